"""SFTTrainer with a LoRA adapter must log the losses of an independent plain PyTorch loop, step by
step.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator
from typing import get_args

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from reference_loop import IGNORED, Adapter, Curve, Fault, Settings, build_model, encode, train
from sft_trainer_curves import (
    CONFIG,
    ROWS,
    SPLIT,
    TARGETS,
    WHOLE,
    Rows,
    TrainerRun,
    base_state,
    make_rows,
    make_tokenizer,
    run_trainer,
)

pytestmark = pytest.mark.long
TOLERANCE = 1e-4
# Values that switch a setting off.
NEUTRAL = [("warmup_steps", 0), ("weight_decay", 0.0), ("max_grad_norm", math.inf)]
ACCUMULATION_FAULTS = ("accumulation_not_divided", "mean_of_means")
# Keyed by accumulation and by whether gradient checkpointing is on.
Runs = dict[tuple[int, bool], TrainerRun]


def largest_gap(got: list[float], expected: list[float]) -> float:
    """Largest absolute difference over the steps; infinite where either side is not finite."""
    assert len(got) == len(expected)
    gaps = [abs(a - b) for a, b in zip(got, expected, strict=True)]
    return max(gap if math.isfinite(gap) else math.inf for gap in gaps)


def assert_same_losses(got: list[float], expected: list[float]) -> None:
    """Fail unless every step's losses agree within the tolerance."""
    gap = largest_gap(got, expected)
    assert gap <= TOLERANCE, f"losses differ by up to {gap:.3g}"


def assert_losses_differ(got: list[float], expected: list[float]) -> None:
    """Fail if finite losses pass for the same."""
    assert all(map(math.isfinite, got))
    with pytest.raises(AssertionError, match="losses differ by"):
        assert_same_losses(got, expected)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Keep torch on one thread:

    on so small a model, threads that wait for a busy core cost minutes.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def rows() -> Rows:
    """The training rows."""
    return make_rows()


@pytest.fixture(scope="module")
def runs(rows: Rows, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """SFTTrainer runs by (accumulation, gradient checkpointing)."""
    return {
        (settings.accumulation, checkpointing): run_trainer(
            settings, checkpointing, rows, tmp_path_factory.mktemp("run")
        )
        for settings in (WHOLE, SPLIT)
        for checkpointing in (False, True)
    }


def run_reference(
    settings: Settings, adapter: Adapter, rows: Rows, fault: Fault | None = None
) -> Curve:
    """Run the plain loop from the same base and adapter weights."""
    model = build_model(CONFIG, base_state(), adapter, settings.lora_alpha, fault)
    return train(model, rows, make_tokenizer(), settings, fault)


@pytest.fixture(scope="module")
def references(runs: Runs, rows: Rows) -> dict[int, Curve]:
    """The faultless loop by accumulation, from the adapter that SFTTrainer started from."""
    return {
        settings.accumulation: run_reference(
            settings, runs[settings.accumulation, False].adapter, rows
        )
        for settings in (WHOLE, SPLIT)
    }


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_losses_match(
    runs: Runs, references: dict[int, Curve], accumulation: int, checkpointing: bool
) -> None:
    """Losses agree at every step.

    So do the learning rates and the gradient norms before clipping.
    """
    logged, expected = runs[accumulation, checkpointing].curve, references[accumulation]
    assert len(logged.losses) == WHOLE.steps
    assert_same_losses(logged.losses, expected.losses)
    assert logged.learning_rates == pytest.approx(expected.learning_rates, abs=1e-9)
    assert logged.grad_norms == pytest.approx(expected.grad_norms, rel=1e-3)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_accumulation_does_not_change_losses(runs: Runs, checkpointing: bool) -> None:
    """Four micro-batches of 2 rows give the curve of one batch of 8 rows."""
    assert_same_losses(runs[4, checkpointing].curve.losses, runs[1, checkpointing].curve.losses)


def test_checkpointing_recomputes(runs: Runs) -> None:
    """The checkpointed runs really are checkpointed: backward runs each layer a second time."""
    for accumulation in (1, 4):
        assert runs[accumulation, True].forwards == 2 * runs[accumulation, False].forwards > 0


def test_data_can_tell_the_faults_apart(
    runs: Runs, references: dict[int, Curve], rows: Rows
) -> None:
    """Uneven micro-batches, some cut rows, losses that move, and clipping that acts on some steps
    only.
    """
    examples = [encode(row, make_tokenizer(), WHOLE.max_length, None) for row in rows]
    tokens = [sum(label != IGNORED for label in e.labels) for e in examples]
    micro = [sum(tokens[i : i + 2]) for i in range(0, ROWS, 2)]
    assert max(micro) > 5 * min(micro)
    assert 0 < sum(e.ids[-1] != CONFIG.eos_token_id for e in examples) < ROWS // 4
    wrapped = {f"model.layers.{i}.self_attn.{target}" for i in range(2) for target in TARGETS}
    assert set(runs[1, False].adapter) == wrapped
    curve = references[1]
    assert max(curve.losses) - min(curve.losses) > 0.5
    assert 3 <= sum(norm > WHOLE.max_grad_norm for norm in curve.grad_norms) <= WHOLE.steps - 3


@pytest.mark.parametrize("fault", get_args(Fault))
def test_fault_is_seen(runs: Runs, rows: Rows, fault: Fault) -> None:
    """The loop with one deliberate fault no longer agrees with SFTTrainer."""
    settings = SPLIT if fault in ACCUMULATION_FAULTS else WHOLE
    run = runs[settings.accumulation, False]
    losses = run_reference(settings, run.adapter, rows, fault).losses
    assert_losses_differ(losses, run.curve.losses)


@pytest.mark.parametrize(("setting", "value"), NEUTRAL)
def test_setting_is_seen(runs: Runs, rows: Rows, setting: str, value: float) -> None:
    """Warm-up, weight decay and clipping each shape the curve:

    dropping one breaks the agreement.
    """
    settings = dataclasses.replace(WHOLE, **{setting: value})
    losses = run_reference(settings, runs[1, False].adapter, rows).losses
    assert_losses_differ(losses, runs[1, False].curve.losses)
