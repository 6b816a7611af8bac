"""What layers keep for the backward: no norm's output where they are compiled, and no copies."""

import pytest
import torch
from peft import PeftModel
from planned_steps import PARTITIONED
from test_lora_products import SIZES, adapted, fused, loss_and_gradients
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from sftlab.fastpath import compile_layers
from sftlab.fastpath.recomputed_norms import RecomputedNorm

TOKENS, HIDDEN = 50, SIZES["hidden_size"]


@pytest.fixture
def partitioned(monkeypatch) -> None:
    """Layers are compiled as inductor's partitioner cuts them, in one graph each."""
    compile_ = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, **_: compile_(f, backend=PARTITIONED, fullgraph=True)
    )
    torch._dynamo.reset()


def peft() -> PeftModel:
    """A small float32 model with LoRA."""
    return adapted().float()


def whole() -> LlamaForCausalLM:
    """The same, all of which trains."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).train()


def compiled(model: nn.Module, checkpointed: bool = False) -> nn.Module:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    base.config.use_cache = False  # a cache's layers differ
    compile_layers.compile_layers(base, checkpointed)
    return model


def kept(model: nn.Module) -> int:
    """Bytes that autograd keeps of a forward of two rows, without weights."""
    ids = torch.arange(2 * TOKENS).view(2, TOKENS) % 64
    model(input_ids=ids)  # fused LoRA moves the weights
    found: dict[int, torch.Tensor] = {}
    weights = {one.untyped_storage().data_ptr() for one in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=ids)
    return sum(one.untyped_storage().nbytes() for one in found.values())


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(peft, marks=pytest.mark.long),
        lambda: fused(peft()),
        pytest.param(whole, marks=pytest.mark.long),
    ],
)
def test_gradients_are_those_of_kept_norms_and_less_is_kept(partitioned, make):
    found, bytes_kept = [], []
    for checkpointed in (True, False):
        torch._dynamo.reset()
        model = compiled(make(), checkpointed)
        found.append(loss_and_gradients(model, TOKENS))
        bytes_kept.append(kept(model))
    assert all(torch.equal(one, found[1][name]) for name, one in found[0].items())
    elements = 2 * TOKENS * (HIDDEN + 1)  # and the scale of every token
    assert bytes_kept[0] - bytes_kept[1] == 4 * 2 * SIZES["num_hidden_layers"] * elements


def test_layers_share_one_graph_for_any_number_of_tokens(monkeypatch):
    counter = CompileCounterWithBackend(PARTITIONED)
    compile_ = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, **_: compile_(f, backend=counter, fullgraph=True)
    )
    torch._dynamo.reset()
    model = compiled(fused(peft()))
    for tokens in (50, 70):
        loss_and_gradients(model, tokens)
    assert counter.frame_count == 2, "the layers, and the last norm"


def test_nothing_changes_where_nothing_is_compiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda forward: forward)
    plain, mine = compiled(peft(), checkpointed=True), compiled(peft())
    assert any(isinstance(module, RecomputedNorm) for module in mine.modules())
    one, other = (loss_and_gradients(model) for model in (plain, mine))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert kept(plain) == kept(mine)


def test_norms_of_heads_and_of_checkpointed_layers_stay(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda forward: forward)
    model = Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16))
    compile_layers.compile_layers(model, checkpointed=True)
    assert not any(isinstance(module, RecomputedNorm) for module in model.modules())
    compile_layers.compile_layers(model)
    again = {
        n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, RecomputedNorm)
    }
    assert again == {"input_layernorm", "post_attention_layernorm"}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_layer_keeps_its_input_itself_and_no_copy_of_it(dropout):
    """What attention makes is kept by attention already."""
    model = fused(adapted(lora_dropout=dropout))
    model(torch.zeros(1, 8, dtype=torch.long))
    attention = model.get_base_model().model.layers[0].self_attn
    x, found = torch.randn(1, 50, 64, dtype=torch.float64, requires_grad=True) * 1, {}
    held = {one.data_ptr() for one in attention.o_proj.together.held}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        attention.o_proj(x)
    assert x.data_ptr() in found
    others = [one for place, one in found.items() if place not in held | {x.data_ptr()}]
    bits = [(1, 50, 8)] if dropout else []
    assert sorted(tuple(one.shape) for one in others) == [*bits, (50, 64)], "and h, padded"
    assert all(one.untyped_storage().nbytes() == one.nbytes for one in others)
