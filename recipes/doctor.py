"""Will a training fail on this machine? Check what it needs, and say what to do about each problem.

python recipes/doctor.py
python recipes/doctor.py --config recipes/demo/attn_r16.yaml
    --config_file accelerate_configs/cpu.yaml [--field value]

Prints a line a check: fine, warning or fails. With a recipe it also rehearses the launch: two steps
of recipes/sft.py, into a folder that is deleted. Exits with status 1 where a check fails.
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

from sftlab.exit_messages import mistakes_in_one_line, short
from sftlab.config.launch_file import read_launch_config
from sftlab.paths import ROOT
from sftlab.script_options import Options
from sftlab.yaml_files import read_yaml

try:
    from sftlab.planning.machine_checks import FAILS, FINE, WARNING, Finding, examine
except ModuleNotFoundError as error:
    sys.exit(
        f"fails    packages       missing: {error.name}\n{'':<24}-> `make setup`, or pip install "
        "-r requirements.txt"
    )

# Seconds for two steps, with the model's loading and compilation.
PATIENCE = 1800
REHEARSAL = "two steps"


def main(argv: list[str]) -> None:
    """Check the machine, rehearse the recipe, say what fails."""
    parser = Options(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--config", help="recipe to rehearse")
    add("--config_file", default="accelerate_configs/single.yaml", help="launch config")
    add("--num_processes", type=int)
    add("--runs", type=Path, default=Path("runs"), help="where runs are written")
    arguments, fields = parser.parse_known_args(argv)
    if fields and not fields[0].startswith("--"):
        sys.exit(f"error: unexpected word {fields[0]!r}: give options such as --config RECIPE.yaml")
    if fields and not arguments.config:
        sys.exit(
            f"error: {fields[0]} is a recipe's field, and no recipe was given: pass --config "
            "RECIPE.yaml"
        )
    if arguments.config:
        try:
            read_yaml(arguments.config)
            read_launch_config(arguments.config_file)
        except ValueError as error:
            sys.exit(short(f"error: {error}"))
    failed = []
    for finding in examine(arguments.runs):
        failed += say(finding)
    for finding in rehearse(arguments, fields) if arguments.config else []:
        failed += say(finding)
    if failed:
        print(f"\n{len(failed)} of the checks failed: {', '.join(failed)}")
        sys.exit(1)
    print("\nready: nothing found that would make a training fail")
    sys.exit(0)


def say(finding: Finding) -> list[str]:
    """Print a finding and what to do; returns the check's name where it fails."""
    print(f"{finding.level:<8} {finding.what:<14} {finding.seen}", flush=True)
    if finding.todo and finding.level != FINE:
        print(f"{'':<24}-> {finding.todo}", flush=True)
    return [finding.what] if finding.level == FAILS else []


def rehearse(arguments: argparse.Namespace, fields: list[str]) -> list[Finding]:
    """Train two steps of the recipe under the launch config; what they say of it is a finding."""
    with tempfile.TemporaryDirectory() as folder:
        command = rehearsal_command(arguments, fields, Path(folder))
        # a session of its own, so that the launcher's processes can be ended with it
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        process = subprocess.Popen(command, start_new_session=True, **pipes)
        try:
            log, _ = process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            todo = "launch it by hand and watch where it waits"
            return [Finding(REHEARSAL, FAILS, f"not done after {PATIENCE} s", todo)]
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    said = (re.match(r"(note|warning): (.+)", line) for line in log.splitlines())
    found = [Finding("recipe", WARNING, one[2]) for one in said if one]
    if process.returncode:
        return [*found, explain_failure(log, process.returncode)]
    line = next((line for line in log.splitlines() if "peak memory" in line), "")
    trained = f"trained; peak memory {' '.join(line.split()[-1:])} GB"
    return [*found, Finding(REHEARSAL, FINE, trained)]


def rehearsal_command(arguments: argparse.Namespace, fields: list[str], folder: Path) -> list[str]:
    """Returns the command that trains two steps and writes into `folder`."""
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    launcher += ["--config_file", arguments.config_file]
    if arguments.num_processes:
        launcher += ["--num_processes", str(arguments.num_processes)]
    recipe = [str(ROOT / "recipes" / "sft.py"), "--config", arguments.config, *fields]
    short = ["--max_steps=2", "--eval_strategy=no", "--save_strategy=no"]
    return [*launcher, *recipe, *short, f"--output_dir={folder}/run"]


def explain_failure(log: str, status: int) -> Finding:
    """Returns the first error of a log, and what to do about it."""
    # the launcher's own error comes after the one that caused it
    errors = (
        line.strip()
        for line in log.splitlines()
        if re.match(r"(\[rank\d+\]: )?(error|[\w.]+Error): ", line)
    )
    seen = next(errors, f"ended with status {status}")
    todo = "the message says what to change; launch it by hand to see the rest"
    if "out of memory" in seen.lower():
        todo = "recipes/plan.py says what would make it fit"
    return Finding(REHEARSAL, FAILS, seen[:300], todo)


if __name__ == "__main__":
    with mistakes_in_one_line():
        main(sys.argv[1:])
