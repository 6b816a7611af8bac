"""LoRA+: B matrices learn at a multiple of the rate, and the training continues exactly."""

import pytest
import torch
from packed_training import assert_continues_exactly, build, train

from sftlab.config.launch import Launch
from sftlab.config.parser import parse_recipe


def matrices(trainer, which):
    named = trainer.model.named_parameters()
    return torch.cat([p.detach().flatten().clone() for name, p in named if which in name])


def moved(fields, ratio):
    """How far A and B go in the first step, and the trainer."""
    own = {} if ratio is None else {"loraplus_lr_ratio": str(ratio)}
    trainer = build({**fields, "max_steps": "1", "warmup_steps": "0"}, overwrite="true", **own)
    before = {which: matrices(trainer, which) for which in ("lora_A", "lora_B")}
    train(trainer)
    return {which: matrices(trainer, which) - was for which, was in before.items()}, trainer


def test_b_moves_by_the_ratio_and_a_as_before(fields):
    plain, _ = moved(fields, None)
    fast, trainer = moved(fields, 4)
    assert plain["lora_B"].abs().max() > 0
    assert torch.allclose(fast["lora_B"], 4 * plain["lora_B"], rtol=1e-4, atol=1e-8)
    assert torch.equal(fast["lora_A"], plain["lora_A"])
    trained = sum(p.requires_grad for p in trainer.model.parameters())
    held = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert len(held) == len(set(map(id, held))) == trained, "each parameter is in one group"


def test_the_schedule_moves_both_rates(fields):
    trainer = build(fields, loraplus_lr_ratio="4", lr_scheduler_type="linear")
    train(trainer)
    rates = {group["lr"] for group in trainer.optimizer.param_groups if group["params"]}
    first = {group["initial_lr"] for group in trainer.optimizer.param_groups if group["params"]}
    assert len(first) == 2 and max(first) == pytest.approx(4 * min(first))
    assert max(rates) < max(first)


def test_it_continues_exactly(fields):
    assert_continues_exactly({**fields, "loraplus_lr_ratio": "4"})


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--loraplus_lr_ratio", "0"), "loraplus_lr_ratio is 0.0: it must be positive"),
        (("--loraplus_lr_ratio", "inf"), "loraplus_lr_ratio"),
        (("--loraplus_lr_ratio", "4", "--use_peft", "false"), "loraplus_lr_ratio needs use_peft"),
        (
            (
                "--loraplus_lr_ratio",
                "4",
                "--optim",
                "galore_adamw",
                "--optim_target_modules",
                "mlp",
            ),
            "has groups of its own",
        ),
    ],
)
def test_what_cannot_be_is_refused(words, said):
    config = ("--config", "recipes/demo/attn_r16.yaml")
    with pytest.raises(ValueError, match=said):
        parse_recipe([*config, *words], Launch.from_environment())
