"""Fused LoRA over float8 weights computes what linears one by one do, LoRA's part in float8 too."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from test_float8_mlp import SIZES, difference, milliseconds, needs_a_gpu
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from sftlab.fastpath import (
    compile_layers,
    float8_lora_mlp,
    float8_lora_ops,
    kernel_warmup,
)
from sftlab.fastpath.float8 import (
    BACKWARD,
    FrozenFloat8Linear,
    float8_product,
    freeze_in_float8,
    inputs_in_16_bits,
    to_float8,
)
from sftlab.fastpath.float8_lora import Float8Input, largest_norm
from sftlab.fastpath.float8_lora_ops import (
    gated_backward_in_float8,
    gated_down_in_float8,
    join_in_float8,
)
from sftlab.fastpath.float8_mlp import fuse_float8_mlps
from sftlab.fastpath.float8_mlp_ops import round_gated
from sftlab.fastpath.fused_lora import SIBLINGS, fuse_lora, unfuse_lora
from sftlab.fastpath.fused_lora_check import differs
from sftlab.fastpath.lora_mlp import LoraMlp
from sftlab.models.gated_mlp import activation

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# e5m2 has two digits, and q, k and v share a scale in the backward
ROUNDING = 0.12
# how much larger an MLP's gradients may be, as far as their scale knows, than any of SmolLM2 is
FOUND_LOOSE = 2.0**9


def build(
    device: str = "cpu",
    targets: list[str] = LINEARS,
    b: float = 0.01,
    together: tuple = SIBLINGS,
    **fields: object,
) -> PeftModel:
    """A small model over float8 weights whose LoRA, in float32, is not zero."""
    torch.manual_seed(0)
    lora = {n: fields.pop(n) for n in ("lora_dropout", "use_dora", "r") if n in fields}
    config = LlamaConfig(**SIZES | {"num_key_value_heads": 2} | fields)
    base = AutoModelForCausalLM.from_config(config).bfloat16()
    found = get_peft_model(
        base, LoraConfig(**{"r": 8, "lora_alpha": 24, "target_modules": targets} | lora)
    )
    for name, parameter in found.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=b)
    found.to(device)
    freeze_in_float8(found, together=together)
    return found.train()


def logits(model: PeftModel) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        return model(input_ids=torch.arange(64).view(2, 32)).logits


def loss_and_gradients(model: PeftModel, rows: int = 2) -> dict[str, torch.Tensor]:
    device = model.device.type
    ids = torch.arange(rows * 40).view(rows, 40).to(device) * 7 % 64
    model.zero_grad()
    with torch.autocast(device, torch.bfloat16):
        output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    return {"logits": output.logits.detach(), "loss": output.loss.detach()} | gradients


@pytest.mark.parametrize("targets", [LINEARS, ["q_proj", "v_proj", "o_proj"]], ids=len)
@pytest.mark.parametrize("b", [0.0, 0.001, 0.03], ids=str)
def test_losses_and_gradients_are_those_of_linears_one_by_one(targets, b):
    model = build(targets=targets, b=b)
    plain = loss_and_gradients(model)
    names = [list(model.state_dict()), list(get_peft_model_state_dict(model))]
    assert fuse_lora(model, torch.bfloat16) == {}
    assert differs(model) is None
    found = loss_and_gradients(model)
    groups = {m.together for m in model.modules() if hasattr(m, "together")}
    assert all(isinstance(group, Float8Input) and group.held for group in groups)
    assert any(isinstance(m, LoraMlp) for m in model.modules()) == (targets is LINEARS)
    zero = [name for name in plain if not plain[name].any()]
    assert all(not found.pop(name).any() for name in zero)
    assert difference(found, {n: one for n, one in plain.items() if n not in zero}) < ROUNDING
    assert [list(model.state_dict()), list(get_peft_model_state_dict(model))] == names
    unfuse_lora(model)
    again = loss_and_gradients(model)
    assert all(torch.equal(again[name], plain[name]) for name in plain)


@pytest.mark.parametrize("size", [0.0, 0.001, 1.0, 100.0])
def test_an_update_of_any_size_is_in_the_product(size):
    """Float8 has 14 doublings above its smallest whole number: no update falls out of them."""
    model = build(b=size)
    fuse_lora(model, torch.bfloat16)
    loss_and_gradients(model)
    torch.manual_seed(3)
    for group in {m.together for m in model.modules() if hasattr(m, "together")}:
        wide, tall, a, b, scale, numbers = group.held
        of_h, of_into_h, room, room_back, reach = numbers.split(1)
        x, y = torch.randn(30, a.shape[1]).bfloat16(), torch.randn(30, len(b)).bfloat16()
        weight = wide[:, : a.shape[1]].float() * scale[0, 0]
        one_a, one_b = (part[: sum(group.held_ranks)] for part in (a, b.t()))
        x[:2], y[:2] = torch.stack([one_a[0], one_a[0].sign()]), one_b[0].sign()  # the largest h
        exact = x.float() @ weight.t() + (x @ one_a.t()).float() @ one_b.float()
        found = float8_product(*join_in_float8([x], x @ a.t(), of_h, False), wide, scale)
        assert (found - exact).norm() < 0.06 * exact.norm()
        # as in an MLP: f(gate) up is x where gate and up are these
        gate = torch.full_like(x, 30)
        found, *_ = gated_down_in_float8(gate, x / 30, wide, a, scale, of_h, room, False)
        assert (found - exact).norm() < 0.06 * exact.norm()
        exact = y.float() @ weight + (y @ one_b.t()).float() @ one_a.float()
        found = float8_product(*join_in_float8([y], y @ b, of_into_h, True), tall, scale)
        assert (found - exact).norm() < 0.12 * exact.norm()
        # it is at most what is said, along the longest column too, and there it is no far less
        along = tall.float()[tall.float().norm(dim=1).argmax()]
        for row in (*torch.cat([y, of_into_h * (y @ b)], 1).float(), along, along.sign()):
            joined = torch.zeros(16, len(row)).index_fill(0, torch.tensor(0), 1) * row
            x8, row_scale = to_float8(joined, BACKWARD, by_row=True)
            most = float8_product(x8, row_scale, tall, scale).abs().max()
            assert most <= row.norm() * reach
        assert along.square().sum() * scale[0, 0] < along.norm() * reach
        assert 1.5 * along.square().sum() * scale[0, 0] > along.norm() * reach
        # the gradient of gate is 33 times that of up, and h is of both; down changes nothing
        gate, up = torch.full_like(y, 30), torch.full_like(y, 990)
        down, ones = torch.eye(len(b), len(b) + 64).to(tall.dtype), torch.ones(1, len(b))
        larger = FOUND_LOOSE * 990 * room_back * torch.ones(30, 1)
        y = (y / 30).to(BACKWARD).bfloat16() * 30
        _, up8, row, *_ = gated_backward_in_float8(
            y / 30, gate, up, y @ b, torch.cat([b, b]), of_into_h, down, 0 * b[:, :64], ones,
            ones[0, :1], larger, 8, 8, False,
        )  # fmt: skip
        found = float8_product(up8, row, tall, scale)
        exact = y.float() @ weight + 34 * (y @ one_b.t()).float() @ one_a.float()
        assert (found - exact).norm() < 0.12 * exact.norm()


@pytest.mark.parametrize("size", [0.01, 1.0, 100.0])
def test_an_update_of_any_size_is_in_the_gradient_of_an_mlp(size):
    model = build(b=size)
    fuse_lora(model, torch.bfloat16)
    loss_and_gradients(model)
    mlp = next(m for m in model.modules() if isinstance(m, LoraMlp))
    x = torch.randn(30, 64).bfloat16().requires_grad_()
    gradient = torch.randn(30, 64).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = torch.autograd.grad(mlp(x), x, gradient)
    whole = {}
    for name in ("gate_proj", "up_proj", "down_proj"):
        layer = getattr(mlp, name)
        weight, _, scale = layer.base_layer.stored()
        a, b = (one.double() for one in layer.matrices)
        whole[name] = weight.double() * scale[0, 0] + layer.scale * b @ a
    x = x.detach().double().requires_grad_()
    act = activation(x @ whole["gate_proj"].t(), False) * (x @ whole["up_proj"].t())
    (exact,) = torch.autograd.grad(act @ whole["down_proj"].t(), x, gradient.double())
    assert (found - exact).norm() < 0.2 * exact.norm()


def test_the_norm_of_the_longest_row_is_found_wherever_it_is():
    x = torch.full((2500, 16), 2.0)
    x[2300] = 3
    assert largest_norm(x.to(torch.float8_e4m3fn)) == 12


@pytest.mark.parametrize("b", [0.0, 0.01, 100.0])
def test_gradients_of_a_step_are_within_float8_and_use_its_range(b, monkeypatch):
    """No row is cut off, and none is so far below the largest number that digits are lost."""
    seen, plain = [], float8_lora_mlp.gated_backward_in_float8
    monkeypatch.setattr(
        float8_lora_mlp,
        "gated_backward_in_float8",
        lambda *given: (found := plain(*given), seen.append((found, *given[1:3])))[0],
    )
    model = build(b=b)
    fuse_lora(model, torch.bfloat16)
    loss_and_gradients(model)
    largest = torch.finfo(BACKWARD).max
    for (gate8, up8, *_), gate, up in seen:
        rows = torch.cat([gate8.float(), up8.float()], 1).abs().amax(1)
        assert rows.max() < largest
        assert gate.shape == up.shape
        some = rows[rows > 0]  # the last token of a row has no target
        assert len(some) >= len(rows) - 2
        assert some.min() > largest / 2 ** (18 if b > 1 else 12)


@pytest.mark.parametrize("tanh_gelu", [False, True])
def test_the_largest_slope_of_an_activation_is_known_beside_it(tanh_gelu):
    torch.manual_seed(0)
    gate, up = (2 * torch.randn(9, 48, dtype=torch.bfloat16) for _ in range(2))
    gate[1], up[2], gate[3] = 0, 0, -9  # by up, by gate alone, and nearly none
    *_, steepest = round_gated(gate, up, tanh_gelu, True, 64, torch.ones(1))
    exact = [one.double().requires_grad_() for one in (gate, up)]
    act = activation(exact[0], tanh_gelu) * exact[1]
    slopes = torch.cat(torch.autograd.grad(act.sum(), exact), 1).abs().amax(1, True)
    torch.testing.assert_close(steepest.double(), slopes, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("rank", [8, 16, 40])
def test_a_and_b_have_twice_float8s_digits_where_there_is_room(rank):
    model = build(b=0.02, r=rank)
    fuse_lora(model, torch.bfloat16)
    loss_and_gradients(model)
    for group in {m.together for m in model.modules() if hasattr(m, "together")}:
        wide, tall, a, b, scale, numbers = group.held
        ranks = sum(group.held_ranks)
        assert len(a) == b.shape[1] == wide.shape[1] - a.shape[1] <= max(128, ranks + 63)
        for held, right, factor in ((wide, b, numbers[0]), (tall, a.t(), numbers[1])):
            right = right[:, :ranks].float()
            found = held[:, -len(a) :].float() * factor * scale[0, 0]
            digits = [found[:, :ranks]]
            if 2 * ranks <= 128:
                digits.append(found[:, ranks : 2 * ranks])
            apart = (sum(digits) - right).norm() / right.norm()
            assert 0 < apart < (0.004 if len(digits) == 2 else 0.04)


def test_weights_are_held_once_and_multiply_alone_as_before():
    model = build()
    linears = {n: m for n, m in model.named_modules() if isinstance(m, FrozenFloat8Linear)}
    x = {n: torch.randn(20, m.in_features).bfloat16() for n, m in linears.items()}
    plain = {n: m(x[n]) for n, m in linears.items()}
    stored = sum(_bytes(m.weight) for m in linears.values())
    fuse_lora(model, torch.bfloat16)
    loss_and_gradients(model)
    assert all(torch.equal(m(x[n]), plain[n]) for n, m in linears.items())
    assert sum(_bytes(m.weight) for m in linears.values()) < stored / 100
    groups = {m.together for m in model.modules() if hasattr(m, "together")}
    ranks = sum(sum(one.shape) for group in groups for one in group.held[:2]) * 64
    assert sum(_bytes(*group.held[:2]) for group in groups) < stored + ranks


def _bytes(*tensors: torch.Tensor) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def test_without_adapters_or_rounding_of_inputs_layers_are_pefts():
    plain, mine = build(), build()
    fuse_lora(mine, torch.bfloat16)
    loss_and_gradients(mine)
    for inside in (lambda model: model.disable_adapter(), lambda _: inputs_in_16_bits()):
        found = []
        for model in (plain, mine):
            with inside(model):
                found.append(logits(model))
        assert torch.equal(*found)
    assert difference(loss_and_gradients(mine), loss_and_gradients(plain)) < ROUNDING


@pytest.mark.long
def test_compiled_for_any_number_of_tokens_it_is_the_same():
    model = build()
    fuse_lora(model, torch.bfloat16)
    plain = [loss_and_gradients(model, rows) for rows in (2, 3)]
    torch._dynamo.reset()
    layer = model.get_base_model().model.layers[0]
    layer.forward = torch.compile(layer.forward, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows, right in zip((2, 3), plain, strict=True):
        with torch.profiler.profile() as profile:
            found = loss_and_gradients(model, rows)
        assert difference(found, right) < ROUNDING
        done = {event.name for event in profile.events()}
        names = "join_in_float8", "gated_down_in_float8", "gated_backward_in_float8"
        assert done >= {f"sftlab::{name}" for name in names}
        assert "sftlab::add_product" not in done


def test_a_first_forward_in_inference_mode_leaves_a_model_that_trains():
    plain, mine = build(), build()
    fuse_lora(plain, torch.bfloat16)
    fuse_lora(mine, torch.bfloat16)
    with torch.inference_mode():
        logits(mine)
    found, right = loss_and_gradients(mine), loss_and_gradients(plain)
    assert all(torch.equal(found[name], right[name]) for name in right)


def test_what_lora_trains_is_copied_before_every_forward():
    model = build()
    fuse_lora(model, torch.bfloat16)
    before = loss_and_gradients(model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(3)
    after = loss_and_gradients(model)
    unfuse_lora(model)
    plain = loss_and_gradients(model)
    assert difference(after, plain) < ROUNDING < difference(after, before)


def test_a_second_forward_before_the_backward_leaves_gradients_as_they_are():
    """As of a reference, and of evaluation within a step: it copies the same once more."""
    model = build()
    fuse_lora(model, torch.bfloat16)
    right, ids = loss_and_gradients(model), torch.arange(80).view(2, 40) * 7 % 64
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=ids, labels=ids).loss
        logits(model)
    loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert all(torch.equal(right[name], one) for name, one in found.items())


@pytest.mark.parametrize("again", [False, True], ids=["compared", "fused again"])
def test_weights_that_are_held_outlive_a_comparison(again):
    model = build()
    fuse_lora(model, torch.bfloat16)
    before = loss_and_gradients(model)
    if again:
        unfuse_lora(model)
        fuse_lora(model, torch.bfloat16)
    assert differs(model) is None
    after = loss_and_gradients(model)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_ddp_takes_a_model_that_has_run(tmp_path):
    """A start that reads rows runs it first; then its frozen weights keep no memory to write to."""
    model = build()
    fuse_lora(model, torch.bfloat16)
    right = loss_and_gradients(model)
    where = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=where, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        ids = torch.arange(80).view(2, 40) * 7 % 64
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(wrapped(input_ids=ids, labels=ids).loss, right["loss"])
    finally:
        torch.distributed.destroy_process_group()


def test_the_kernels_that_are_rehearsed_are_those_of_every_step(monkeypatch):
    called = {}

    def note(plain):
        def noted(*given):
            given = [one for part in given for one in (part if type(part) is list else [part])]
            tensors = [one for one in given if isinstance(one, torch.Tensor)]
            forms = [(t.dtype, t.stride(0), t.shape[1:], t.data_ptr() % 16) for t in tensors]
            others = [one for one in given if not isinstance(one, torch.Tensor)]
            called.setdefault(plain._name, set()).add((*forms, *others))
            return plain(*given) if plain is not join_in_float8 else plain([given[0]], *given[1:])

        return noted

    for name in ("join_in_float8", "gated_down_in_float8", "gated_backward_in_float8"):
        noted = note(getattr(float8_lora_ops, name))
        monkeypatch.setattr(float8_lora_ops, name, noted)
        monkeypatch.setattr(float8_lora_mlp, name, noted)
    model = build(targets=["gate_proj", "up_proj", "down_proj"])
    fuse_lora(model, torch.bfloat16)
    kernel_warmup.rehearse_float8_mlp(model.config, 8, torch.bfloat16, torch.device("cpu"))
    rehearsed, called = called, {}
    for rows in (2, 3):
        loss_and_gradients(model, rows)
    assert {name: len(forms) for name, forms in called.items()} == {
        "join_in_float8": 1,
        "gated_down_in_float8": 1,
        "gated_backward_in_float8": 1,
    }
    assert called == rehearsed


@pytest.mark.parametrize(
    "fields, reason",
    [
        ({"lora_dropout": 0.1}, "in float8 LoRA with dropout stays peft's"),
        ({"intermediate_size": 16400}, "a float8 linear has more than 16,384 inputs or outputs"),
        ({"use_dora": True}, "DoraLinearVariant changes the LoRA update"),
    ],
    ids=str,
)
def test_what_is_not_known_is_left_alone(fields, reason):
    model = build(**fields)
    left = fuse_lora(model, torch.bfloat16)
    assert left == {reason: 3 if "intermediate_size" in fields else 7}


def test_weights_with_scales_of_their_own_share_no_product():
    model = build(together=())
    assert fuse_lora(model, torch.bfloat16) == {}
    groups = [m.together.layers for m in model.modules() if hasattr(m, "together")]
    assert {len(layers) for layers in groups} == {1}
    assert differs(model) is None


@needs_a_gpu
def test_compiled_layers_have_the_loss_and_gradients_of_linears_one_by_one():
    found = []
    for fuse in (False, True):
        torch._dynamo.reset()
        model = build("cuda", hidden_size=256, intermediate_size=512)
        if fuse:
            assert fuse_lora(model, torch.bfloat16) == {}
            assert differs(model) is None
        compile_layers.compile_layers(model.get_base_model())
        found.append(loss_and_gradients(model))
    assert difference(*found) < 2 * ROUNDING
    assert abs(found[0]["loss"] - found[1]["loss"]) < 0.01


@needs_a_gpu
def test_how_long_a_compiled_layer_takes():
    x = torch.randn(1, 20480, 2048, device="cuda").bfloat16().requires_grad_()
    gradient = torch.randn_like(x)
    sizes = {"num_attention_heads": 32, "num_key_value_heads": 8}
    for fuse in (False, True):
        torch._dynamo.reset()
        model = build("cuda", hidden_size=2048, intermediate_size=8192, **sizes)
        if fuse:
            fuse_lora(model, torch.bfloat16)
        else:
            fuse_float8_mlps(model)
        layer = model.get_base_model().model.layers[0]
        for hook in list(model.get_base_model().model._forward_pre_hooks.values()):
            hook()
        linears = torch.compile(lambda x, layer=layer: projected(layer, x))
        ms = milliseconds(linears, x, gradient)
        print(f"linears of a layer, LoRA fused {fuse}: {ms:.2f} ms forward and backward")
        assert ms > 0


def projected(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What the layer's linears make of x, with sums where the attention is."""
    attention, y = layer.self_attn, layer.input_layernorm(x)
    q, k, v = attention.q_proj(y), attention.k_proj(y), attention.v_proj(y)
    x = x + attention.o_proj(q + torch.cat([k, v], -1).repeat(1, 1, 2))
    return x + layer.mlp(layer.post_attention_layernorm(x))
