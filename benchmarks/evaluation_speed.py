"""How fast eval/quality.py answers on a GPU, and how much memory it takes.

python benchmarks/evaluation_speed.py --tokenizer DIR --dataset FILE \
    [--out results/evaluation_speed]

A random-initialised model of Llama-3.2-1B's shape is fine-tuned for five steps and evaluated three
times: 1,000 rows in batches of 64 with the decoding step compiled (the default), 192 rows without,
and 64 rows of 512 tokens in batches of 32 for the memory. Such a model never ends an answer, so
every answer has all 256 tokens.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from sftlab.exit_messages import mistakes_in_one_line
from sftlab.models.random_models import train_random_llama
from sftlab.paths import ROOT
from sftlab.runs.run_directory import read_run
from sftlab.script_options import Options
from sftlab.tables import write_csv

RUN = "runs/evaluation-1b"
# name: (flags of eval/quality.py, and whether the rows are the long ones)
CELLS = {
    "1,000 rows, compiled": (["--samples", "1000", "--batch_size", "64"], False),
    "192 rows, not compiled": (["--samples", "192", "--batch_size", "64", "--no_compile"], False),
    "64 rows of 512 tokens": (["--batch_size", "32", "--no_compile"], True),
}


def main() -> None:
    """Make the model and the run, evaluate it once a cell, write rows as each ends."""
    parser = Options(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--tokenizer", required=True, help="folder of a tokenizer of at most 128,256 tokens"
    )
    parser.add_argument("--dataset", required=True, help="local data file with at least 2,000 rows")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "evaluation_speed")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    # five steps, and more than 1,000 rows left for the test
    flags = ("--max_steps", "5", "--split_fractions", "0.4", "0.02", "0.58")
    train_random_llama(RUN, arguments.tokenizer, arguments.dataset, "single", flags)
    long = ROOT / "data" / "long.jsonl"
    long.write_text(
        "".join(json.dumps(row) + "\n" for row in long_rows(arguments.dataset)), encoding="utf-8"
    )
    lines = []
    for name, (flags, is_long) in CELLS.items():
        lines += measure(name, [*flags, *(["--dataset_name", str(long)] if is_long else [])])
        write_csv(arguments.out / "evaluation_speed.csv", lines)


def long_rows(dataset: str) -> list[dict[str, str]]:
    """Returns 64 rows with answers of more than 512 tokens, made of the data set's texts."""
    texts = [
        " ".join(json.loads(line).values())
        for line in Path(dataset).read_text(encoding="utf-8").splitlines()
    ]
    return [
        {"question": f"Recite part {i} of the book.", "answer": " ".join(texts[8 * i : 8 * i + 8])}
        for i in range(64)
    ]


def measure(name: str, flags: list[str]) -> list[dict[str, Any]]:
    """Run one evaluation. Returns a row for each model."""
    command = ["eval/quality.py", "--run", RUN, *flags]
    started = time.perf_counter()
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    took = time.perf_counter() - started
    newest = max((ROOT / RUN / "eval").glob("quality*.json"), key=lambda path: path.stat().st_mtime)
    report = json.loads(newest.read_text(encoding="utf-8"))
    run, memory = read_run(ROOT / RUN), report["gpu_memory_gb"]
    return [
        {
            "cell": name,
            "model": side,
            "rows": report["rows"],
            "answer_rows_per_s": facts["rows_per_s"],
            "answer_tokens_per_s": round(facts["rows_per_s"] * facts["mean_tokens"]),
            "answer_seconds": facts["seconds"],
            "whole_command_s": round(took, 1),
            "weights_gb": memory["weights"],
            "likelihood_gb_beyond_weights": round(memory["likelihood_peak"] - memory["weights"], 3),
            "generation_gb_beyond_weights": round(memory["generation_peak"] - memory["weights"], 3),
            "hardware": run["hardware"]["gpu"],
            "versions": " ".join(f"{k} {v}" for k, v in report["versions"].items()),
            "command": " ".join(["python", *command]).replace(str(ROOT) + "/", ""),
        }
        for side, facts in report["answers"].items()
    ]


if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
