"""Which trainings does a study run, which of them are done, and how did they end?"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sftlab.comparison.run_results import outcome
from sftlab.config.launch_file import read_launch_config
from sftlab.files import write_json
from sftlab.paths import ROOT
from sftlab.runs.clearing import clear
from sftlab.runs.run_directory import read_run
from sftlab.schema import read_object
from sftlab.tables import preview
from sftlab.yaml_files import read_yaml

LAUNCH_CONFIG_HINT = "accelerate_configs/ has the launch configs"


class Task(NamedTuple):
    """One training of one cell; `name` is for people, `folder` is its run directory."""

    name: str
    cell: str
    repeat: int
    folder: Path
    launch: str
    processes: int
    flags: Mapping[str, Any]
    fields: Mapping[str, Any]
    recipe: Path

    def command(self) -> list[str]:
        """Returns `accelerate launch` of recipes/sft.py, from the repository's root."""
        flags = {"num_processes": self.processes, **self.flags}
        command = ["accelerate", "launch", "--config_file", self.launch]
        command += [item for key, value in flags.items() for item in (f"--{key}", as_word(value))]
        command += ["recipes/sft.py", "--config", str(self.recipe)]
        command += ["--output_dir", str(self.folder)]
        for key, value in self.fields.items():
            if isinstance(value, list):
                command += [f"--{key}", *map(as_word, value)]
            else:
                command.append(f"--{key}={as_word(value)}")
        return [*command, "--overwrite=true"]

    def recipe_fields(self) -> dict[str, Any]:
        """Returns the fields of the recipe file."""
        return read_yaml(self.recipe, folder=ROOT)

    def launch_config(self) -> dict[str, Any]:
        """Returns the fields of the launch config file."""
        return read_launch_config(self.launch, ROOT)

    def has_run(self) -> bool:
        """Returns whether its folder holds a run."""
        return (self.folder / "run.json").is_file()

    def logged_error(self) -> str:
        """Returns the first error in the log; where there is none, the log's path."""
        log = self.folder / "log"
        text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
        errors = (x for x in text.splitlines() if x.startswith("error: ") or ": error: " in x)
        return next(errors, f"see {log}")


def as_word(value: Any) -> str:
    """Returns a value as a word of a command line."""
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value) if isinstance(value, dict) else str(value)


def gpus_needed(task: Task) -> int:
    """Returns the number of GPUs that the launch config takes; 0 on a CPU."""
    config = task.launch_config()
    on_cpu = config.get("use_cpu") or str(config.get("gpu_ids", "")).startswith("-1")
    return 0 if on_cpu else task.processes


def is_done(task: Task) -> bool:
    """Returns whether this very command has a result that another try would only repeat.

    Success, divergence and memory that ran out are results. Raises ValueError where the folder
    holds the run of another command.
    """
    if not (task.folder / "task.json").is_file():
        if task.has_run():
            raise ValueError(
                f"{task.folder} holds a run that is not of this study: move it, or pass another "
                "--runs"
            )
        return False
    noted = read_object(task.folder / "task.json")
    now = task_settings(task)
    if changed := [name for name, value in now.items() if noted.get(name, value) != value]:
        raise ValueError(
            f"{task.folder} holds {task.name} with other settings ({', '.join(changed)}): remove "
            "it to train it again, or pass another --runs"
        )
    if not task.has_run():
        return False
    run = read_run(task.folder)
    status = outcome(run)[0]
    if status == "out of memory":
        # beside other trainings this says nothing about the cell
        return not noted.get("beside")
    return run["status"] == "succeeded" or status == "diverged"


def task_settings(task: Task) -> dict[str, Any]:
    """Returns the command and the content of the files that it names, for task.json."""
    recipe = {k: v for k, v in task.recipe_fields().items() if k not in task.fields}
    return {"command": task.command(), "recipe": recipe, "launch": task.launch_config()}


def begin(task: Task, beside: int = 0) -> None:
    """Write task.json, by which a later start knows what the folder holds.

    `beside` is the number of other trainings that share the GPUs. A run that ran out of memory is
    removed: should this start be interrupted, that run would pass for its result.
    """
    task.folder.mkdir(parents=True, exist_ok=True)
    if ran_out_of_memory(task):
        clear(task.folder)
    write_json(task.folder / "task.json", task_settings(task) | {"beside": beside})


def python_command(task: Task) -> list[str]:
    """Returns the task's command for this Python.

    It bypasses accelerate's command line tool, whose import takes a second.
    """
    return [sys.executable, "-m", "accelerate.commands.launch", *task.command()[2:]]


def ran_out_of_memory(task: Task) -> bool:
    """Returns whether the task's run ended for lack of memory."""
    return task.has_run() and outcome(read_run(task.folder))[0] == "out of memory"


def not_begun(tasks: Sequence[Task]) -> dict[str, str]:
    """Returns why a task has not begun, by the names of those that have not.

    Raises ValueError where a folder holds the run of another command.
    """
    for task in tasks:
        is_done(task)
    new = (task for task in tasks if not (task.folder / "task.json").is_file())
    needed = {task.name: gpus_needed(task) for task in new}
    return {
        name: f"it needs {gpus} GPUs" if gpus > 1 else "not yet" for name, gpus in needed.items()
    }


def failures(tasks: Sequence[Task], not_run: Mapping[str, str]) -> list[str]:
    """Returns the names of tasks that another try may complete.

    Tasks that were not run count only where no task was.
    """
    failed = [task.name for task in tasks if task.name not in not_run and not is_done(task)]
    return failed or (list(not_run) if len(not_run) == len(tasks) else [])


def result(task: Task) -> str:
    """Returns how a task ended, in a few words."""
    if not task.has_run():
        return f"failed, {task.logged_error()}"
    run = read_run(task.folder)
    status, reason = outcome(run)
    if speed := (run.get("measured") or {}).get("tokens_per_s"):
        return f"{status}, {speed:,.0f} real tokens/s"
    return f"{status} ({preview(reason, 200)})" if reason else status
