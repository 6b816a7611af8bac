"""Compare the base and the tuned model of a run on lm-eval-harness tasks, document by document.

python eval/harness.py --run runs/x --tasks mmlu,arc_challenge,gsm8k,truthfulqa_mc2 [--limit 100]
    [--num_fewshot 5] [--batch_size 16] [--no_chat_template]
    [--files gsm8k_test=FILE gsm8k_train=FILE ...]
    [--server http://127.0.0.1:8000/v1 [--server_likelihoods]]
python eval/harness.py --config_file accelerate_configs/ddp.yaml --num_processes 4 --run runs/x ...

Both models answer from one load of the weights, under the run's chat template.
RUN/eval/harness.json keeps the newest entry of each task, template on or off, few-shot count and
limit. RUN/eval/harness/ has one record per document and filter. The tasks *_local read --files
instead of the hub. After an interruption the same command asks only what is not answered yet.
Several processes are dealt whole batches, and results are those of one. A server generates texts;
log-likelihoods stay on transformers without --server_likelihoods.
"""

import sftlab.startup.filter_warnings  # noqa: I001  (before the libraries that it quiets)
import sftlab.startup.launcher  # it may replace this process
import sftlab.startup.preload  # noqa: F401

import argparse
import hashlib
import io
import json
import logging
import sys
import time
from contextlib import nullcontext, redirect_stderr
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import transformers
from lm_eval.api.model import CachingLM

from sftlab.config.recipe import ModelArguments
from sftlab.evaluation.base_and_tuned import (
    add_trust_flag,
    answering,
    evaluation_errors,
    finished_run,
    load_pair,
    refuse_unknown_ids,
    run_tokenizer,
)
from sftlab.evaluation.harness_comparison import (
    Record,
    compare_items,
    count_cut_prompts,
    means_of,
    pair,
)
from sftlab.evaluation.entries import read_entries
from sftlab.evaluation.harness_models import (
    SERVER,
    TRANSFORMERS,
    DealtModel,
    ServedModel,
    answered_by,
    joined_cache,
)
from sftlab.evaluation.harness_tasks import SEED, LoadedTasks, load_units
from sftlab.evaluation.processes import Processes
from sftlab.evaluation.served_answers import (
    ServedModels,
    add_server_flags,
    refuse_many_askers,
    served_models,
)
from sftlab.evaluation.significance import FEW_ROWS, add_holm
from sftlab.exit_messages import mistakes_in_one_line
from sftlab.export.server_agreement import LoadedRun, hold_side
from sftlab.files import write_json
from sftlab.models.identity import base_identity, tokenizer_identity
from sftlab.runs.environment import environment
from sftlab.runs.run_directory import SIDES, adapter_hash
from sftlab.script_options import Options
from sftlab.startup.launcher import reported_to_launcher
from sftlab.tables import aligned, interval, p_value

LOCAL_TASKS = str(Path(__file__).parent / "tasks")
KEY = ("task", "chat_template", "few_shot", "limit")
# messages that lm-eval logs for every loaded model, and one that `count_cut_prompts` replaces
NOISE = ("`pretrained` model kwarg", "Passed an already-initialized", "Left truncation applied")
# The metrics that depend least on an answer's length and form. Where a task has one, it enters
# Holm's correction.
MAIN = ("acc_norm,", ",flexible-extract")
Entry = dict[str, Any]  # one of harness.json


def main(argv: list[str]) -> None:
    """Load the tasks, then the models; ask, compare, write, print."""
    arguments = parse_arguments(argv)
    with evaluation_errors(
        f" at --batch_size {arguments.batch_size}: take a smaller one; answers are kept"
    ):
        check_at_least(arguments, limit=1, batch_size=1, num_fewshot=0)
        processes = Processes.joined()
        quiet_libraries(processes)
        refuse_many_askers(arguments, processes)
        served = served_models(arguments)
        run = finished_run(arguments.run)
        names = arguments.tasks.replace(" ", "").split(",")
        units = load_units(names, arguments.num_fewshot, arguments.files, LOCAL_TASKS)
        who = answerers(units, arguments)
        tokenizer = run_tokenizer(arguments.run, run)
        model = load_pair(arguments.run, run, arguments.trust_remote_code)
        refuse_unknown_ids(model, tokenizer)
        facts = describe(arguments.run, run, model.device.type)
        lm = model_for(LoadedRun(run, model, tokenizer), served, processes, arguments)
        entries = []
        for name, loaded in units.items():
            about = facts | who[name]
            path = records_path(name, loaded, arguments)
            asked = ask_both(name, loaded, lm, arguments, about, path)
            if processes.is_main:
                entries.append(evaluate(name, loaded, lm, asked, arguments, path) | about)
    if not processes.is_main:
        return
    add_holm({entry["task"]: entry["metrics"][entry["main_metric"]] for entry in entries})
    write_entries(arguments.run / "eval" / "harness.json", entries)
    for entry in entries:
        kept = (arguments.run / "eval" / "harness").glob(f".unfinished-{entry['records']}.*")
        for answers in kept:
            answers.unlink()
    print_table(arguments.run, entries)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = Options(description=__doc__.splitlines()[0])
    parser.add_argument("--run", required=True, type=Path, help="a finished run's directory")
    add_trust_flag(parser)
    parser.add_argument(
        "--tasks", required=True, help="lm-eval's tasks and groups, separated by commas"
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
    add_server_flags(parser)
    parser.add_argument(
        "--server_likelihoods",
        action="store_true",
        help="the server gives log-likelihoods too (default: transformers does)",
    )
    parser.needs("--server_likelihoods", "--server")
    return parser.parse_args(argv)


def check_at_least(arguments: argparse.Namespace, **least: int) -> None:
    """Raise ValueError for an option below its smallest value."""
    for name, smallest in least.items():
        if (value := getattr(arguments, name)) is not None and value < smallest:
            raise ValueError(f"--{name} is {value}: expected {smallest} or more")


def answerers(
    units: dict[str, LoadedTasks], arguments: argparse.Namespace
) -> dict[str, dict[str, str | None]]:
    """Returns of each unit who answers it, and the server's address.

    Raises ValueError where a server would answer nothing.
    """
    url, likelihoods = arguments.server, arguments.server_likelihoods
    found = {name: answered_by(loaded, bool(url), likelihoods) for name, loaded in units.items()}
    if url and not any(SERVER in who for who in found.values()):
        raise ValueError(
            f"--server generates texts, and {', '.join(found)} compares log-likelihoods: leave it "
            "out, or ask for them with --server_likelihoods"
        )
    return {name: {"answered_by": who, "server": url} for name, who in found.items()}


def model_for(
    pair: LoadedRun,
    served: ServedModels | None,
    processes: Processes,
    arguments: argparse.Namespace,
) -> DealtModel:
    """Returns lm-eval's model of the run. A server is held to transformers first."""
    size = arguments.batch_size
    if served is None:
        return DealtModel(pair.model, pair.tokenizer, size, processes)
    for side in SIDES:
        hold_side(served, pair, side)
    return ServedModel(pair.model, pair.tokenizer, size, served, arguments.server_likelihoods)


def quiet_libraries(processes: Processes) -> None:
    """Silence progress bars and messages that say nothing to the reader."""
    if not processes.is_main:
        logging.disable(logging.WARNING)
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)
    logging.getLogger("lm_eval.models.huggingface").addFilter(
        lambda said: not said.getMessage().startswith(NOISE)
    )


def describe(folder: Path, run: dict[str, Any], device: str) -> Entry:
    """Returns the facts of the models and the machine that every entry holds."""
    recipe, facts = run["recipe"], environment()
    facts["versions"]["lm_eval"] = version("lm_eval")
    facts["base_model"] = {
        name: recipe.get(name)
        for name in (*ModelArguments.__dataclass_fields__, "model_init_kwargs")
    }
    facts["base_model"]["identity"] = base_identity(
        recipe["model_name_or_path"], recipe["model_revision"]
    )
    return facts | {
        "adapter_hash": adapter_hash(folder),
        "tokenizer": tokenizer_identity(folder / "adapter"),
        "template_hash": run["template"]["hash"],
        "device": device,
    }


def records_path(name: str, loaded: LoadedTasks, arguments: argparse.Namespace) -> Path:
    """Returns the file of a unit's records."""
    prompts = "plain" if arguments.no_chat_template else "template"
    first = f"-first{arguments.limit}" if arguments.limit else ""
    file = f"{name}-{prompts}-{few_shot(loaded)}shot{first}.jsonl"
    return arguments.run / "eval" / "harness" / file


def few_shot(loaded: LoadedTasks) -> int:
    """Returns how many examples the prompts of a unit's tasks have, at most."""
    return max(task.get_config("num_fewshot") for task in loaded["tasks"].values())


def evaluate(
    name: str,
    loaded: LoadedTasks,
    lm: DealtModel,
    asked: dict[str, dict[str, Any]],
    arguments: argparse.Namespace,
    path: Path,
) -> Entry:
    """Compare what both models answered and write the records.

    Returns an entry of harness.json.
    """
    samples = {side: asked[side]["samples"] for side in SIDES}
    records = {
        task: pair(task, *(samples[side][task] for side in SIDES)) for task in loaded["tasks"]
    }
    pooled = [record for task in records for record in records[task]]
    write_records(path, pooled)
    means = means_of(loaded)
    figures = {side: asked[side]["results"] for side in SIDES}
    metrics = compare_items(name, pooled, figures, means)
    entry = {
        "task": name,
        "chat_template": not arguments.no_chat_template,
        "few_shot": few_shot(loaded),
        "limit": arguments.limit,
        "task_version": asked["base"]["versions"][name],
        "documents": len({(record["task"], record["doc_id"]) for record in pooled}),
        "main_metric": max(metrics, key=lambda key: any(part in key for part in MAIN)),
        "metrics": metrics,
        "cut_prompts": sum(count_cut_prompts(lm, part) for part in samples["base"].values()),
        "window": lm.max_length,
        "batch_size": arguments.batch_size,
        "processes": lm.processes.count,
        "records": path.name,
    }
    for key in ("seconds", "answers_reused"):
        entry[key] = {side: asked[side][key] for side in SIDES}
    if len(records) > 1:
        entry["pooled"] = "the documents of all subtasks, each once (lm-eval's weight_by_size)"
        entry["subtasks"] = {
            task: compare_items(task, records[task], figures, means) for task in records
        }
    return entry


def ask_both(
    name: str,
    loaded: LoadedTasks,
    lm: DealtModel,
    arguments: argparse.Namespace,
    facts: Entry,
    path: Path,
) -> dict[str, dict[str, Any]]:
    """Returns lm-eval's results of both models. Answers are kept beside `path` meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    identity = {key: fact for key, fact in facts.items() if key not in ("git_commit", "hardware")}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    asked, template = {}, not arguments.no_chat_template
    for side in SIDES:
        cache = path.with_name(f".unfinished-{path.name}.{side}.{digest}.db")
        with nullcontext() if lm.processes.is_main else redirect_stderr(io.StringIO()):
            print(f"{name}, {side}", file=sys.stderr)
            own = joined_cache(cache, lm.processes)
            asked[side] = ask(loaded, lm, side, arguments.limit, template, own)
    return asked


def ask(
    loaded: LoadedTasks, lm: DealtModel, side: str, limit: int | None, template: bool, cache: Path
) -> dict[str, Any]:
    """Returns lm-eval's results of one model.

    Every answer is kept in `cache`. Its keys name the request but no model.
    """
    if isinstance(lm, ServedModel):
        lm.side = side
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


def write_records(path: Path, records: list[Record]) -> None:
    """Write one JSON line per record."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(
            json.dumps(record, ensure_ascii=False, default=str) + "\n" for record in records
        )


def write_entries(path: Path, entries: list[Entry]) -> None:
    """Add the entries to harness.json. They replace those with the same KEY."""
    old = read_entries(path, KEY)
    new = [[entry[name] for name in KEY] for entry in entries]
    write_json(
        path, {"entries": [one for one in old if [one[name] for name in KEY] not in new] + entries}
    )


def print_table(folder: Path, entries: list[Entry]) -> None:
    """Print one line per metric, each task's main one first, then notes on how to read them."""
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
    print("  in brackets 95 % intervals")
    print("  scores of 0 or 1: intervals by Wilson and Newcombe, p by McNemar's exact test")
    print("  other scores: intervals by bootstrap-t, p by a paired permutation test")
    print(f"  p (Holm): corrected for {len(entries)} task(s), each by its first line")
    for entry in entries:
        if entry["server"] and TRANSFORMERS in entry["answered_by"]:
            print(f"  {entry['task']}: log-likelihoods by transformers, not by the server")
        if entry["limit"]:
            print(f"  {entry['task']}: the first documents only (--limit), no random sample")
        if entry["documents"] < FEW_ROWS:
            print(f"  {entry['task']}: fewer than {FEW_ROWS} documents, the intervals are wide")
        if cut := entry["cut_prompts"]:
            print(
                f"  {entry['task']}: {cut} prompts do not fit the model's {entry['window']} "
                "tokens, and their beginnings are cut off"
            )


if __name__ == "__main__":
    with reported_to_launcher(), mistakes_in_one_line():
        main(sys.argv[1:])
