"""Fill in the figures of README.md and docs/training.md from the demo's runs and their report.

python benchmarks/fill_readme.py    (after `make results`, which calls it)

README.md gets the scores that eval/quality.py prints for the demo, docs/training.md a table made of
results/demo/runs.csv. Both stand between markers.
"""

import csv
import re
import subprocess
import sys
from pathlib import Path

from sftlab.evaluation.text_metrics import NAMES
from sftlab.exit_messages import mistakes_in_one_line
from sftlab.paths import ROOT
from sftlab.runs.run_directory import read_run
from sftlab.tables import interval

DEMO = "runs/demo-attn_r16"
BLOCK = "<!-- {0}: made by benchmarks/fill_readme.py -->\n{1}<!-- end of {0} -->"


def main() -> None:
    """Replace both blocks."""
    fill(ROOT / "README.md", "demo", demo_output())
    fill(ROOT / "docs" / "training.md", "recipes", recipes_table())


def fill(page: Path, name: str, content: str) -> None:
    """Replace what stands between the markers `name` of a page."""
    block = BLOCK.format(name, content)
    text = page.read_text(encoding="utf-8")
    text, found = re.subn(BLOCK.format(name, "(?:.*\n)*?"), lambda _: block, text)
    if found != 1:
        sys.exit(f"error: {page} has {found} blocks {name}, expected one between its markers")
    page.write_text(text, encoding="utf-8")
    print(f"{page}: block {name} filled in")


def demo_output() -> str:
    """Returns the scores that eval/quality.py prints for the demo, in a code block."""
    command = [sys.executable, "eval/quality.py", "--run", DEMO]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return "```\n" + "\n".join(score_lines(done.stdout)) + "\n```\n"


def score_lines(printed: str) -> list[str]:
    """Returns the title, the header and a line a score; the answers shown below are left out."""
    lines = printed.strip().splitlines()
    name = NAMES["response_perplexity"]
    first = next(i for i, line in enumerate(lines) if line.strip().startswith(name))
    return lines[first - 2 : first + len(NAMES)]


def recipes_table() -> str:
    """Returns a row a demo recipe, and what they were measured on."""
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
    cores = run["hardware"]["cpu_cores"]
    about = f"{cores} CPU cores, {versions}; in brackets 95 % intervals over the test rows."
    return "\n".join([*lines, "", about]) + "\n"


def scored(row: dict[str, str], name: str) -> str:
    """A score of the CSV with its interval."""
    ends = [float(row[f"{name} {end}"]) for end in ("low", "high")]
    return interval({"value": float(row[name]), "interval_95": ends})


if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
