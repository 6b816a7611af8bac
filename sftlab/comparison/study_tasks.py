"""The trainings of a study: their commands, which of them are done, and how they ended."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from sftlab.comparison.run_results import outcome
from sftlab.files import write_json
from sftlab.paths import ROOT
from sftlab.runs.run_directory import read_run
from sftlab.tables import preview


class Task(NamedTuple):
    """One training of one cell; `name` is for people, `folder` where its run is."""

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
        """`accelerate launch` of recipes/sft.py, from the project's folder."""
        flags = {"num_processes": self.processes, **self.flags}
        command = ["accelerate", "launch", "--config_file", self.launch]
        command += [item for key, value in flags.items() for item in (f"--{key}", as_word(value))]
        command += [
            "recipes/sft.py",
            "--config",
            str(self.recipe),
            "--output_dir",
            str(self.folder),
        ]
        for key, value in self.fields.items():
            command += (
                [f"--{key}", *map(as_word, value)]
                if isinstance(value, list)
                else [f"--{key}={as_word(value)}"]
            )
        return [*command, "--overwrite=true"]

    def last_words(self) -> str:
        """What the log says where there is no run.json."""
        log = self.folder / "log"
        lines = (
            log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
        )
        said = [line for line in lines if line.startswith("error: ") or ": error: " in line]
        return next(iter(said), f"see {log}")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A recipe, launch config or study as YAML has it; ValueError where there is none."""
    if not (ROOT / path).is_file():
        raise ValueError(f"there is no file {path}")
    try:
        content = yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no fields: expected lines of name: value")
    return content


def as_word(value: Any) -> str:
    """A value as a command line has it."""
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value) if isinstance(value, dict) else str(value)


def gpus_needed(task: Task) -> int:
    """GPUs that the launch config takes of this machine; 0 for a CPU."""
    config = read_yaml(task.launch)
    return (
        0
        if config.get("use_cpu") or str(config.get("gpu_ids", "")).startswith("-1")
        else task.processes
    )


def is_done(task: Task) -> bool:
    """Whether its run ended, by this very command, and another try would end alike (memory ran
    out).

    ValueError where the folder holds the run of another command.
    """
    if not (task.folder / "task.json").is_file():
        if (task.folder / "run.json").is_file():
            raise ValueError(
                f"{task.folder} holds a run that is not of this study: move it, or pass another "
                "--runs"
            )
        return False
    noted = json.loads((task.folder / "task.json").read_text(encoding="utf-8"))
    if changed := [
        name for name, value in settings(task).items() if noted.get(name, value) != value
    ]:
        raise ValueError(
            f"{task.folder} holds {task.name} with other settings ({', '.join(changed)}): remove "
            "it to train it again, "
            "or pass another --runs"
        )
    if not (task.folder / "run.json").is_file():
        return False
    run = read_run(task.folder)
    ended = outcome(run)[0]
    if ended == "out of memory":
        # beside others it says nothing of the cell
        return not noted.get("beside")
    return run["status"] == "succeeded" or ended == "diverged"


def settings(task: Task) -> dict[str, Any]:
    """The command, and what stands in the files that it names."""
    recipe = {
        name: value for name, value in read_yaml(task.recipe).items() if name not in task.fields
    }
    return {"command": task.command(), "recipe": recipe, "launch": read_yaml(task.launch)}


def begin(task: Task, beside: int = 0) -> None:
    """Note the settings, so that a later start knows what the folder holds, and how many trainings
    share the GPUs.
    """
    task.folder.mkdir(parents=True, exist_ok=True)
    write_json(task.folder / "task.json", settings(task) | {"beside": beside})


def python_command(task: Task) -> list[str]:
    """The task's command under this interpreter, without accelerate's other commands, whose import
    takes a second.
    """
    return [sys.executable, "-m", "accelerate.commands.launch", *task.command()[2:]]


def ran_out(task: Task) -> bool:
    """Whether its memory did not suffice."""
    return (task.folder / "run.json").is_file() and outcome(read_run(task.folder))[
        0
    ] == "out of memory"


def not_begun(tasks: Sequence[Task]) -> dict[str, str]:
    """Tasks that nothing is known of, and why.

    ValueError where a folder holds the run of another command.
    """
    for task in tasks:
        is_done(task)
    needed = {
        task.name: gpus_needed(task) for task in tasks if not (task.folder / "task.json").is_file()
    }
    return {
        name: f"it needs {gpus} GPUs" if gpus > 1 else "not yet" for name, gpus in needed.items()
    }


def failures(tasks: Sequence[Task], not_run: Mapping[str, str]) -> list[str]:
    """Names of those that another try may mend.

    Of all that were not run where none has a result.
    """
    failed = [task.name for task in tasks if task.name not in not_run and not is_done(task)]
    return failed or (list(not_run) if len(not_run) == len(tasks) else [])


def result(task: Task) -> str:
    """How a task ended, in a few words."""
    if not (task.folder / "run.json").is_file():
        return f"failed, {task.last_words()}"
    run = read_run(task.folder)
    status, reason = outcome(run)
    speed = (run.get("measured") or {}).get("tokens_per_s")
    return f"{status}{f', {speed:,.0f} real tokens/s' if speed else f' ({preview(reason, 200)})' if reason else ''}"
