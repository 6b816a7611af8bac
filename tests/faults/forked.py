"""Trainings in processes forked from one that has imported everything: a start takes a second
instead of ten.

What runs is recipes/sft.py's `main` with the arguments and the environment that `accelerate launch`
would give it, in a process of its own with its own process group; it dies by a real SIGKILL. What
is not tested so is the launcher, and the imports.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).parent.parent))

from own_progress_lock import take_own_progress_lock


@dataclass
class Moment:
    """When a process kills itself: `after_s` seconds after the `count`-th change of the run
    directory that has `where`
    in its name (an audit event and a path), or after its start where `count` is 0.

    With a `count` of -1 it lives, and writes every change and its time to a file beside the run
    directory.
    """

    where: str = ""
    count: int = 0
    after_s: float = 0.0


class Training:
    """One start of recipes/sft.py on `processes` processes.

    Rank `victim` dies of SIGKILL at `moment`, if at all.
    """

    def __init__(
        self,
        sft: ModuleType,
        argv: Sequence[str],
        log: Path,
        processes: int = 1,
        moment: Moment | None = None,
        victim: int = 0,
        prepare: Callable[[], None] | None = None,
        environment: Mapping[str, str] | None = None,
        fresh: bool = False,
    ) -> None:
        """`environment` is what a launcher exports; `fresh` starts import their libraries anew."""
        self.log, self.codes = log, {}
        port = _free_port()
        sys.stdout.flush()
        sys.stderr.flush()
        self._ranks = {}
        for rank in range(processes):
            its = moment if rank == victim else None
            said = (list(argv), str(log), rank, processes, port, its, dict(environment or {}))
            self._ranks[_start_anew(said) if fresh else _fork(sft, said, prepare)] = rank

    def wait(self, seconds: float = 240.0, together: bool = True) -> bool:
        """Wait for the end of all.

        `together`: when one fails the others are killed, as a launcher would.

        Whether all went well. Raises RuntimeError where one hangs.
        """
        deadline = time.monotonic() + seconds
        while self._ranks and time.monotonic() < deadline:
            for pid in list(self._ranks):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.codes[self._ranks.pop(pid)] = os.waitstatus_to_exitcode(status)
            if together and any(self.codes.values()):
                self.kill()
            time.sleep(0.005)
        if self._ranks:
            self.kill()
            raise RuntimeError(f"hung for {seconds:.0f} s: {self.log}")
        return not any(self.codes.values())

    def kill(self, number: int = signal.SIGKILL) -> None:
        """End what is still there."""
        for pid in list(self._ranks):
            os.kill(pid, number)
            if number == signal.SIGKILL:
                os.waitpid(pid, 0)
                self.codes[self._ranks.pop(pid)] = -signal.SIGKILL

    def signal(self, number: int, rank: int) -> None:
        """Send a signal to one rank alone."""
        for pid, its in self._ranks.items():
            if its == rank:
                os.kill(pid, number)


# Python would wait for a process itself once nothing refers to it.
_started: list[subprocess.Popen] = []


def _fork(sft: ModuleType, said: tuple, prepare: Callable[[], None] | None) -> int:
    if (pid := os.fork()) == 0:
        _become(sft, *said, prepare)
    return pid


def _start_anew(said: tuple) -> int:
    *plain, moment, environment = said
    words = json.dumps([*plain, moment and asdict(moment), environment])
    _started.append(subprocess.Popen([sys.executable, __file__, words]))
    return _started[-1].pid


def _become(
    sft: ModuleType,
    argv: Sequence[str],
    log: str,
    rank: int,
    processes: int,
    port: int,
    moment: Moment | None,
    environment: Mapping[str, str],
    prepare: Callable[[], None] | None,
) -> None:
    code = 1
    try:
        os.setpgid(0, 0)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ |= environment
        if processes > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": str(port)}
            os.environ |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        take_own_progress_lock()
        if prepare:
            prepare()
        if moment:
            _die_at(moment, _output_dir(argv))
        sft.main(list(argv))
        code = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _die_at(moment: Moment, folder: str) -> None:
    """Arrange for the death of this process."""
    if moment.count == 0:
        return _die_in(moment.after_s)
    left, began = moment.count, time.monotonic()
    record = open(f"{folder}.changes", "w") if moment.count < 0 else None  # noqa: SIM115

    def heard(event: str, arguments: tuple) -> None:
        nonlocal left
        if left and event in _CHANGES and _CHANGES[event](arguments):
            path = str(arguments[1] if event == "os.rename" else arguments[0])
            if not path.startswith(f"{folder}/"):
                return
            if record:
                record.write(f"{time.monotonic() - began:.4f} {event} {path}\n")
                record.flush()
            elif moment.where in f"{event} {path}":
                left -= 1
                if left == 0:
                    _die_in(moment.after_s)

    sys.addaudithook(heard)


def _die_in(seconds: float) -> None:
    if seconds <= 0:
        os.kill(os.getpid(), signal.SIGKILL)
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
    timer.daemon = True
    timer.start()


def _writes(arguments: tuple) -> bool:
    return bool(arguments[2] and arguments[2] & (os.O_WRONLY | os.O_RDWR))


# Audit events that change a folder; Python raises them before the change.
_CHANGES = {
    "open": _writes,
    "os.rename": bool,
    "os.remove": bool,
    "os.mkdir": bool,
    "os.rmdir": bool,
    "shutil.rmtree": bool,
}


def _output_dir(argv: Sequence[str]) -> str:
    return next(
        word.partition("=")[2] for word in reversed(argv) if word.startswith("--output_dir=")
    )


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


if __name__ == "__main__":
    *_plain, _moment, _environment = json.loads(sys.argv[1])
    os.environ |= _environment
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from conftest import load_script

    _moment = Moment(**_moment) if _moment else None
    _become(load_script("recipes/sft.py"), *_plain, _moment, _environment, None)
