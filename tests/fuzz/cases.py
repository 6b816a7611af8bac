"""Which input does a case break, how, and which script reads it?"""

import dataclasses
import itertools
import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import mutators
import world

from sftlab.config.preference_fields import PreferenceArguments
from sftlab.config.recipe import DataArguments, ModelArguments, TrainingArguments

TRAIN = ("sft", ["--config", "recipe.yaml"])
AGAIN = ("sft", ["--config", "recipe.yaml", "--output_dir", "run"])
ANEW = ("sft", ["--config", "recipe.yaml", "--output_dir", "run", "--overwrite"])
RESUME = ("sft", ["--config", "recipe.yaml", "--output_dir", "stopped"])
RESUME_ANEW = ("sft", ["--config", "recipe.yaml", "--output_dir", "stopped", "--overwrite"])
PLAN = ("plan", ["--config", "recipe.yaml", "--config_file", "launch.yaml"])
SHOW = ("show", ["--config", "recipe.yaml", "--rows", "2", "--look", "20"])
DPO = ("sft", ["--config", "dpo.yaml"])
SHOW_DPO = ("show", ["--config", "dpo.yaml", "--rows", "2", "--look", "20"])
PLAN_DPO = ("plan", ["--config", "dpo.yaml", "--config_file", "launch.yaml"])
GO_ON = ("sft", ["--config", "dpo.yaml", "--adapter_name_or_path", "run"])
PREFERENCES = ("preferences", ["--run", "preferred", "--samples", "2", "--max_new_tokens", "4"])
REPORT_BOTH = ("report", ["--runs", "run", "preferred", "--axis", "method", "--out", "report"])
MIXED = ("sft", ["--config", "mixture.yaml"])
SHOW_MIXED = ("show", ["--config", "mixture.yaml", "--rows", "2", "--look", "20"])
TOKENIZE_MIXED = ("tokenize", ["--config", "mixture.yaml", "--out", "mixed_tokens"])
# a study's paths start at the project's folder
_STUDIED = ["study.yaml", "--recipe", "HERE/recipe.yaml", "--launch", "HERE/launch.yaml"]
STUDY = ("study", [*_STUDIED, "--dry-run"])
TABLES = ("study", [*_STUDIED, "--no_train", "--out", "tables"])
QUALITY = (
    "quality",
    ["--run", "run", "--samples", "2", "--max_new_tokens", "4", "--no_compile"],
)
REPORT = ("report", ["--runs", "run", "--out", "report"])
DOCTOR = ("doctor", ["--runs", "runs"])
TOKENIZE = ("tokenize", ["--config", "recipe.yaml", "--out", "more_tokens"])
TOKENIZE_AGAIN = ("tokenize", ["--config", "recipe.yaml", "--out", "tokens"])
JOB = ("job", ["train", "recipe.yaml", "launch.yaml", "--output_dir", "out"])
EVALUATE_JOB = ("job", ["evaluate", "run", "quality --samples 2"])
EXPORT = ("export", ["--run", "run", "--to", "adapter", "--out", "exported", "--prompts", "2"])
MERGE = ("export", ["--run", "run", "--to", "merged", "--out", "exported", "--prompts", "2"])
GGUF = ("export", ["--run", "run", "--to", "gguf", "--out", "exported", "--prompts", "2"])
APP = ("app", ["--run", "run", "--votes", "votes.jsonl", "--report", "report"])
_ANSWERS = ["--run", "run", "--limit", "2", "--sanity_checks", "1", "--max_new_tokens", "4"]
_ANSWERS += ["--judge", "judge", "--judge_url", "URL"]
ALPACA = ("alpaca", [*_ANSWERS, "--reference", "outputs.json"])
AGREED = ("alpaca", [*_ANSWERS, "--reference", "outputs.json", "--agreement", "annotations.json"])
MT_BENCH = (
    "mt_bench",
    [*_ANSWERS, "--questions", "questions.jsonl", "--references", "references.jsonl"],
)


def _with(command: tuple[str, list[str]], *words: str) -> tuple[str, list[str]]:
    return command[0], [*command[1], *words]


def _rows(name: str) -> list[tuple[str, list[str]]]:
    words = ("--dataset_name", name)
    commands = (TRAIN, TOKENIZE, QUALITY, SHOW)
    return [_with(command, *words) for command in commands]


# border, file, kind, commands that read it
INPUTS = [
    ("recipe", "recipe.yaml", "yaml", [TRAIN, TRAIN, TRAIN, PLAN, TOKENIZE, STUDY, JOB, SHOW]),
    ("recipe", "mixture.yaml", "yaml", [MIXED, MIXED, SHOW_MIXED, TOKENIZE_MIXED]),
    ("recipe", "dpo.yaml", "yaml", [DPO, DPO, SHOW_DPO, PLAN_DPO]),
    ("command line", None, "words", [DPO, DPO, SHOW_DPO, PREFERENCES]),
    ("rows", "pairs.jsonl", "jsonl", [DPO, DPO, SHOW_DPO, PLAN_DPO, PREFERENCES]),
    ("run.json", "run/run.json", "json", [GO_ON]),
    ("run.json", "preferred/run.json", "json", [PREFERENCES, REPORT_BOTH]),
    ("answer file", "preferred/eval/preferences.json", "json", [REPORT_BOTH]),
    ("command line", None, "words", [TRAIN, TRAIN, TRAIN]),
    ("command line", None, "words", [PLAN, STUDY, QUALITY, REPORT, DOCTOR, SHOW]),
    ("command line", None, "words", [TOKENIZE, JOB, EVALUATE_JOB, APP, ALPACA, MT_BENCH, EXPORT]),
    ("launch config", "launch.yaml", "yaml", [PLAN, STUDY, JOB]),
    ("run.json", "run/run.json", "json", [AGAIN, ANEW, QUALITY, REPORT, APP, ALPACA, EXPORT]),
    ("run.json", "stopped/run.json", "json", [RESUME, RESUME_ANEW, RESUME]),
    ("manifest", "stopped/checkpoint-1/manifest.json", "json", [RESUME]),
    ("manifest", "stopped/checkpoint-1/trainer_state.json", "json", [RESUME]),
    ("manifest", "stopped/progress.json", "json", [RESUME]),
    ("manifest", "stopped/made.txt", "text", [RESUME, RESUME_ANEW]),
    ("manifest", "tokens/manifest.json", "json", [_with(TRAIN, "--dataset_name", "tokens")]),
    ("manifest", "tokens/shard-00000.json", "json", [TOKENIZE_AGAIN]),
    ("manifest", "tokens/train-00000.arrow", "text", [_with(TRAIN, "--dataset_name", "tokens")]),
    ("adapter_config.json", "run/adapter/adapter_config.json", "json", [QUALITY, APP, EXPORT]),
    ("safetensors", "base/model.safetensors", "safetensors", [TRAIN, QUALITY]),
    ("safetensors", "run/adapter/adapter_model.safetensors", "safetensors", [QUALITY, APP, MERGE]),
    ("model files", "base/config.json", "json", [TRAIN, QUALITY, PLAN, MERGE]),
    ("model files", "base/tokenizer.json", "json", [TRAIN, TOKENIZE]),
    ("model files", "base/tokenizer_config.json", "json", [TRAIN, TOKENIZE]),
    ("model files", "base/generation_config.json", "json", [QUALITY, APP, EXPORT]),
    ("model files", "run/adapter/tokenizer_config.json", "json", [QUALITY, APP, GGUF]),
    ("rows", "rows.jsonl", "jsonl", _rows("rows.jsonl")),
    ("rows", "chat.jsonl", "jsonl", _rows("chat.jsonl")),
    ("rows", "rows.json", "json", _rows("rows.json")),
    ("rows", "rows.csv", "csv", _rows("rows.csv")),
    ("rows", "rows.parquet", "parquet", _rows("rows.parquet")),
    ("rows", "rows.arrow", "arrow", _rows("rows.arrow")),
    ("template", "template.jinja", "template", [TRAIN, TOKENIZE, SHOW]),
    ("template", "run/adapter/chat_template.jinja", "template", [QUALITY, APP, EXPORT]),
    ("study file", "study.yaml", "yaml", [STUDY, STUDY, TABLES]),
    ("votes", "votes.jsonl", "jsonl", [APP]),
    ("answer file", "run/eval/quality.json", "json", [REPORT, APP, QUALITY, EXPORT]),
    ("answer file", "run/eval/quality.jsonl", "jsonl", [REPORT]),
    ("answer file", "outputs.json", "json", [ALPACA]),
    ("answer file", "annotations.json", "json", [AGREED]),
    ("answer file", "questions.jsonl", "jsonl", [MT_BENCH]),
    ("answer file", "references.jsonl", "jsonl", [MT_BENCH]),
    ("judge reply", "reply.json", "reply", [ALPACA, MT_BENCH]),
]
SLOW = (
    "sft",
    "show",
    "quality",
    "preferences",
    "tokenize",
    "alpaca",
    "mt_bench",
    "report",
    "export",
)
# fields whose values are right and take minutes
_LONG = {"torch_compile", "torch_compile_backend", "torch_compile_mode", "compile_layers"}
FIELDS = tuple(
    field.name
    for group in (DataArguments, TrainingArguments, ModelArguments, PreferenceArguments)
    for field in dataclasses.fields(group)
    if field.init and field.name not in _LONG
)
TEMPLATES = (
    "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    "{{ messages[0]['content'] }}",
    "{{ raise_exception('no system role') }}",
    "{% if messages|length > 1 %}{{ raise_exception('odd') }}{% endif %}x",
    "{% for i in range(10**9) %}x{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 'x' * 10**10 }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{% include '/etc/passwd' %}",
    "{{ messages[5]['content'] }}",
    "{{ messages | tojson }}",
    "{{ strftime_now('%d %b %Y') }}{{ messages[-1].content }}",
    "{{ 1 / 0 }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% if",
    "{{ eos_token }}",
)
SAID = (
    "",
    "[[A]]",
    "[[B]] [[A]]",
    "[RESULT] A",
    "[[11]]",
    "[[5]]",
    "<think>[[A]]",
    "[[" * 10_000,
    None,
    7,
    [],
)


@dataclass
class Case:
    """One broken input: the border, the script, its words, and what was done to the input."""

    number: int
    border: str
    script: str
    argv: list[str]
    done: str


def numbers(seed: int, count: int, quick: bool) -> list[int]:
    """Returns the numbers of `count` cases. Of quick ones few take a second."""
    if not quick:
        return list(range(count))
    found, slow = [], 0
    for number in itertools.count():
        is_slow = script_of(seed, number) in SLOW
        # one in ten
        if not is_slow or slow < len(found) // 10:
            found.append(number)
            slow += is_slow
        if len(found) == count:
            return found
    return found


def script_of(seed: int, number: int) -> str:
    """Returns the script that reads a case's input."""
    rng = random.Random(f"{seed}-{number}")
    return rng.choice(INPUTS[number % len(INPUTS)][3])[0]


def prepare(seed: int, number: int, folder: Path) -> Case:
    """Break one input in a copy of the world, and return the case."""
    rng = random.Random(f"{seed}-{number}")
    border, name, kind, commands = INPUTS[number % len(INPUTS)]
    script, argv = rng.choice(commands)
    if name is None:
        fields = (
            FIELDS
            if script in ("sft", "plan", "show", "tokenize", "job") and rng.random() < 0.7
            else ()
        )
        return Case(number, border, script, mutators.words(rng, argv, fields), "words")
    path = folder / "work" / name
    if rng.random() < 0.04:
        return Case(
            number, border, script, argv, f"{name} is now: {mutators.file_itself(rng, path)}"
        )
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(_broken(rng, kind, data))
    return Case(number, border, script, argv, f"{name} changed")


def _broken(rng: random.Random, kind: str, data: bytes) -> bytes:
    if kind == "yaml":
        return mutators.yaml_file(rng, data, FIELDS if b"lora_alpha: 4" in data else ())
    if kind in ("parquet", "arrow"):
        return mutators.table_file(rng, data, world.ROWS, arrow=kind == "arrow")
    if kind == "template":
        return rng.choice((mutators.text(rng, data), rng.choice(TEMPLATES).encode()))
    if kind == "reply" and rng.random() < 0.3:
        return json.dumps(world.completion(rng.choice(SAID))).encode()
    return mutators.BY_NAME["json" if kind == "reply" else kind](rng, data)


def copy_world(world_folder: Path, folder: Path) -> None:
    """Copy the world; hard links would not keep a broken copy apart."""
    shutil.copytree(world_folder, folder, symlinks=True)
