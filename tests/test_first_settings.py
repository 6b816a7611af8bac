"""A plan holds the recipe's learning rate against a published sweep."""

import csv

import pytest
from conftest import ROOT, load_script

from sftlab.planning.first_settings import (
    ALL_LINEARS,
    BY_RANK,
    BY_TARGETS,
    first_rate,
    rank_line,
    rate_lines,
    targets_line,
)


@pytest.mark.parametrize(
    ("parameters", "lora", "rate"),
    [
        (1.35e8, True, 3e-3),
        (1.35e8, False, 3e-4),
        (1.24e9, True, 1e-3),
        (8e9, True, 3e-4),
        (1.24e9, False, 1e-4),
        (70e9, False, 3e-5),
    ],
)
def test_small_models_begin_higher_and_full_fine_tuning_at_a_tenth(parameters, lora, rate):
    assert first_rate(parameters, lora).rate == pytest.approx(rate)


@pytest.mark.parametrize(
    ("rate", "said"),
    [
        (2e-4, "outside"),
        (3.4e-4, "within"),
        (1e-3, "within"),
        (2.9e-3, "within"),
        (4e-3, "outside"),
    ],
)
def test_a_rate_is_within_the_range_or_outside(rate, said):
    assert rate_lines(rate, 1_236_000_000, True, 32) == [
        f"learning rate {rate:g}: {said} 0.00033 to 0.003, a third to three times 0.001, "
        "the best of LoRA in a published sweep"
    ]


def test_what_the_sweep_did_not_have_is_said():
    lines = rate_lines(1e-3, 360_000_000, True, 64)
    assert "1 billion parameters" in lines[1]
    assert "lora_alpha 32, this recipe has 64" in lines[2]
    (line, _) = rate_lines(1e-4, 360_000_000, False, None)
    assert "times 0.0001, a tenth of the best of LoRA in a published sweep" in line
    assert "larger than this model" in rate_lines(1e-2, 354_048, True, 32)[1]
    lines = rate_lines(1e-3, 1_236_000_000, True, 32, loraplus=16)
    assert "LoRA+ moves B matrices at 16 times the rate" in lines[1] and len(lines) == 2
    lines = rate_lines(1e-3, 1_236_000_000, True, 32, stabilised=True)
    assert "rank-stabilised scaling" in lines[1] and len(lines) == 2


def test_models_of_a_hundred_million_parameters_have_a_sweep_of_their_own():
    (line,) = rate_lines(1e-3, 135_000_000, True, 32)
    assert (
        "within 0.001 to 0.009, a third to three times 0.003, the best of LoRA in a sweep" in line
    )
    with (ROOT / "results" / "lora_or_full" / "tuning.csv").open() as file:
        best = {
            r["cell"]: float(r["learning_rate"])
            for r in csv.DictReader(file)
            if r["best"] == "True"
        }
    assert best["LoRA"] == pytest.approx(first_rate(135_000_000, True).rate)
    assert best["full"] == pytest.approx(first_rate(135_000_000, False).rate)


def test_the_rank_is_held_against_the_ranks_that_were_measured():
    with (ROOT / "results" / "lora_rank_tuned" / "summary.csv").open() as file:
        found = {r["cell"]: r["tuned response_perplexity"] for r in csv.DictReader(file)}
    assert found.keys() == {f"r{rank}" for rank in BY_RANK}
    for rank, score in BY_RANK.items():
        assert f"{score:.3f}" == f"{float(found[f'r{rank}']):.3f}"
    assert rank_line(16).startswith("rank 16: where to begin; ")
    assert rank_line(1).startswith("rank 1: 16 is where to begin; ")
    assert "r1 1.931, r4 1.887, " in rank_line(1)


def test_the_targets_are_held_against_those_that_were_measured():
    with (ROOT / "results" / "lora_targets_tuned" / "summary.csv").open() as file:
        found = {
            r["cell"].partition(",")[0]: r["tuned response_perplexity"]
            for r in csv.DictReader(file)
        }
    assert found.keys() == BY_TARGETS.keys()
    for name, score in BY_TARGETS.items():
        assert f"{score:.3f}" == f"{float(found[name]):.3f}"
    for everything in ("all-linear", ALL_LINEARS, [*ALL_LINEARS, "lm_head"]):
        assert targets_line(everything).startswith("LoRA on all linears: where to begin; ")
    for some in (["q_proj", "v_proj"], ".*q_proj", None):
        assert targets_line(some).startswith("LoRA on all linears is better; ")
    assert "all linears 1.873, MLP 1.887, " in targets_line(["q_proj"])


def test_a_plan_says_it(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = ["--random", "llama3.2-1b", "--rows", "100"]
    load_script("recipes/plan.py").main([*words, "--config", "recipes/llama3.2-1b/attn_r16.yaml"])
    said = capsys.readouterr().out
    assert "learning rate 0.0002: outside 0.00033 to 0.003" in said
    assert "rank 16: where to begin" in said
    assert "LoRA on all linears is better; " in said
