"""The rules of the house: where code stands and what it is called."""

import ast
import csv
import re
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

from conftest import ROOT

SCRIPT_FOLDERS = ("recipes", "eval", "app", "slurm", "benchmarks")
SCRIPTS = sorted(p for folder in SCRIPT_FOLDERS for p in (ROOT / folder).rglob("*.py"))
MODULES = sorted((ROOT / "sftlab").rglob("*.py"))


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def test_scripts_are_no_packages_and_never_import_one_another():
    names = {path.stem for path in SCRIPTS}
    assert not [p for folder in SCRIPT_FOLDERS for p in (ROOT / folder).rglob("__init__.py")]
    for path in SCRIPTS:
        assert not {name.split(".")[0] for name in imports(path)} & names, path


def test_the_package_imports_no_script_library():
    for path in MODULES:
        heavy = {name.split(".")[0] for name in imports(path)} & {
            "gradio",
            "dask",
            "distributed",
            "matplotlib",
            "vllm",
        }
        assert not heavy, (path, heavy)


def test_no_script_hides_a_module():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    needed = {
        re.split(r"[=\[]", line)[0].replace("-", "_") for line in lines if re.match(r"\w", line)
    }
    taken = set(sys.stdlib_module_names) | needed | {"evaluate", "tokenize", "datasets", "lm_eval"}
    assert not {path.stem for path in SCRIPTS} & taken


def test_print_stands_in_scripts_alone():
    for path in MODULES:
        calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        assert not [c for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"], path


def test_every_script_says_its_command():
    for path in SCRIPTS:
        docstring = ast.get_docstring(ast.parse(path.read_text()))
        assert docstring, path
        assert str(path.relative_to(ROOT)) in docstring, path


def test_files_stay_short():
    for path in [*SCRIPTS, *MODULES]:
        assert len(path.read_text().splitlines()) <= 460, path


def test_every_dependency_has_an_exact_version():
    lines = [
        x
        for x in (ROOT / "requirements.txt").read_text().splitlines()
        if x and not x.startswith("#")
    ]
    assert lines.pop() == "-e ."
    assert all(re.fullmatch(r"[\w\-\[\]]+==[\d.]+", line) for line in lines)
    assert requires("sftlab") is None


def test_every_path_in_the_readme_exists():
    text = (ROOT / "README.md").read_text()
    folders = "accelerate_configs|app|recipes|eval|sftlab|benchmarks|results|tests|docs"
    named = set(re.findall(rf"\b((?:{folders})/[\w./-]+\.(?:py|yaml|jinja|csv|md))", text))
    assert named
    assert not [name for name in named if not (ROOT / name).exists()]


def test_the_working_tree_ignores_what_runs_write():
    for name in ("runs/x/run.json", "data/x", ".venv/x"):
        done = subprocess.run(["git", "check-ignore", "-q", name], cwd=ROOT)
        assert done.returncode in (0, 128), name


def test_the_readmes_figures_are_those_of_the_report():
    text = (ROOT / "README.md").read_text()
    with (ROOT / "results" / "demo" / "runs.csv").open(newline="") as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    table = text.partition("<!-- recipes:")[2].partition("<!-- end of recipes -->")[0]
    assert {f"demo-{path.stem}" for path in (ROOT / "recipes" / "demo").glob("*.yaml")} == set(rows)
    for name, row in rows.items():
        line = next(
            line
            for line in table.splitlines()
            if line.startswith(f"| {name.removeprefix('demo-')} |")
        )
        assert f"{float(row['tokens_per_s']):,.0f}" in line
        assert f"{float(row['tuned bleu']):.4g} [" in line
    demo = text.partition("<!-- demo:")[2].partition("<!-- end of demo -->")[0]
    assert f"{float(rows['demo-attn_r16']['base response_perplexity']):.4g} [" in demo
