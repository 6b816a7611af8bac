"""Make preference pairs of a run's own solutions: right against wrong, by the final number.

python recipes/sample_pairs.py --run runs/mine --dataset_name gsm8k_train.jsonl --out pairs.jsonl
    [--questions 500] [--solutions 8] [--temperature 0.8] [--max_new_tokens 256]
python recipes/sample_pairs.py --config_file accelerate_configs/ddp.yaml --num_processes 4 ...

The answers of the data set end in `#### n`, as those of GSM8K. The tuned model solves each question
`--solutions` times. A solution is right if its final number is n: the number behind its `####`, or
its last one. A question with right and wrong solutions gives a pair; the others are counted. OUT
has prompt, chosen and rejected, a pair a line; OUT with the ending .json says how it was made.
Solutions are kept in RUN/eval/answers-*.jsonl. After a kill the same command goes on from there.
"""

import sftlab.startup.filter_warnings  # noqa: I001  (before the libraries that it quiets)
import sftlab.startup.launcher  # it may replace this process
import sftlab.startup.preload  # noqa: F401

import argparse
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sftlab.config.recipe import DataArguments
from sftlab.data.splits import load_splits
from sftlab.evaluation.answer_file import AnswerFile, answer_facts, fill
from sftlab.evaluation.base_and_tuned import (
    add_trust_flag,
    evaluation_errors,
    finished_run,
    load_pair,
    model_settings,
    refuse_unknown_ids,
    run_tokenizer,
)
from sftlab.evaluation.final_number import marked_number
from sftlab.evaluation.generation import (
    Answer,
    Generator,
    Sampling,
    generation_facts,
    longest_prompt,
    rows_worth_compiling,
)
from sftlab.evaluation.held_out import HeldOut, ScoredRows, select
from sftlab.evaluation.processes import Processes
from sftlab.evaluation.sampled_pairs import Question, counts, pairs_of, solved
from sftlab.exit_messages import mistakes_in_one_line
from sftlab.files import write_json, write_lines
from sftlab.runs.environment import environment
from sftlab.runs.run_directory import adapter_hash
from sftlab.script_options import Options
from sftlab.startup.launcher import reported_to_launcher

SIDE = "tuned"


def main(argv: list[str]) -> None:
    """Load the run, sample solutions, mark them, write the pairs, print what was made."""
    options = parse_options(argv)
    with evaluation_errors(
        f" at --batch_size {options.batch_size}: take a smaller one; solutions are kept"
    ):
        make(options, Processes.joined())


def parse_options(argv: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = Options(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--run", required=True, type=Path, help="a finished run's directory")
    add_trust_flag(parser)
    add("--dataset_name", required=True, help="questions whose answers end in '#### n'")
    add("--dataset_config", help="configuration of that hub data set")
    add("--dataset_split", default="train", help="split of that hub data set")
    add("--out", required=True, type=Path, help="the file of pairs (.jsonl)")
    add("--overwrite", action="store_true", help="replace a file that is there")
    add("--questions", type=int, default=0, help="the first n questions (0, the default: all)")
    add("--solutions", type=int, default=8, help="solutions of a question")
    add("--pairs_a_question", type=int, default=1, help="most pairs of a question")
    add("--temperature", type=float, default=0.8)
    add("--top_p", type=float, default=1.0)
    add("--seed", type=int, default=0)
    add("--max_new_tokens", type=int, default=256, help="longest solution")
    add("--batch_size", type=int, default=32, help="solutions at a time")
    return parser.parse_args(argv)


def make(options: argparse.Namespace, processes: Processes) -> None:
    """Make the pairs. Raises ValueError where it cannot be done, and where there would be none."""
    check(options)
    sampling = Sampling(options.max_new_tokens, options.temperature, options.top_p, options.seed)
    run = finished_run(options.run)
    dataset = questions_of(options)
    tokenizer = run_tokenizer(options.run, run)
    model = load_pair(options.run, run, options.trust_remote_code)
    refuse_unknown_ids(model, tokenizer)
    room = longest_prompt(model.config, sampling)
    rows = select(dataset, options.questions, tokenizer, None, room)
    known = {
        number: Question(row["prompt"], right, row.get("tools"))
        for number, row in zip(rows.numbers, rows.rows, strict=True)
        if (right := marked_number(row["reference"])) is not None
    }
    if not known:
        raise ValueError(
            f"no answer of {dataset.facts['dataset']} has '#### n' with a number: its solutions "
            "cannot be marked"
        )
    solutions, answers, generation = sample(
        options, sampling, run, model, tokenizer, rows, known, dataset, processes
    )
    if not processes.is_main:
        return
    found = {number: solved(solutions[number], known[number].number) for number in sorted(known)}
    pairs = [
        pair
        for number, one in found.items()
        for pair in pairs_of(known[number], one, options.pairs_a_question)
    ]
    facts = counts([*found.values()]) | {
        "pairs": len(pairs),
        "questions_without_a_number": len(rows.numbers) - len(known),
        "questions_without_room": rows.left_out["rows_without_room"],
    }
    print("\n".join(lines_of(options, facts)))
    if not pairs:
        raise ValueError(
            "no question has both a right and a wrong solution, so no pairs are written: give more "
            "--solutions or --questions, or a higher --temperature"
        )
    write_lines(options.out, pairs)
    every = [one for number in sorted(known) for one in solutions[number]]
    write_json(
        options.out.with_suffix(".json"),
        {
            "run": str(options.run),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "adapter_hash": adapter_hash(options.run),
            "data": dataset.facts,
            "generation": generation | {"file": answers.path.name},
            "solutions": options.solutions,
            "answers": answer_facts(every) | answers.pace(SIDE),
            **facts,
            **environment(),
        },
    )


def check(options: argparse.Namespace) -> None:
    """Raise ValueError for options that cannot hold, before anything is loaded."""
    for name in ("solutions", "pairs_a_question", "batch_size"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} {getattr(options, name)}: expected at least 1")
    if options.questions < 0:
        raise ValueError(f"--questions {options.questions}: expected 0 (all) or more")
    if options.solutions < 2 or not options.temperature:
        raise ValueError(
            "a question gives a pair where its solutions differ: give --solutions 2 or more and "
            "a --temperature above 0"
        )
    if options.out.resolve() == Path(options.dataset_name).resolve():
        raise ValueError(f"--out {options.out} is the file of the questions: name another")
    if options.out.suffix != ".jsonl":
        raise ValueError(f"--out {options.out}: expected a name that ends in .jsonl")
    for path in (options.out, options.out.with_suffix(".json")):
        if path.exists() and not options.overwrite:
            raise ValueError(f"{path} is there already: give another --out, or --overwrite")


def questions_of(options: argparse.Namespace) -> HeldOut:
    """Returns all rows of the data set. Raises ValueError where it cannot be read."""
    splits = load_splits(
        DataArguments(
            dataset_name=options.dataset_name,
            dataset_config=options.dataset_config,
            dataset_train_split=options.dataset_split,
            split_fractions=[0.0, 0.0, 1.0],
        )
    )
    facts = {
        "dataset": options.dataset_name,
        "fingerprint": splits.facts["test"]["fingerprint"],
    }
    return HeldOut(splits.test, facts, None)


def sample(
    options: argparse.Namespace,
    sampling: Sampling,
    run: dict[str, Any],
    model: Any,
    tokenizer: Any,
    rows: ScoredRows,
    known: dict[int, Question],
    dataset: HeldOut,
    processes: Processes,
) -> tuple[dict[int, list[Answer]], AnswerFile, dict[str, Any]]:
    """Returns the solutions of each question by its row, their file, and how they were made."""
    asked = [
        (f"{number}/{solution}", prompt)
        for number, prompt in zip(rows.numbers, rows.prompts, strict=True)
        if number in known
        for solution in range(options.solutions)
    ]
    size = options.batch_size
    fixed = rows_worth_compiling(model, len(asked), size)
    generator = Generator(model, tokenizer, sampling, fixed)
    generation = generation_facts(sampling, generator.turn) | {"decoding": generator.decoding}
    generation |= {
        name: getattr(options, name) for name in ("questions", "solutions", "batch_size")
    }
    settings = model_settings(options.run, run) | dataset.facts | generation
    answers = AnswerFile(options.run / "eval", settings, processes=processes)
    names, prompts = zip(*asked, strict=True)
    fill(answers, SIDE, names, prompts, size, generator.answers, "solutions")
    found = {
        number: [answers.found[SIDE, f"{number}/{n}"] for n in range(options.solutions)]
        for number in known
    }
    return found, answers, generation


def lines_of(options: argparse.Namespace, facts: dict[str, Any]) -> list[str]:
    """Returns what was made, for a reader, and what to type next."""
    solutions = sum(facts[f"solutions_{name}"] for name in ("right", "wrong", "unfinished"))
    lines = [
        f"{facts['pairs']} pairs of {facts['questions_with_both']} questions with right and wrong "
        "solutions",
        f"  left out: {facts['questions_all_wrong']} questions have wrong solutions alone, "
        f"{facts['questions_all_right']} right ones alone, "
        f"{facts['questions_without_a_finished_solution']} none that ends; "
        f"{facts['questions_without_a_number']} have no number behind ####, "
        f"{facts['questions_without_room']} no room",
        f"  of {solutions} solutions {facts['solutions_right']} are right, "
        f"{facts['solutions_wrong']} wrong, {facts['solutions_unfinished']} empty or cut at "
        f"{options.max_new_tokens} tokens",
    ]
    if facts["pairs"]:
        fields = ["--adapter_name_or_path", options.run, "--dataset_name", options.out]
        lines.append(
            f"{options.out} has them. Next: recipes/dpo.py with {shlex.join(map(str, fields))} "
            "(docs/preference_tuning.md)"
        )
    return lines


if __name__ == "__main__":
    with reported_to_launcher(), mistakes_in_one_line():
        main(sys.argv[1:])
