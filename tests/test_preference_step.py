"""The benchmark of a step of preference tuning measures the same work for every variant."""

import json
from types import SimpleNamespace

import pytest
from conftest import load_script, pair_rows, write_jsonl

step = load_script("benchmarks/preference_step.py")


def turns_of(variant, base, folder, turns=2):
    """What the worker of a variant writes where no turn has to wait."""
    worker = load_script("benchmarks/preference_step_worker.py")
    folder.mkdir()
    pairs = write_jsonl(folder / "pairs.jsonl", pair_rows(60))
    for turn in range(turns + 1):
        (folder / f"go{turn}").touch()
    work = {"count": 12, "batch": 4, "max_length": 128, "turns": turns}
    given = {"base": base, "pairs": pairs, "folder": folder, **work}
    given["fields"] = json.dumps(variant.fields)
    words = [f"--{name}={value}" for name, value in given.items()]
    worker.main([*words, *(["--trl"] if variant.trl else [])])
    files = [path for path in folder.iterdir() if path.name.startswith(("done", "facts", "failed"))]
    return {path.name: json.loads(path.read_text()) for path in files}


@pytest.mark.long
def test_variants_do_the_same_work(base, tmp_path):
    names = (step.OURS, "trl", "trl, reference beforehand")
    found = {
        name: turns_of(step.VARIANTS[name], base, tmp_path / str(number))
        for number, name in enumerate(names)
    }
    for number, name in enumerate(names):
        folder = tmp_path / str(number)
        assert all((folder / f"ready{turn}").exists() for turn in range(3))
        assert found[name].keys() == {"facts", "done0", "done1", "done2"}
        assert found[name]["done0"]["seconds"] > 0
        assert found[name]["done2"]["step_gb"] > 0
        assert found[name]["facts"]["tokens"] == found["trl"]["facts"]["tokens"] > 500
        assert found[name]["done1"]["loss"] == pytest.approx(found["trl"]["done1"]["loss"])
    assert found[step.OURS]["facts"]["parts"] == "fused_loss"
    assert found["trl, reference beforehand"]["facts"]["reference_s"] > 0


def test_a_worker_that_fails_says_why(base, tmp_path):
    variant = step.Variant({"attn_implementation": "nonsense"})
    found = turns_of(variant, base, tmp_path / "worker", turns=1)
    assert found.keys() == {"failed"}
    assert "nonsense" in found["failed"]["why"]


def test_what_compiles_has_its_rounds_last_and_beside_dpo_py():
    names = ["dpo.py, compiled", step.OURS, "trl"]
    assert step.rounds_of(names, 2) == [[step.OURS, "trl"]] * 2 + [[*names[:2]]] * 2
    assert step.rounds_of(["trl"], 1) == [["trl"]]


def test_ratios_are_of_the_same_round():
    def report(seconds):
        return {"seconds": seconds, "loss": 0.5, "peak_gb": 9.0, "step_gb": 3.0}

    worker = SimpleNamespace(name="trl", why_not=None, facts={"tokens": 300, "reference_s": 1.0})
    worker.reports = {0: report(2.0), 1: report(8.0), 2: report(6.0)}
    ours = {1: report(2.0), 2: report(3.0)}
    row = step.summary(worker, ours, {"count": 24, "batch": 8, "max_length": 64})
    assert (row["times_dpo_py_lowest"], row["times_dpo_py_highest"]) == (2.0, 4.0)
    assert (row["step_s"], row["step_s_lowest"], row["step_s_highest"]) == (2.0, 0.6667, 2.6667)
    assert row["first_epoch_step_s"] == pytest.approx(2.0 + 1 / 3, abs=1e-4)
    assert (row["tokens_per_s"], row["peak_gb"], row["step_gb"]) == (50, 9.0, 3.0)


def test_a_table_has_a_row_for_what_did_not_run():
    failed = SimpleNamespace(name="trl", why_not="out of memory", facts={}, reports={})
    work = {"count": 24, "batch": 8, "max_length": 64}
    rows = step.rows(
        [failed], {"trl, Liger": "not installed: liger_kernel"}, work, {"command": "x"}
    )
    assert [row["note"] for row in rows] == ["out of memory", "not installed: liger_kernel"]
    assert "trl, Liger: not installed: liger_kernel" in step.shown(rows)
    assert rows[0].keys() == rows[1].keys()
