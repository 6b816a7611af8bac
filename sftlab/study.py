"""A study: cells equal but for an axis, each trained several times; which are done, and what they say together.

A study file names the recipe, the launch config, the axis and the cells; docs are in recipes/study.py.
"""

import json
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from scipy.stats import ttest_rel

from sftlab import confound
from sftlab.evidence import STEP_PARTS, figures, outcome, read_evidence
from sftlab.launch import PRECISIONS
from sftlab.run import read_run, write_json
from sftlab.significance import add_holm

ROOT = Path(__file__).parent.parent
LAUNCH_KEYS = ("launch", "processes", "flags")
STUDY_KEYS = {
    "recipe", "axis", "seeds", "repeats", "quality", "fields", "cells", "grid", "reference", "published", *LAUNCH_KEYS
}  # fmt: skip
# What a summary shows of a cell, where it was measured; and whether less is better, where 'better' means something.
MEASURED = (
    "tokens_per_s", "rows_per_s", "share_of_limit", "peak_memory_gb", "step_time_s",
    *(f"step_{part}_gb" for part in STEP_PARTS), "trainable_parameters", "train_loss", "validation_loss",
)  # fmt: skip
# What the factors of a grid are said to change, and the change from which it counts.
CHANGED = ("step_time_s", *(f"step_{part}_gb" for part in STEP_PARTS))
COUNTS = 0.05
LESS_IS_BETTER = {"tuned response_perplexity": True, "tuned bleu": False, "tuned rougeL": False}
SEEDS_FOR_A_CLAIM = 3


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

    Tasks are in the order in which they run: every cell once, then every cell again. ValueError says what is wrong.
    """
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not content.get("axis") or not (content.get("cells") or content.get("grid")):
        raise ValueError(f"{path} is no study: it needs `axis`, a list of fields, and `cells`, fields by name")
    if unknown := sorted(content.keys() - STUDY_KEYS):
        raise ValueError(f"{path}: {', '.join(unknown)} is nothing that a study knows: {', '.join(sorted(STUDY_KEYS))}")
    cells = content.get("cells") or {_label(chosen): _merged(chosen) for chosen in product(*_options(content["grid"]))}
    fields = content.get("fields", {}) | {k: v for k, v in given.items() if k not in (*LAUNCH_KEYS, "recipe") and v}
    base = {key: given.get(key) or content.get(key) for key in LAUNCH_KEYS}
    recipe = Path(given.get("recipe") or content["recipe"])
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
    quality, published = content.get("quality", False), content.get("published", [])
    return Study(path.stem, list(content["axis"]), tasks, reference, quality, published, content.get("grid", {}))


def _options(grid: Mapping[str, Mapping[str, Any]]) -> list[list[tuple[str, Mapping[str, Any]]]]:
    return [[("", {}), (factor, fields)] for factor, fields in grid.items()]


def _label(chosen: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    return " + ".join(factor for factor, _ in chosen if factor) or "none"


def _merged(chosen: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    return {key: value for _, fields in chosen for key, value in fields.items()}


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
    return run["status"] == "succeeded" or outcome(run)[0] in ("out of memory", "diverged")


def begin(task: Task) -> None:
    """Note the command, so that a later start knows what the folder holds."""
    task.folder.mkdir(parents=True, exist_ok=True)
    write_json(task.folder / "task.json", {"command": task.command()})


def python_command(task: Task) -> list[str]:
    """The task's command under this interpreter."""
    return [sys.executable, "-m", "accelerate.commands.accelerate_cli", *task.command()[1:]]


def collect(study: Study, not_run: Mapping[str, str], allow_confounded: bool = False) -> tuple[list[dict], list[str]]:
    """A row of figures a task, and what confounds the study; ValueError for a confounded one unless allowed.

    `not_run` says of tasks (by name) why they were not started.
    """
    found = {task.name: read_evidence(task.folder) for task in study.tasks if (task.folder / "run.json").is_file()}
    settings = {name: confound.settings(one.run, one.quality) for name, one in found.items()}
    if settings:
        confound.settle_axes(settings, study.axes, allow_confounded)
    rows = []
    for task in study.tasks:
        row = {"cell": task.cell, "repeat": task.repeat, "seed": task.fields.get("seed")}
        if task.name in found:
            row |= figures(found[task.name], settings[task.name].facts)
        else:
            row["status"] = "not run" if task.name in not_run else "failed"
            row["reason"] = not_run.get(task.name) or task.last_words()
        rows.append(row)
    return rows, confound.describe(confound.differences(settings, study.axes))


def summarise(study: Study, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A line a cell: median, lowest and highest of every figure over the runs that have it, and how they ended."""
    lines = []
    for cell in study.cells:
        mine = [row for row in rows if row["cell"] == cell]
        good = [row for row in mine if row["status"] == "succeeded"]
        ends = dict.fromkeys(row["status"] for row in mine)
        reason = next((row["reason"] for row in mine if row["reason"]), "")
        line = {"cell": cell, "runs": len(good), "status": ", ".join(ends), "reason": reason}
        for key in (*MEASURED, *LESS_IS_BETTER):
            values = sorted(row[key] for row in good if row.get(key) is not None)
            line[key] = statistics.median(values) if values else None
            line[f"{key} low"], line[f"{key} high"] = (values[0], values[-1]) if values else (None, None)
        published = next((one for one in study.published if one["cell"] == cell), {})
        line |= {f"published {key}": value for key, value in published.items() if key != "cell"}
        lines.append(line)
    columns = dict.fromkeys(key for line in lines for key in line)
    return [{key: line.get(key) for key in columns} for line in lines]


def effects(study: Study, summary: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What each factor of a grid changes: the median ratio of cells with it to those without, all else equal.

    The range is over those pairs; a change counts where the median is 5 % or more from 1 (`up` or `down`, else `same`).
    """
    by_cell, found = {line["cell"]: line for line in summary}, []
    for factor in study.grid:
        others = product(*_options({name: fields for name, fields in study.grid.items() if name != factor}))
        pairs = []
        for chosen in others:
            names = {name for name, _ in chosen if name}
            both = [" + ".join(n for n in study.grid if n in each) or "none" for each in (names, names | {factor})]
            pairs.append([by_cell[name] for name in both])
        one: dict[str, Any] = {"factor": factor}
        for key in CHANGED:
            ratios = sorted(with_[key] / without[key] for without, with_ in pairs if without[key] and with_[key])
            if ratios:
                middle = statistics.median(ratios)
                one |= {key: middle, f"{key} low": ratios[0], f"{key} high": ratios[-1]}
                one[f"{key} is"] = "up" if middle >= 1 + COUNTS else "down" if middle <= 1 - COUNTS else "same"
        found.append(one)
    return found


def claims(study: Study, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each cell against the reference in every score: the difference over seeds and whether it is 'better' or 'worse'.

    Runs of equal seed are pairs (paired t-test over seeds, Student 1908), p-values after Holm over all comparisons.
    With fewer than three pairs, or p above 0.05, the word is 'not distinguishable'.
    """
    reference, found = study.reference, {}
    for cell in (cell for cell in study.cells if cell != reference):
        for score in LESS_IS_BETTER:
            pairs = _pairs(rows, reference, cell, score)
            if not pairs:
                continue
            first, mine = np.array(pairs).T
            one = {"cell": cell, "against": reference, "score": score, "seeds": len(pairs)}
            one |= {"difference": float((mine - first).mean()), "p_value": 1.0, "low": None, "high": None}
            if len(pairs) >= SEEDS_FOR_A_CLAIM and len(set((mine - first).tolist())) > 1:
                test = ttest_rel(mine, first)
                one["p_value"], (one["low"], one["high"]) = float(test.pvalue), test.confidence_interval()
            found[f"{cell} {score}"] = one
    add_holm(found)
    for one in found.values():
        sure = one["seeds"] >= SEEDS_FOR_A_CLAIM and one["p_holm"] < 0.05
        better = (one["difference"] < 0) == LESS_IS_BETTER[one["score"]]
        one["word"] = ("better" if better else "worse") if sure else "not distinguishable"
    return list(found.values())


def _pairs(rows: Sequence[Mapping[str, Any]], a: str, b: str, score: str) -> list[tuple[float, float]]:
    values: dict[str, dict[Any, float]] = {a: {}, b: {}}
    for row in rows:
        if row["cell"] in values and row["status"] == "succeeded" and row.get(score) is not None:
            values[row["cell"]][row["seed"]] = row[score]
    return [(values[a][seed], values[b][seed]) for seed in values[a] if seed in values[b]]
