"""eval/report.py and sftlab/comparison/comparability.py:

which runs may stand side by side, and what a report says of them.
"""

import csv
import json
import math
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, load_script
from matplotlib.figure import Figure

from sftlab.comparison.comparability import differences, suggest_axes
from sftlab.comparison.run_results import outcome
from sftlab.comparison.run_settings import settings
from sftlab.config.launch import Launch
from sftlab.config.parser import parse_recipe
from sftlab.evaluation.significance import add_holm, compare
from sftlab.evaluation.text_metrics import NAMES, ROUGE_SIGNATURE, Bleu, paired_scores, score_texts
from sftlab.runs.run_directory import adapter_hash
from sftlab.tables import interval, p_value

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
    return load_script("eval/report.py")


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


@pytest.fixture
def make(recipe, tmp_path):
    return run_writer(recipe, tmp_path)


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


def test_ranks_alone_are_compared_and_the_axis_is_inferred(make, report, capsys, tmp_path):
    for rank in (16, 8, 32):
        make(f"r{rank}", lora_r=rank, lora_alpha=2 * rank)
    out = tmp_path / "out"
    printed = run_report(report, capsys, "--runs", tmp_path / "runs", "--out", out)
    text = (out / "report.md").read_text()
    assert "axis: lora_r (inferred)" in printed
    assert "axis: lora_r (inferred)" in text
    assert "CONFOUNDED" not in printed + text
    assert [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| r")][1:4] == [
        "| r8",
        "| r16",
        "| r32",
    ]
    assert text.count("no interval") == 1
    assert (
        str(tmp_path) not in text + printed.rsplit("written to")[0] + (out / "runs.csv").read_text()
    )
    for plot in ("speed", "memory", "losses", "quality"):
        assert (out / f"{plot}.png").read_bytes().startswith(b"\x89PNG")
        assert f"![{plot}]({plot}.svg)" in text


def test_rank_with_a_fixed_alpha_is_refused(make, report, tmp_path):
    for rank in (8, 16):
        make(f"r{rank}", wrong=None, lora_r=rank, lora_alpha=32)
    for axis in ((), ("--axis", "lora_r"), ("--axis", "lora_r", "lora_alpha")):
        error = refused(report, "--runs", tmp_path / "runs", "--out", tmp_path / "out", *axis)
        assert (
            "lora_scale: 4.0 (r8) | 2.0 (r16)" in error
            or "lora_scale: 2.0 (r16) | 4.0 (r8)" in error
        )
        assert "alpha that follows the rank" in error
    assert not (tmp_path / "out").exists()


def test_rank_of_a_run_that_never_ran_counts_its_alpha_too(make):
    failed = {"status": "failed", "reason": "RuntimeError: CUDA out of memory", "ran": None}
    runs = {
        "a": make("a", wrong=None, lora_r=8, lora_alpha=16),
        "b": make("b", wrong=None, lora_r=16, top=failed),
    }
    assert list(differences({n: facts(f) for n, f in runs.items()}, ["lora_r"])) == []
    runs["c"] = make("c", wrong=None, lora_r=32, top=failed)
    assert list(differences({n: facts(f) for n, f in runs.items()}, ["lora_r"])) == ["lora_scale"]


BF16 = {"compute": {"linear": "Linear", "output_dtype": "bfloat16"}}


def test_precision_explains_what_follows_from_it_and_no_more(make):
    bf16 = {
        "launch": {"precision": "bf16", "settings": {"ACCELERATE_MIXED_PRECISION": "bf16"}},
        "ran": BF16,
    }
    runs = {
        "fp32": facts(make("fp32", wrong=None)),
        "bf16": facts(make("bf16", wrong=None, dtype="bfloat16", **bf16)),
    }
    assert set(differences(runs)) == {"precision", "compute", "dtype", "frozen_dtypes"}
    assert suggest_axes(runs) == (["precision"], {})
    # bf16 twice, once over float32 weights: dtype no longer follows from precision
    runs["again"] = facts(make("again", wrong=None, dtype="float32", **bf16))
    assert set(differences(runs, ["precision"])) == {"dtype", "frozen_dtypes"}
    runs["again"] = facts(
        make(
            "quantized",
            wrong=None,
            dtype="bfloat16",
            load_in_4bit=True,
            launch=bf16["launch"],
            ran=BF16 | {"quantization": "4bit"},
        )
    )
    assert set(differences(runs, ["precision"])) == {"quantization"}


def test_precision_that_was_asked_for_and_did_not_run_is_no_difference(
    make, report, capsys, tmp_path
):
    for name in ("fp32", "bf16"):
        make(name, wrong=None, launch={"precision": name}, ran={"precision": "bf16", **BF16})
    printed = run_report(
        report,
        capsys,
        "--runs",
        tmp_path / "runs",
        "--out",
        tmp_path / "out",
        "--axis",
        "precision",
    )
    assert "warning: the runs do not differ in precision" in printed


def processes(count: int, **more) -> dict:
    strategy = "ddp" if count > 1 else "single"
    return {
        "hardware": GPU | {"cpu_cores": 16 * count, "gpus_visible": count},
        "wrong": None,
        "launch": {
            "strategy": strategy,
            "world_size": count,
            "local_world_size": count,
            "hides_gpus": False,
        },
        "ran": {"gradients_reduced_in": "float32" if count > 1 else None, **more},
    }


def test_world_size_never_explains_another_global_batch(make, report, tmp_path):
    one = make("one", **processes(1))
    same = make("same", per_device_train_batch_size=8, **processes(2))
    assert suggest_axes({"one": facts(one), "two": facts(same)}) == (["world_size"], {})
    other = make("other", global_batch_size=32, **processes(2))
    assert set(differences({"one": facts(one), "two": facts(other)}, ["world_size"])) == {
        "global_batch"
    }
    error = refused(report, "--runs", one, other, "--axis", "world_size", "--out", tmp_path / "out")
    assert "global_batch: 16 (one) | 32 (other)" in error
    fsdp = make("fsdp", per_device_train_batch_size=8, **processes(2, strategy="fsdp2"))
    assert "strategy" in differences({"one": facts(one), "two": facts(fsdp)}, ["world_size"])


def test_strategy_explains_how_gradients_are_reduced_and_not_the_optimizer(make):
    ddp = facts(make("ddp", **processes(2)))
    fsdp = facts(
        make(
            "fsdp",
            optim="paged_adamw_32bit",
            **processes(2, strategy="fsdp2", gradients_reduced_in="bfloat16"),
        )
    )
    assert set(differences({"ddp": ddp, "fsdp": fsdp})) == {
        "strategy",
        "gradients_reduced_in",
        "optim",
    }
    assert set(differences({"ddp": ddp, "fsdp": fsdp}, ["strategy"])) == {"optim"}


def test_quantization_explains_dtypes_and_not_precision(make):
    ran = {
        "quantization": "4bit",
        "frozen_dtypes": ["bfloat16", "uint8"],
        "trainable_dtypes": ["bfloat16"],
        "compute": {"linear": "Linear4bit", "output_dtype": "float32"},
    }
    runs = {
        "full": facts(make("full", wrong=None)),
        "q": facts(make("q", wrong=None, load_in_4bit=True, ran=ran)),
    }
    assert suggest_axes(runs) == (["load_in_4bit"], {})
    runs["q"] = facts(
        make("q2", wrong=None, load_in_4bit=True, ran=ran, launch={"precision": "bf16"})
    )
    assert set(differences(runs, ["load_in_4bit"])) == {"precision"}


@pytest.mark.parametrize("part", ["train", "validation", "test"])
def test_other_data_are_explained_by_nothing_but_the_data_set(make, part):
    other = {part: {"rows": 320, "fingerprint": "others"}}
    runs = {
        "a": facts(make("a", wrong=None)),
        "b": facts(make("b", wrong=None, data=other, dataset_fraction=0.5)),
    }
    assert set(suggest_axes(runs)[1]) == {f"data.{part}"}
    assert set(differences(runs, ["dataset_name"])) == {"dataset_fraction", f"data.{part}"}
    assert not differences(runs, ["dataset_name", "dataset_fraction"])
    # the same name and other rows: not two data sets but one that changed
    runs["b"] = facts(make("c", wrong=None, data=other))
    assert set(differences(runs, ["dataset_name"])) == {f"data.{part}"}


def test_the_same_rows_from_another_file_and_bookkeeping_are_no_difference(make):
    moved = make(
        "b",
        wrong=None,
        dataset_name="elsewhere.jsonl",
        output_dir="x",
        logging_steps=1,
        save_steps=7,
        hub_model_id="a/b",
    )
    assert not differences({"a": facts(make("a", wrong=None)), "b": facts(moved)})


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"top": {"versions": VERSIONS | {"torch": "2.11.0"}}}, "versions.torch"),
        ({"hardware": CPU | {"cpu_cores": 4}}, "hardware.cpu_cores"),
        ({"top": {"template": {"source": "x", "hash": "other"}}}, "template"),
        ({"ran": {"attn_implementation": "eager"}}, "attn_implementation"),
        (
            {"ran": {"a fact of a later version": 1}, "logging_nan_inf_filter": True},
            "logging_nan_inf_filter",
        ),
        ({"launch": {"settings": {"FSDP_OFFLOAD_PARAMS": "true"}}}, "launch.FSDP_OFFLOAD_PARAMS"),
        ({"lora_dropout": 0.1}, "lora_dropout"),
    ],
)
def test_what_decides_a_figure_is_compared(make, change, field):
    runs = {"a": facts(make("a", wrong=None)), "b": facts(make("b", wrong=None, **change))}
    assert list(differences(runs)) == [field]


def test_order_of_target_modules_is_no_difference(make):
    runs = {"a": ["q_proj", "v_proj"], "b": ["v_proj", "q_proj"]}
    assert not differences(
        {n: facts(make(n, wrong=None, lora_target_modules=m)) for n, m in runs.items()}
    )


def test_how_scores_were_found_is_compared(make, report, tmp_path):
    make("a")
    make("b", generation={"batch_size": 8})
    runs = [tmp_path / "runs" / name for name in "abc"]
    report.main(["--runs", *map(str, runs[:2]), "--out", str(tmp_path / "out")])
    make("c", generation={"max_new_tokens": 32})
    assert "quality.max_new_tokens: 256 (a, b) | 32 (c)" in refused(
        report, "--runs", *runs, "--out", tmp_path / "o"
    )


@pytest.fixture
def confounded(make) -> Path:
    make("r8", lora_r=8, lora_alpha=16, learning_rate=0.001)
    return make("r16").parent


def test_learning_rate_that_came_with_the_rank_is_refused(confounded, report, tmp_path):
    for axis in ((), ("--axis", "lora_r")):
        error = refused(report, "--runs", confounded, "--out", tmp_path / "out", *axis)
        assert "learning_rate: 0.004 (r16) | 0.001 (r8)" in error
        assert "--axis lora_r learning_rate" in error.replace(
            "learning_rate lora_r", "lora_r learning_rate"
        )
        assert "--allow-confounded" in error
    assert not (tmp_path / "out").exists()


def test_confounded_runs_are_marked_everywhere(confounded, report, capsys, tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr(Figure, "suptitle", lambda self, text, **kwargs: titles.append(text))
    flags = ("--axis", "lora_r", "--allow-confounded")
    printed = run_report(report, capsys, "--runs", confounded, "--out", tmp_path / "out", *flags)
    text = (tmp_path / "out" / "report.md").read_text()
    line = "learning_rate: 0.001 (r8) | 0.004 (r16)"
    for where in (printed, text):
        assert where.index("CONFOUNDED") < where.index(line) < where.index("status")
    assert "**CONFOUNDED**" in text.split("## Runs")[0]
    assert {row["confounded"] for row in read_csv(tmp_path / "out").values()} == {
        "learning_rate: 0.001 (r8) | 0.004 (r16)"
    }
    assert len(titles) == 4
    bare = run_report(
        report, capsys, "--runs", confounded, "--out", tmp_path / "out", "--allow-confounded"
    )
    assert "all settings are equal" not in bare
    assert all(title.startswith("CONFOUNDED") for title in titles)


def test_axes_that_change_together_are_warned_of(confounded, report, capsys, tmp_path):
    flags = ("--axis", "lora_r", "learning_rate")
    printed = run_report(report, capsys, "--runs", confounded, "--out", tmp_path / "out", *flags)
    assert "warning: lora_r and learning_rate change together" in printed


def test_runs_that_failed_are_rows(make, report, capsys, tmp_path):
    nan = [[5, 5.2], [10, math.nan]]
    made = {
        "ok": {},
        "memory": {
            "status": "failed",
            "reason": "OutOfMemoryError: CUDA out of memory",
            "ran": None,
            "measured": None,
        },
        "nan": {
            "status": "failed",
            "reason": "RuntimeError: diverged: the mean is nan",
            "losses": nan,
        },
        "rising": {"losses": [[5, 5.2], [10, 8.1]]},
        "noisy": {"losses": [[5, 5.2], [10, 5.3]]},
        "broken": {
            "status": "failed",
            "reason": "KeyError: 'x | y' in /home/me/data/rows.jsonl",
            "measured": None,
        },
        "stopped": {"status": "interrupted", "reason": "signal 15 at step 30 of 60"},
        "going": {"status": "running", "ran": None, "measured": None},
    }
    for rank, (name, top) in enumerate(made.items(), start=1):
        make(name, wrong=3 if name == "ok" else None, lora_r=rank, lora_alpha=2 * rank, top=top)
    printed = run_report(report, capsys, "--runs", tmp_path / "runs", "--out", tmp_path / "out")
    text, rows = (tmp_path / "out" / "report.md").read_text(), read_csv(tmp_path / "out")
    statuses = {
        "ok": "succeeded",
        "memory": "out of memory",
        "nan": "diverged",
        "rising": "diverged",
        "noisy": "succeeded",
        "broken": "failed",
        "stopped": "interrupted",
        "going": "running",
    }
    assert {name: row["status"] for name, row in rows.items()} == statuses
    assert rows["memory"]["tokens_per_s"] == ""
    assert "| diverged: the loss is nan at step 10 |" in table_row(text, "nan")
    assert "grew from 5.2 to 8.1" in table_row(text, "rising")
    assert "KeyError: 'x \\| y' in rows.jsonl" in table_row(text, "broken")
    assert all(name in printed for name in made)
    assert "not compared" not in printed  # one run with scores: nothing is compared
    svg = (tmp_path / "out" / "speed.svg").read_text()
    assert re.search(r">\s*out of memory\s*<", svg)


def test_a_run_whose_process_is_gone_is_said_to_be():
    run = {"status": "running", "host_pid": [socket.gethostname(), 2**22 + 1]}
    assert outcome(run) == ("running", "its process is gone: start it again to continue")
    assert outcome(run | {"host_pid": [socket.gethostname(), os.getpid()]}) == ("running", "")


def test_a_run_judged_twice_is_named(make, report, capsys, tmp_path):
    for rank in (4, 8, 16, 32):
        folder = make(
            f"r{rank}",
            lora_r=rank,
            lora_alpha=2 * rank,
            wrong=rank // 4,
            adapter="x" if rank < 16 else None,
        )
        (folder / "eval" / "judgments.jsonl").write_text("A\nB\n" if rank > 8 else f"{rank}\n")
    text = (tmp_path / "runs" / "r4" / "eval" / "quality.jsonl").read_text()
    (tmp_path / "runs" / "r32" / "eval" / "quality.jsonl").write_text(text)
    printed = run_report(report, capsys, "--runs", tmp_path / "runs", "--out", tmp_path / "out")
    markdown, rows = (tmp_path / "out" / "report.md").read_text(), read_csv(tmp_path / "out")
    for where in (printed, markdown):
        assert "r4 and r8 hold the same adapter:" in where
        assert "r16 and r32 hold the same judgements (judgments.jsonl)" in where
        assert "r4 and r32 hold the same answers" in where
    assert rows["r8"]["note"] == "same adapter as r4"
    assert rows["r4"]["note"] == "same adapter as r8; same answers as r32"
    assert "same adapter as r4" in table_row(markdown, "r8")
    assert "r8 and r16" not in printed


def test_equal_answers_differ_by_exactly_nothing(make, report, capsys, tmp_path):
    for name in ("a", "b"):
        folder = make(name)
        text = (tmp_path / "runs" / "a" / "eval" / "quality.jsonl").read_text()
        (folder / "eval" / "quality.jsonl").write_text(text)
    flags = ("--reference", tmp_path / "runs" / "b")
    run_report(report, capsys, "--runs", tmp_path / "runs", "--out", tmp_path / "out", *flags)
    section = (tmp_path / "out" / "report.md").read_text().split("## Tuned models against b")[1]
    assert (
        table_row(section, "a") == "| a | 0 [0, 0] | 1.000 | 0 [0, 0] | 1.000 | 0 [0, 0] | 1.000 |"
    )


def test_holm_counts_every_comparison_of_the_section(make, report, capsys, tmp_path):
    made = {
        rank: make(f"r{rank}", lora_r=rank, lora_alpha=2 * rank, wrong=wrong)
        for rank, wrong in ((8, 9), (16, 1), (32, 8))
    }
    make("r64", lora_r=64, lora_alpha=128, wrong=None)
    printed = run_report(report, capsys, "--runs", tmp_path / "runs", "--out", tmp_path / "out")
    assert "Tuned models against r8" in printed
    assert "after Holm over all 6 comparisons" in printed
    assert "not compared: r64 (no scores)" in printed
    tuned = {
        rank: [
            json.loads(line)["tuned"]
            for line in (folder / "eval" / "quality.jsonl").read_text().splitlines()
        ]
        for rank, folder in made.items()
    }
    expected = {}
    for rank in (16, 32):
        pairs = paired_scores(tuned[8], tuned[rank])
        found = compare({score: pairs[score] for score in report.SHOWN})
        expected |= {(rank, score): one for score, one in found.items()}
    add_holm(expected)
    section = (tmp_path / "out" / "report.md").read_text().split("## Tuned models against")[1]
    for rank in (16, 32):
        cells = []
        for score in report.SHOWN:
            cells += [
                interval(expected[rank, score]["difference"]),
                p_value(expected[rank, score]["p_holm"]),
            ]
        assert table_row(section, f"r{rank}") == f"| r{rank} | {' | '.join(cells)} |"
    assert expected[32, "bleu"]["p_holm"] > expected[32, "bleu"]["p_value"]


def test_scores_on_other_rows_are_not_compared(make, report, capsys, tmp_path):
    make("a")
    path = make("b") / "eval" / "quality.jsonl"
    path.write_text(path.read_text().replace("no other number", "no other one"))
    printed = run_report(report, capsys, "--runs", tmp_path / "runs", "--out", tmp_path / "out")
    assert "Tuned models against" not in printed
    make("c")
    printed = run_report(report, capsys, "--runs", tmp_path / "runs", "--out", tmp_path / "out")
    assert "not compared: b (other held-out rows)" in printed


def test_figures_of_the_csv_are_those_of_the_records(make, report, capsys, tmp_path):
    peaks = [{"allocated_gb": 1.5, "reserved_gb": 9}, {"allocated_gb": 2.25, "reserved_gb": 9}]
    folder = make(
        "run", measured={"tokens_per_s": 7834.512345678901, "peak_memory": peaks}, hardware=GPU
    )
    run_report(report, capsys, "--runs", folder, "--out", tmp_path / "out")
    row = read_csv(tmp_path / "out")["run"]
    run = json.loads((folder / "run.json").read_text())
    for key in (
        "tokens_per_s",
        "rows_per_s",
        "share_of_limit",
        "train_seconds",
        "train_loss",
        "validation_loss",
    ):
        assert float(row[key]) == run["measured"][key], key
    assert (row["peak_memory_gb"], row["peak_memory_is"]) == ("2.25", "allocated")
    assert row["trainable_parameters"] == "16896"
    scores = json.loads((folder / "eval" / "quality.json").read_text())["scores"]
    assert scores.keys() == NAMES.keys()
    for score, one in scores.items():
        for side in ("base", "tuned"):
            found = [float(row[f"{side} {score}{end}"]) for end in ("", " low", " high")]
            assert found == [one[side]["value"], *one[side]["interval_95"]], (side, score)


def test_speed_of_replicas_has_a_range(make, report, capsys, tmp_path):
    for seed, speed in ((1, 7000.0), (2, 7700.0)):
        make(f"seed{seed}", seed=seed, measured={"tokens_per_s": speed})
    printed = run_report(report, capsys, "--runs", tmp_path / "runs", "--out", tmp_path / "out")
    assert "axis: seed (inferred)" in printed
    assert "alike but for the seed, seed1, seed2: 7,000 to 7,700 real tokens/s" in printed


def test_scores_of_another_adapter_are_not_the_runs(make, report, capsys, tmp_path):
    folder = make("a")
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"trained again")
    printed = run_report(report, capsys, "--runs", folder, "--out", tmp_path / "out")
    row = read_csv(tmp_path / "out")["a"]
    assert "warning: a: stale scores, of another adapter" in printed
    assert (row["tuned bleu"], row["note"]) == ("", "stale scores")
    assert not (tmp_path / "out" / "quality.png").exists()


def test_main_metrics_of_the_harness_are_shown(make, report, capsys, tmp_path):
    folder = make("a", wrong=None)
    one = {
        side: {"value": v, "interval_95": [v - 0.1, v + 0.1]}
        for side, v in (("base", 0.25), ("tuned", 0.375))
    }
    entry = {
        "task": "arc_easy",
        "chat_template": True,
        "few_shot": 5,
        "limit": None,
        "main_metric": "acc_norm,none",
        "metrics": {"acc,none": {}, "acc_norm,none": one},
        "adapter_hash": adapter_hash(folder),
    }
    stale = entry | {"task": "gsm8k", "adapter_hash": "another"}
    (folder / "eval" / "harness.json").write_text(json.dumps({"entries": [entry, stale]}))
    printed = run_report(report, capsys, "--runs", folder, "--out", tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "tuned arc_easy 5-shot" in text
    assert "0.375 [0.275, 0.475]" in text
    assert "gsm8k" not in text
    assert "stale harness scores" in printed


def test_scores_of_judges_stand_under_their_titles(make, report, capsys, tmp_path):
    for name in ("r8", "r16"):
        folder = make(name, wrong=None, lora_r=int(name[1:]), lora_alpha=2 * int(name[1:]))
        one = {
            side: {"value": v, "interval_95": [v - 4, v + 4]}
            for side, v in (("base", 12.5), ("tuned", 31.25))
        }
        entry = {
            "title": "AlpacaEval instructions, judge x, reference base",
            "judge_fit": name == "r8",
            "scores": {"win_rate": one},
            "adapter_hash": adapter_hash(folder),
            "answers": {"tuned": {"hash": f"of {name}"}},
            "judged": {"tuned": {"hash": "the same"}},
            "judge": {"judge": "x"},
            "generation": {"max_new_tokens": 256},
            "questions_hash": "q",
        }
        rated = entry | {"title": "MT-Bench, judge x, scale 1 to 5", "scores": {"overall": one}}
        for file, found in (
            ("alpaca", [entry]),
            ("mt_bench", [rated, rated | {"adapter_hash": "another"}]),
        ):
            (folder / "eval" / f"{file}.json").write_text(json.dumps({"entries": found}))
    printed = run_report(report, capsys, "--runs", tmp_path / "runs", "--out", tmp_path / "out")
    text, rows = (tmp_path / "out" / "report.md").read_text(), read_csv(tmp_path / "out")
    title = "tuned win rate %, AlpacaEval instructions, judge x, reference base"
    assert (rows["r8"][title], rows["r16"][title]) == ("31.25", "")
    assert rows["r16"][f"{title}, UNFIT judge"] == "31.25"
    assert rows["r8"]["base mean rating, MT-Bench, judge x, scale 1 to 5"] == "12.5"
    assert "31.25 [27.25, 35.25]" in text
    assert "stale mt_bench scores" in printed
    assert "hold the same judgements (AlpacaEval instructions, judge x" in printed

    (folder / "eval" / "mt_bench.json").write_text(
        json.dumps({"entries": [rated | {"generation": {"max_new_tokens": 9}}]})
    )
    with pytest.raises(SystemExit) as stopped:
        report.main(
            ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--axis", "lora_r"]
        )
    assert "quality.MT-Bench, judge x, scale 1 to 5.max_new_tokens" in str(stopped.value)


def test_what_a_user_types(make, report, tmp_path):
    for rank in (8, 16):
        make(f"r{rank}", lora_r=rank, lora_alpha=2 * rank)
    command = [sys.executable, "eval/report.py", "--runs", str(tmp_path / "runs"), "--out"]
    done = subprocess.run(
        [*command, str(tmp_path / "one")], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "axis: lora_r (inferred)" in done.stdout
    assert (
        "python eval/report.py --runs runs --out one"
        in (tmp_path / "one" / "report.md").read_text()
    )
    report.main([*command[2:], str(tmp_path / "two")])
    names = {
        f"{plot}.{kind}"
        for plot in ("speed", "memory", "losses", "quality")
        for kind in ("png", "svg")
    }
    assert {path.name for path in (tmp_path / "one").iterdir()} == names | {"report.md", "runs.csv"}
    for name in names | {"runs.csv"}:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), (
            name
        )
    wrong = subprocess.run(
        [*command, "x", "--axis", "lora_rr"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert wrong.stderr.startswith("error: --axis lora_rr")
    assert "did you mean 'lora_r'?" in wrong.stderr


def test_bad_input(make, report, tmp_path):
    folder, out = make("a"), tmp_path / "out"
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no run in" in refused(report, "--runs", empty, "--out", out)
    assert "no run in" in refused(report, "--runs", tmp_path / "nowhere", "--out", out)
    error = refused(report, "--runs", folder, "--reference", "runs/elsewhere", "--out", out)
    assert "--reference runs/elsewhere: not among the runs" in error
    for name, content, said in (
        ("eval/quality.jsonl", "{", "quality.jsonl is not what"),
        ("eval/quality.json", "[]", "quality.json is no record"),
        ("eval/quality.json", "{", "quality.json is not JSON"),
        ("run.json", '{"status": "succeeded"}', "run.json is no record"),
        ("run.json", "{", "run.json is not JSON"),
    ):
        (folder / name).write_text(content)
        assert said in refused(report, "--runs", folder, "--out", out)
    assert not out.exists()


def test_runs_of_the_same_name_are_told_apart(make, report, capsys, tmp_path):
    make("a", wrong=None)
    make("b", wrong=None)
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / "runs" / name).rename(tmp_path / name / "run")
    run_report(
        report,
        capsys,
        "--runs",
        tmp_path / "a",
        tmp_path / "b",
        tmp_path / "a",
        "--out",
        tmp_path / "out",
    )
    assert list(read_csv(tmp_path / "out")) == ["a/run", "b/run"]
