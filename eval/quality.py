"""Compare base and tuned on the test split: perplexity, BLEU and ROUGE with 95 % intervals.

python eval/quality.py --run runs/demo-attn_r16 [--samples 1000] [--batch_size 32]
    [--max_new_tokens 256]
python eval/quality.py --config_file accelerate_configs/ddp.yaml --num_processes 4 --run runs/x

Both models answer the same rows under the run's own template and mask, from one load of the
weights. RUN/eval/quality.json has the scores, and RUN/eval/quality.jsonl one record per row.
Answers are kept in RUN/eval/answers-*.jsonl as they are generated. After a kill the same command
goes on from there. Several processes are dealt whole batches, and the results are those of one.
"""

import sftlab.startup.filter_warnings  # noqa: I001  (before the libraries that it quiets)
import sftlab.startup.launcher  # it may replace this process
import sftlab.startup.preload  # noqa: F401

import argparse
import sys
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from sftlab.exit_messages import mistakes_in_one_line
from sftlab.files import write_json, write_lines
from sftlab.evaluation.documents import document_records, holds_documents, select_documents
from sftlab.evaluation.answer_file import AnswerFile, answer_facts, fill
from sftlab.evaluation.generation import (
    Generator,
    Sampling,
    generation_facts,
    rows_worth_compiling,
    longest_prompt,
)
from sftlab.evaluation.held_out import HeldOut, ScoredRows, held_out, select
from sftlab.evaluation.base_and_tuned import (
    add_trust_flag,
    answering,
    finished_run,
    load_pair,
    model_settings,
    refuse_unknown_ids,
    run_tokenizer,
    evaluation_errors,
)
from sftlab.evaluation.processes import Processes
from sftlab.evaluation.served_answers import (
    FACTS,
    ServedModels,
    add_server_flags,
    refuse_many_askers,
    served_models,
)
from sftlab.export.server_agreement import LoadedRun, answers_of_held_server
from sftlab.runs.environment import environment
from sftlab.runs.made_files import result_name
from sftlab.runs.run_directory import SIDES, adapter_hash
from sftlab.evaluation.row_scores import likelihoods, score_rows
from sftlab.evaluation.text_metrics import (
    NAMES,
    ROUGE_SIGNATURE,
    Bleu,
    paired_scores,
    tokenizer_of,
)
from sftlab.evaluation.significance import add_holm, compare, method
from sftlab.evaluation.quality_warnings import few_row_warnings, short_row_warnings, warnings
from sftlab.script_options import Options
from sftlab.startup.launcher import reported_to_launcher
from sftlab.tables import aligned, interval, p_value, preview

SHOWN_PROMPTS = 3
LEFT_OUT = {
    "rows_without_a_response_token": "rows left out: max_length leaves nothing of the response",
    "rows_without_room": "rows left out: the prompt leaves no room for an answer",
    "references_cut": "rows that max_length cuts (for perplexity alone)",
}


def main(argv: list[str]) -> None:
    """Load the run, let both models answer, score, compare, write, print."""
    arguments = parse_arguments(argv)
    with evaluation_errors(
        f" at --batch_size {arguments.batch_size}: take a smaller one; answers are kept"
    ):
        processes = Processes.joined()
        refuse_many_askers(arguments, processes)
        evaluate(arguments, processes)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = Options(description=__doc__.splitlines()[0])
    parser.add_argument("--run", required=True, type=Path, help="a finished run's directory")
    add_trust_flag(parser)
    parser.add_argument(
        "--samples", type=int, default=0, help="the first n test rows (default: all)"
    )
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument(
        "--no_compile",
        action="store_true",
        help="neither capture nor compile the decoding step (by default a GPU does)",
    )
    parser.add_argument("--max_new_tokens", type=int, default=256, help="longest answer")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument(
        "--seed", type=int, default=0, help="of sampling; greedy decoding needs none"
    )
    parser.add_argument(
        "--bleu_tokenize",
        help="sacrebleu's tokenizer: 13a, intl, zh, char, ... (default: by the references' script)",
    )
    add_server_flags(parser)
    parser.add_argument(
        "--dataset_name", help="score all rows of this data set instead of the run's test split"
    )
    parser.add_argument("--dataset_config", help="configuration of that hub data set")
    parser.add_argument("--dataset_split", default="train", help="split of that hub data set")
    parser.needs("--dataset_config", "--dataset_name")
    parser.needs("--dataset_split", "--dataset_name")
    return parser.parse_args(argv)


def evaluate(arguments: argparse.Namespace, processes: Processes) -> None:
    """Run the whole evaluation. Raises ValueError where it cannot be done."""
    if arguments.samples < 0 or arguments.batch_size < 1:
        raise ValueError("--samples must be 0 (all) or more and --batch_size at least 1")
    sampling = sampling_of(arguments)
    bleu = Bleu(arguments.bleu_tokenize) if arguments.bleu_tokenize else None
    served = served_models(arguments)
    run = finished_run(arguments.run)
    dataset = held_out(
        run, arguments.dataset_name, arguments.dataset_config, arguments.dataset_split
    )
    tokenizer = run_tokenizer(arguments.run, run)
    model = load_pair(arguments.run, run, arguments.trust_remote_code)
    refuse_unknown_ids(model, tokenizer)
    if holds_documents(dataset):
        evaluate_documents(arguments, run, dataset, model, tokenizer, processes)
        return
    longest = longest_prompt(model.config, sampling)
    recipe = run["recipe"]
    cut = recipe.get("truncation_mode", "keep_start")
    rows = select(dataset, arguments.samples, tokenizer, recipe["max_length"], longest, cut)
    bleu = bleu or Bleu(tokenizer_of([row["reference"] for row in rows.rows]))
    memory, started = {"weights": allocated_gb()}, time.perf_counter()
    nll, same_token = likelihoods(model, rows, tokenizer, arguments.batch_size, processes)
    likelihood_seconds = round(time.perf_counter() - started, 2)
    memory["likelihood_peak"] = allocated_gb(peak=True)
    pair = LoadedRun(run, model, tokenizer)
    if served:
        answers, generation = ask_server(arguments, dataset, rows, served, pair)
    else:
        answers, generation = generate(arguments, dataset, rows, pair, processes)
    if not processes.is_main:
        return
    memory["generation_peak"] = allocated_gb(peak=True)

    records = score_rows(rows, nll, answers, bleu)
    report = facts_of(arguments, dataset, rows, records, answers) | {
        "nats_of_the_token_just_read": same_token,
        "likelihood_seconds": likelihood_seconds,
        "generation": generation | {"batch_size": arguments.batch_size, "file": answers.path.name},
        "bleu": bleu.signature(),
        "gpu_memory_gb": memory if torch.cuda.is_available() else None,
    }
    report["warnings"] = warnings(report, dataset.unchecked) + short_row_warnings(records)
    write(arguments, report, records)
    print_report(report, records[:SHOWN_PROMPTS])


def evaluate_documents(
    arguments: argparse.Namespace,
    run: dict[str, Any],
    dataset: HeldOut,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    processes: Processes,
) -> None:
    """Compare the models' perplexity of plain text. Nothing is generated: it has no answers."""
    rows = select_documents(dataset, arguments.samples, tokenizer, run["recipe"]["max_length"])
    nll, _ = likelihoods(model, rows, tokenizer, arguments.batch_size, processes)
    if not processes.is_main:
        return
    records = document_records(rows, nll)
    report, documents = compared(arguments, records), {one["conversation"] for one in records}
    report |= {
        "documents": len(documents),
        "pieces": len(records),
        "held_out": dataset.facts,
        "statistics": method("documents"),
        "warnings": [dataset.unchecked] if dataset.unchecked else [],
    }
    report["warnings"] += few_row_warnings(report["scores"], len(documents), "documents")
    write(arguments, report, records, "perplexity")
    print(
        f"\n{arguments.run}: base against tuned on {report['documents']} held-out documents "
        f"({dataset.facts['dataset']}); no answers are generated, as text has none"
    )
    print_scores(report)
    for warning in report["warnings"]:
        print(f"  warning: {warning}")


def sampling_of(arguments: argparse.Namespace) -> Sampling:
    """Returns how the next token is chosen."""
    return Sampling(
        arguments.max_new_tokens, arguments.temperature, arguments.top_p, arguments.seed
    )


def generate(
    arguments: argparse.Namespace,
    dataset: HeldOut,
    rows: ScoredRows,
    pair: LoadedRun,
    processes: Processes,
) -> tuple[AnswerFile, dict[str, Any]]:
    """Returns both models' answers, generated here, and the settings of the generation."""
    sampling = sampling_of(arguments)
    generator = generator_for(pair.model, pair.tokenizer, sampling, rows, arguments)
    generation = generation_facts(sampling, generator.turn)
    generation["decoding"] = generator.decoding
    settings = answer_settings(arguments, pair.run, dataset, generation)
    answers = AnswerFile(arguments.run / "eval", settings, processes=processes)
    # the longest prompts first: those of a batch are about as long, and memory fails early
    order = sorted(range(len(rows.numbers)), key=lambda i: (-len(rows.prompts[i]), i))
    numbers, prompts = ([of[i] for i in order] for of in (rows.numbers, rows.prompts))
    asked = numbers, prompts, arguments.batch_size, generator.answers
    for side in SIDES:
        with answering(pair.model, side):
            fill(answers, side, *asked, f"{side} answers", together=False)
    answers.read_others()
    return answers, generation | {"processes": processes.count}


def ask_server(
    arguments: argparse.Namespace,
    dataset: HeldOut,
    rows: ScoredRows,
    served: ServedModels,
    pair: LoadedRun,
) -> tuple[AnswerFile, dict[str, Any]]:
    """Returns both models' answers from a server, and the settings of the generation."""
    sampling = sampling_of(arguments)
    generation = generation_facts(sampling, pair.turn) | FACTS
    settings = answer_settings(arguments, pair.run, dataset, generation)
    answers = AnswerFile(arguments.run / "eval", settings)
    for side in SIDES:
        asked = rows.numbers, rows.prompts, sampling
        answers_of_held_server(served, pair, side, answers, *asked, f"{side} answers")
    return answers, generation | {"server": served.client.url}


def generator_for(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    sampling: Sampling,
    rows: ScoredRows,
    arguments: argparse.Namespace,
) -> Generator:
    """Returns a generator; one that compiles only where there are enough rows for that to pay."""
    fast = not arguments.no_compile
    fixed = rows_worth_compiling(model, len(rows.numbers), arguments.batch_size) if fast else None
    return Generator(model, tokenizer, sampling, fixed, capture=fast)


def facts_of(
    arguments: argparse.Namespace,
    dataset: HeldOut,
    rows: ScoredRows,
    records: list[dict[str, Any]],
    answers: AnswerFile,
) -> dict[str, Any]:
    """Returns the scores of both models, and what they were measured on."""
    drawn = len({record["conversation"] for record in records})
    what = "rows" if drawn == len(records) else "conversations"
    found = {side: [answers.found[side, number] for number in rows.numbers] for side in SIDES}
    report = compared(arguments, records)
    return report | {
        "rows": len(records),
        "conversations": drawn,
        "held_out": dataset.facts | rows.left_out,
        "answers": {side: answer_facts(found[side]) | answers.pace(side) for side in SIDES},
        "rouge": ROUGE_SIGNATURE,
        "statistics": f"{method(what)}; p_holm: Holm over {len(report['scores'])} scores",
    }


def compared(arguments: argparse.Namespace, records: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the scores of both models over records, with the run and the machine."""
    pairs = paired_scores(*([record[side] for record in records] for side in SIDES))
    scores = compare(pairs, clusters=[record["conversation"] for record in records])
    add_holm(scores)
    return {
        "run": str(arguments.run),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "adapter_hash": adapter_hash(arguments.run),
        "scores": scores,
        **environment(),
    }


def write(
    arguments: argparse.Namespace,
    report: dict[str, Any],
    records: list[dict[str, Any]],
    name: str = "quality",
) -> None:
    """Write NAME.json and NAME.jsonl. Another data set's name becomes part of the names.

    A result of more rows that is there is kept aside.
    """
    name, folder = result_name(name, arguments.dataset_name), arguments.run / "eval"
    folder.mkdir(exist_ok=True)
    if kept := keep_larger(folder, name, len(records)):
        print(f"the result of more rows that was there is now {kept}")
    write_lines(folder / f"{name}.jsonl", records)
    write_json(folder / f"{name}.json", report)


def keep_larger(folder: Path, name: str, rows: int) -> Path | None:
    """Rename NAME.json and NAME.jsonl of more than so many rows; returns the former's new path."""
    table = folder / f"{name}.jsonl"
    if not table.exists() or (count := len(table.read_bytes().splitlines())) <= rows:
        return None
    for suffix in (".jsonl", ".json"):
        with suppress(FileNotFoundError):
            (folder / f"{name}{suffix}").replace(folder / f"of-{count}-rows-{name}{suffix}")
    return folder / f"of-{count}-rows-{name}.json"


def answer_settings(
    arguments: argparse.Namespace, run: dict[str, Any], dataset: HeldOut, generation: dict[str, Any]
) -> dict[str, Any]:
    """Returns what answers depend on. Batches matter only for sampled ones."""
    settings = model_settings(arguments.run, run) | dataset.facts | generation
    if arguments.temperature > 0:
        settings |= {"samples": arguments.samples, "batch_size": arguments.batch_size}
    return settings


def print_report(report: dict[str, Any], shown: list[dict[str, Any]]) -> None:
    """Print the comparison as a table, and the first prompts with both answers."""
    print(
        f"\n{report['run']}: base against tuned on {report['rows']} held-out rows "
        f"({report['held_out']['dataset']})"
    )
    print_scores(report)
    limit = report["generation"]["max_new_tokens"]
    for side in SIDES:
        facts = report["answers"][side]
        ended = f"{facts['empty']} empty, {facts['cut_at_max_new_tokens']} cut at {limit} tokens"
        print(f"  {side} answers: {ended}, {facts['mean_tokens']} tokens on average")
    for what, said in LEFT_OUT.items():
        if count := report["held_out"][what]:
            print(f"  {said}: {count}")
    for warning in report["warnings"]:
        print(f"  warning: {warning}")
    for record in shown:
        print(f"\n  row {record['row']}: {preview(record['prompt'][-1]['content'])}")
        print(f"    reference  {preview(record['reference'])}")
        for side in SIDES:
            print(f"    {side:<11}{preview(record[side]['text']) or '(empty)'}")


def print_scores(report: dict[str, Any]) -> None:
    """Print the scores of both models as a table."""
    lines = [["", "base", "tuned", "tuned - base", "p"]]
    for name, one in report["scores"].items():
        values = [interval(one[what]) for what in ("base", "tuned", "difference")]
        lines.append([NAMES[name], *values, p_value(one["p_holm"])])
    print(aligned(lines))
    print(f"  in brackets 95 % intervals; {report['statistics'].replace('p_holm', 'p')}")


def allocated_gb(peak: bool = False) -> float | None:
    """Returns GPU memory in GB (2**30 bytes): allocated now, or its peak since the last call."""
    if not torch.cuda.is_available():
        return None
    size = torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return round(size / 2**30, 3)


if __name__ == "__main__":
    with reported_to_launcher(), mistakes_in_one_line():
        main(sys.argv[1:])
