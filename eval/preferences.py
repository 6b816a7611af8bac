"""What did preference tuning gain, and what was lost? Base, start and tuned with 95 % intervals.

python eval/preferences.py --run runs/demo-dpo-attn_r16 [--samples 1000] [--batch_size 32]
    [--max_new_tokens 256] [--dataset_name PAIRS.jsonl]
python eval/preferences.py --config_file accelerate_configs/ddp.yaml --num_processes 4 --run runs/x

Start is the model that the run went on from, usually after supervised fine-tuning (SFT). Three
things are scored: the held-out pairs, the answers to their prompts, and the test rows of the SFT
run. RUN/eval/preferences.json has the scores, RUN/eval/preferences.jsonl a record per pair, and
RUN/eval/start_rows.jsonl one per test row of the SFT run; --dataset_name adds its own name to
theirs. Answers are kept in RUN/eval/answers-*.jsonl; after a kill the same command goes on from
there.
"""

import sftlab.startup.filter_warnings  # noqa: I001  (before the libraries that it quiets)
import sftlab.startup.launcher  # it may replace this process
import sftlab.startup.preload  # noqa: F401

import argparse
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from sftlab.data.converter import PAIRS
from sftlab.evaluation.answer_file import AnswerFile, answer_facts, fill
from sftlab.evaluation.base_and_tuned import (
    add_trust_flag,
    answering,
    evaluation_errors,
    finished_run,
    load_pair,
    model_settings,
    refuse_unknown_ids,
    run_tokenizer,
)
from sftlab.evaluation.generation import (
    Answer,
    Generator,
    Sampling,
    generation_facts,
    rows_worth_compiling,
    longest_prompt,
)
from sftlab.evaluation.held_out import held_out
from sftlab.evaluation.preference_pairs import (
    CHOSEN,
    REJECTED,
    Pairs,
    log_probs,
    of_models,
    pair_scores,
    perplexities,
    read_pairs,
)
from sftlab.evaluation.preference_words import SCORES, lines_of, warnings
from sftlab.evaluation.processes import Processes
from sftlab.evaluation.row_scores import likelihoods
from sftlab.evaluation.significance import add_holm, mean, method, with_counts
from sftlab.evaluation.start_model import Start, load_start, sides_of, start_of
from sftlab.evaluation.start_rows import StartRows, pairs_known_to_start, start_rows
from sftlab.exit_messages import mistakes_in_one_line
from sftlab.files import write_json, write_lines
from sftlab.runs.environment import environment
from sftlab.runs.made_files import result_name
from sftlab.runs.run_directory import adapter_hash
from sftlab.script_options import Options
from sftlab.startup.launcher import reported_to_launcher


class Models(NamedTuple):
    """The models of a run, loaded once, and the names of those that answer."""

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    start: Start | None

    @property
    def sides(self) -> tuple[str, ...]:
        """Returns base, start (if the run went on from an adapter) and tuned."""
        return sides_of(self.start)


def main(argv: list[str]) -> None:
    """Load the run, score pairs, answers and the start's rows, write, print."""
    arguments = parse_arguments(argv)
    with evaluation_errors(
        f" at --batch_size {arguments.batch_size}: take a smaller one; answers are kept"
    ):
        evaluate(arguments, Processes.joined())


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = Options(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--run", required=True, type=Path, help="a finished run of method dpo")
    add_trust_flag(parser)
    add("--samples", type=int, default=0, help="the first n test pairs and rows (default: all)")
    add("--batch_size", type=int, default=32)
    add("--max_new_tokens", type=int, default=256, help="longest answer")
    add("--dataset_name", help="score all pairs of this data set instead of the run's test split")
    add("--dataset_config", help="configuration of that hub data set")
    add("--dataset_split", default="train", help="split of that hub data set")
    return parser.parse_args(argv)


def evaluate(arguments: argparse.Namespace, processes: Processes) -> None:
    """Run the whole evaluation. Raises ValueError where it cannot be done."""
    if arguments.samples < 0 or arguments.batch_size < 1:
        raise ValueError("--samples must be 0 (all) or more and --batch_size at least 1")
    sampling = Sampling(arguments.max_new_tokens)
    run = finished_run(arguments.run)
    if run["recipe"].get("method") != "dpo":
        raise ValueError(
            f"{arguments.run} is no preference tuning (its recipe has no method: dpo): "
            "eval/quality.py compares base and tuned"
        )
    start = start_of(arguments.run, run)
    other = arguments.dataset_name, arguments.dataset_config, arguments.dataset_split
    dataset = held_out(run, *other, shape=PAIRS)
    models = load(arguments, run, start)
    longest, room = run["recipe"]["max_length"], longest_prompt(models.model.config, sampling)
    if room < 1:
        raise ValueError("--max_new_tokens leaves the model no room for a prompt: give fewer")
    pairs = read_pairs(dataset, arguments.samples, models.tokenizer, longest, room)
    rows = start_rows(start, run, arguments.samples)

    asking = arguments.batch_size, processes, models.sides
    nll, _ = likelihoods(models.model, pairs.sides, models.tokenizer, *asking)
    of_rows = {}
    if rows.scored:
        of_rows, _ = likelihoods(models.model, rows.scored, rows.tokenizer, *asking)
    answers, generation = generate(arguments, run, models, pairs, sampling, processes)
    if not processes.is_main:
        return

    found = {side: log_probs(pairs, one) for side, one in nll.items()}
    beta = run["recipe"]["beta"]
    scores, rewards = pair_scores(found, beta, pairs.questions)
    if rows.scored:
        scores["start_perplexity"] = perplexities(of_rows, rows.conversations)
    made = {side: [answers.found[side, key] for key in pairs.prompts] for side in models.sides}
    if pairs.prompts:
        scores["answer_tokens"] = lengths(made, pairs)
    add_holm(scores)
    report = {
        "run": str(arguments.run),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "adapter_hash": adapter_hash(arguments.run),
        "start": start and {"adapter": str(start.adapter), "weights": start.weights},
        "models": models.sides,
        "beta": beta,
        "pairs": len(pairs.numbers),
        "questions": len(set(pairs.questions)),
        "held_out": dataset.facts | pairs.left_out,
        "start_rows": rows.facts,
        "scores": {name: scores[name] for name in SCORES if name in scores},
        "answers": {side: answer_facts(of) for side, of in made.items() if of},
        "generation": generation | {"file": answers.path.name},
        "statistics": f"{method('questions')}; p_holm: Holm over {len(scores)} scores",
        **environment(),
    }
    known = pairs_known_to_start(start, pairs.questions)
    report["warnings"] = warnings(report, [dataset.unchecked, rows.why_not, known])
    write(arguments, report, pair_records(pairs, found, rewards), rows, of_rows)
    print("\n".join(lines_of(report)))


def lengths(made: dict[str, list[Answer]], pairs: Pairs) -> dict[str, Any]:
    """Returns the mean tokens of each model's answers to the prompts, by question."""
    tokens = {side: with_counts(np.array([a.tokens for a in of])) for side, of in made.items()}
    return of_models(tokens, mean, [*pairs.asked.values()], 0.0)


def load(arguments: argparse.Namespace, run: dict[str, Any], start: Start | None) -> Models:
    """Load the base model with the run's adapter, and that of its start beside it."""
    tokenizer = run_tokenizer(arguments.run, run)
    model = load_pair(arguments.run, run, arguments.trust_remote_code)
    refuse_unknown_ids(model, tokenizer)
    if start:
        load_start(model, start)
    return Models(model, tokenizer, start)


def generate(
    arguments: argparse.Namespace,
    run: dict[str, Any],
    models: Models,
    pairs: Pairs,
    sampling: Sampling,
    processes: Processes,
) -> tuple[AnswerFile, dict[str, Any]]:
    """Returns every model's greedy answers to the prompts, and the settings of the generation."""
    size, prompts = arguments.batch_size, pairs.prompts
    fixed = rows_worth_compiling(models.model, len(prompts), size)
    generator = Generator(models.model, models.tokenizer, sampling, fixed)
    generation = generation_facts(sampling, generator.turn) | {"decoding": generator.decoding}
    settings = model_settings(arguments.run, run) | generation
    settings |= {"start": models.start and models.start.weights}
    answers = AnswerFile(arguments.run / "eval", settings, processes=processes)
    keys = sorted(prompts, key=lambda key: (-len(prompts[key]), key))
    for side in models.sides:
        with answering(models.model, side):
            asked = keys, [prompts[key] for key in keys], size, generator.answers
            fill(answers, side, *asked, f"{side} answers", together=False)
    answers.read_others()
    return answers, generation | {"batch_size": size, "processes": processes.count}


def pair_records(
    pairs: Pairs, found: dict[str, np.ndarray], rewards: np.ndarray
) -> list[dict[str, Any]]:
    """Returns a record per pair: its texts, each model's log-probabilities, and rewards."""
    records = []
    for place, (number, text) in enumerate(zip(pairs.numbers, pairs.texts, strict=True)):
        record = {"row": number, "question": pairs.questions[place], **text}
        # each [nats, tokens]
        record |= {side: by_answer(one[place]) for side, one in found.items()}
        record["rewards"] = by_answer(rewards[place])
        records.append(record)
    return records


def by_answer(values: np.ndarray) -> dict[str, Any]:
    """Returns values of both answers [2, ...] by name."""
    return {"chosen": values[CHOSEN].tolist(), "rejected": values[REJECTED].tolist()}


def write(
    arguments: argparse.Namespace,
    report: dict[str, Any],
    records: Sequence[dict[str, Any]],
    rows: StartRows,
    of_rows: dict[str, Any],
) -> None:
    """Write the scores, and the records of pairs and of the start's rows.

    Another data set's name becomes part of the names.
    """
    folder, other = arguments.run / "eval", arguments.dataset_name
    write_json(folder / f"{result_name('preferences', other)}.json", report)
    write_lines(folder / f"{result_name('preferences', other)}.jsonl", records)
    if rows.scored:
        nats = {side: one.response.tolist() for side, one in of_rows.items()}
        lines = [
            {"row": number, **{side: {"response_nll": of[place]} for side, of in nats.items()}}
            for place, number in enumerate(rows.scored.numbers)
        ]
        lines.sort(key=lambda line: line["row"])
        write_lines(folder / f"{result_name('start_rows', other)}.jsonl", lines)


if __name__ == "__main__":
    with reported_to_launcher(), mistakes_in_one_line():
        main(sys.argv[1:])
