"""lm-eval-harness on the base and the tuned model of a run, compared document by document.

python eval/harness.py --run runs/x --tasks mmlu,arc_challenge,arc_easy,gsm8k,truthfulqa_mc2 [--limit 100]
    [--num_fewshot 5] [--batch_size 16] [--no_chat_template] [--files gsm8k_test=FILE gsm8k_train=FILE ...]

One load of the weights, the run's chat template. RUN/eval/harness.json keeps the newest entry of
each task, template on or off, few-shot count and limit; RUN/eval/harness/ has a record a document
and filter. The tasks *_local read --files in place of the hub. After an interruption the same
command asks only what was not yet answered.
"""

import sftlab.startup.filter_warnings  # noqa: I001  (before the libraries that it quiets)
import sftlab.startup.preload  # noqa: F401

import argparse
import difflib
import hashlib
import json
import logging
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import numpy as np
import transformers
from lm_eval.api.metrics import mean as mean_over_documents
from lm_eval.api.model import CachingLM
from lm_eval.api.task import Task
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager

from sftlab.files import write_json
from sftlab.config.recipe import ModelArguments
from sftlab.evaluation.base_and_tuned import (
    answering,
    finished_run,
    load_pair,
    one_sentence,
    run_tokenizer,
)
from sftlab.runs.environment import environment
from sftlab.runs.run_directory import SIDES, adapter_hash
from sftlab.evaluation.significance import (
    FEW_ROWS,
    Paired,
    add_holm,
    compare,
    compare_rates,
    mean,
    with_counts,
)
from sftlab.tables import aligned, interval, p_value

LOCAL_TASKS = str(Path(__file__).parent / "tasks")
SEED = 1234  # lm-eval's own, of the few-shot examples
KEY = ("task", "chat_template", "few_shot", "limit")
# what lm-eval says whenever a model is given loaded, and what `cut_prompts` counts
NOISE = ("`pretrained` model kwarg", "Passed an already-initialized", "Left truncation applied")
# the metrics that depend least on an answer's length and form: where a task has one, it enters
# Holm's correction
MAIN = ("acc_norm,", ",flexible-extract")
Loaded = dict[str, Any]  # tasks and groups as lm_eval.evaluate takes them
Entry = Record = dict[str, Any]  # of harness.json; of a document and filter


def main(argv: list[str]) -> None:
    """Load the tasks, then the models; ask, pair, compare, write, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", required=True, type=Path, help="a finished run's directory")
    parser.add_argument(
        "--tasks", required=True, help="lm-eval's tasks and groups, with commas between them"
    )
    parser.add_argument(
        "--limit", type=int, help="the first n documents of each task (default: all)"
    )
    parser.add_argument(
        "--num_fewshot", type=int, help="examples in the prompt (default: the task's own number)"
    )
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--no_chat_template", action="store_true", help="plain prompts")
    parser.add_argument(
        "--files", nargs="+", default=[], metavar="NAME=FILE", help="the files of the *_local tasks"
    )
    arguments = parser.parse_args(argv)
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)
    logging.getLogger("lm_eval.models.huggingface").addFilter(
        lambda said: not said.getMessage().startswith(NOISE)
    )
    with one_sentence(
        f" at --batch_size {arguments.batch_size}: take a smaller one; answers are kept"
    ):
        run = finished_run(arguments.run)
        units = load_units(arguments)
        tokenizer = run_tokenizer(arguments.run, run)
        model = load_pair(arguments.run, run)
        facts = describe(arguments.run, run, model.device.type)
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=arguments.batch_size)
        entries = [evaluate(name, loaded, lm, arguments, facts) for name, loaded in units.items()]
    add_holm({entry["task"]: entry["metrics"][entry["main_metric"]] for entry in entries})
    write_entries(arguments.run / "eval" / "harness.json", entries)
    for entry in entries:
        for answers in (arguments.run / "eval" / "harness").glob(
            f".unfinished-{entry['records']}.*"
        ):
            answers.unlink()
    print_table(arguments.run, entries)


def load_units(arguments: argparse.Namespace) -> dict[str, Loaded]:
    """What is compared as one: tasks, and groups with their subtasks' documents pooled.

    ValueError for bad input.
    """
    for name, least in (("limit", 1), ("batch_size", 1), ("num_fewshot", 0)):
        if (value := getattr(arguments, name)) is not None and value < least:
            raise ValueError(f"--{name} is {value}: expected {least} or more")
    if wrong := [given for given in arguments.files if "=" not in given]:
        raise ValueError(
            f"--files {wrong[0]}: expected NAME=FILE, for instance gsm8k_test=data/test.jsonl"
        )
    files = dict(given.split("=", 1) for given in arguments.files)
    names = arguments.tasks.replace(" ", "").split(",")
    manager = TaskManager(include_path=LOCAL_TASKS, include_defaults=False, metadata=files)
    if not set(names) <= set(manager.all_tasks):
        manager = TaskManager(include_path=LOCAL_TASKS, metadata=files)
    units: dict[str, Loaded] = {}
    for name in names:
        loaded = load(name, manager)
        group = loaded["groups"].get(name)
        if not group or not group.has_aggregation:
            units |= {
                one: {"tasks": {one: task}, "groups": {}} for one, task in loaded["tasks"].items()
            }
        elif all(metric.weight_by_size for metric in group.aggregate_metric_list):
            units[name] = loaded
        else:
            raise ValueError(
                f"{name} weighs subtasks equally, whatever their size: name the subtasks themselves"
            )
    tasks = [task for loaded in units.values() for task in loaded["tasks"].values()]
    for task in tasks:
        settle_examples(task, arguments.num_fewshot)
    readable = sorted(name for task in tasks for name in getattr(task, "file_names", {}).values())
    if unread := sorted(set(files) - set(readable)):
        raise ValueError(
            f"--files {unread[0]}: these tasks read {', '.join(readable) or 'no files'}"
        )
    return units


def load(name: str, manager: TaskManager) -> Loaded:
    """One task, group or tag with its documents."""
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
            f"the data of {name} cannot be had ({str(error).splitlines()[0]}){hint}"
        ) from error


def settle_examples(task: Task, asked: int | None) -> None:
    """Set the number of few-shot examples, and build a prompt to see that they can be had."""
    own = task.get_config("num_fewshot")
    if mean_over_documents not in task.aggregation().values():
        raise ValueError(
            f"{task.task_name} has no score a document: base and tuned cannot be paired on it"
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


def describe(folder: Path, run: dict[str, Any], device: str) -> Entry:
    """What every entry says of the models and the machine."""
    recipe, facts = run["recipe"], environment()
    facts["versions"]["lm_eval"] = version("lm_eval")
    files = sorted(Path(recipe["model_name_or_path"]).glob("*.safetensors"))
    facts["base_model"] = {
        name: recipe[name] for name in (*ModelArguments.__dataclass_fields__, "model_init_kwargs")
    }
    facts["base_model"]["files"] = [[path.name, path.stat().st_mtime_ns] for path in files]
    return facts | {
        "adapter_hash": adapter_hash(folder),
        "template_hash": run["template"]["hash"],
        "device": device,
    }


def evaluate(
    name: str, loaded: Loaded, lm: HFLM, arguments: argparse.Namespace, facts: Entry
) -> Entry:
    """Ask both models, pair and compare their answers:

    an entry of harness.json, and its records.
    """
    template, limit = not arguments.no_chat_template, arguments.limit
    shots = max(task.get_config("num_fewshot") for task in loaded["tasks"].values())
    stem = f"{name}-{'template' if template else 'plain'}-{shots}shot{f'-first{limit}' if limit else ''}"
    path = arguments.run / "eval" / "harness" / f"{stem}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    identity = json.dumps(
        {k: fact for k, fact in facts.items() if k not in ("git_commit", "hardware")},
        sort_keys=True,
    )
    digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
    asked = {}
    for side in SIDES:
        print(f"{name}, {side}", file=sys.stderr)
        cache = path.with_name(f".unfinished-{path.name}.{side}.{digest}.db")
        asked[side] = ask(loaded, lm, side, limit, template, cache)
    samples = {side: asked[side]["samples"] for side in SIDES}
    records = {
        task: pair(task, *(samples[side][task] for side in SIDES)) for task in loaded["tasks"]
    }
    pooled = [record for task in records for record in records[task]]
    with path.open("w", encoding="utf-8") as file:
        file.writelines(
            json.dumps(record, ensure_ascii=False, default=str) + "\n" for record in pooled
        )
    kinds = [kind for task in loaded["tasks"].values() for kind in task.aggregation().items()]
    means = {metric for metric, how in kinds if how is mean_over_documents}
    figures = {side: asked[side]["results"] for side in SIDES}
    metrics = compare_items(name, pooled, figures, means)
    entry = {
        "task": name,
        "chat_template": template,
        "few_shot": shots,
        "limit": limit,
        "task_version": asked["base"]["versions"][name],
        "documents": len({(record["task"], record["doc_id"]) for record in pooled}),
        "main_metric": max(metrics, key=lambda key: any(part in key for part in MAIN)),
        "metrics": metrics,
        "cut_prompts": sum(cut_prompts(lm, part) for part in samples["base"].values()),
        "window": lm.max_length,
        "batch_size": arguments.batch_size,
        "records": path.name,
        **{
            name: {side: asked[side][name] for side in SIDES}
            for name in ("seconds", "answers_reused")
        },
        **facts,
    }
    if len(records) > 1:
        entry["pooled"] = (
            "the documents of all subtasks, each counted once (lm-eval's weight_by_size)"
        )
        entry["subtasks"] = {
            task: compare_items(task, records[task], figures, means) for task in records
        }
    return entry


def ask(
    loaded: Loaded, lm: HFLM, side: str, limit: int | None, template: bool, cache: Path
) -> dict[str, Any]:
    """lm-eval's results of one model.

    Every answer is kept in `cache`, whose keys name the request but no model.
    """
    caching = CachingLM(lm, str(cache))
    reused = len(caching.dbdict)
    transformers.set_seed(SEED)
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(SEED)
    start = time.perf_counter()
    chat = {"apply_chat_template": template, "fewshot_as_multiturn": template}
    with answering(lm.model, side):
        results = lm_eval.evaluate(caching, loaded, limit=limit, bootstrap_iters=0, **chat)
    caching.dbdict.close()
    return results | {"seconds": round(time.perf_counter() - start, 2), "answers_reused": reused}


def pair(task: str, base: list[dict[str, Any]], tuned: list[dict[str, Any]]) -> list[Record]:
    """lm-eval's samples of both models as a record a document and filter.

    ValueError where they are not the same.
    """
    first, second = (
        {(sample["doc_id"], sample["filter"]): sample for sample in side} for side in (base, tuned)
    )
    same = ("doc_hash", "prompt_hash", "target_hash", "metrics")
    alike = len(base) == len(tuned) == len(first) and first.keys() == second.keys()
    if not alike or any(first[key][name] != second[key][name] for key in first for name in same):
        raise ValueError(
            f"{task}: base and tuned were not asked the same documents with the same prompts"
        )
    about = [
        {name: one[name] for name in ("doc_id", "filter", *same[:2], "target")}
        for one in first.values()
    ]
    answers = [{"base": scored(one), "tuned": scored(second[key])} for key, one in first.items()]
    return [{"task": task} | one | both for one, both in zip(about, answers, strict=True)]


def scored(sample: dict[str, Any]) -> dict[str, Any]:
    """The text generated and what the filter took from it, or each choice's log-likelihood in nats;
    and the scores.
    """
    responses = [response[0] for response in sample["resps"]]
    scores = {"scores": {name: sample[name] for name in sample["metrics"]}}
    if isinstance(responses[0], str):
        return {"answer": responses[0], "filtered": sample["filtered_resps"][0]} | scores
    return {"log_likelihoods": [log_likelihood for log_likelihood, _ in responses]} | scores


def compare_items(
    name: str, records: list[Record], figures: dict[str, Any], means: set[str]
) -> dict[str, Any]:
    """Compare on lm-eval's figures ('acc,none') that are `means`.

    ValueError where one is not that of its records.
    """
    values = {}
    for key in (key for key in figures["base"][name] if key.split(",")[0] in means):
        metric, chosen = key.split(",")
        rows = [
            [one[side]["scores"][metric] for one in records if one["filter"] == chosen]
            for side in SIDES
        ]
        values[key] = np.array(rows, dtype=float)
        given = [figures[side][name][key] for side in SIDES]
        if not np.allclose(values[key].mean(axis=1), given, rtol=1e-9, atol=1e-12):
            hint = (
                "a document's choices all have probability 0"
                if np.isnan(given).any()
                else "lm-eval aggregates otherwise"
            )
            raise ValueError(f"{name}, {key}: {given} are not the means of the documents: {hint}")
    compared = compare({key: Paired(mean, *map(with_counts, rows)) for key, rows in values.items()})
    for key, rows in values.items():
        rates = np.isin(rows, (0, 1)).all()
        compared[key]["statistics"] = (
            "Wilson, Newcombe, exact McNemar" if rates else "paired bootstrap"
        )
        compared[key] |= compare_rates(*rows) if rates else {}
    return compared


def cut_prompts(lm: HFLM, samples: list[dict[str, Any]]) -> int:
    """How many documents exceed the model's window, so that lm-eval drops the beginning of their
    prompts.
    """
    cut = set()
    for sample in samples:
        text, rest = max(sample["arguments"], key=lambda request: len(request[1]))
        generated = (
            normalize_gen_kwargs(rest, lm.max_gen_toks)["max_gen_toks"]
            if isinstance(rest, dict)
            else -1
        )
        if (
            len(lm.tok_encode(text if isinstance(rest, dict) else text + rest))
            > lm.max_length - generated
        ):
            cut.add(sample["doc_id"])
    return len(cut)


def write_entries(path: Path, entries: list[Entry]) -> None:
    """Add the entries to harness.json in place of those with the same KEY."""
    old = json.loads(path.read_text(encoding="utf-8"))["entries"] if path.is_file() else []
    new = [[entry[name] for name in KEY] for entry in entries]
    write_json(
        path, {"entries": [one for one in old if [one[name] for name in KEY] not in new] + entries}
    )


def print_table(folder: Path, entries: list[Entry]) -> None:
    """A line a metric, each task's main one first, and what must be known to read them."""
    prompts = "the run's chat template" if entries[0]["chat_template"] else "plain prompts"
    print(f"\n{folder}: base against tuned, lm-eval {entries[0]['versions']['lm_eval']}, {prompts}")
    rows = [("task", "shots", "n", "metric", "base", "tuned", "tuned - base", "p", "p (Holm)")]
    for entry in entries:
        about = (entry["task"], str(entry["few_shot"]), str(entry["documents"]))
        for key in sorted(entry["metrics"], key=lambda key: key != entry["main_metric"]):
            one = entry["metrics"][key]
            cells = (
                key,
                *(interval(one[name]) for name in (*SIDES, "difference")),
                p_value(one["p_value"]),
            )
            rows.append((*about, *cells, p_value(one["p_holm"]) if "p_holm" in one else ""))
            about = ("", "", "")
    print(aligned(rows))
    print(
        "  in brackets 95 % intervals: where scores are 0 or 1 Wilson's and Newcombe's, and p is "
        "McNemar's (exact);"
    )
    print(
        f"  else both by paired bootstrap; p (Holm): corrected for {len(entries)} task(s), each by "
        "its first line"
    )
    for entry in entries:
        if entry["limit"]:
            print(f"  {entry['task']}: the first documents only (--limit), no random sample")
        if entry["documents"] < FEW_ROWS:
            print(f"  {entry['task']}: fewer than {FEW_ROWS} documents, the intervals are rough")
        if cut := entry["cut_prompts"]:
            print(
                f"  {entry['task']}: {cut} prompts do not fit the model's {entry['window']} "
                "tokens: beginning cut off"
            )


if __name__ == "__main__":
    main(sys.argv[1:])
