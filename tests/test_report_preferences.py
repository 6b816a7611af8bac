"""eval/report.py: preference tuning beside the supervised run that it went on from."""

import json

import pytest
from report_runs import facts, read_csv, refused, run_report

from sftlab.comparison.comparability import differences
from sftlab.runs.run_directory import adapter_hash

pytestmark = pytest.mark.usefixtures("no_other_plots")
STAGE = {
    "method": "dpo",
    "adapter_name_or_path": "runs/sft",
    "dataset_name": "pairs.jsonl",
    "dataset_shape": "preference",
    "learning_rate": 5e-6,
    "max_steps": 100,
}
PAIRS = {name: {"rows": 9, "fingerprint": "p"} for name in ("train", "validation", "test")}
RAN = {"method": "dpo", "reference": "the adapter that it started from", "beta": 0.1}
RAN |= {"loss_type": ["sigmoid"], "fused_loss": False}


def estimate(value):
    return {"value": value, "interval_95": [value - 1, value + 1]}


def write_preferences(folder, **changes):
    margin = {"tuned": estimate(4.5), "p_value": 0.001, "p_holm": 0.002}
    sides = {"base": estimate(9.0), "start": estimate(2.0), "tuned": estimate(2.5)}
    lost = sides | {"difference": estimate(0.5), "p_value": 0.01, "p_holm": 0.02}
    found = {
        "adapter_hash": adapter_hash(folder),
        "models": ["base", "start", "tuned"],
        "pairs": 9,
        "held_out": {"dataset": "pairs.jsonl, test split"},
        "scores": {"reward_margin": margin, "start_perplexity": lost},
    }
    (folder / "eval" / "preferences.json").write_text(json.dumps(found | changes))


@pytest.fixture
def two(make):
    make("sft")
    folder = make("dpo", ran=RAN, data=PAIRS, **STAGE)
    write_preferences(folder)
    return folder


def test_a_stage_is_compared_with_the_one_before_by_its_method(two, report, capsys, tmp_path):
    out = tmp_path / "out"
    said = run_report(report, capsys, "--runs", tmp_path / "runs", "--out", out)
    text, rows = (out / "report.md").read_text(), read_csv(out)
    assert "axis: method (inferred)" in said and "CONFOUNDED" not in text
    assert "methods: dpo (dpo) | sft (sft). Losses are left out" in text
    assert rows["sft"]["train_loss"] == rows["dpo"]["validation_loss"] == ""
    assert float(rows["sft"]["tokens_per_s"]) > 0
    assert "| dpo | reward margin, nats |  |  | 4.5 [3.5, 5.5] |  | 0.002 |" in text
    lost = "response perplexity, test rows of the start"
    assert f"| dpo | {lost} | 9 [8, 10] | 2 [1, 3] | 2.5 [1.5, 3.5] | 0.5 [-0.5, 1.5] |" in text
    assert rows["dpo"]["preferences: start start_perplexity"] == "2.0"
    assert "Tuned models against" in text, "both have scores of the same rows"


def test_the_losses_of_two_methods_are_not_drawn(two, plots, report, capsys, tmp_path):
    out = tmp_path / "out"
    said = run_report(report, capsys, "--runs", tmp_path / "runs", "--out", out)
    assert "quality.png" in said and "losses.png" not in said
    alone = tmp_path / "alone"
    assert "losses.png" in run_report(report, capsys, "--runs", two, "--out", alone)
    assert read_csv(alone)["dpo"]["train_loss"]


def test_what_is_no_part_of_a_stage_still_tells_them_apart(make):
    runs = {"sft": facts(make("sft")), "dpo": facts(make("dpo", ran=RAN, data=PAIRS, **STAGE))}
    assert list(differences(runs, ["method"])) == []
    other = make("other", ran=RAN, data=PAIRS, **STAGE, model_name_or_path="another/base")
    runs["other"] = facts(other)
    assert list(differences(runs, ["method"])) == ["model_name_or_path"]
    faster = make("faster", ran=RAN, data=PAIRS, **STAGE | {"learning_rate": 1e-5})
    del runs["other"]
    runs["faster"] = facts(faster)
    assert list(differences(runs, ["method"])) == ["learning_rate"]


def test_ranks_of_preference_tuning_go_on_from_adapters_of_their_own(make):
    runs = {}
    for rank in (8, 16):
        fields = STAGE | {"adapter_name_or_path": f"runs/r{rank}"}
        fields |= {"lora_r": rank, "lora_alpha": 2 * rank}
        runs[f"r{rank}"] = facts(make(f"r{rank}", ran=RAN, data=PAIRS, **fields))
    assert list(differences(runs, ["lora_r"])) == []


def test_scores_of_another_adapter_are_left_out(two, report, capsys, tmp_path):
    write_preferences(two, adapter_hash="another")
    out = tmp_path / "out"
    said = run_report(report, capsys, "--runs", tmp_path / "runs", "--out", out)
    assert "dpo: stale scores of preferences, of another adapter" in said
    assert "What preference tuning gained" not in (out / "report.md").read_text()


def test_a_damaged_file_is_named(two, report, tmp_path):
    write_preferences(two, scores={"reward_margin": {"tuned": 3}})
    error = refused(report, "--runs", tmp_path / "runs", "--out", tmp_path / "out")
    assert "preferences.json, scores.reward_margin" in error and "tuned" in error
