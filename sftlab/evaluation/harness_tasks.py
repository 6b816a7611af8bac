"""Tasks of lm-eval-harness, loaded and checked before any model is."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.metrics import mean as mean_over_documents
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

# lm-eval's own seed, which draws the few-shot examples
SEED = 1234
# tasks and groups in the form that lm_eval.evaluate takes
LoadedTasks = dict[str, Any]


def load_units(
    names: Sequence[str], few_shot: int | None, files: Sequence[str], local_tasks: Path | str
) -> dict[str, LoadedTasks]:
    """Load the tasks that are compared as one unit each.

    A task is a unit. So is a group whose subtasks' documents are pooled; other groups and tags
    fall into their tasks. `few_shot` is the number of examples in a prompt (None: the task's own).
    `files` are NAME=FILE for the tasks under the folder `local_tasks`. Raises ValueError for an
    unknown task, data that cannot be loaded, and options that a task does not take.
    """
    if wrong := [given for given in files if "=" not in given]:
        raise ValueError(
            f"--files {wrong[0]}: expected NAME=FILE, for instance gsm8k_test=data/test.jsonl"
        )
    named = dict(given.split("=", 1) for given in files)
    manager = TaskManager(include_path=str(local_tasks), include_defaults=False, metadata=named)
    if not set(names) <= set(manager.all_tasks):
        manager = TaskManager(include_path=str(local_tasks), metadata=named)
    units: dict[str, LoadedTasks] = {}
    for name in names:
        units |= _units_of(name, _load(name, manager))
    tasks = [task for loaded in units.values() for task in loaded["tasks"].values()]
    for task in tasks:
        _set_few_shot(task, few_shot)
    readable = sorted(name for task in tasks for name in getattr(task, "file_names", {}).values())
    if unread := sorted(set(named) - set(readable)):
        raise ValueError(
            f"--files {unread[0]}: these tasks read {', '.join(readable) or 'no files'}"
        )
    return units


def _units_of(name: str, loaded: LoadedTasks) -> dict[str, LoadedTasks]:
    group = loaded["groups"].get(name)
    if not group or not group.has_aggregation:
        return {one: {"tasks": {one: task}, "groups": {}} for one, task in loaded["tasks"].items()}
    if all(metric.weight_by_size for metric in group.aggregate_metric_list):
        return {name: loaded}
    raise ValueError(
        f"{name} weighs subtasks equally, whatever their size: name the subtasks themselves"
    )


def _load(name: str, manager: TaskManager) -> LoadedTasks:
    """Load one task, group or tag with its documents."""
    if name not in manager.all_tasks:
        near = difflib.get_close_matches(name, manager.all_tasks, n=1)
        raise ValueError(
            f"lm-eval has no task {name}" + (f": did you mean {near[0]}?" if near else "")
        )
    try:
        return manager.load([name])
    except OSError as error:
        local = f"{name}_local"
        hint = f": {local} reads files (--files)" if local in manager.all_tasks else ""
        raise ValueError(
            f"the data of {name} cannot be loaded ({str(error).splitlines()[0]}){hint}"
        ) from error


def _set_few_shot(task: Task, asked: int | None) -> None:
    """Set the number of few-shot examples, and build one prompt to see that they exist."""
    own = task.get_config("num_fewshot")
    if mean_over_documents not in task.aggregation().values():
        raise ValueError(
            f"{task.task_name} has no score per document: base and tuned cannot be paired on it"
        )
    if asked and own == 0:
        raise ValueError(f"{task.task_name} fixes its examples itself: leave --num_fewshot out")
    count = (own or 0) if asked is None else asked
    task.set_config("num_fewshot", count)
    task.set_fewshot_seed(SEED)
    try:
        task.fewshot_context(task.eval_docs[0], num_fewshot=count)
    except (ValueError, AssertionError) as error:
        raise ValueError(
            f"{task.task_name} cannot be asked with {count} examples: {error}"
        ) from error
