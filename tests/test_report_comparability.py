"""Only runs that differ in the axis are compared; every confounded run is named."""

import json
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from report_runs import CPU, GPU, VERSIONS, facts, read_csv, refused, run_report

from sftlab.comparison.comparability import differences, suggest_axes

pytestmark = pytest.mark.usefixtures("no_other_plots")


def test_ranks_alone_are_compared_and_the_axis_is_inferred(plots, make, report, capsys, tmp_path):
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


def test_4_bits_in_float8_differ_in_precision_alone(make):
    """Their linears, and LoRA that is not fused with them, follow from it."""
    runs = {}
    for name, linear, kernel, fused in (
        ("bf16", "Linear4bit", "one kernel", True),
        ("fp8", "Float8Linear4bit", "one kernel, float8", False),
    ):
        ran = {"compute": {"linear": linear, "output_dtype": "bfloat16"}, "precision": name}
        ran |= {"quantization": "4bit", "four_bit_weights": kernel, "fused_lora": fused}
        settings = {"ACCELERATE_MIXED_PRECISION": name}
        launch = {"precision": name, "settings": settings}
        asked = {"dtype": "bfloat16", "load_in_4bit": True}
        runs[name] = facts(make(name, wrong=None, ran=ran, launch=launch, **asked))
    found = set(differences(runs))
    assert found == {"precision", "compute", "four_bit_weights", "fused_lora"}
    assert suggest_axes(runs) == (["precision"], {})


def test_fp8_of_before_and_after_the_head_was_in_float8_differ(make):
    """A record of before says nothing of the head."""
    launch = {"precision": "fp8", "settings": {"ACCELERATE_MIXED_PRECISION": "fp8"}}
    ran = {"compute": {"linear": "FrozenFloat8Linear", "output_dtype": "bfloat16"}}
    runs = {
        name: facts(make(name, wrong=None, ran=ran | {"precision": "fp8"} | more, launch=launch))
        for name, more in (("before", {}), ("after", {"float8_head": True}))
    }
    assert set(differences(runs)) == {"float8_head"}


@pytest.mark.parametrize("name", ["strategy", "world_size", "precision"])
def test_a_record_without_its_launch_is_named(make, name):
    folder = make("cut")
    run = json.loads((folder / "run.json").read_text())
    del run["launch"][name]
    (folder / "run.json").write_text(json.dumps(run))
    with pytest.raises(ValueError, match=rf"run\.json has no launch\.{name}"):
        facts(folder)


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


def test_steps_that_runs_captured_by_themselves_are_no_second_axis(make):
    small = facts(make("small", ran={"captured_step": True}, lora_r=8, lora_alpha=16))
    large = facts(make("large", ran={"captured_step": False}, lora_r=16, lora_alpha=32))
    runs = {"small": small, "large": large}
    assert list(differences(runs, ["lora_r"])) == []
    assert "captured_step" in differences(runs), "a report says so"
    asked = {"ran": {"captured_step": True}, "captured_step": True}
    runs["small"] = facts(make("asked", lora_r=8, lora_alpha=16, **asked))
    assert list(differences(runs, ["lora_r"])) == ["captured_step"]


def test_tiles_of_longer_rows_are_no_second_axis(make):
    ran = {length: {"attention_tile": 128 if length > 2048 else 64} for length in (512, 4096)}
    runs = {f"{one}": facts(make(f"{one}", ran=ran[one], max_length=one)) for one in ran}
    assert list(differences(runs, ["max_length"])) == []
    assert set(differences(runs)) == {"max_length", "attention_tile"}


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


def test_loss_on_explains_the_rows_that_are_trained_on_and_no_others(make):
    other = {"rows": 320, "fingerprint": "others"}
    runs = {
        "a": facts(make("a", wrong=None, loss_on="all")),
        "b": facts(make("b", wrong=None, loss_on="last", data={"train": other})),
    }
    assert not differences(runs, ["loss_on"])
    runs["b"] = facts(make("c", wrong=None, loss_on="last", data={"test": other}))
    assert set(differences(runs, ["loss_on"])) == {"data.test"}
    # of questions with one answer each it changes nothing
    runs["b"] = facts(make("d", wrong=None, loss_on="last"))
    assert not differences(runs)


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
    make("a", generation={"processes": 1, "server": "http://127.0.0.1:8000/v1"})
    make(
        "b",
        generation={
            "batch_size": 8,
            "processes": 2,
            "decoding": "captured",
            "server": "http://127.0.0.1:8001/v1",
        },
    )
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


@pytest.mark.long
def test_confounded_runs_are_marked_everywhere(
    plots, confounded, report, capsys, tmp_path, monkeypatch
):
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
