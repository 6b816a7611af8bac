"""Layers with fused LoRA are compared with peft's before a training, and can be peft's again."""

import pytest
import torch
from test_lora_mlp import CONFIGS, build
from test_lora_products import loss_and_gradients
from torch import nn

from sftlab.fastpath import fused_lora_check, joined_product, lora_mlp, lora_products, mlp_ops
from sftlab.fastpath.fused_lora import fuse_lora, unfuse_lora
from sftlab.fastpath.fused_lora_check import differs


def in_dtype(dtype: torch.dtype, config: str = "llama", **fields: object) -> nn.Module:
    """A small fused model with weights of a dtype, and LoRA's in float32 where that is less."""
    model = build(CONFIGS[config], False, **fields).to(dtype)
    for name, parameter in model.named_parameters():
        if "lora_" in name and dtype.itemsize == 2:
            parameter.data = parameter.data.float()
    assert fuse_lora(model, dtype) == {}
    return model


@pytest.mark.parametrize("config", ["llama", "gemma"])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_layers_that_are_right_are_found_so(config, dtype, monkeypatch):
    assert differs(in_dtype(dtype, config)) is None
    most = {one: 0.4 * most for one, most in fused_lora_check.SAME.items()}
    monkeypatch.setattr(fused_lora_check, "SAME", most)
    assert differs(in_dtype(dtype, config)) is None, "with room to spare"


def half_a_gradient(monkeypatch):
    plain = mlp_ops.gated_backward_

    def wrong(gradient, y, tanh_gelu, out):
        plain(gradient, y, tanh_gelu, out)
        out[:, : out.shape[1] // 2] *= 0.5

    monkeypatch.setattr(mlp_ops, "gated_backward_", wrong)


def another_activation(monkeypatch):
    monkeypatch.setattr(mlp_ops, "activation", lambda x, tanh_gelu: x.sigmoid())


def another_scale(monkeypatch):
    scale = property(lambda self: 1.05 * next(iter(self.scaling.values())))
    monkeypatch.setattr(lora_products.LoraProduct, "scale", scale)


def no_gradient_of_b(monkeypatch):
    plain = joined_product.adapter_gradients
    wrong = lambda *of: [g * (i % 2 == 0) for i, g in enumerate(plain(*of))]  # noqa: E731
    monkeypatch.setattr(joined_product, "adapter_gradients", wrong)


def no_numbers(monkeypatch):
    plain = lora_mlp.adapter_gradients
    wrong = lambda *of: [g * float("nan") for g in plain(*of)]  # noqa: E731
    monkeypatch.setattr(lora_mlp, "adapter_gradients", wrong)


def other_order(monkeypatch):
    plain = mlp_ops.beside
    monkeypatch.setattr(mlp_ops, "beside", lambda parts, columns: plain(parts[::-1], columns))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "broken, said",
    [
        (half_a_gradient, "mlp computes something else than peft's layers (the gradient"),
        (another_activation, "mlp computes something else than peft's layers (the output is"),
        (another_scale, "computes something else than peft's layers (the gradient of B is"),
        (no_gradient_of_b, "q_proj computes something else than peft's layers (the gradient of B"),
        (no_numbers, "(the gradient of A is nan% apart"),
        (other_order, "q_proj computes something else"),
    ],
)
def test_wrong_kernels_are_caught_with_their_figure(broken, said, dtype, monkeypatch):
    model = in_dtype(dtype)
    broken(monkeypatch)
    why = differs(model)
    assert said in why
    assert f"expected at most {fused_lora_check.SAME[dtype]:.1%}" in why


@pytest.mark.parametrize("ran", [False, True], ids=["before", "after"])
def test_a_comparison_leaves_everything_as_it_was(ran):
    model = in_dtype(torch.bfloat16, lora_dropout=0.1)
    model.get_base_model().model.layers[0].mlp.down_proj.eval()
    if ran:
        with torch.autocast("cpu", torch.bfloat16):
            model(torch.zeros(1, 8, dtype=torch.long)).logits.sum().backward()
    groups = {one.together for one in model.modules() if isinstance(one, lora_products.LoraProduct)}

    def state() -> tuple:
        tensors = [*model.named_parameters(), *model.named_buffers()]
        return (
            torch.random.get_rng_state().tolist(),
            [(name, one.data_ptr(), one.detach().clone().tolist()) for name, one in tensors],
            [one.grad if one.grad is None else one.grad.tolist() for one in model.parameters()],
            [(type(one), one.training) for one in model.modules()],
            [(id(one.held), one._x, bool(one._waiting and any(one._waiting))) for one in groups],
            torch.is_autocast_enabled("cpu"),
        )

    hooks = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(hooks.append)
    before = state()
    with torch.no_grad():
        assert differs(model) is None
    assert state() == before
    assert not hooks, "as DDP's, which would send gradients"


def test_one_part_of_each_kind_is_compared(monkeypatch):
    seen, plain = [], fused_lora_check.copy_matrices
    monkeypatch.setattr(
        fused_lora_check, "copy_matrices", lambda groups: [seen.append(groups), plain(groups)]
    )
    model = in_dtype(torch.float32)
    assert differs(model) is None
    assert [len(one.layers) for groups in seen for one in groups] == [2, 1, 3, 1]
    assert differs(build(fused=False)) is None, "there is nothing to compare"
    del seen[:]
    model.get_base_model().model.layers[0].self_attn.o_proj.scaling["default"] = 7.0
    assert differs(model) is None
    assert len(seen) == 4, "another scale is another kind"


@pytest.mark.parametrize("ran", [False, True], ids=["before", "after"])
def test_undone_the_model_computes_exactly_what_it_did(ran):
    plain, mine = build(fused=False), build(fused=False)
    before = [(name, type(one), sorted(vars(one))) for name, one in mine.named_modules()]
    expected = loss_and_gradients(plain)
    assert fuse_lora(mine, torch.float64) == {}
    if ran:
        loss_and_gradients(mine)
    places = {name: one.data_ptr() for name, one in mine.named_parameters()}
    unfuse_lora(mine)
    assert [(name, type(one), sorted(vars(one))) for name, one in mine.named_modules()] == before
    assert {name: one.data_ptr() for name, one in mine.named_parameters()} == places
    assert not mine.get_base_model().model._forward_pre_hooks
    found = loss_and_gradients(mine)
    assert all(torch.equal(one, expected[name]) for name, one in found.items())
    unfuse_lora(mine)
    assert fuse_lora(mine, torch.float64) == {}
    assert loss_and_gradients(mine)["loss"] == pytest.approx(float(expected["loss"]), abs=1e-9)
