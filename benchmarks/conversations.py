"""What does a conversation cost as one sequence, and what as a row for each answer?

python benchmarks/conversations.py [--model data/demo/base] [--conversations 40] [--turns 10]
    [--repeats 1] [--out results/conversations]

Made-up conversations are trained for one epoch under accelerate_configs/cpu.yaml, with each
`loss_on` in turn. The table has the rows and tokens of the epoch, and its seconds (median).
`python recipes/demo/build.py` makes the model.
"""

import json
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from sftlab.exit_messages import mistakes_in_one_line
from sftlab.paths import ROOT
from sftlab.runs.environment import environment
from sftlab.script_options import Options
from sftlab.tables import aligned, write_csv

WORDS = (
    *("hot", "cold", "big", "small", "tall", "short", "fast", "slow"),
    *("old", "new", "happy", "sad", "day", "night", "up", "down"),
)
SHOWN = ("loss_on", "rows", "tokens", "tokens_in_loss", "seconds_an_epoch")


def main(argv: list[str]) -> None:
    """Train with each `loss_on`, and write a row for each."""
    parser = Options(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="data/demo/base", help="folder of the base model")
    parser.add_argument("--conversations", type=int, default=40)
    parser.add_argument("--turns", type=int, default=10, help="answers of a conversation")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "conversations")
    arguments = parser.parse_args(argv)
    found: dict[str, list[dict[str, Any]]] = {"all": [], "completion": []}
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        write_conversations(rows, arguments.conversations, arguments.turns)
        for number in range(arguments.repeats):
            for loss_on, runs in found.items():
                out = Path(folder) / f"{loss_on}-{number}"
                runs.append(train(arguments.model, rows, out, loss_on))
    lines = [row_of(loss_on, runs) for loss_on, runs in found.items()]
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_csv(arguments.out / "conversations.csv", lines)
    print(
        aligned(
            [
                list(SHOWN),
                *(
                    [f"{line[name]:,}" if name != "loss_on" else line[name] for name in SHOWN]
                    for line in lines
                ),
            ]
        )
    )


def write_conversations(path: Path, count: int, turns: int) -> None:
    """Write conversations of `turns` questions and answers of some words each, always the same."""
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            messages = [{"role": "user", "content": f"Conversation {number}."}]
            for turn in range(turns):
                if turn:
                    messages.append({"role": "user", "content": said(draw, 4, 10)})
                messages.append({"role": "assistant", "content": said(draw, 4, 16)})
            file.write(json.dumps({"messages": messages}) + "\n")


def said(draw: random.Random, fewest: int, most: int) -> str:
    """Returns a sentence of random words."""
    return " ".join(draw.choices(WORDS, k=draw.randint(fewest, most))) + "."


def train(model: str, rows: Path, out: Path, loss_on: str) -> dict[str, Any]:
    """Train one epoch. Returns run.json."""
    fields = {
        "model_name_or_path": model,
        "dataset_name": rows,
        "output_dir": out,
        "loss_on": loss_on,
        "max_length": 1024,
        "num_train_epochs": 1,
        "global_batch_size": 4,
        "per_device_train_batch_size": 4,
        "save_strategy": "no",
        "save_adapter": "false",
    }
    command = [sys.executable, "recipes/sft.py", "--config_file", "accelerate_configs/cpu.yaml"]
    command += ["--config", "recipes/demo/attn_r16.yaml"]
    command += [word for name, value in fields.items() for word in (f"--{name}", str(value))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"the training failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads((out / "run.json").read_text(encoding="utf-8"))


def row_of(loss_on: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns a row of the table."""
    tokenized, now = runs[0]["data"]["tokenized"], environment()
    seconds = [run["measured"]["train_seconds"] for run in runs]
    return {
        "loss_on": loss_on,
        "rows": tokenized["sequences"],
        "tokens": tokenized["tokens"],
        "tokens_in_loss": tokenized["loss_tokens"],
        "seconds_an_epoch": round(statistics.median(seconds), 1),
        "fastest": min(seconds),
        "slowest": max(seconds),
        "hardware": f"{now['hardware']['cpu_cores']} CPU cores",
        **{name: now["versions"][name] for name in ("torch", "transformers", "trl", "peft")},
    }


if __name__ == "__main__":
    with mistakes_in_one_line():
        main(sys.argv[1:])
