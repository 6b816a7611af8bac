"""Look for what would make a training fail on this machine, and say what to do about it.

python recipes/doctor.py
python recipes/doctor.py --config recipes/demo/attn_r16.yaml --config_file accelerate_configs/cpu.yaml [--field value]

One line a check: fine, warning or fails. With a recipe, its launch is rehearsed too: two steps of
recipes/sft.py as it would be launched, into a folder that is thrown away. Ends with status 1 where
something fails.
"""

import sftlab.startup.filter_warnings  # noqa: F401, I001  (before the libraries that it quiets)

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

try:
    from sftlab.planning.machine_checks import FAILS, FINE, Finding, examine
except ModuleNotFoundError as error:
    sys.exit(
        f"fails    packages       missing: {error.name}\n{'':<24}-> `make setup`, or pip install "
        "-r requirements.txt"
    )

ROOT = Path(__file__).parent.parent
# Seconds for two steps, with the model's loading and compilation.
PATIENCE = 1800


def main(argv: list[str]) -> None:
    """Examine, rehearse, say."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--config", help="recipe to rehearse")
    parser.add_argument(
        "--config_file", default="accelerate_configs/single.yaml", help="launch config"
    )
    parser.add_argument("--num_processes", type=int)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where runs are written")
    arguments, fields = parser.parse_known_args(argv)
    if fields and not arguments.config:
        sys.exit(
            f"error: {fields[0]} is a recipe's field, and no recipe was given: pass --config "
            "RECIPE.yaml"
        )
    failed = []
    for finding in examine(arguments.runs):
        failed += say(finding)
    if arguments.config:
        failed += say(rehearse(arguments, fields))
    print(
        f"\n{len(failed)} of the checks failed: {', '.join(failed)}"
        if failed
        else "\nnothing stands in the way"
    )
    sys.exit(1 if failed else 0)


def say(finding: Finding) -> list[str]:
    """Print a line (and what to do); the check's name where it fails."""
    print(f"{finding.level:<8} {finding.what:<14} {finding.seen}", flush=True)
    if finding.todo and finding.level != FINE:
        print(f"{'':<24}-> {finding.todo}", flush=True)
    return [finding.what] if finding.level == FAILS else []


def rehearse(arguments: argparse.Namespace, fields: list[str]) -> Finding:
    """Two steps of the recipe under the launch config."""
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.accelerate_cli",
        "launch",
        "--config_file",
        arguments.config_file,
    ]
    launch += ["--num_processes", str(arguments.num_processes)] if arguments.num_processes else []
    with tempfile.TemporaryDirectory() as folder:
        recipe = [
            *fields,
            "--max_steps=2",
            f"--output_dir={folder}/run",
            "--eval_strategy=no",
            "--save_strategy=no",
        ]
        command = [*launch, str(ROOT / "recipes" / "sft.py"), "--config", arguments.config, *recipe]
        # a session of its own, so that the launcher's processes end with it
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        done = subprocess.Popen(command, start_new_session=True, **pipes)
        try:
            log, _ = done.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            todo = "launch it by hand and watch where it waits"
            return Finding("two steps", FAILS, f"not done after {PATIENCE} s", todo)
        finally:
            if done.poll() is None:
                os.killpg(done.pid, signal.SIGKILL)
        if done.returncode == 0:
            memory = next((line for line in log.splitlines() if "peak memory" in line), "").split()[
                -1:
            ]
            return Finding("two steps", FINE, f"trained; peak memory {' '.join(memory)} GB")
    # the launcher's own error comes after the one that it is about
    said = [
        line
        for line in log.splitlines()
        if re.match(r"(\[rank\d+\]: )?(error|[\w.]+Error): ", line)
    ]
    seen = said[0].strip() if said else f"ended with status {done.returncode}"
    if "out of memory" in seen.lower():
        return Finding(
            "two steps", FAILS, seen[:200], "recipes/plan.py says what would make it fit"
        )
    return Finding(
        "two steps",
        FAILS,
        seen[:300],
        "the message says what to change; launch it by hand to see the rest",
    )


if __name__ == "__main__":
    main(sys.argv[1:])
