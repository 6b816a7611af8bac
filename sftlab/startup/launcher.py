"""`python recipes/sft.py --config_file LAUNCH.yaml ...` launches itself, when this is imported.

The evaluations in eval/ do so too.

accelerate reads the launch config and starts the processes, as `accelerate launch` does. That
command adds a traceback of its own wherever a training exits with another status than 0. Here the
training's sentence is the last line, and its status is the command's. Under `accelerate launch`
the launcher's report ends with that sentence.

Ctrl-C before the training listens to signals ends the process in one line too.
"""

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

from sftlab.config.launch import exported
from sftlab.exit_messages import short

CONFIG = "config_file"
# flags of `accelerate launch` that may stand beside it
FLAGS = (
    *("num_processes", "num_machines", "machine_rank", "mixed_precision", "gpu_ids"),
    *("main_process_ip", "main_process_port", "rdzv_backend"),
)
# the scripts that launch themselves
LAUNCHED = (
    *("sft.py", "sample_pairs.py", "quality.py", "preferences.py"),
    *("alpaca.py", "mt_bench.py", "harness.py"),
)
_NOISY = ("torch.distributed.run", "torch.distributed.elastic")


def launch_as_asked(script: str, arguments: list[str]) -> None:
    """Start the script under the launch config that its arguments name; return if they name none.

    One process is this one, with the launch config's variables; where accelerate had to be asked
    for them, a new one takes its place, because libraries have looked at the devices. Several are
    started by accelerate, and this process ends as they end.
    """
    rest, flags = take_flags(arguments)
    config = flags.pop(CONFIG, None)
    if config is None or "ACCELERATE_MIXED_PRECISION" in os.environ:
        return
    had_torch = "torch" in sys.modules
    try:
        variables = exported(config, flags)
    except ValueError as error:
        sys.exit(short(f"error: {error}"))
    if variables["WORLD_SIZE"] == "1":
        os.environ |= {k: v for k, v in variables.items() if not k.endswith("WORLD_SIZE")}
        if "torch" in sys.modules and not had_torch:
            os.execv(sys.executable, [sys.executable, script, *rest])
        sys.argv[1:] = rest
        return
    flags.setdefault("mixed_precision", variables["ACCELERATE_MIXED_PRECISION"])
    if "CUDA_VISIBLE_DEVICES" in variables:
        flags.setdefault("gpu_ids", variables["CUDA_VISIBLE_DEVICES"])
    words = [f"--{name}={value}" for name, value in flags.items()]
    sys.exit(_run(["--config_file", config, *words, script, *rest]))


def take_flags(arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    """Returns the script's own arguments, and the launcher's flags by name.

    Raises SystemExit for a flag without a value, or one that is given twice.
    """
    rest, flags, words = [], {}, iter(arguments)
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or name not in (CONFIG, *FLAGS):
            rest.append(word)
            continue
        if name in flags:
            sys.exit(f"error: --{name} is given twice: give it once")
        flags[name] = value if equals else next(words, "")
        if not flags[name]:
            sys.exit(f"error: --{name} needs a value")
    return rest, flags


def _run(words: list[str]) -> int:
    """Launch several processes and wait for them; returns the exit status."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        launch_command(launch_command_parser().parse_args(words))
    except SignalException as stopped:
        return 128 + stopped.sigval
    except ChildFailedError as failed:
        return status_of([failure.exitcode for failure in failed.failures.values()])
    except (ValueError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    return 0


@contextmanager
def reported_to_launcher() -> Iterator[None]:
    """Hand the sentence that the script exits with to torch's launcher, which ends with it.

    The launcher names a file for it in TORCHELASTIC_ERROR_FILE and reads `message` and `timestamp`
    (`ProcessFailure`, torch.distributed.elastic.multiprocessing.errors).
    """
    try:
        yield
    except SystemExit as ended:
        file = os.environ.get("TORCHELASTIC_ERROR_FILE")
        if file and isinstance(ended.code, str):
            said = json.dumps({"message": ended.code, "timestamp": int(time.time())})
            with suppress(OSError):  # the sentence is printed all the same
                Path(file).write_text(said, encoding="utf-8")
        raise


def status_of(codes: list[int]) -> int:
    """Returns one status for those of several ranks: a signal's first, else 1.

    A rank that a signal killed has a negative code, one that stopped for it 128 + its number.
    """
    numbers = [128 - code if code < 0 else code for code in codes]
    return next((code for code in numbers if code > 128), 1)


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    if os.environ.get("RANK", "0") == "0":
        os.write(2, b"\nstopped by Ctrl-C before the training: nothing was written\n")
    os._exit(128 + number)


if (_SCRIPT := Path(sys.argv[0]).name) in LAUNCHED:
    if _SCRIPT == "sft.py" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop)
    launch_as_asked(sys.argv[0], sys.argv[1:])
