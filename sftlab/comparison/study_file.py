"""What does a study file ask for, and are its cells equal but for the axis?

A study has cells that differ only in an axis, each trained several times. Its keys are explained in
recipes/study.py.
"""

import contextlib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from sftlab.comparison import comparability
from sftlab.comparison.run_settings import settings
from sftlab.comparison.study_tasks import LAUNCH_CONFIG_HINT, Task
from sftlab.comparison.tuned_field import at_value, tuned_field
from sftlab.config.launch import PRECISIONS
from sftlab.config.launch_file import read_launch_config
from sftlab.paths import ROOT
from sftlab.yaml_files import read_yaml

LAUNCH_KEYS = ("launch", "processes", "flags")
# Options of recipes/study.py that override a study's keys; any other option is a recipe field.
GIVEN = ("recipe", "launch", "processes", "random", "known_text")
# What each key of a study file holds.
STUDY_KEYS = {
    "title": str,
    "recipe": str,
    "axis": list,
    "seeds": list,
    "tune": dict,
    "repeats": int,
    "quality": bool,
    "quality_options": dict,
    "speed": bool,
    "known_text": str,
    "harness": dict,
    "fields": dict,
    "cells": dict,
    "grid": dict,
    "reference": str,
    "published": list,
    "published_as": str,
    "launch": str,
    "processes": int,
    "flags": dict,
}
KINDS = {
    str: "a word",
    list: "a list",
    int: "a whole number",
    bool: "true or false",
    dict: "lines of name: value",
}
# options of eval/quality.py that a study may set
QUALITY_OPTIONS = ("samples", "batch_size", "max_new_tokens", "bleu_tokenize")
# options of eval/harness.py that a study may set; `tasks` is a list of names
HARNESS_OPTIONS = ("tasks", "limit", "num_fewshot", "batch_size", "files")
# the least value of those that are whole numbers
LEAST = {"samples": 0, "num_fewshot": 0, "batch_size": 1, "max_new_tokens": 1, "limit": 1}
# Recipe fields that say where a run is kept: the study sets them.
ITS_OWN = ("output_dir", "overwrite", "config", "resume_from_checkpoint")
# Random weights are not saved, and all rows train.
RANDOM_FIELDS = {"save_adapter": False, "split_fractions": [1.0, 0.0, 0.0]}
# of a cell: each is a training of its own
MOST_REPEATS = 1000


@dataclass
class Study:
    """A study file, overridden by the command line.

    `tasks` are in the order in which they run: every cell once, then every cell again.
    `tuning` are the trainings that choose each cell's own value of the field `tuned`.
    `title` is for people. `published_as` says under which conditions the `published` figures were
    measured. `random` is the shape of a random model and the length of its longest row.
    """

    name: str
    axis: list[str]
    tasks: list[Task]
    reference: str
    quality: bool = False
    quality_options: Mapping[str, Any] = field(default_factory=dict)
    speed: bool = True
    known_text: str | None = None
    harness: Mapping[str, Any] = field(default_factory=dict)
    published: list[dict[str, Any]] = field(default_factory=list)
    published_as: str = ""
    title: str = ""
    grid: dict[str, dict[str, Any]] = field(default_factory=dict)
    random: tuple[str, int] | None = None
    tuned: str = ""
    tuning: list[Task] = field(default_factory=list)

    @property
    def cells(self) -> list[str]:
        """Names in the file's order."""
        return list(dict.fromkeys(task.cell for task in self.tasks))

    @property
    def axes(self) -> list[str]:
        """The axis, the tuned field, and the seed where cells are repeated with several."""
        seeds = {task.fields.get("seed") for task in self.tasks}
        varied = [*([self.tuned] if self.tuned else []), *(["seed"] if len(seeds) > 1 else [])]
        return list(dict.fromkeys([*self.axis, *varied]))


def load(path: Path, runs: Path, given: Mapping[str, Any]) -> Study:
    """Returns the study of a file, whose runs are kept in `runs`.

    `given` overrides its recipe, launch config and processes; any other name in it is a recipe
    field. `given["random"]` names a shape of sftlab/models/random_models.py: model and rows are
    random, which is enough to measure throughput and memory. Raises ValueError for what is wrong.
    """
    content = _read(path)
    recipe = Path(given.get("recipe") or content["recipe"])
    asked = {name: value for name, value in given.items() if name not in GIVEN and value}
    fields = content.get("fields", {}) | asked
    random = _random(given["random"], recipe, fields) if given.get("random") else None
    if random:
        fields = _random_fields(*random) | fields
    if content.get("seeds") and "seed" in fields:
        raise ValueError(f"{path} trains with seeds {content['seeds']}: --seed would say nothing")
    _check_heard(path, content["cells"], {k: v for k, v in given.items() if v})
    launch = {key: given.get(key) or content.get(key) for key in LAUNCH_KEYS}
    cells = [
        _cell_task(path, cell, settings or {}, launch, fields, recipe)
        for cell, settings in content["cells"].items()
    ]
    seeds = content.get("seeds") or [None] * _repeats(path, content.get("repeats", 1))
    if odd := [seed for seed in seeds if seed is not None and type(seed) is not int]:
        raise ValueError(f"{path}: seeds holds {odd[0]!r}: expected whole numbers")
    tasks = [
        _repeated(cell, repeat, seed, runs)
        for repeat, seed in enumerate(seeds, start=1)
        for cell in cells
    ]
    _check_folders(path, tasks)
    tuned, values = tuned_field(path, content, fields, ITS_OWN)
    tuning = [at_value(task, tuned, value) for value in values for task in tasks[: len(cells)]]
    return Study(
        name=path.stem,
        axis=content["axis"],
        tasks=tasks,
        reference=content["reference"],
        quality=content.get("quality", False),
        quality_options=content.get("quality_options", {}),
        speed=content.get("speed", True),
        known_text=given.get("known_text") or content.get("known_text"),
        harness=content.get("harness", {}),
        published=content.get("published", []) if _is_as_published(given, recipe) else [],
        published_as=content.get("published_as", ""),
        title=content.get("title") or path.stem,
        grid=content.get("grid", {}),
        random=random,
        tuned=tuned,
        tuning=tuning,
    )


def _check_heard(path: Path, cells: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raise ValueError for what the command line says and every cell overrides."""
    for name in given:
        if all(name in (own or {}) for own in cells.values()):
            raise ValueError(f"{path}: every cell sets {name} itself: --{name} would say nothing")


def _read(path: Path) -> dict[str, Any]:
    """Returns the keys of a study file, with `cells` and `reference` filled in.

    Raises ValueError for a key that is missing, unknown or holds what it should not.
    """
    found = read_yaml(path, "study", "recipes/studies/ has the studies")
    content = {key: value for key, value in found.items() if value is not None}
    _check_keys(path, content)
    content["cells"] = content.get("cells") or _grid_cells(content["grid"])
    content.setdefault("reference", next(iter(content["cells"])))
    if content["reference"] not in content["cells"]:
        raise ValueError(f"{path}: the reference {content['reference']} is none of the cells")
    if odd := [one for one in content.get("quality_options", {}) if one not in QUALITY_OPTIONS]:
        raise ValueError(
            f"{path}: quality_options has {odd[0]!r}: expected {', '.join(QUALITY_OPTIONS)}"
        )
    if "harness" in content:
        _check_harness(path, content["harness"])
    _check_numbers(path, "quality_options", content.get("quality_options", {}))
    published = content.get("published", [])
    if odd := [one for one in published if not (isinstance(one, dict) and "cell" in one)]:
        raise ValueError(f"{path}: published holds {odd[0]!r}: expected a cell and its figures")
    published = [one["cell"] for one in published]
    if unknown := [cell for cell in published if cell not in content["cells"]]:
        raise ValueError(
            f"{path}: published figures of {', '.join(unknown)}, which is none of the cells"
        )
    return content


def _check_numbers(path: Path, key: str, options: Mapping[str, Any]) -> None:
    """Raise ValueError for an option of an evaluation that is no number that it takes."""
    for name, value in options.items():
        if name in LEAST and (type(value) is not int or value < LEAST[name]):
            raise ValueError(
                f"{path}: {key}, {name}: got {value!r}, expected a whole number from {LEAST[name]}"
            )


def _check_harness(path: Path, options: dict[str, Any]) -> None:
    _check_numbers(path, "harness", options)
    files = options.get("files", [])
    if not isinstance(files, list) or not all(isinstance(one, str) for one in files):
        raise ValueError(f"{path}: harness, files: got {files!r}, expected a list of NAME=FILE")
    if odd := [one for one in options if one not in HARNESS_OPTIONS]:
        raise ValueError(f"{path}: harness has {odd[0]!r}: expected {', '.join(HARNESS_OPTIONS)}")
    tasks = options.get("tasks")
    if not isinstance(tasks, list) or not tasks or not all(isinstance(t, str) for t in tasks):
        raise ValueError(f"{path}: harness, tasks: got {tasks!r}, expected a list of lm-eval tasks")


def _check_keys(path: Path, content: dict[str, Any]) -> None:
    if unknown := sorted(map(str, content.keys() - STUDY_KEYS.keys())):
        raise ValueError(
            f"{path}: {', '.join(unknown)} is nothing that a study knows: expected "
            f"{', '.join(sorted(STUDY_KEYS))}"
        )
    has_cells = content.get("cells") or content.get("grid")
    if not (content.get("axis") and has_cells and content.get("recipe")):
        raise ValueError(
            f"{path} is no study: it needs a `recipe`, `axis` (a list of fields) and `cells` (by "
            "name)"
        )
    if isinstance(content["axis"], str):
        content["axis"] = [content["axis"]]
    for key, value in content.items():
        if not isinstance(value, STUDY_KEYS[key]):
            raise ValueError(f"{path}: {key} is {value!r}: expected {KINDS[STUDY_KEYS[key]]}")
    if wrong := [one for one in content["axis"] if not isinstance(one, str)]:
        raise ValueError(f"{path}: axis holds {wrong[0]!r}: expected names of fields")
    for key in ("cells", "grid"):
        for name, fields in content.get(key, {}).items():
            if not isinstance(fields, dict) and not (fields is None and key == "cells"):
                raise ValueError(
                    f"{path}: {name} of {key} is {fields!r}: expected fields, a line of name: "
                    "value each"
                )


def options(grid: Mapping[str, Mapping[str, Any]]) -> list[list[tuple[str, Mapping[str, Any]]]]:
    """Returns each factor's two options, without it and with it, as names and fields."""
    return [[("", {}), (factor, fields)] for factor, fields in grid.items()]


def combination(grid: Mapping[str, Any], chosen: Collection[str]) -> str:
    """Returns the name of the cell with these factors."""
    return " + ".join(factor for factor in grid if factor in chosen) or "none"


def _grid_cells(grid: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns a cell for every combination of factors."""
    return {
        combination(grid, {name for name, _ in chosen}): {
            k: v for _, fields in chosen for k, v in fields.items()
        }
        for chosen in product(*options(grid))
    }


def _random(shape: str, recipe: Path, fields: Mapping[str, Any]) -> tuple[str, int]:
    """Returns the shape of the random model and the length of its longest row."""
    longest = fields.get("max_length") or read_yaml(recipe, folder=ROOT).get("max_length")
    if longest is None:
        raise ValueError("max_length is null: --random needs the longest row, pass --max_length")
    return shape, int(longest)


def _random_fields(shape: str, longest: int) -> dict[str, Any]:
    from sftlab.models.random_models import random_files  # imports transformers, which takes time

    model, rows = (str(path.relative_to(ROOT)) for path in random_files(shape, longest))
    files = {"model_name_or_path": model, "dataset_name": rows, "dataset_fraction": 1.0}
    return RANDOM_FIELDS | files


def _cell_task(
    path: Path,
    cell: str,
    settings: Mapping[str, Any],
    launch: Mapping[str, Any],
    fields: Mapping[str, Any],
    recipe: Path,
) -> Task:
    """Returns the training of a cell, whose `settings` override launch config and fields."""
    own = {**fields, **{k: v for k, v in settings.items() if k not in LAUNCH_KEYS}}
    if kept := [name for name in ITS_OWN if name in own]:
        raise ValueError(
            f"{path}: {', '.join(kept)} is the study's own: --runs says where the runs are kept"
        )
    launch = {**launch, **{k: v for k, v in settings.items() if k in LAUNCH_KEYS}}
    config = _launch_config(launch["launch"] or "single")
    processes = launch["processes"] or read_launch_config(config, ROOT).get("num_processes", 1)
    flags = _flags(launch["flags"])
    return Task(cell, cell, 0, Path(cell), config, processes, flags, own, recipe)


def _repeated(task: Task, repeat: int, seed: int | None, runs: Path) -> Task:
    """Returns a repeat of a cell's training, with a seed of its own where the study has seeds."""
    if seed is None:
        name, fields = f"{task.cell}, {repeat}", task.fields
    else:
        name, fields = f"{task.cell}, seed {seed}", {**task.fields, "seed": seed}
    ending = repeat if seed is None else seed
    folder = runs / re.sub(r"[^\w.+-]+", "_", f"{task.cell}-{ending}")
    return task._replace(name=name, repeat=repeat, folder=folder, fields=fields)


def _check_folders(path: Path, tasks: Sequence[Task]) -> None:
    kept: dict[Path, str] = {}
    for task in tasks:
        if task.folder in kept:
            raise ValueError(
                f"{path}: {task.name} and {kept[task.folder]} would both be kept in {task.folder}"
            )
        kept[task.folder] = task.name


def _launch_config(name: str) -> str:
    path = name if name.endswith((".yaml", ".yml")) else f"accelerate_configs/{name}.yaml"
    if not (ROOT / path).is_file():
        shown = " ".join(str(path).split())  # a name may hold a line break
        raise ValueError(f"there is no launch config {shown}: {LAUNCH_CONFIG_HINT}")
    return path


def _flags(flags: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns flags of `accelerate launch`; YAML reads its `no` as false."""
    return {
        k: "no" if k == "mixed_precision" and v is False else v for k, v in (flags or {}).items()
    }


def _is_as_published(given: Mapping[str, Any], recipe: Path) -> bool:
    """Returns whether model and row length are those of the published figures."""
    same_recipe = not given.get("recipe") and given.get("random") in (None, recipe.parent.name)
    return same_recipe and not (given.get("model_name_or_path") or given.get("max_length"))


def check_comparable(study: Study) -> None:
    """Raise ValueError where cells differ in more than the axis explains.

    Only files are read, before anything runs.
    """
    asked = {task.name: _asked(task) for task in study.tasks}
    every = dict.fromkeys(key for one in asked.values() for key in one["recipe"])
    for one in asked.values():
        one["recipe"] = every | one["recipe"]
    found = {name: settings(one) for name, one in asked.items()}
    comparability.resolve_axes(found, study.axes, study=True)


def _asked(task: Task) -> dict[str, Any]:
    """Returns recipe and launch config of a task, as a run.json would have them."""
    launch = task.launch_config()
    precision = str(_flags(launch | task.flags).get("mixed_precision", "no"))
    if precision not in PRECISIONS:
        raise ValueError(
            f"{task.name}: mixed_precision is {precision}: expected one of {', '.join(PRECISIONS)}"
        )
    strategy = "ddp" if task.processes > 1 else "single"
    if "FSDP" in launch.get("distributed_type", ""):
        strategy = "fsdp"
    return {
        "recipe": task.recipe_fields() | {k: _read_word(v) for k, v in task.fields.items()},
        "launch": {
            "precision": PRECISIONS[precision],
            "world_size": task.processes,
            "settings": {},
            "strategy": strategy,
        },
    }


def _read_word(value: Any) -> Any:
    """Returns a word of the command line as the number that it is, for a comparison."""
    for kind in (int, float) if isinstance(value, str) else ():
        with contextlib.suppress(ValueError):
            return kind(value)
    return value


def _repeats(path: Path, repeats: object) -> int:
    if type(repeats) is not int or not 1 <= repeats <= MOST_REPEATS:
        raise ValueError(
            f"{path}: repeats is {repeats!r}: expected a whole number from 1 to {MOST_REPEATS}"
        )
    return repeats
