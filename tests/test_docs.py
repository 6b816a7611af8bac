"""README and docs: links, paths, commands, options, quoted messages, figures and sentences hold."""

import ast
import re
import shlex
from functools import cache
from pathlib import Path

import pytest
from conftest import ROOT

README = ROOT / "README.md"
NOTEBOOK = ROOT / "docs" / "LOG.md"
PAGES = [
    README,
    *sorted(path for path in (ROOT / "docs").glob("*.md") if path != NOTEBOOK),
    ROOT / "app" / "README.md",
    ROOT / "slurm" / "README.md",
]
IGNORED = {".venv", ".git", "runs", "data", ".pytest_cache", ".ruff_cache", "sftlab.egg-info"}
MARKDOWN = sorted(
    path for path in ROOT.rglob("*.md") if not IGNORED & set(path.relative_to(ROOT).parts)
)
FOLDERS = "accelerate_configs|app|benchmarks|docs|eval|recipes|results|sftlab|slurm|tests"
PATH = re.compile(rf"(?<![\w./-])(?:{FOLDERS})/[\w./*{{}},-]*")
OPTION = re.compile(r"(?<![\w-])--[A-Za-z][\w-]*")
SCRIPT = re.compile(rf"(?:{FOLDERS})/[\w/]+\.(?:py|sbatch)")
# What comes after these names a place to write to.
WRITES = re.compile(r"--(?:out|table|output_dir|runs|votes)[ =]\S+")
# Options of programs that are not ours: sbatch, lm_eval, hf, tensorboard.
FOREIGN = OPTION.findall(
    "--nodes --gpus-per-node --cpus-per-task --ntasks-per-node --dependency --parsable --time "
    "--model --model_args --apply_chat_template --type --sdk --include --logdir --enable-lora "
    "--enforce-eager --query-gpu --format"
)
# Its text is the code's and its libraries', which mention options of other programs.
REFERENCE = ROOT / "docs" / "reference.md"


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def code_blocks(text: str) -> list[str]:
    return re.findall(r"^```[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def code(text: str) -> list[str]:
    """Every line of a code block (continued lines joined) and every code span."""
    lines = [
        line for block in code_blocks(text) for line in re.sub(r"\\\n\s*", "", block).splitlines()
    ]
    outside = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return lines + [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", outside)]


# Links


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        number = sum(1 for one in found if re.fullmatch(rf"{re.escape(slug)}(-\d+)?", one))
        found.add(f"{slug}-{number}" if number else slug)
    return found


def broken_links(path: Path) -> list[str]:
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", text)):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        linked = (path.parent / file).resolve() if file else path
        if not linked.exists() or (anchor and anchor not in anchors(linked)):
            broken.append(target)
    return broken


@pytest.mark.parametrize("path", MARKDOWN, ids=name)
def test_links_resolve(path):
    assert not broken_links(path)


# Paths


def missing_paths(text: str) -> list[str]:
    missing = []
    for line in code(text):
        for found in PATH.findall(WRITES.sub("", line)):
            found = found.rstrip(".,:")
            if re.search(r"\b[A-Z]{2,}\b", found) and not found.endswith(".md"):
                continue  # a placeholder: eval/NAME.py
            if re.fullmatch(r"eval/[\w*-]+\.jsonl?", found):
                continue  # in a run directory
            matches = ROOT.glob(found) if "*" in found else [ROOT / found]
            if not any(path.exists() for path in matches):
                missing.append(found)
    return missing


@pytest.mark.parametrize("path", [*PAGES, NOTEBOOK], ids=name)
def test_paths_exist(path):
    assert not missing_paths(path.read_text())


def test_make_targets_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for path in PAGES:
        asked = {
            one for line in code(path.read_text()) for one in re.findall(r"^make ([\w-]+)", line)
        }
        assert asked <= targets, path


# Options


@cache
def constants(path: Path) -> frozenset[str]:
    nodes = ast.walk(ast.parse(path.read_text()))
    return frozenset(
        n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)
    )


def is_declaring(node: ast.AST, short: set[str] = frozenset()) -> bool:
    """Whether a node is some parser's `add_argument`, or a variable that holds it."""
    return getattr(node, "attr", "") == "add_argument" or getattr(node, "id", "") in short


@cache
def declared(path: Path) -> frozenset[str]:
    """The options of a file's `add_argument` calls; of an f-string every word that it may hold."""
    found: set[str] = set()
    nodes = list(ast.walk(ast.parse(path.read_text())))
    assigned = [n for n in nodes if isinstance(n, ast.Assign) and is_declaring(n.value)]
    short = {target.id for n in assigned for target in n.targets if isinstance(target, ast.Name)}
    for node in nodes:
        if isinstance(node, ast.Call) and is_declaring(node.func, short):
            for word in node.args:
                if isinstance(word, ast.Constant):
                    found.add(word.value)
                elif isinstance(word, ast.JoinedStr):
                    found |= {f"--{one}" for one in constants(path) if re.fullmatch(r"\w+", one)}
    return frozenset(found)


@cache
def fields() -> frozenset[str]:
    """Every field of a recipe, as an option."""
    from sftlab.config.preference_fields import PreferenceArguments
    from sftlab.config.recipe import DataArguments, ModelArguments, TrainingArguments

    groups = (DataArguments, ModelArguments, TrainingArguments, PreferenceArguments)
    names = {field for group in groups for field in group.__dataclass_fields__}
    return frozenset({"--config", *(f"--{field}" for field in names)})


@cache
def accelerate_options() -> frozenset[str]:
    from accelerate.commands.launch import launch_command_parser

    return frozenset(launch_command_parser()._option_string_actions)


@cache
def options(script: Path) -> frozenset[str]:
    """The options that a script accepts: its own, those of modules it imports, recipe fields."""
    text = script.read_text()
    found = set(declared(script))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sftlab."):
            module = ROOT / (node.module.replace(".", "/") + ".py")
            found |= declared(module) if module.is_file() else set()
    if "parse_known_args" in text or "parse_recipe" in text:
        found |= fields()
    if "import sftlab.startup.launcher" in text:
        from sftlab.startup.launcher import CONFIG, FLAGS

        found |= {f"--{flag}" for flag in (CONFIG, *FLAGS)}
    return frozenset(found)


STARTS = {
    "recipes/dpo.py": "recipes/sft.py",
    "slurm/train.sbatch": "recipes/sft.py",
    "slurm/study.sbatch": "recipes/study.py",
    "slurm/tokenize.sbatch": "slurm/tokenize_dataset.py",
}


def refused_options(line: str) -> list[str]:
    """The options of a command that its script, or accelerate before it, does not accept."""
    if not (found := SCRIPT.search(line)):
        return []
    before, script, after = line[: found.start()], found[0], line[found.end() :].split("  #")[0]
    refused = []
    if "accelerate launch" in before:
        refused = [one for one in OPTION.findall(before) if one not in accelerate_options()]
    if script == "slurm/eval.sbatch":
        evaluations = [shlex.split(one) for one in shlex.split(after)[1:]]
        given = [(f"eval/{one}.py", OPTION.findall(" ".join(rest))) for one, *rest in evaluations]
    else:
        given = [(STARTS.get(script, script), OPTION.findall(after))]
    for one, words in given:
        refused += [word for word in words if word not in options(ROOT / one)]
    return refused


@cache
def every_option() -> frozenset[str]:
    scripts = [p for folder in FOLDERS.split("|") for p in (ROOT / folder).rglob("*.py")]
    ours = [option for script in scripts for option in declared(script)]
    known = {*ours, *fields(), *accelerate_options(), *FOREIGN}
    # both spellings of an option are accepted
    return frozenset(known | {f"--{option[2:].replace('_', '-')}" for option in known})


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_commands_and_options_are_accepted(path):
    lines = code(path.read_text())
    commands = [line for line in lines if SCRIPT.search(line)]
    assert not {line: bad for line in commands if (bad := refused_options(line))}
    alone = {one for line in lines if line not in commands for one in OPTION.findall(line)}
    assert path == REFERENCE or not alone - every_option()


# Messages
