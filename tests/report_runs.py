"""Run directories for the tests of eval/report.py, and how they call it.

Its fixtures are those of every test: conftest.py names it as a plugin.
"""

import csv
import json
import math
from pathlib import Path

import pytest
from conftest import ROOT, load_script

from sftlab.comparison.run_settings import settings
from sftlab.config.launch import Launch
from sftlab.config.parser import parse_recipe
from sftlab.evaluation.significance import add_holm, compare
from sftlab.evaluation.text_metrics import ROUGE_SIGNATURE, Bleu, paired_scores, score_texts
from sftlab.runs.run_directory import adapter_hash

ROWS = 40
REFERENCES = [f"The answer to question {i} is {i * 7} and no other number." for i in range(ROWS)]
VERSIONS = {
    "python": "3.11.7",
    "torch": "2.13.0+cpu",
    "transformers": "5.23.0",
    "trl": "1.16.0",
    "peft": "0.21.2",
}
CPU = {"cpu_cores": 2, "machine": "x86_64"}
GPU = {
    "cpu_cores": 16,
    "machine": "x86_64",
    "gpu": "NVIDIA H200",
    "gpus_visible": 1,
    "gpu_memory_gb": 139.8,
}
LAUNCH = {
    "precision": "fp32",
    "strategy": "single",
    "world_size": 1,
    "local_world_size": 1,
    "hides_gpus": True,
    "settings": {"ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_MIXED_PRECISION": "no"},
}


@pytest.fixture(scope="session")
def recipe() -> dict:
    """The resolved fields of recipes/demo/attn_r16.yaml, as run.json holds them."""
    launch = Launch("fp32", "single", 1, 1, True, {})
    facts = parse_recipe(["--config", str(ROOT / "recipes/demo/attn_r16.yaml")], launch).facts()
    return json.loads(json.dumps(facts, default=str))


@pytest.fixture(scope="session")
def report():
    """eval/report.py in this process."""
    return load_script("eval/report.py")


@pytest.fixture
def make(recipe, tmp_path):
    """Writes run directories into tmp_path/runs."""
    return run_writer(recipe, tmp_path)


@pytest.fixture
def plots():
    """For tests that look at a plot."""


@pytest.fixture
def no_other_plots(request, report, monkeypatch):
    """Drawing takes nine tenths of a report's time."""
    if "plots" not in request.fixturenames:
        monkeypatch.setattr(report, "draw_comparison", lambda *_: [])


def run_writer(recipe, tmp_path):
    """Returns a function that writes a run directory into one folder.

    It is shaped like those that sft.py and quality.py leave.
    """

    def build(
        name: str,
        wrong: int | None = 3,
        ran: dict | None = None,
        launch: dict | None = None,
        measured: dict | None = None,
        adapter: str | None = None,
        data: dict | None = None,
        hardware: dict = CPU,
        top: dict | None = None,
        generation: dict | None = None,
        **fields,
    ):
        folder = tmp_path / "runs" / name
        (folder / "adapter").mkdir(parents=True)
        (folder / "eval").mkdir()
        fields = recipe | {"output_dir": f"runs/{name}"} | fields
        launched = LAUNCH | (launch or {})
        gpu = "gpu" in hardware
        happened = {
            "precision": launched["precision"],
            "compute": {"linear": "Linear", "output_dtype": "float32"},
            "tf32": False if gpu else None,
            "trainable_parameters": 1056 * fields["lora_r"],
            "trainable_dtypes": ["float32"],
            "frozen_dtypes": [fields["dtype"]],
            "quantization": None,
            "strategy": launched["strategy"],
            "gradients_reduced_in": None,
            "world_size": launched["world_size"],
            "device": "cuda" if gpu else "cpu",
            "lora_scale": [fields["lora_alpha"] / fields["lora_r"]],
            "attn_implementation": "sdpa",
            "packing": gpu,
            "compile_layers": gpu,
            "fused_loss": True,
            "micro_batch": fields["per_device_train_batch_size"],
            "accumulation": fields["gradient_accumulation_steps"],
            "global_batch": fields["global_batch_size"],
            "seed": fields["seed"],
        }
        speed = 7000.0 + 13.7 * len(name)
        memory = {"allocated_gb": 9.125, "reserved_gb": 10.0} if gpu else {"resident_gb": 0.631}
        run = {
            "status": "succeeded",
            "reason": None,
            "interruptions": [],
            "host_pid": ["elsewhere", 1],
            "recipe": fields,
            "launch": launched,
            "versions": VERSIONS,
            "git_commit": "0123456789ab",
            "hardware": hardware,
            "data": {
                "dataset": fields["dataset_name"],
                "shape": "dolly",
                **{
                    part: {"rows": rows, "fingerprint": f"{part}-rows"}
                    for part, rows in (("train", 320), ("validation", 40), ("test", ROWS))
                },
                "tokenized": {
                    "sequences": 320,
                    "tokens": 11407,
                    "longest": 49,
                    "cut": 0,
                    "dropped": 0,
                },
            }
            | (data or {}),
            "template": {"source": "instruction.jinja", "hash": "490ae3fccfc44f10"},
            "measured": {
                "tokens_per_s": speed,
                "rows_per_s": speed / 35.7,
                "share_of_limit": 0.0631,
                "train_seconds": 44.09,
                "peak_memory": [memory] * launched["world_size"],
                "train_loss": 0.2748147100896592,
                "global_step": 60,
                "validation_loss": 0.03408412430299287,
                "limit": "measured float32 matrix rate",
            }
            | (measured or {}),
            "ran": happened | (ran or {}),
            "losses": [[5 * i, 5.2 * math.exp(-i / 3) + 0.03] for i in range(1, 13)],
        } | (top or {})
        if run["ran"] is None or run["measured"] is None:
            run = {key: value for key, value in run.items() if value is not None}
        (folder / "run.json").write_text(json.dumps(run, indent=2))
        (folder / "adapter" / "adapter_model.safetensors").write_bytes((adapter or name).encode())
        if wrong is not None:
            write_quality(folder, wrong, generation or {}, hardware)
        return folder

    return build


def write_quality(folder: Path, wrong: int, generation: dict, hardware: dict) -> None:
    """quality.json and quality.jsonl of a tuned model that answers `wrong` rows wrongly.

    Texts name the run.
    """
    answers = {
        "base": ["I do not know."] * ROWS,
        "tuned": [
            f"{folder.name} says no." if i < wrong else text for i, text in enumerate(REFERENCES)
        ],
    }
    scored = {}
    for side, texts in answers.items():
        scored[side] = [
            {
                "text": text,
                "tokens": 7,
                "finish": "stop",
                "repeats": False,
                "response_nll": [
                    (9.0 if side == "base" else 0.1 + 2.0 * (i < wrong)) * 12 + 0.01 * i,
                    12.0,
                ],
                "text_nll": [80.0 + i, 30.0],
                **scores,
            }
            for i, (text, scores) in enumerate(
                zip(texts, score_texts(texts, REFERENCES, Bleu()), strict=True)
            )
        ]
    records = [
        {
            "row": i,
            "prompt": [{"role": "user", "content": f"question {i}"}],
            "reference": REFERENCES[i],
            "base": scored["base"][i],
            "tuned": scored["tuned"][i],
        }
        for i in range(ROWS)
    ]
    scores = compare(paired_scores(scored["base"], scored["tuned"]), resamples=50)
    add_holm(scores)
    quality = {
        "run": str(folder),
        "adapter_hash": adapter_hash(folder),
        "rows": ROWS,
        "held_out": {
            "dataset": "data/demo/instructions.jsonl, test split",
            "fingerprint": "test-rows",
        },
        "scores": scores,
        "generation": {
            "max_new_tokens": 256,
            "temperature": 0.0,
            "top_p": 1.0,
            "seed": 0,
            "end_tokens": [1],
            "stop_strings": ["### Instruction:"],
            "batch_size": 32,
            "file": "answers-1.jsonl",
        }
        | generation,
        "bleu": Bleu().signature(),
        "rouge": ROUGE_SIGNATURE,
        "versions": VERSIONS,
        "hardware": hardware,
    }
    (folder / "eval" / "quality.json").write_text(json.dumps(quality))
    (folder / "eval" / "quality.jsonl").write_text(
        "".join(json.dumps(record) + "\n" for record in records)
    )


def run_report(report, capsys, *arguments) -> str:
    """What the report prints."""
    report.main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def refused(report, *arguments) -> str:
    """Why there is no report."""
    with pytest.raises(SystemExit) as stopped:
        report.main([str(argument) for argument in arguments])
    assert str(stopped.value).startswith("error: ")
    return str(stopped.value)


def read_csv(out: Path) -> dict[str, dict[str, str]]:
    with (out / "runs.csv").open(newline="") as file:
        return {row["run"]: row for row in csv.DictReader(file)}


def facts(folder: Path):
    return settings(json.loads((folder / "run.json").read_text()))


def table_row(markdown: str, name: str) -> str:
    return next(line for line in markdown.splitlines() if line.startswith(f"| {name} |"))
