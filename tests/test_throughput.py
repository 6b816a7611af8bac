"""The throughput benchmark: its command line, its workers in turn, and rows of what failed."""

import json
import re
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest
from conftest import ROOT, load_script

from sftlab.measurement import turnstile
from sftlab.measurement.flops import Flops
from sftlab.measurement.throughput_variants import (
    CAPTURED,
    EVERY,
    FAMILIES,
    FAMILY_OF,
    FUSED_LORA,
    PEERS,
    VARIANTS,
    Variant,
    family_variants,
)
from sftlab.tables import read_csv

script = load_script("benchmarks/throughput.py")
FIELDS = {"per_device_train_batch_size": 2, "max_length": 64}
SFT = Variant("sft", "cpu", FIELDS, 64, "tiny", warm=8, steps=4)
TRL = Variant(
    "trl",
    "cpu",
    FIELDS | {"packing": True, "bf16": False, "attn_implementation": "eager"},
    64,
    "tiny",
    warm=8,
    steps=4,
)
LACKING = SFT._replace(needs=("torch", "no_such_module"))


def run(monkeypatch, tmp_path, variants, *words):
    """Runs the benchmark with other variants on this CPU. Returns its table by variant."""
    monkeypatch.setattr(script, "matrix_rate", lambda device, dtype: 1e12)
    monkeypatch.setattr(script, "EVERY", variants)
    argv = ["throughput.py", "--variants", *variants, "--out", str(tmp_path), *words]
    monkeypatch.setattr(sys, "argv", argv)
    script.main()
    return {row["variant"]: row for row in read_csv(tmp_path / "throughput.csv")}


def asked(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["throughput.py", *words])
    return script.parse_arguments()


@pytest.mark.long
def test_variants_train_in_turn_beside_one_that_fails_and_one_that_lacks_a_module(
    monkeypatch, tmp_path
):
    variants = {
        "sft.py bf16": SFT,
        "trl bf16": TRL._replace(fields={"no_such_field": 1}),
        "trl bf16, packed, sdpa": TRL,
        "sft.py fp8": LACKING,
    }
    rows = run(monkeypatch, tmp_path, variants, "--repeats", "2")
    assert list(rows) == list(variants)
    for name in ("sft.py bf16", "trl bf16, packed, sdpa"):
        row = rows[name]
        assert 0 < float(row["lowest"]) <= float(row["tokens_per_s"]) <= float(row["highest"])
        assert row["repeats"] == "2" and not row["note"]
        assert 6 < float(row["loss"]) < 8  # ln 1024 is 6.9
        assert 64 < float(row["tokens_per_step"]) <= 128
        assert 0 < float(row["rows_per_s"]) < float(row["tokens_per_s"]) / 16
    assert "packing: no" in rows["sft.py bf16"]["parts"]
    assert "packing is off: " in rows["sft.py bf16"]["parts"]
    assert "attention: eager; packing: yes" in rows["trl bf16, packed, sdpa"]["parts"]
    assert "TypeError" in rows["trl bf16"]["note"] and "no_such_field" in rows["trl bf16"]["note"]
    assert rows["sft.py fp8"]["note"] == "not installed here: no_such_module"
    for name in ("trl bf16", "sft.py fp8"):
        assert rows[name]["tokens_per_s"] == "failed" and rows[name]["repeats"] == "0"
    assert (tmp_path / "throughput.png").is_file()


def test_a_worker_that_is_never_ready_is_ended_and_the_next_group_starts(monkeypatch, tmp_path):
    variants = {"trl bf16": TRL, "sft.py fp8": LACKING}
    before = set(psutil.Process().children(recursive=True))
    rows = run(monkeypatch, tmp_path, variants, "--patience", "1", "--gb", "1")
    assert re.fullmatch("not ready [12] s after its start", rows["trl bf16"]["note"])
    assert rows["sft.py fp8"]["note"] == "not installed here: no_such_module"
    assert set(psutil.Process().children(recursive=True)) <= before


@pytest.mark.long
def test_at_the_end_of_its_time_the_command_writes_what_it_has(monkeypatch, tmp_path):
    variants = {"trl bf16": TRL, "sft.py bf16": SFT}
    before = set(psutil.Process().children(recursive=True))
    rows = run(monkeypatch, tmp_path, variants, "--seconds", "5", "--gb", "1")
    assert rows["trl bf16"]["note"].startswith("the time was up: not ready")
    assert rows["sft.py bf16"]["note"] == "not reached in 5 s"
    assert set(psutil.Process().children(recursive=True)) <= before


def test_the_table_is_written_after_every_turn(monkeypatch, tmp_path):
    folder = tmp_path / "0"
    folder.mkdir()
    report = {"tokens_per_s": 5.0}
    code = f"""
import time
from pathlib import Path
folder = Path({str(folder)!r})
for turn in range(2):
    (folder / f"ready{{turn}}").touch()
    while not (folder / f"go{{turn}}").exists():
        time.sleep(0.01)
    (folder / f"done{{turn}}.part").write_text({json.dumps(report)!r})
    (folder / f"done{{turn}}.part").rename(folder / f"done{{turn}}")
time.sleep(600)
"""
    folder.rmdir()  # the script makes it
    monkeypatch.setattr(script, "start", lambda *_: subprocess.Popen([sys.executable, "-c", code]))
    found, seen = {"one": script.Found()}, []
    script.drive(
        {"one": TRL}, found, 2, tmp_path, script.Limits(60),
        lambda: seen.append(len(found["one"].reports)),
    )  # fmt: skip
    assert seen == [1, 2] and found["one"] == script.Found([report, report])


@pytest.mark.parametrize(
    "log, said",
    [
        ("INFO\nValueError: no\nCalledProcessError: it\n", "ValueError: no"),
        ("a.b.OutOfMemoryError: GPU\n at line 3\n", "a.b.OutOfMemoryError: GPU"),
        ("error: the recipe\nx.errors.ChildFailedError: \n===\n", "error: the recipe"),
        ("Killed\n", "Killed"),
        (
            "triton.errors.OutOfResources: no\n File.py: it\n====\n",
            "triton.errors.OutOfResources: no",
        ),
        ("Signal 11 (SIGSEGV)\n=====\n-----\n", "Signal 11 (SIGSEGV)"),
        ("", "it ended without a word"),
    ],
)
def test_a_failure_is_one_line_the_worker_s_own(log, said):
    assert script.reason(log) == said


def test_sets_and_parts_of_them_are_asked_for_by_name(monkeypatch, capsys):
    assert list(asked(monkeypatch, "--peers").chosen) == list(PEERS)
    given = asked(monkeypatch, "--families", "--only", "Qwen3-1.7B", "Gemma")
    assert len(given.chosen) == 6 and given.out == ROOT / "results" / "families"
    default = asked(monkeypatch).chosen
    assert not set(default) & (set(FUSED_LORA) | set(FAMILIES))
    assert default["sft.py bf16, 64 rows"].profiled
    assert not asked(monkeypatch, "--peers").chosen["sft.py bf16, 64 rows"].profiled
    with pytest.raises(SystemExit):
        asked(monkeypatch, "--peers", "--only", "no such text")
    assert "no variant has no such text" in capsys.readouterr().err


def test_variants_of_one_model_share_a_group_where_they_fit():
    def sizes(*shapes):
        named = {str(i): TRL._replace(shape=shape, gb=4) for i, shape in enumerate(shapes)}
        return [len(names) for names in script.groups(named, 10)]

    assert sizes("a", "a", "a", "a", "a") == [2, 2, 1]
    assert sizes("a", "b", "b", "c") == [1, 2, 1]
    assert sizes("a", "b", "c") == [2, 1]


def test_what_one_question_compares_shares_a_group():
    assert set(EVERY) == {*VARIANTS, *FUSED_LORA, *CAPTURED, *PEERS, *FAMILIES}
    together = [set(names) for names in script.groups(FAMILIES, 135)]
    for shape, family in FAMILY_OF.items():
        assert any(set(family_variants(shape, family)) <= group for group in together)
    together = [set(names) for names in script.groups(PEERS, 135)]
    for pair in (
        {"sft.py bf16, 20 rows", "Unsloth bf16, packed, 20 rows"},
        {"sft.py bf16, 64 rows", "Unsloth bf16, packed, 64 rows"},
        {"sft.py bf16, all linears, 64 rows", "Unsloth bf16, packed, all linears, 64 rows"},
        {"sft.py bf16, 8B, 2 full rows of 4096", "Unsloth bf16, 8B, 2 full rows of 4096"},
        {"sft.py QLoRA, 7B, kept activations, 4 rows", "Unsloth QLoRA, 7B, packed, 4 rows"},
    ):
        assert any(pair <= group for group in together), pair


class Clock:
    """A clock that stands until it is moved, for a turnstile."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(turnstile.time, "perf_counter", lambda: self.now)


def steps_of(turns, folder, clock, seconds_a_step):
    """Trains until the turnstile stops it; returns the steps before the first turn and in all."""
    control, step, warm = SimpleNamespace(should_training_stop=False), 0, None
    turns.flops = Flops(1.0, 1.0)
    while not control.should_training_stop and step < turns.total:
        for turn in range(9):
            (folder / f"go{turn}").touch()
        turns.on_step_begin(None, SimpleNamespace(global_step=step), control)
        warm = step if warm is None and (folder / "ready0").exists() else warm
        turns.count(10, 2, 8)
        clock.now, step = clock.now + seconds_a_step(step), step + 1
        turns.on_step_end(None, SimpleNamespace(global_step=step), control)
    return warm, step


def test_turns_have_the_steps_asked_for(monkeypatch, tmp_path):
    turns = turnstile.Turnstile(tmp_path, turns=2, warm=4, steps=3)
    clock = Clock(monkeypatch)
    assert steps_of(turns, tmp_path, clock, lambda step: 1.0 + 50 * (step < 2)) == (4, 10)
    report = json.loads((tmp_path / "done1").read_text(encoding="utf-8"))
    assert (report["tokens_per_s"], report["tokens_per_step"]) == (10, 10)
    assert report["model_flops_per_s"] == 18 and not (tmp_path / "done2").exists()


def test_slow_steps_end_a_warm_up_and_a_turn_early(monkeypatch, tmp_path):
    turns = turnstile.Turnstile(tmp_path, turns=2, warm=40, steps=30)
    warm, steps = steps_of(turns, tmp_path, Clock(monkeypatch), lambda step: 20.0)
    # two steps compile, 13 more take longer than 240 s; two of each turn take longer than 30 s
    assert (warm, steps) == (15, 19)
    assert json.loads((tmp_path / "done0").read_text(encoding="utf-8"))["tokens_per_step"] == 10
