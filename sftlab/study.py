"""A study: cells equal but for an axis, each trained several times: its file, its tasks, and which of them are done.

A study file names the recipe, the launch config, the axis and the cells; docs are in recipes/study.py.
"""

import json
import re
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from sftlab import confound
from sftlab.evidence import outcome
from sftlab.files import write_json
from sftlab.launch import PRECISIONS
from sftlab.run import read_run

ROOT = Path(__file__).parent.parent
LAUNCH_KEYS = ("launch", "processes", "flags")
# What a command line says of a study itself; everything else is a recipe field.
GIVEN = ("recipe", "launch", "processes", "random")
STUDY_KEYS = {
    "recipe", "axis", "seeds", "repeats", "quality", "fields", "cells", "grid", "reference", "published", *LAUNCH_KEYS
}  # fmt: skip


class Task(NamedTuple):
    """One training of one cell."""

    cell: str
    repeat: int
    folder: Path
    launch: str
    processes: int
    flags: Mapping[str, Any]
    fields: Mapping[str, Any]
    recipe: Path

    @property
    def name(self) -> str:
        """As a person reads it."""
        return f"{self.cell}, seed {self.fields['seed']}" if "seed" in self.fields else f"{self.cell}, {self.repeat}"

    def command(self) -> list[str]:
        """`accelerate launch` of recipes/sft.py, from the project's folder."""
        flags = {"num_processes": self.processes, **self.flags}
        command = ["accelerate", "launch", "--config_file", self.launch]
        command += [item for key, value in flags.items() for item in (f"--{key}", _as_word(value))]
        command += ["recipes/sft.py", "--config", str(self.recipe), "--output_dir", str(self.folder)]
        for key, value in self.fields.items():
            command += (
                [f"--{key}", *map(_as_word, value)] if isinstance(value, list) else [f"--{key}={_as_word(value)}"]
            )
        return [*command, "--overwrite=true"]

    def last_words(self) -> str:
        """What the log says where there is no run.json."""
        log = self.folder / "log"
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
        said = [line for line in lines if line.startswith("error: ") or ": error: " in line]
        return next(iter(said), f"see {log}")


@dataclass
class Study:
    """What a study file says, overridden by the command line."""

    name: str
    axis: list[str]
    tasks: list[Task]
    reference: str
    quality: bool = False
    published: list[dict[str, Any]] = field(default_factory=list)
    grid: dict[str, dict[str, Any]] = field(default_factory=dict)
    random: tuple[str, int] | None = None  # the shape of a random-initialised model, and the longest of its rows

    @property
    def cells(self) -> list[str]:
        """Names in the file's order."""
        return list(dict.fromkeys(task.cell for task in self.tasks))

    @property
    def axes(self) -> list[str]:
        """The axis, and the seed where cells are repeated with several."""
        seeds = {task.fields.get("seed") for task in self.tasks}
        return [*self.axis, "seed"] if len(seeds) > 1 and "seed" not in self.axis else self.axis


def load(path: Path, runs: Path, given: Mapping[str, Any]) -> Study:
    """Read a study file; `given` beats it (recipe, launch, processes) and, for every other name, is a recipe field.

    `given["random"]` names a shape of sftlab/shapes.py: model and rows are random, as throughput and memory allow.

    Tasks are in the order in which they run: every cell once, then every cell again. ValueError says what is wrong.
    """
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not content.get("axis") or not (content.get("cells") or content.get("grid")):
        raise ValueError(f"{path} is no study: it needs `axis`, a list of fields, and `cells`, fields by name")
    if unknown := sorted(content.keys() - STUDY_KEYS):
        raise ValueError(f"{path}: {', '.join(unknown)} is nothing that a study knows: {', '.join(sorted(STUDY_KEYS))}")
    cells = content.get("cells") or _cells(content["grid"])
    fields = content.get("fields", {}) | {k: v for k, v in given.items() if k not in (*GIVEN, "flags") and v}
    base = {key: given.get(key) or content.get(key) for key in LAUNCH_KEYS}
    recipe, random = Path(given.get("recipe") or content["recipe"]), None
    if given.get("random"):
        from sftlab.shapes import random_files  # it takes transformers with it

        random = given["random"], int(fields.get("max_length") or _read(recipe)["max_length"])
        model, rows = (str(path.relative_to(ROOT)) for path in random_files(*random))
        fields = {"model_name_or_path": model, "dataset_name": rows, "dataset_fraction": 1.0} | fields
        # of random weights nobody needs what was trained, nor how good it is
        fields = {"save_adapter": False, "split_fractions": [1.0, 0.0, 0.0]} | fields
    seeds = content.get("seeds") or [None] * content.get("repeats", 1)
    tasks = []
    for repeat, seed in enumerate(seeds, start=1):
        for cell, settings in cells.items():
            settings = settings or {}
            own = fields | {k: v for k, v in settings.items() if k not in LAUNCH_KEYS}
            own |= {} if seed is None else {"seed": seed}
            launch = base | {k: v for k, v in settings.items() if k in LAUNCH_KEYS}
            config = _launch_config(launch["launch"] or "single")
            processes = launch["processes"] or _read(config)["num_processes"]
            folder = runs / re.sub(r"[^\w.+-]+", "_", f"{cell}-{repeat if seed is None else seed}")
            tasks.append(Task(cell, repeat, folder, config, processes, launch["flags"] or {}, own, recipe))
    reference = content.get("reference", tasks[0].cell)
    if reference not in cells:
        raise ValueError(f"{path}: the reference {reference} is none of the cells")
    if unknown := [one["cell"] for one in content.get("published", []) if one["cell"] not in cells]:
        raise ValueError(f"{path}: published figures of {', '.join(unknown)}, which is none of the cells")
    # of another model they would say nothing
    same_model = not given.get("recipe") and given.get("random") in (None, recipe.parent.name)
    quality, published = content.get("quality", False), content.get("published", []) if same_model else []
    axis, grid = list(content["axis"]), content.get("grid", {})
    return Study(path.stem, axis, tasks, reference, quality, published, grid, random)


def options(grid: Mapping[str, Mapping[str, Any]]) -> list[list[tuple[str, Mapping[str, Any]]]]:
    """Of every factor, without it and with it: names and fields."""
    return [[("", {}), (factor, fields)] for factor, fields in grid.items()]


def combination(grid: Mapping[str, Any], chosen: Collection[str]) -> str:
    """The name of the cell with these factors."""
    return " + ".join(factor for factor in grid if factor in chosen) or "none"


def _cells(grid: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    return {
        combination(grid, {name for name, _ in chosen}): {k: v for _, fields in chosen for k, v in fields.items()}
        for chosen in product(*options(grid))
    }


def _launch_config(name: str) -> str:
    path = name if name.endswith((".yaml", ".yml")) else f"accelerate_configs/{name}.yaml"
    if not (ROOT / path).is_file():
        raise ValueError(f"there is no launch config {path}")
    return path


def _read(path: str | Path) -> dict[str, Any]:
    if not (ROOT / path).is_file():
        raise ValueError(f"there is no file {path}")
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def _as_word(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value) if isinstance(value, dict) else str(value)


def check(study: Study) -> None:
    """ValueError where cells differ in more than the axis explains, as far as files can tell before anything runs."""
    asked = {}
    for task in study.tasks:
        launch = _read(task.launch)
        fsdp = "FSDP" in launch.get("distributed_type", "")
        precision = task.flags.get("mixed_precision", launch.get("mixed_precision", "no"))
        facts = {"precision": PRECISIONS[str(precision)], "world_size": task.processes, "settings": {}}
        facts["strategy"] = "fsdp" if fsdp else "ddp" if task.processes > 1 else "single"
        asked[task.name] = {"recipe": _read(task.recipe) | dict(task.fields), "launch": facts}
    every = dict.fromkeys(key for one in asked.values() for key in one["recipe"])
    for one in asked.values():
        one["recipe"] = every | one["recipe"]
    confound.settle_axes({name: confound.settings(one) for name, one in asked.items()}, study.axes)


def gpus_needed(task: Task) -> int:
    """GPUs that the launch config takes of this machine; 0 for a CPU."""
    config = _read(task.launch)
    return 0 if config.get("use_cpu") or str(config.get("gpu_ids", "")).startswith("-1") else task.processes


def is_done(task: Task) -> bool:
    """Whether its run ended, by this very command, and another try would end alike (memory ran out).

    ValueError where the folder holds the run of another command.
    """
    started = task.folder / "task.json"
    if not started.is_file():
        if (task.folder / "run.json").is_file():
            raise ValueError(f"{task.folder} holds a run that is not of this study: move it, or pass another --runs")
        return False
    if json.loads(started.read_text(encoding="utf-8"))["command"] != task.command():
        raise ValueError(
            f"{task.folder} holds {task.name} with other settings: remove it to train it again, or pass another --runs"
        )
    if not (task.folder / "run.json").is_file():
        return False
    run = read_run(task.folder)
    ended = outcome(run)[0]
    if ended == "out of memory":
        # beside others it says nothing of the cell
        return not json.loads(started.read_text(encoding="utf-8")).get("beside")
    return run["status"] == "succeeded" or ended == "diverged"


def begin(task: Task, beside: int = 0) -> None:
    """Note the command, so that a later start knows what the folder holds, and how many trainings share the GPUs."""
    task.folder.mkdir(parents=True, exist_ok=True)
    write_json(task.folder / "task.json", {"command": task.command(), "beside": beside})


def python_command(task: Task) -> list[str]:
    """The task's command under this interpreter, without accelerate's other commands, whose import takes a second."""
    return [sys.executable, "-m", "accelerate.commands.launch", *task.command()[2:]]
