"""eval/harness.py gives lm-eval's figures for base and tuned, and continues after a kill."""

import json
import signal
import sqlite3
import subprocess
import time

import fork_server
import pytest
from conftest import ROOT, SHARED, copy_of, load_script, needs_shared
from harness_files import (
    TASKS,
    assert_same,
    by_hand,
    entries,
    harness_records,
    named,
    write_files,
)
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.long


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """Handmade files with the hub's columns, by the names that --files gives them."""
    return write_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def harness():
    return load_script("eval/harness.py")


@pytest.fixture
def run(finished, tmp_path):
    return copy_of(finished[0], tmp_path / "run")


def test_the_figures_are_those_of_the_lm_eval_command(harness, run, base, files, tmp_path):
    tasks, names = (
        "arc_challenge_local,gsm8k_local",
        ("arc_challenge_test", "arc_challenge_train", "gsm8k_test", "gsm8k_train"),
    )
    harness.main(
        [
            "--run",
            str(run),
            "--tasks",
            tasks,
            *named(files, *names),
            "--num_fewshot",
            "1",
            "--batch_size",
            "8",
        ]
    )
    command = [
        fork_server.python(),
        "-m",
        "lm_eval",
        "run",
        "--model",
        "hf",
        "--batch_size",
        "8",
        "--device",
        "cpu",
        *(
            "--model_args",
            f"pretrained={base},peft={run / 'adapter'},tokenizer={run / 'adapter'},dtype=float32",
        ),
        *(
            "--include_path",
            str(TASKS),
            "--tasks",
            tasks,
            "--num_fewshot",
            "1",
            "--apply_chat_template",
        ),
        *("--metadata", *(f"{name}={files[name]}" for name in names)),
        *("--log_samples", "--output_path", str(tmp_path / "out")),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(next((tmp_path / "out").rglob("results_*.json")).read_text())["results"]
    for task, entry in entries(run).items():
        samples = next((tmp_path / "out").rglob(f"samples_{task}_*.jsonl")).read_text().splitlines()
        samples = [json.loads(line) for line in samples]
        assert_same(entry, "tuned", harness_records(run, entry), results[task], samples)
        records = harness_records(run, entry)
        assert any(record["base"] != record["tuned"] for record in records)


@pytest.mark.parametrize("template", [True, False])
def test_the_figures_are_those_of_lm_eval_for_either_model_and_template(
    harness, run, base, files, template
):
    names = ("arc_challenge_test", "arc_challenge_train")
    flags = [] if template else ["--no_chat_template"]
    harness.main(
        [
            "--run",
            str(run),
            "--tasks",
            "arc_challenge_local",
            *named(files, *names),
            "--batch_size",
            "8",
            *flags,
        ]
    )
    entry = entries(run)["arc_challenge_local"]
    records = harness_records(run, entry)
    for side in ("base", "tuned") if not template else ("base",):
        found = by_hand(
            base, run, side, files, "arc_challenge_local", {"apply_chat_template": template}
        )
        task = found["samples"]["arc_challenge_local"]
        assert_same(entry, side, records, found["results"]["arc_challenge_local"], task)
        assert ("### Response" in task[0]["arguments"][0][0]) == template


@needs_shared
def test_real_gsm8k_gives_lm_evals_figures(harness, run, base):
    real = {name: str(SHARED / f"{name}.jsonl") for name in ("gsm8k_test", "gsm8k_train")}
    settings = {"limit": 4, "num_fewshot": 1}
    flags = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    harness.main(
        [
            "--run",
            str(run),
            "--tasks",
            "gsm8k_local",
            *named(real, *real),
            "--batch_size",
            "8",
            *flags,
        ]
    )
    entry = entries(run)["gsm8k_local"]
    assert entry["main_metric"] == "exact_match,flexible-extract"
    found = by_hand(
        base, run, "tuned", real, "gsm8k_local", settings | {"apply_chat_template": True}
    )
    records = harness_records(run, entry)
    assert_same(
        entry, "tuned", records, found["results"]["gsm8k_local"], found["samples"]["gsm8k_local"]
    )
    assert len(records) == 8
    assert entry["documents"] == 4


def test_an_adapter_that_changes_nothing_gives_differences_of_zero(harness, run, files, capsys):
    weights = load_file(run / "adapter" / "adapter_model.safetensors")
    zeroed = {name: value.zero_() if "lora_B" in name else value for name, value in weights.items()}
    save_file(zeroed, run / "adapter" / "adapter_model.safetensors")
    tasks = "truthfulqa_mc2_local,mmlu_local,arc_easy_local"
    names = ("truthfulqa_validation", "mmlu_test", "arc_easy_test")
    harness.main(["--run", str(run), "--tasks", tasks, *named(files, *names)])
    found = entries(run)
    assert list(found) == tasks.split(",")
    for entry in found.values():
        for metric in entry["metrics"].values():
            assert metric["difference"]["value"] == 0
            assert metric["p_value"] == 1
        assert all(record["base"] == record["tuned"] for record in harness_records(run, entry))
    assert (
        found["truthfulqa_mc2_local"]["metrics"]["acc,none"]["statistics"]
        == "bootstrap-t, exchange"
    )
    assert found["mmlu_local"]["metrics"]["acc,none"]["statistics"].endswith("exact McNemar")
    assert found["arc_easy_local"]["main_metric"] == "acc_norm,none"
    assert [e["metrics"][e["main_metric"]]["p_holm"] for e in found.values()] == [1, 1, 1]
    printed = capsys.readouterr().out
    assert "mmlu_local: fewer than 30 documents" in printed
    assert "corrected for 3 task(s)" in printed


def test_settings_have_entries_of_their_own_and_a_repetition_replaces_its_entry(
    harness, run, files
):
    command = [
        "--run",
        str(run),
        "--tasks",
        "arc_challenge_local",
        *named(files, "arc_challenge_test"),
    ]
    for flags in ([], ["--limit", "4"], ["--no_chat_template"], ["--limit", "4"]):
        harness.main([*command, *flags])
    found = json.loads((run / "eval" / "harness.json").read_text())["entries"]
    assert [(entry["chat_template"], entry["limit"], entry["documents"]) for entry in found] == [
        (True, None, 32),
        (False, None, 32),
        (True, 4, 4),
    ]
    assert sorted(path.name for path in (run / "eval" / "harness").iterdir()) == sorted(
        e["records"] for e in found
    )
    assert (
        found[0]["adapter_hash"]
        and found[0]["versions"]["lm_eval"]
        and found[0]["hardware"]
        and found[0]["seconds"]
    )


def answers_kept(run):
    total = 0
    for path in (run / "eval" / "harness").glob(".unfinished-*.db"):
        connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
        if connection.execute("select 1 from sqlite_master where name = 'unnamed'").fetchone():
            total += connection.execute("select count(*) from unnamed").fetchone()[0]
        connection.close()
    return total


def test_a_killed_evaluation_continues_where_it_stopped(harness, finished, files, tmp_path):
    killed, whole = (copy_of(finished[0], tmp_path / name) for name in ("killed", "whole"))
    flags = [
        "--tasks",
        "gsm8k_local",
        *named(files, "gsm8k_test"),
        "--num_fewshot",
        "0",
        "--batch_size",
        "3",
    ]
    process = subprocess.Popen(
        [fork_server.python(), str(ROOT / "eval" / "harness.py"), "--run", str(killed), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=ROOT,
    )
    while answers_kept(killed) < 6:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kept = answers_kept(killed)
    assert 6 <= kept < 24
    assert not (killed / "eval" / "harness.json").exists()
    for run in (killed, whole):
        harness.main(["--run", str(run), *flags])
        assert not list((run / "eval" / "harness").glob(".unfinished-*"))
    continued, undisturbed = entries(killed)["gsm8k_local"], entries(whole)["gsm8k_local"]
    assert sum(continued["answers_reused"].values()) == kept
    assert sum(undisturbed["answers_reused"].values()) == 0
    assert continued["metrics"] == undisturbed["metrics"]
    assert harness_records(killed, continued) == harness_records(whole, undisturbed)


def test_answers_of_another_adapter_are_not_reused(harness, run, files, monkeypatch):
    command = ["--run", str(run), "--tasks", "arc_easy_local", *named(files, "arc_easy_test")]
    monkeypatch.setattr(harness, "pair", lambda *a: (_ for _ in ()).throw(ValueError("stopped")))
    with pytest.raises(SystemExit, match="stopped"):
        harness.main(command)
    assert answers_kept(run) == 2 * 36
    monkeypatch.undo()
    weights = load_file(run / "adapter" / "adapter_model.safetensors")
    save_file(
        {name: value * 3 for name, value in weights.items()},
        run / "adapter" / "adapter_model.safetensors",
    )
    harness.main(command)
    assert entries(run)["arc_easy_local"]["answers_reused"] == {"base": 0, "tuned": 0}
