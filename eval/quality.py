"""Base against tuned on the untouched test split: perplexity, BLEU and ROUGE with 95 % intervals.

python eval/quality.py --run runs/demo-attn_r16 [--samples 1000] [--batch_size 32] [--max_new_tokens 256]

Both models answer for the same rows, with the run's own template and mask, from one load of the
weights (the adapter switched off and on). Writes RUN/eval/quality.json and, one record a row,
RUN/eval/quality.jsonl. Answers are kept in RUN/eval/answers-*.jsonl as they are generated: started
again after a kill, it goes on from there.
"""

import sftlab.startup.filter_warnings  # noqa: I001  (before the libraries that it quiets)
import sftlab.startup.preload  # noqa: F401

import argparse
import json
import math
import re
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from sftlab.files import write_json
from sftlab.evaluation.answer_file import AnswerFile, answer_facts, fill
from sftlab.evaluation.generation import (
    BATCHES_WORTH_COMPILING,
    Generator,
    Sampling,
    generation_facts,
    longest_prompt,
)
from sftlab.evaluation.held_out import HeldOut, ScoredRows, held_out, select
from sftlab.models.likelihood import Likelihood, likelihood, nats_of_the_token_read
from sftlab.evaluation.base_and_tuned import (
    answering,
    finished_run,
    load_pair,
    model_settings,
    run_tokenizer,
    one_sentence,
)
from sftlab.runs.environment import environment
from sftlab.runs.run_directory import SIDES, adapter_hash
from sftlab.evaluation.text_metrics import NAMES, ROUGE_SIGNATURE, Bleu, paired_scores, score_texts
from sftlab.evaluation.significance import FEW_ROWS, add_holm, compare, method
from sftlab.tables import aligned, interval, p_value, preview

SHOWN_PROMPTS = 3


def main(argv: list[str]) -> None:
    """Load the run, let both models answer, score, compare, write, print."""
    arguments = parse_arguments(argv)
    with one_sentence(
        f" at --batch_size {arguments.batch_size}: take a smaller one; answers are kept"
    ):
        evaluate(arguments)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", required=True, type=Path, help="a finished run's directory")
    parser.add_argument(
        "--samples", type=int, default=0, help="the first n test rows (default: all)"
    )
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument(
        "--no_compile",
        action="store_true",
        help="never compile the decoding step (GPU, many batches)",
    )
    parser.add_argument("--max_new_tokens", type=int, default=256, help="longest answer")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0, help="of sampling; greedy needs none")
    parser.add_argument(
        "--bleu_tokenize", default="13a", help="sacrebleu's tokenizer (13a, intl, zh, char, ...)"
    )
    parser.add_argument(
        "--dataset_name", help="judge on all rows of this data set instead of the run's test split"
    )
    parser.add_argument("--dataset_config", help="configuration of that hub data set")
    parser.add_argument("--dataset_split", default="train", help="split of that hub data set")
    return parser.parse_args(argv)


def evaluate(arguments: argparse.Namespace) -> None:
    """The whole evaluation; ValueError says in one sentence why it cannot be done."""
    if arguments.samples < 0 or arguments.batch_size < 1:
        raise ValueError("--samples must be 0 (all) or more and --batch_size at least 1")
    sampling = Sampling(
        arguments.max_new_tokens, arguments.temperature, arguments.top_p, arguments.seed
    )
    bleu = Bleu(arguments.bleu_tokenize)
    run = finished_run(arguments.run)
    dataset = held_out(
        run, arguments.dataset_name, arguments.dataset_config, arguments.dataset_split
    )
    tokenizer = run_tokenizer(arguments.run, run)
    model = load_pair(arguments.run, run)
    rows = select(
        dataset,
        arguments.samples,
        tokenizer,
        run["recipe"]["max_length"],
        longest_prompt(model.config, sampling),
    )
    compiled = model.device.type == "cuda" and not arguments.no_compile
    compiled &= len(rows.numbers) > BATCHES_WORTH_COMPILING * arguments.batch_size
    generator = Generator(
        model, tokenizer, sampling, static_rows=arguments.batch_size if compiled else None
    )
    memory = {"weights": allocated_gb()}
    nll, same_token = likelihoods(model, rows, tokenizer, arguments.batch_size)
    memory["likelihood_peak"] = allocated_gb(peak=True)
    facts = generation_facts(sampling, generator.turn) | {"compiled": compiled}
    answers = AnswerFile(arguments.run / "eval", answer_settings(arguments, run, dataset, facts))
    for side in SIDES:
        with answering(model, side):
            title = f"{side} answers"
            fill(
                answers,
                side,
                rows.numbers,
                rows.prompts,
                arguments.batch_size,
                generator.answers,
                title,
            )
    memory["generation_peak"] = allocated_gb(peak=True)

    records = score(rows, nll, answers, bleu)
    scores = compare(paired_scores(*([record[side] for record in records] for side in SIDES)))
    add_holm(scores)
    report = {
        "run": str(arguments.run),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "adapter_hash": adapter_hash(arguments.run),
        "rows": len(records),
        "held_out": dataset.facts | rows.left_out,
        "scores": scores,
        "nats_of_the_token_just_read": same_token,
        "answers": {
            side: answer_facts([answers.found[side, number] for number in rows.numbers])
            | answers.pace(side)
            for side in SIDES
        },
        "generation": facts | {"batch_size": arguments.batch_size, "file": answers.path.name},
        "bleu": bleu.signature(),
        "rouge": ROUGE_SIGNATURE,
        "statistics": f"{method(len(records))}; p_holm: Holm over {len(scores)} scores",
        "gpu_memory_gb": memory if torch.cuda.is_available() else None,
        **environment(),
    }
    report["warnings"] = warnings(report, dataset.unchecked)
    write(arguments, report, records)
    print_report(report, records[:SHOWN_PROMPTS])


def write(
    arguments: argparse.Namespace, report: dict[str, Any], records: list[dict[str, Any]]
) -> None:
    """quality.json and quality.jsonl, under a name of their own where another data set was judged
    on.
    """
    other = arguments.dataset_name and re.sub(r"\W+", "-", Path(arguments.dataset_name).stem)
    name = f"quality-{other}" if other else "quality"
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    (arguments.run / "eval" / f"{name}.jsonl").write_text(text, encoding="utf-8")
    write_json(arguments.run / "eval" / f"{name}.json", report)


def likelihoods(
    model: PeftModel, rows: ScoredRows, tokenizer: PreTrainedTokenizerBase, size: int
) -> tuple[dict[str, Likelihood], dict[str, float]]:
    """Of both models: the references' likelihood, right-padded as in training, and the nats of the
    token just read.
    """
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    collator = DataCollatorForLanguageModeling(pad_token_id=pad)

    def batch(part: slice) -> dict[str, torch.Tensor]:
        return {k: v.to(model.device) for k, v in collator(rows.encoded[part]).items()}

    nll, same_token = {}, {}
    for side in SIDES:
        with answering(model, side):
            try:
                nll[side] = likelihood(model, map(batch, rows.batches(size)), names=rows.numbers)
            except ValueError as error:
                raise ValueError(f"{side} model, {error}") from error
            same_token[side] = nats_of_the_token_read(model, batch(slice(size)))
    return nll, same_token


def answer_settings(
    arguments: argparse.Namespace, run: dict[str, Any], dataset: HeldOut, generation: dict[str, Any]
) -> dict[str, Any]:
    """Whatever decides what the answers are.

    Batches matter where tokens are drawn, not where they are greedy.
    """
    settings = model_settings(arguments.run, run) | dataset.facts | generation
    if arguments.temperature > 0:
        settings |= {"samples": arguments.samples, "batch_size": arguments.batch_size}
    return settings


def score(
    rows: ScoredRows, nll: dict[str, Likelihood], answers: AnswerFile, bleu: Bleu
) -> list[dict[str, Any]]:
    """One record a row, in the order of the held-out set."""
    references = [row["completion"][0]["content"].strip() for row in rows.rows]
    scored = {}
    for side in SIDES:
        found = [answers.found[side, number] for number in rows.numbers]
        overlaps = score_texts([answer.text for answer in found], references, bleu)
        scored[side] = [
            answer._asdict()
            | {"response_nll": response.tolist(), "text_nll": text.tolist()}
            | overlap
            for answer, response, text, overlap in zip(found, *nll[side], overlaps, strict=True)
        ]
    records = [
        {
            "row": number,
            "prompt": row["prompt"],
            "reference": reference,
            "base": base,
            "tuned": tuned,
        }
        for number, row, reference, base, tuned in zip(
            rows.numbers, rows.rows, references, scored["base"], scored["tuned"], strict=True
        )
    ]
    return sorted(records, key=lambda record: record["row"])


def warnings(report: dict[str, Any], unchecked: str | None) -> list[str]:
    """What a reader must know before believing the table."""
    found = [unchecked] if unchecked else []
    rows, likelihoods = report["rows"], report["scores"]["response_perplexity"]
    if rows < FEW_ROWS:
        found.append(f"fewer than {FEW_ROWS} rows: the intervals are rough")
    if likelihoods["difference"]["interval_95"][0] > 0:
        found.append("the tuned model's response perplexity is higher than the base model's")
    repeating = report["answers"]["tuned"]["repetitive"]
    if repeating > rows / 2:
        found.append(f"{repeating} of {rows} tuned answers go round in circles")
    same = report["nats_of_the_token_just_read"]["tuned"]
    following = math.log(report["scores"]["text_perplexity"]["tuned"]["value"])
    if same < following / 2:
        found.append(
            f"the tuned model predicts the token that it has just read ({same:.2f} nats) rather "
            "than the next one "
            f"({following:.2f}), as one does that was trained on labels not shifted by one: "
            "distrust every score"
        )
    return found


def print_report(report: dict[str, Any], shown: list[dict[str, Any]]) -> None:
    """The comparison in a table, and the first prompts with both answers."""
    print(
        f"\n{report['run']}: base against tuned on {report['rows']} held-out rows "
        f"({report['held_out']['dataset']})"
    )
    lines = [["", "base", "tuned", "tuned - base", "p"]]
    for name, one in report["scores"].items():
        values = [interval(one[what]) for what in ("base", "tuned", "difference")]
        lines.append([NAMES[name], *values, p_value(one["p_holm"])])
    print(aligned(lines))
    print(f"  in brackets 95 % intervals; {report['statistics'].replace('p_holm', 'p')}")
    limit = report["generation"]["max_new_tokens"]
    for side in SIDES:
        facts = report["answers"][side]
        ended = f"{facts['empty']} empty, {facts['cut_at_max_new_tokens']} cut at {limit} tokens"
        print(f"  {side} answers: {ended}, {facts['mean_tokens']} tokens on average")
    for what in ("rows_without_a_response_token", "rows_without_room", "references_cut"):
        if report["held_out"][what]:
            print(f"  {what.replace('_', ' ')}: {report['held_out'][what]}")
    for warning in report["warnings"]:
        print(f"  warning: {warning}")
    for record in shown:
        print(f"\n  row {record['row']}: {preview(record['prompt'][-1]['content'])}")
        print(f"    reference  {preview(record['reference'])}")
        for side in SIDES:
            print(f"    {side:<11}{preview(record[side]['text']) or '(empty)'}")


def allocated_gb(peak: bool = False) -> float | None:
    """GPU memory in GB (2**30 bytes): allocated now, or at most since the last call."""
    if not torch.cuda.is_available():
        return None
    size = torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return round(size / 2**30, 3)


if __name__ == "__main__":
    main(sys.argv[1:])
