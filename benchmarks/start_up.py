"""Seconds from the command of a training to its first step at full speed, by part.

python benchmarks/start_up.py [--shape llama3.2-1b] [--repeats 3] [--out results/start_up]
python benchmarks/start_up.py --launch cpu --shape tiny --rows 4        # on a CPU
python benchmarks/start_up.py --fused_lora false                        # any field of the recipe

The command is typed as a user would: `accelerate launch --config_file ... recipes/sft.py --config
recipes/llama3.2-1b/attn_r16.yaml`, on a random-initialised model and random rows, and
`python recipes/sft.py --config_file ...` beside it, in turn. Each starts twice in a repeat: cold,
with empty folders for what Inductor, Triton, CUDA and datasets keep, and warm, with what the cold
start left there. Files that were read before are in the machine's memory in both.

`launcher` is the time until the trainer's process starts, then come the phases of
`measured.start_s` in run.json. `first_step` ends with step 1. Every step is logged,
which waits for the GPU, and steps end when they are logged. The first step at full speed takes at
most 1.3 times the median of steps 11 to 20. `total` is from the command to the end of that step.
Writes start_up.csv after every start: a row a part, its median and range.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sftlab.config.launch_command import as_arguments, launch_command
from sftlab.exit_messages import mistakes_in_one_line
from sftlab.models.random_models import make_random_files, random_files
from sftlab.paths import ROOT
from sftlab.runs.environment import provenance
from sftlab.runs.run_directory import read_run
from sftlab.script_options import Options
from sftlab.startup.phases import seconds_since_start
from sftlab.tables import aligned, write_csv

STEPS, SHOWN, FULL_SPEED = 20, 10, 1.3
LAUNCHER, NUMBER, TOTAL = "launcher", "first_full_speed_step", "total"
STEADY = f"median of steps {SHOWN + 1} to {STEPS}"
CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH", "HF_DATASETS_CACHE")
COMMANDS, STATES = ("accelerate", "python"), ("cold", "warm")
SCRIPT, BATCH = "recipes/sft.py", ("global_batch_size", "per_device_train_batch_size")
Found = dict[tuple[str, str], list[dict[str, float]]]


def main() -> None:
    """Make the model and its rows, start the training again and again, and write the table."""
    arguments, fields = parse_arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    make_random_files(arguments.shape, arguments.longest)
    about = {"shape": arguments.shape, "rows": arguments.rows} | provenance()
    found: Found = {(command, state): [] for command in arguments.commands for state in STATES}
    for _ in range(arguments.repeats):
        for command in arguments.commands:
            with tempfile.TemporaryDirectory() as folder:
                for state in STATES:
                    run = Path(folder) / state
                    words = typed(command, arguments, run, fields)
                    parts = parts_of(start(words, run, Path(folder)))
                    found[command, state].append(parts)
                    print(f"{command}, {state}: {parts[TOTAL]:.2f} s", flush=True)
                    write_csv(arguments.out / "start_up.csv", rows_of(found, about))
    print(table(found))


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    """Returns the command line, and the fields of the recipe in it."""
    parser = Options(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="llama3.2-1b")
    parser.add_argument("--launch", default="single", help="a file of accelerate_configs/")
    parser.add_argument("--config", default="recipes/llama3.2-1b/attn_r16.yaml")
    parser.add_argument("--rows", type=int, default=64, help="rows of a step")
    parser.add_argument("--longest", type=int, default=512, help="tokens of the longest row")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "start_up")
    return parser.parse_known_args()


def typed(
    command: str, arguments: argparse.Namespace, run: Path, fields: Sequence[str]
) -> list[str]:
    """Returns the words of the training's command."""
    base, rows = random_files(arguments.shape, arguments.longest)
    own = as_arguments({"model_name_or_path": base, "dataset_name": rows, "output_dir": run})
    own += as_arguments({"dataset_fraction": 1, "eval_strategy": "no", "save_strategy": "no"})
    own += as_arguments(dict.fromkeys(BATCH, arguments.rows) | {"max_steps": STEPS})
    words = ["--config", arguments.config, *own, "--logging_steps=1", *fields]
    if command == "accelerate":
        return launch_command(arguments.launch, SCRIPT, words)
    launch = f"accelerate_configs/{arguments.launch}.yaml"
    return [sys.executable, SCRIPT, "--config_file", launch, *words]


def start(words: Sequence[str], run: Path, caches: Path) -> tuple[float, Path, float]:
    """Run the command to its end, with its caches in a folder.

    Returns when it was typed (Unix time), the run directory, and the seconds until the trainer's
    process started. Raises ValueError where the training fails.
    """
    log, own = run.with_suffix(".log"), {name: str(caches / name.lower()) for name in CACHES}
    with log.open("wb") as output:
        moment, began = time.time(), time.monotonic()
        process = subprocess.Popen(
            words, cwd=ROOT, env=os.environ | own, stdout=output, stderr=output
        )
        try:
            launcher = None
            while process.poll() is None:
                if launcher is None and (run / "run.json").is_file():
                    trainer = read_run(run)["host_pid"][1]
                    passed = time.monotonic() - began
                    launcher = max(0.0, passed - seconds_since_start(trainer))
                time.sleep(0.02)
        finally:
            process.kill()
            process.wait()
    if process.returncode or launcher is None:
        said = re.split(r"[\r\n]+", log.read_text("utf-8", "replace").strip())
        raise ValueError(f"the training ended with status {process.returncode}: {said[-1]}")
    return moment, run, launcher


def parts_of(started: tuple[float, Path, float]) -> dict[str, float]:
    """Returns the seconds of each part of a start, by name, and its first step at full speed."""
    moment, run, launcher = started
    ends = logged(run)
    seconds = {step: ends[step] - ends[step - 1] for step in range(2, STEPS + 1)}
    steady = statistics.median(seconds[step] for step in range(SHOWN + 1, STEPS + 1))
    full = next(step for step, taken in seconds.items() if taken <= FULL_SPEED * steady)
    phases = read_run(run)["measured"]["start_s"]
    shown = {f"step {step}": seconds[step] for step in range(2, SHOWN + 1)}
    parts = {LAUNCHER: launcher} | phases | shown
    return parts | {STEADY: steady, NUMBER: full, TOTAL: ends[full] - moment}


def logged(run: Path) -> dict[int, float]:
    """Returns when each step was logged (Unix time), by its number."""
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event

    ends: dict[int, float] = {}
    for file in sorted((run / "tensorboard").rglob("events.out.tfevents.*")):
        for record in RawEventFileLoader(str(file)).Load():
            event = Event.FromString(record)
            if any(value.tag == "train/loss" for value in event.summary.value):
                ends[event.step] = event.wall_time
    return ends


def rows_of(found: Found, about: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns a row for each part of each kind of start: its median and range over the repeats."""
    rows = []
    for (command, state), starts in found.items():
        for part in starts[0] if starts else ():
            values = sorted(one[part] for one in starts)
            row = {"started_by": command, "caches": state, "part": part}
            row["seconds" if part != NUMBER else "step"] = round(statistics.median(values), 3)
            row |= {"lowest": round(values[0], 3), "highest": round(values[-1], 3)}
            rows.append(row | {"repeats": len(values)} | about)
    return rows


def table(found: Found) -> str:
    """Returns the medians as a readable table, a column for each kind of start."""
    kinds = [kind for kind, starts in found.items() if starts]
    lines = [["seconds", *(", ".join(kind) for kind in kinds)]]
    for part in found[kinds[0]][0]:
        medians = (statistics.median(one[part] for one in found[kind]) for kind in kinds)
        lines.append([part, *(f"{m:.0f}" if part == NUMBER else f"{m:.2f}" for m in medians)])
    return aligned(lines)


if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
