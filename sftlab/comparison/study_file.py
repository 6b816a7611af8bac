"""A study: cells equal but for an axis, each trained several times: its file, and whether it
compares what is equal.

A study file names the recipe, the launch config, the axis and the cells; docs are in
recipes/study.py.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from sftlab.comparison import comparability
from sftlab.comparison.study_tasks import Task, read_yaml
from sftlab.config.launch import PRECISIONS
from sftlab.paths import ROOT

LAUNCH_KEYS = ("launch", "processes", "flags")
# What a command line says of a study itself; everything else is a recipe field.
GIVEN = ("recipe", "launch", "processes", "random")
# What each key of a study file holds.
STUDY_KEYS = {
    "recipe": str, "axis": list, "seeds": list, "repeats": int, "quality": bool, "fields": dict, "cells": dict,
    "grid": dict, "reference": str, "published": list, "published_as": str, "launch": str, "processes": int,
    "flags": dict,
}  # fmt: skip
NAMES = {
    str: "a word",
    list: "a list",
    int: "a whole number",
    bool: "true or false",
    dict: "lines of name: value",
}
# Recipe fields that say where a run is kept, which the study says itself.
ITS_OWN = ("output_dir", "overwrite", "config", "resume_from_checkpoint")


@dataclass
class Study:
    """What a study file says, overridden by the command line."""

    name: str
    axis: list[str]
    tasks: list[Task]
    reference: str
    quality: bool = False
    published: list[dict[str, Any]] = field(default_factory=list)
    published_as: str = ""  # under which conditions
    grid: dict[str, dict[str, Any]] = field(default_factory=dict)
    random: tuple[str, int] | None = (
        None  # the shape of a random-initialised model, and the longest of its rows
    )

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
    """Read a study file; `given` beats it (recipe, launch, processes) and, for every other name, is
    a recipe field.

    `given["random"]` names a shape of sftlab/models/random_models.py: model and rows are random, as
    throughput and memory allow.

    Tasks are in the order in which they run: every cell once, then every cell again. ValueError
    says what is wrong.
    """
    content = _content(path)
    cells = content.get("cells") or _cells(content["grid"])
    fields = content.get("fields", {}) | {
        k: v for k, v in given.items() if k not in (*GIVEN, "flags") and v
    }
    base = {key: given.get(key) or content.get(key) for key in LAUNCH_KEYS}
    recipe, random = Path(given.get("recipe") or content["recipe"]), None
    if given.get("random"):
        from sftlab.models.random_models import random_files  # it takes transformers with it

        longest = fields.get("max_length") or read_yaml(recipe)["max_length"]
        if longest is None:
            raise ValueError(
                "max_length is null: --random needs the longest row, pass --max_length"
            )
        random = given["random"], int(longest)
        model, rows = (str(path.relative_to(ROOT)) for path in random_files(*random))
        fields = {
            "model_name_or_path": model,
            "dataset_name": rows,
            "dataset_fraction": 1.0,
        } | fields
        # of random weights nobody needs what was trained, nor how good it is
        fields = {"save_adapter": False, "split_fractions": [1.0, 0.0, 0.0]} | fields
    if content.get("seeds") and "seed" in fields:
        raise ValueError(f"{path} trains with seeds {content['seeds']}: --seed would say nothing")
    seeds = content.get("seeds") or [None] * content.get("repeats", 1)
    tasks: dict[Path, Task] = {}
    for repeat, seed in enumerate(seeds, start=1):
        for cell, settings in cells.items():
            settings = settings or {}
            own = fields | {k: v for k, v in settings.items() if k not in LAUNCH_KEYS}
            own |= {} if seed is None else {"seed": seed}
            if kept := [name for name in ITS_OWN if name in own]:
                raise ValueError(
                    f"{path}: {', '.join(kept)} is the study's own: --runs says where the runs are "
                    "kept"
                )
            launch = base | {k: v for k, v in settings.items() if k in LAUNCH_KEYS}
            config = _launch_config(launch["launch"] or "single")
            processes = launch["processes"] or read_yaml(config)["num_processes"]
            name = f"{cell}, {repeat}" if seed is None else f"{cell}, seed {seed}"
            folder = runs / re.sub(r"[^\w.+-]+", "_", f"{cell}-{repeat if seed is None else seed}")
            task = Task(
                name, cell, repeat, folder, config, processes, _flags(launch["flags"]), own, recipe
            )
            if folder in tasks:
                raise ValueError(
                    f"{path}: {name} and {tasks[folder].name} would both be kept in {folder}"
                )
            tasks[folder] = task
    reference = content.get("reference", next(iter(cells)))
    if reference not in cells:
        raise ValueError(f"{path}: the reference {reference} is none of the cells")
    if unknown := [one["cell"] for one in content.get("published", []) if one["cell"] not in cells]:
        raise ValueError(
            f"{path}: published figures of {', '.join(unknown)}, which is none of the cells"
        )
    # of another model, or of longer rows, they would say nothing
    alike = not given.get("recipe") and given.get("random") in (None, recipe.parent.name)
    alike = alike and not {"model_name_or_path", "max_length"} & {
        name for name in given if given[name]
    }
    return Study(
        path.stem,
        content["axis"],
        list(tasks.values()),
        reference,
        content.get("quality", False),
        content.get("published", []) if alike else [],
        content.get("published_as", ""),
        content.get("grid", {}),
        random,
    )


def _content(path: Path) -> dict[str, Any]:
    """A study file; ValueError for one that is none, or has something else than it should under a
    key.
    """
    content = {key: value for key, value in read_yaml(path.resolve()).items() if value is not None}
    if unknown := sorted(map(str, content.keys() - STUDY_KEYS.keys())):
        raise ValueError(
            f"{path}: {', '.join(unknown)} is nothing that a study knows: "
            f"{', '.join(sorted(STUDY_KEYS))}"
        )
    if (
        not content.get("axis")
        or not (content.get("cells") or content.get("grid"))
        or not content.get("recipe")
    ):
        raise ValueError(
            f"{path} is no study: it needs a `recipe`, `axis`, a list of fields, and `cells`, by "
            "name"
        )
    if isinstance(content["axis"], str):
        content["axis"] = [content["axis"]]
    for key, value in content.items():
        if not isinstance(value, STUDY_KEYS[key]):
            raise ValueError(f"{path}: {key} is {value!r}: expected {NAMES[STUDY_KEYS[key]]}")
    for key in ("cells", "grid"):
        for name, settings in content.get(key, {}).items():
            if not (settings is None and key == "cells") and not isinstance(settings, dict):
                raise ValueError(
                    f"{path}: {name} of {key} is {settings!r}: expected fields, a line of name: "
                    "value each"
                )
    return content


def _flags(flags: Mapping[str, Any] | None) -> dict[str, Any]:
    """Flags of `accelerate launch`; YAML reads its `no` as false."""
    return {
        k: "no" if k == "mixed_precision" and v is False else v for k, v in (flags or {}).items()
    }


def options(grid: Mapping[str, Mapping[str, Any]]) -> list[list[tuple[str, Mapping[str, Any]]]]:
    """Of every factor, without it and with it: names and fields."""
    return [[("", {}), (factor, fields)] for factor, fields in grid.items()]


def combination(grid: Mapping[str, Any], chosen: Collection[str]) -> str:
    """The name of the cell with these factors."""
    return " + ".join(factor for factor in grid if factor in chosen) or "none"


def _cells(grid: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    return {
        combination(grid, {name for name, _ in chosen}): {
            k: v for _, fields in chosen for k, v in fields.items()
        }
        for chosen in product(*options(grid))
    }


def _launch_config(name: str) -> str:
    path = name if name.endswith((".yaml", ".yml")) else f"accelerate_configs/{name}.yaml"
    if not (ROOT / path).is_file():
        raise ValueError(f"there is no launch config {path}")
    return path


def check(study: Study) -> None:
    """ValueError where cells differ in more than the axis explains, as far as files can tell before
    anything runs.
    """
    asked = {}
    for task in study.tasks:
        launch = read_yaml(task.launch)
        fsdp = "FSDP" in launch.get("distributed_type", "")
        precision = str(_flags(launch | task.flags).get("mixed_precision", "no"))
        if precision not in PRECISIONS:
            raise ValueError(
                f"{task.name}: mixed_precision is {precision}: expected one of "
                f"{', '.join(PRECISIONS)}"
            )
        facts = {"precision": PRECISIONS[precision], "world_size": task.processes, "settings": {}}
        facts["strategy"] = "fsdp" if fsdp else "ddp" if task.processes > 1 else "single"
        asked[task.name] = {"recipe": read_yaml(task.recipe) | dict(task.fields), "launch": facts}
    every = dict.fromkeys(key for one in asked.values() for key in one["recipe"])
    for one in asked.values():
        one["recipe"] = every | one["recipe"]
    comparability.settle_axes(
        {name: comparability.settings(one) for name, one in asked.items()}, study.axes
    )
