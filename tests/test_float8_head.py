"""In fp8 the gradient of the fused loss comes out of a head in float8; the loss does not."""

import pytest
import torch
from conftest import short_fields
from packed_training import build
from tiny_base import with_words_of_16

from sftlab.fastpath import fused_loss
from sftlab.fastpath.fused_loss import FrozenHeadLoss, in_float8


@pytest.fixture
def drawn() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(50, 64, generator=generator).bfloat16()
    weight = (torch.randn(992, 64, generator=generator) / 4).bfloat16()
    targets = torch.randint(0, 992, (50,), generator=generator)
    return {"hidden": hidden, "weight": weight, "targets": targets}


def loss_and_gradient(drawn, rounded, **changes) -> tuple[torch.Tensor, torch.Tensor]:
    hidden = drawn["hidden"].clone().requires_grad_()
    every = torch.arange(len(hidden))
    given = None, changes.get("factor", 1.0), changes.get("cap", 0.0), None, rounded
    nats, _, hits = FrozenHeadLoss.apply(hidden, drawn["weight"], every, drawn["targets"], *given)
    (nats * torch.linspace(0.5, 1.5, len(nats))).sum().backward()
    return torch.stack([nats.detach(), hits]), hidden.grad


@pytest.mark.parametrize("changes", [{}, {"cap": 5.0}, {"factor": 0.5}], ids=str)
def test_the_loss_is_the_same_and_its_gradient_is_near(drawn, monkeypatch, changes):
    monkeypatch.setattr(fused_loss, "CHUNK", 16)
    loss, gradient = loss_and_gradient(drawn, None, **changes)
    rounded = in_float8(drawn["weight"])
    same, near = loss_and_gradient(drawn, rounded, **changes)
    assert torch.equal(loss, same)
    assert not torch.equal(gradient, near)
    cosine = torch.cosine_similarity(gradient.float(), near.float(), dim=1)
    assert cosine.min() > 0.99
    assert near.float().norm() == pytest.approx(gradient.float().norm().item(), rel=0.02)


def test_a_head_of_other_sizes_stays_as_it_is(drawn):
    assert in_float8(drawn["weight"][:-1]) is None
    assert in_float8(drawn["weight"][:, :40]) is None
    rounded = in_float8(drawn["weight"])
    assert rounded.weight_t.shape == (64, 992)
    whole = rounded.weight_t.float() * rounded.scale.t()
    assert torch.allclose(whole.t(), drawn["weight"].float(), rtol=2**-4, atol=1e-3)


@pytest.mark.parametrize(("began", "found"), [(None, True), (False, False), (True, True)])
def test_a_run_goes_on_as_it_began(base, rows, tmp_path, began, found):
    folder = with_words_of_16(base, tmp_path / "base")
    trainer = build(short_fields(folder, rows, tmp_path / "run"))
    trainer.args.mixed_precision = "fp8"
    if began is not None:
        trainer.fast.continue_with_float8_head(began, settings_changed=False)
    trainer.choose_loss()
    assert trainer.fast.float8_head == found
