"""The rules of the house: where code stands, what it may import and what it is called."""

import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import requires
from pathlib import Path
from statistics import median

import pytest
from conftest import ROOT

SCRIPT_FOLDERS = ("recipes", "eval", "app", "slurm", "benchmarks")
SCRIPTS = sorted(p for folder in SCRIPT_FOLDERS for p in (ROOT / folder).rglob("*.py"))
MODULES = sorted((ROOT / "sftlab").rglob("*.py"))
# A district imports only from those before it; "" are the modules beside the districts.
DISTRICTS = (
    "",
    "config",
    "startup",
    "data",
    "models",
    "measurement",
    "runs",
    "fastpath",
    "training",
    "planning",
    "evaluation",
    "export",
    "judging",
    "comparison",
    "chat",
)
SCRIPT_LIBRARIES = {"gradio", "dask", "distributed", "matplotlib", "vllm"}
# eval/report.py and recipes/study.py draw with it
PLOTS = [
    ROOT / "sftlab" / "comparison" / name for name in ("plots.py", "canvas.py", "tuning_plot.py")
]
LIGHT = {"sftlab", "__future__"} | set(sys.stdlib_module_names)


def imported_names(tree: ast.AST) -> set[str]:
    """Every module and every name that is imported, TYPE_CHECKING and functions included."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def imports(path: Path) -> set[str]:
    return imported_names(ast.parse(path.read_text()))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def district(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 2 else ""


def module_imports() -> dict[str, set[str]]:
    """Modules of the package, and which of the package each imports."""
    names = {module_name(path): path for path in MODULES}
    return {name: imports(path) & set(names) - {name, "sftlab"} for name, path in names.items()}


def test_scripts_are_no_packages_and_never_import_one_another():
    names = {path.stem for path in SCRIPTS}
    assert not [p for folder in SCRIPT_FOLDERS for p in (ROOT / folder).rglob("__init__.py")]
    for path in SCRIPTS:
        assert not {name.split(".")[0] for name in imports(path)} & names, path


def test_the_package_imports_no_script_library():
    for path in MODULES:
        heavy = {name.split(".")[0] for name in imports(path)} & SCRIPT_LIBRARIES
        assert not heavy - ({"matplotlib"} if path in PLOTS else set()), (path, heavy)


@pytest.mark.parametrize("path", PLOTS, ids=lambda path: path.stem)
def test_the_plots_import_matplotlib_only_when_they_draw(path):
    module = ast.parse(path.read_text())
    module.body = [node for node in module.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert "matplotlib" not in {name.split(".")[0] for name in imported_names(module)}
    users = {path for path in SCRIPTS if "sftlab.comparison.plots" in imports(path)}
    assert users >= {ROOT / "eval" / "report.py", ROOT / "recipes" / "study.py"}
    command = f"import sys, {module_name(path)}; sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", command], cwd=ROOT, check=True, timeout=120)


def test_a_district_imports_only_those_before_it():
    folders = {path.name for path in (ROOT / "sftlab").iterdir() if (path / "__init__.py").exists()}
    assert folders == set(DISTRICTS) - {""}
    upward = [
        f"{module} imports {other}"
        for module, found in module_imports().items()
        for other in found
        if DISTRICTS.index(district(other)) > DISTRICTS.index(district(module))
    ]
    assert not upward


def test_no_module_imports_itself_through_others():
    try:
        TopologicalSorter(module_imports()).prepare()
    except CycleError as error:
        pytest.fail(f"a cycle of imports: {' <- '.join(error.args[1])}")


@pytest.mark.parametrize("name", DISTRICTS[1:])
def test_a_district_is_several_modules_under_a_light_init(name):
    folder = ROOT / "sftlab" / name
    assert len(list(folder.glob("*.py"))) >= 3, f"{name} is a module, not a district"
    tree = ast.parse((folder / "__init__.py").read_text())
    assert ast.get_docstring(tree)
    assert not {found.split(".")[0] for found in imported_names(tree)} - LIGHT


def test_names_with_an_underscore_stay_in_their_module():
    for path in [*SCRIPTS, *MODULES]:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sftlab"):
                taken = [alias.name for alias in node.names if alias.name.startswith("_")]
                assert not taken, (path, taken)


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
    lengths = {path: len(path.read_text().splitlines()) for path in [*SCRIPTS, *MODULES]}
    assert not {str(path): length for path, length in lengths.items() if length > 400}
    assert median(lengths[path] for path in lengths if path.name != "__init__.py") < 220


def test_every_dependency_has_an_exact_version():
    lines = [
        x
        for x in (ROOT / "requirements.txt").read_text().splitlines()
        if x and not x.startswith("#")
    ]
    assert lines.pop() == "-e ."
    exact = re.compile(r'[\w\-\[\]]+==[\d.]+(; sys_platform == "linux")?')
    assert all(exact.fullmatch(line) for line in lines)
    assert requires("sftlab") is None


def test_the_working_tree_ignores_what_runs_write():
    for name in ("runs/x/run.json", "data/x", ".venv/x"):
        done = subprocess.run(["git", "check-ignore", "-q", name], cwd=ROOT)
        assert done.returncode in (0, 128), name
