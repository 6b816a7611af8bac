"""What docs quote of the code is what the code says: messages, the reference, figures, run.json."""

import ast
import csv
import re
import runpy
from functools import cache
from pathlib import Path

from conftest import ROOT


@cache
def messages() -> str:
    """Every string of the code, an f-string's in one piece with a mark for each value."""
    pieces = []
    for folder in ("sftlab", "recipes", "eval", "slurm", "app"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts = [v.value if isinstance(v, ast.Constant) else "\0" for v in node.values]
                    pieces.append("".join(parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    pieces.append(node.value)
    return "\1".join(pieces)


def unknown_messages(text: str) -> list[str]:
    """Messages quoted in the first column of a table of which a fragment is nowhere in the code."""
    quoted = re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)
    fragments = {one: [f.strip(" ;,") for f in one.split("...")] for one in quoted}
    return [one for one, parts in fragments.items() if not all(p in messages() for p in parts)]


def test_quoted_messages_are_the_codes():
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    assert len(re.findall(r"^\| `", text, re.MULTILINE)) >= 20
    assert not unknown_messages(text)


def test_the_reference_is_what_the_code_says():
    page = runpy.run_path(str(ROOT / "docs" / "make_reference.py"))["page"]()
    assert (ROOT / "docs" / "reference.md").read_text() == page, "run python docs/make_reference.py"


def block(path: Path, title: str) -> str:
    text = path.read_text().partition(f"<!-- {title}:")[2]
    return text.partition(f"<!-- end of {title} -->")[0]


def test_the_demos_figures_are_those_of_its_report():
    with (ROOT / "results" / "demo" / "runs.csv").open(newline="") as file:
        rows = {row["run"].removeprefix("demo-"): row for row in csv.DictReader(file)}
    table = block(ROOT / "docs" / "training.md", "recipes").splitlines()
    assert {path.stem for path in (ROOT / "recipes" / "demo").glob("*.yaml")} == set(rows)
    for recipe, row in rows.items():
        line = next(line for line in table if line.startswith(f"| {recipe} |"))
        assert f"{float(row['tokens_per_s']):,.0f}" in line
        assert f"{float(row['tuned bleu']):.4g} [" in line
    base = float(rows["attn_r16"]["base response_perplexity"])
    assert f"{base:.4g} [" in block(ROOT / "README.md", "demo")


def test_run_json_is_explained():
    """Every key that sft.py's modules write to run.json is in the table of architecture.md."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    verification = ast.parse((ROOT / "sftlab" / "training" / "verification.py").read_text())
    function = next(
        n for n in ast.walk(verification) if isinstance(n, ast.FunctionDef) and n.name == "what_ran"
    )
    returned = next(n.value for n in ast.walk(function) if isinstance(n, ast.Return))
    keys = [key.value for key in returned.keys if isinstance(key, ast.Constant)]
    assert len(keys) > 10
    assert not [key for key in keys if f"`{key}`" not in text]
