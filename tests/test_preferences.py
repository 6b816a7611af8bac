"""eval/preferences.py: what preference tuning gained on held-out pairs, and what was lost."""

import json
import math

import numpy as np
import pytest
from conftest import copy_of, load_script, pair_rows, read, write_jsonl
from judged_runs import change_adapter

from sftlab.config.recipe import DataArguments
from sftlab.data.splits import load_splits
from sftlab.evaluation.held_out import HeldOut
from sftlab.evaluation.preference_pairs import of_models, pair_scores
from sftlab.evaluation.significance import mean, with_counts
from sftlab.evaluation.start_model import start_of
from sftlab.files import write_json

SHORT = ("--max_new_tokens", "8")


@pytest.fixture(scope="module")
def preferences():
    return load_script("eval/preferences.py")


def found_in(run, name="preferences"):
    return json.loads((run / "eval" / f"{name}.json").read_text())


def lines_of(run, name):
    return [json.loads(line) for line in (run / "eval" / name).read_text().splitlines()]


def evaluated(preferences, run, tmp_path, *more):
    copy = copy_of(run, tmp_path / "copy")
    preferences.main(["--run", str(copy), *SHORT, *more])
    return copy, found_in(copy)


def test_three_models_are_scored_on_the_held_out_pairs(
    preferences, preferred, finished, tmp_path, capsys
):
    run, found = evaluated(preferences, preferred, tmp_path)
    said = capsys.readouterr().out
    record = read(preferred)
    assert found["models"] == ["base", "start", "tuned"]
    assert found["pairs"] == record["data"]["test"]["rows"] == found["questions"]
    assert found["scores"]["reward_accuracy"]["tuned"]["value"] == 1
    assert found["scores"]["reward_margin"]["tuned"]["interval_95"][0] > 0
    assert "tuned - start" in said and "Holm over 7 scores" in said
    records = lines_of(run, "preferences.jsonl")
    rewards = [one["rewards"] for one in records]
    margins = [one["chosen"] - one["rejected"] for one in rewards]
    margin = found["scores"]["reward_margin"]["tuned"]["value"]
    assert np.mean(margins) == pytest.approx(margin)
    one = records[0]
    by_hand = found["beta"] * (one["tuned"]["chosen"][0] - one["start"]["chosen"][0])
    assert one["rewards"]["chosen"] == pytest.approx(by_hand)
    rows = lines_of(run, "start_rows.jsonl")
    nats, tokens = np.sum([one["start"]["response_nll"] for one in rows], axis=0)
    start = found["scores"]["start_perplexity"]["start"]["value"]
    assert start == pytest.approx(math.exp(nats / tokens))
    assert len(rows) == read(finished[0])["data"]["test"]["rows"] == found["start_rows"]["rows"]


def test_the_starts_perplexity_is_that_of_its_own_evaluation(
    preferences, preferred, finished, tmp_path
):
    found = evaluated(preferences, preferred, tmp_path)[1]["scores"]["start_perplexity"]
    sft = copy_of(finished[0], tmp_path / "sft")
    load_script("eval/quality.py").main(["--run", str(sft), *SHORT])
    own = found_in(sft, "quality")["scores"]["response_perplexity"]
    assert found["start"]["value"] == pytest.approx(own["tuned"]["value"], rel=1e-5)
    assert found["base"]["value"] == pytest.approx(own["base"]["value"], rel=1e-5)


def test_over_a_base_model_two_models_are_scored(preferences, preferred_over_base, tmp_path):
    _, found = evaluated(preferences, preferred_over_base, tmp_path)
    assert found["models"] == ["base", "tuned"]
    assert found["start"] is None and "start_perplexity" not in found["scores"]
    assert found["scores"]["reward_accuracy"]["tuned"]["value"] == 1


def test_the_trainings_own_validation_figures_are_found_again(
    preferences, preferred, tmp_path, monkeypatch
):
    rows = load_splits(data_of(read(preferred))).validation
    dataset = HeldOut(rows, {"dataset": "the validation pairs", "fingerprint": ""}, None)
    monkeypatch.setattr(preferences, "held_out", lambda *_, **__: dataset)
    scores = evaluated(preferences, preferred, tmp_path)[1]["scores"]
    measured = read(preferred)["measured"]
    for name in ("accuracy", "margin"):
        value = scores[f"reward_{name}"]["tuned"]["value"]
        assert value == pytest.approx(measured[f"validation_reward_{name}"], rel=1e-4)


def data_of(record):
    fields = DataArguments.__dataclass_fields__
    return DataArguments(**{k: v for k, v in record["recipe"].items() if k in fields})


def test_pairs_of_another_file_are_scored_unless_they_were_trained_on(
    preferences, preferred, tmp_path, capsys
):
    rows = [one | {"prompt": f"{one['prompt']} Now!"} for one in pair_rows(12)]
    rows[1]["rejected"] = rows[1]["chosen"]
    path = write_jsonl(tmp_path / "other.jsonl", rows)
    run = copy_of(preferred, tmp_path / "copy")
    preferences.main(["--run", str(run), "--dataset_name", str(path), *SHORT])
    assert found_in(run, "preferences-other")["pairs"] == 11
    assert not (run / "eval" / "preferences.json").exists(), "that is of the run's own pairs"
    assert len(lines_of(run, "preferences-other.jsonl")) == 11
    assert "fewer than 30 questions" in capsys.readouterr().out
    path = write_jsonl(tmp_path / "known.jsonl", pair_rows(200))
    with pytest.raises(SystemExit, match="trained or validated on"):
        preferences.main(["--run", str(preferred), "--dataset_name", str(path), *SHORT])


@pytest.mark.parametrize("change", ["gone", "other"])
def test_a_start_that_is_gone_or_has_changed_is_refused(
    preferences, preferred, finished, tmp_path, change
):
    run, start = copy_of(preferred, tmp_path / "run"), copy_of(finished[0], tmp_path / "start")
    record = read(run)
    record["started_from"]["adapter"] = str(start / "adapter")
    write_json(run / "run.json", record)
    assert start_of(run, record).run == start
    if change == "gone":
        (start / "adapter" / "adapter_model.safetensors").unlink()
    else:
        change_adapter(start, lambda name, tensor: tensor * 2)
    said = {"gone": "is not there: bring it back", "other": "has changed since"}[change]
    with pytest.raises(SystemExit, match=said):
        preferences.main(["--run", str(run), *SHORT])


def test_supervised_runs_are_sent_to_quality(preferences, finished):
    with pytest.raises(SystemExit, match=r"is no preference tuning .*eval/quality\.py"):
        preferences.main(["--run", str(finished[0]), *SHORT])


def nats(chosen, rejected):
    """Log-probabilities [pairs, 2, 2] of answers of ten tokens."""
    sides = np.stack([np.array(chosen, float), np.array(rejected, float)], axis=1)
    return np.stack([sides, np.full_like(sides, 10)], axis=2)


def test_swapped_sides_change_the_sign_of_the_margin_and_turn_the_accuracy():
    start, tuned = nats([-9, -8, -7], [-9, -9, -9]), nats([-7, -9, -6], [-10, -9, -12])
    scores, rewards = pair_scores({"base": start, "start": start, "tuned": tuned}, 0.5, [1, 2, 3])
    swapped = {
        side: one[:, ::-1] for side, one in {"base": start, "start": start, "tuned": tuned}.items()
    }
    other, _ = pair_scores(swapped, 0.5, [1, 2, 3])
    assert rewards[0] == pytest.approx([1, -0.5])
    assert scores["reward_margin"]["tuned"]["value"] == pytest.approx((1.5 - 0.5 + 2) / 3)
    assert other["reward_margin"]["tuned"]["value"] == pytest.approx(-1)
    assert scores["reward_accuracy"]["tuned"]["value"] == pytest.approx(2 / 3)
    assert other["reward_accuracy"]["tuned"]["value"] == pytest.approx(1 / 3)


def test_a_model_that_is_its_start_prefers_by_chance():
    same = nats([-5] * 20, [-6] * 20)
    scores, _ = pair_scores({"base": same, "start": same, "tuned": same}, 0.1, range(20))
    assert scores["reward_accuracy"]["tuned"]["value"] == 0.5
    assert scores["reward_margin"]["p_value"] == 1


def test_pairs_of_one_question_are_drawn_together():
    rng = np.random.default_rng(0)
    of_question = np.repeat(rng.normal(0.3, 1, 20), 10)
    start, tuned = nats([0] * 200, [0] * 200), nats(of_question, [0] * 200)
    models = {"base": start, "tuned": tuned}
    alone, _ = pair_scores(models, 1.0, range(200))
    together, _ = pair_scores(models, 1.0, np.repeat(range(20), 10))

    def width(scores):
        low, high = scores["reward_margin"]["tuned"]["interval_95"]
        return high - low

    assert width(together) > 2 * width(alone)
    assert together["reward_margin"]["p_value"] > alone["reward_margin"]["p_value"]


def test_base_start_and_tuned_stand_beside_one_another():
    lengths = {"base": [9, 9, 9, 8], "start": [4, 5, 6, 4], "tuned": [8, 9, 11, 9]}
    parts = {side: with_counts(np.array(of, float)) for side, of in lengths.items()}
    found = of_models(parts, mean, range(4), 0.0)
    assert [found[side]["value"] for side in lengths] == [8.75, 4.75, 9.25]
    assert found["difference"]["value"] == 4.5
