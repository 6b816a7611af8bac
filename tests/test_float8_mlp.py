"""An MLP over float8 weights as one function computes what its linears do one by one."""

import time
from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig
from triton_interpreter import (
    on_a_gpu,
)

from sftlab.fastpath import compile_layers, float8, float8_mlp, float8_mlp_ops
from sftlab.fastpath.float8 import freeze_in_float8
from sftlab.fastpath.float8_mlp import Float8Mlp, fuse_float8_mlps
from sftlab.fastpath.own_class import own_class

needs_a_gpu = pytest.mark.skipif(not on_a_gpu, reason="compiled kernels run on a GPU")
SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}
CONFIGS = {  # Gemma's activation is the tanh form of GELU
    "llama": LlamaConfig(**SIZES),
    "gemma": GemmaConfig(**SIZES, head_dim=16, pad_token_id=0),
}
GATED = ["gate_proj", "up_proj", "down_proj"]
TARGETS = {"none": ["q_proj"], "all": GATED, "down": ["down_proj"], "up": ["up_proj"]}
# a value on the border of two float8 numbers goes either way, by a quarter of itself at most
ROUNDING = 0.03


def build(
    config: str | object = "llama", targets: str = "all", device: str = "cpu", **fields: object
) -> PeftModel:
    """A small model over float8 weights whose LoRA, in float32, is not zero."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(
        deepcopy(CONFIGS[config] if isinstance(config, str) else config)
    ).bfloat16()
    lora = {"r": 8, "lora_alpha": 24, "target_modules": TARGETS[targets]} | fields
    found = get_peft_model(base, LoraConfig(**lora))
    for name, parameter in found.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    found.to(device)
    freeze_in_float8(found)
    return found.train()


def mlp(model: PeftModel) -> nn.Module:
    return model.get_base_model().model.layers[0].mlp


def output_and_gradients(
    module: nn.Module, run: Callable | None = None, tokens: int = 40
) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    x = torch.randn(2, tokens, 64).bfloat16().requires_grad_()
    weights = torch.randn(2, tokens, 64).bfloat16()
    module.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        output = (module if run is None else run)(x)
    assert output.dtype == torch.bfloat16 and output.shape == x.shape
    (output * weights).sum().backward()
    gradients = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
    return {"output": output.detach(), "x": x.grad} | gradients


def difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest norm of a tensor's difference, over the tensor's norm."""
    assert one.keys() == other.keys()
    pairs = ((one[k].float(), other[k].float()) for k in one)
    return max(((mine - plain).norm() / plain.norm()).item() for mine, plain in pairs)


@pytest.fixture
def whole(monkeypatch) -> list[int]:
    """Has an entry, its rows, for every MLP that was computed as one function."""
    found, plain = [], float8_mlp.gated_to_float8

    def gated_to_float8(gate, *rest):
        found.append(len(gate))
        return plain(gate, *rest)

    monkeypatch.setattr(float8_mlp, "gated_to_float8", gated_to_float8)
    return found


def unrounded(tensor: torch.Tensor, dtype: torch.dtype, by_row: bool) -> tuple:
    """What `to_float8` returns, with every digit."""
    return 2 * tensor.float(), tensor.new_full((len(tensor), 1), 0.5)


def unrounded_product(x, x_scale, weight, scale):
    with torch.autocast("cpu", enabled=False):
        return (x * x_scale @ weight.float().t() * scale[:, : len(weight)]).bfloat16()


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("rounds", [True, False])
def test_the_output_and_every_gradient_are_those_of_linears_one_by_one(
    config, targets, rounds, whole, monkeypatch
):
    model = build(config, targets)
    if not rounds:
        for module in (float8, float8_mlp):
            monkeypatch.setattr(module, "float8_product", unrounded_product)
        for module in (float8, float8_mlp, float8_mlp_ops):
            monkeypatch.setattr(module, "to_float8", unrounded)
    plain = output_and_gradients(mlp(model))
    names = [list(model.state_dict()), list(get_peft_model_state_dict(model))]
    assert whole == []
    assert fuse_float8_mlps(model) == 1
    found = output_and_gradients(mlp(model))
    assert whole == [80]
    assert difference(found, plain) < (ROUNDING if rounds else 0.01)
    assert [list(model.state_dict()), list(get_peft_model_state_dict(model))] == names


@pytest.mark.parametrize("targets", TARGETS)
def test_checkpointed_and_without_gradients_it_is_the_same(targets, whole):
    model = build(targets=targets)
    fuse_float8_mlps(model)
    module = mlp(model)
    plain = output_and_gradients(module)
    again = output_and_gradients(module, lambda x: checkpoint(module, x, use_reentrant=False))
    assert difference(plain, again) == 0
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(1)
        output = module.eval()(torch.randn(2, 40, 64).bfloat16())
    assert torch.equal(output, plain["output"])
    assert whole == [80] * 4


@pytest.mark.parametrize("targets", ["none", "all"])
def test_compiled_for_any_number_of_tokens_it_is_the_same(targets):
    model = build(targets=targets)
    assert fuse_float8_mlps(model) == 1
    torch._dynamo.reset()
    compiled = torch.compile(mlp(model), backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (40, 24):
        plain = output_and_gradients(mlp(model), tokens=tokens)
        with torch.profiler.profile() as profile:
            found = output_and_gradients(mlp(model), compiled, tokens)
        assert difference(found, plain) < ROUNDING
        done = {event.name for event in profile.events()}
        assert done >= {"sftlab::gated_to_float8", "sftlab::gated_backward_to_float8"}
        assert ("sftlab::add_product" in done) == (targets == "all")


def test_its_backward_keeps_no_activation():
    model = build(targets="none")
    found = []
    for fuse in (False, True):
        if fuse:
            fuse_float8_mlps(model)
        sizes = {}

        def pack(tensor: torch.Tensor, sizes=sizes) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        x = torch.randn(50, 64).bfloat16().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = mlp(model)(x)
        found.append(sum(sizes.values()))
        assert output.shape == x.shape
    layers = mlp(model).gate_proj, mlp(model).up_proj, mlp(model).down_proj
    held = sum(_bytes(layer.weight, layer.scale) for layer in layers)
    assert found[1] == held + 2 * 2 * 50 * 96
    assert found[0] > found[1]


def _bytes(*tensors: torch.Tensor) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


CHANGES: dict[str, Callable[[PeftModel], object]] = {
    "another": lambda m: setattr(mlp(m), "up_proj", nn.Linear(64, 96).requires_grad_(False)),
    "merged": lambda m: mlp(m).up_proj.merged_adapters.append("default"),
    "hook": lambda m: mlp(m).gate_proj.register_forward_hook(lambda *a: a[2] * 2),
    "within": lambda m: mlp(m).down_proj.base_layer.register_forward_pre_hook(
        lambda _, x: (x[0] + 1,)
    ),
    "before": lambda m: mlp(m).act_fn.register_forward_pre_hook(lambda _, x: (x[0] + 1,)),
    "second adapter": lambda m: m.add_adapter("second", LoraConfig(target_modules=GATED)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_a_layer_later_is_done_linear_by_linear(change, whole):
    model = build()
    fuse_float8_mlps(model)
    CHANGES[change](model)
    found = output_and_gradients(mlp(model))
    assert whole == []
    mlp(model).__class__ = own_class(mlp(model))
    assert difference(output_and_gradients(mlp(model)), found) == 0


@pytest.mark.parametrize("names", [["up_proj"], ["down_proj"], GATED], ids=len)
def test_disabled_adapters_are_left_out(names, whole):
    model = build()
    for name in names:
        getattr(mlp(model), name).enable_adapters(False)
    plain = output_and_gradients(mlp(model))
    fuse_float8_mlps(model)
    assert difference(output_and_gradients(mlp(model)), plain) < ROUNDING
    assert whole == [80]


def test_without_autocast_lora_in_float32_is_done_linear_by_linear(whole):
    model = build()
    fuse_float8_mlps(model)
    mlp(model)(torch.randn(8, 64).bfloat16())
    assert whole == []


def test_dropout_in_force_is_done_linear_by_linear(whole):
    model = build(lora_dropout=0.3)
    assert fuse_float8_mlps(model) == 1
    output_and_gradients(mlp(model))
    assert whole == []
    output_and_gradients(mlp(model.eval()))
    assert whole == [80]


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_act": "gelu"},
        {"mlp_bias": True},
        {"intermediate_size": 16400},
        {"use_dora": True},
        {"lora_bias": True},
        {"modules_to_save": ["up_proj"], "targets": "down"},
    ],
    ids=str,
)
def test_what_is_not_known_is_left_alone(fields):
    known = {"hidden_act", "mlp_bias", "intermediate_size"}
    config = LlamaConfig(**SIZES | {k: v for k, v in fields.items() if k in known})
    model = build(config, **{k: v for k, v in fields.items() if k not in known})
    assert fuse_float8_mlps(model) == 0
    assert not isinstance(mlp(model), Float8Mlp)


@needs_a_gpu
def test_compiled_decoder_layers_have_the_loss_and_the_gradients_of_linears_one_by_one():
    found = []
    ids = torch.randint(
        64, (4, 128), device="cuda", generator=torch.Generator("cuda").manual_seed(1)
    )
    config = LlamaConfig(**SIZES | {"hidden_size": 256, "intermediate_size": 512})
    for fuse in (False, True):
        torch._dynamo.reset()
        model = build(config, device="cuda")
        if fuse:
            assert fuse_float8_mlps(model) == 1
        compile_layers.compile_layers(model.get_base_model())
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        found.append({"loss": loss.detach()} | gradients)
    assert difference(*found) < 2 * ROUNDING
    assert abs(found[0]["loss"] - found[1]["loss"]) < 0.01


@needs_a_gpu
@pytest.mark.parametrize("targets", ["none", "all"])
def test_how_long_a_compiled_mlp_takes(targets):
    config = LlamaConfig(**SIZES | {"hidden_size": 2048, "intermediate_size": 8192})
    x = torch.randn(20480, 2048, device="cuda").bfloat16().requires_grad_()
    gradient = torch.randn_like(x)
    for fuse in (False, True):
        torch._dynamo.reset()
        model = build(config, targets, device="cuda")
        if fuse:
            assert fuse_float8_mlps(model) == 1
        module = torch.compile(mlp(model))
        ms = milliseconds(module, x, gradient)
        print(f"LoRA on {targets}, one function {fuse}: {ms:.2f} ms forward and backward")
        assert ms > 0


def milliseconds(run: Callable, x: torch.Tensor, gradient: torch.Tensor) -> float:
    """The mean time of ten forwards and backwards on a GPU, after five."""
    for step in range(15):
        if step == 5:
            torch.cuda.synchronize()
            start = time.perf_counter()
        with torch.autocast("cuda", torch.bfloat16):
            output = run(x)
        output.backward(gradient)
    torch.cuda.synchronize()
    return (time.perf_counter() - start) * 100
