"""Fill the README's figures in from the demo's runs and their report.

python benchmarks/fill_readme.py    (after `make results`, which calls it)

Between the markers of README.md stand what eval/quality.py prints for the demo, and a table out of
results/demo/runs.csv.
"""

import csv
import re
import subprocess
import sys
from pathlib import Path

from sftlab.runs.run_directory import read_run
from sftlab.tables import interval

ROOT = Path(__file__).parent.parent
DEMO = "runs/demo-attn_r16"
BLOCK = "<!-- {0}: made by benchmarks/fill_readme.py -->\n{1}<!-- end of {0} -->"


def main() -> None:
    """Replace both blocks."""
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    for name, content in (("demo", demo_output()), ("recipes", recipes_table())):
        block = BLOCK.format(name, content)
        text, found = re.subn(BLOCK.format(name, "(?:.*\n)*?"), lambda _, block=block: block, text)
        if found != 1:
            sys.exit(
                f"error: README.md has {found} blocks {name}, expected one between its markers"
            )
    readme.write_text(text, encoding="utf-8")
    print(f"README.md: filled in from {DEMO} and results/demo/runs.csv")


def demo_output() -> str:
    """What eval/quality.py prints for the demo, in a code block."""
    command = [sys.executable, "eval/quality.py", "--run", DEMO]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return f"```\n{done.stdout.strip()}\n```\n"


def recipes_table() -> str:
    """A row a demo recipe, and what they were measured on."""
    with (ROOT / "results" / "demo" / "runs.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    run = read_run(ROOT / DEMO)
    versions = ", ".join(
        f"{name} {run['versions'][name]}" for name in ("torch", "transformers", "trl", "peft")
    )
    lines = [
        "| recipe | targets | rank | trainable | real tokens/s | peak GB | tuned response "
        "perplexity | tuned BLEU |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        perplexity, bleu = (
            scored(row, f"tuned {score}") for score in ("response_perplexity", "bleu")
        )
        cells = [
            row["run"].removeprefix("demo-"),
            row["axis lora_target_modules"].replace("_proj", ""),
        ]
        cells += [
            row["axis lora_r"],
            f"{int(row['trainable_parameters']):,}",
            f"{float(row['tokens_per_s']):,.0f}",
        ]
        cells += [f"{float(row['peak_memory_gb']):.2f}", perplexity, bleu]
        lines.append(f"| {' | '.join(cells)} |")
    about = f"{run['hardware']['cpu_cores']} CPU cores, {versions}; in brackets 95 % intervals over the test rows."
    return "\n".join([*lines, "", about]) + "\n"


def scored(row: dict[str, str], name: str) -> str:
    """A score of the CSV with its interval."""
    ends = [float(row[f"{name} {end}"]) for end in ("low", "high")]
    return interval({"value": float(row[name]), "interval_95": ends})


if __name__ == "__main__":
    main()
