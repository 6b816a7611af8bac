"""An MLP over 4-bit weights as one function in float8 computes what its linears do."""

import pytest
import torch
from bitsandbytes import nn as bitsandbytes
from peft import LoraConfig, PeftModel, get_peft_model
from test_float8_mlp import (
    CONFIGS,
    ROUNDING,
    TARGETS,
    difference,
    mlp,
    output_and_gradients,
    whole,
)
from test_four_bit_linear import BITSANDBYTES, Graphs, Ran
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

from sftlab.fastpath.float8_mlp import fuse_float8_mlps
from sftlab.fastpath.four_bit_float8 import Float8Linear4bit
from sftlab.fastpath.four_bit_layers import four_bit_linears, swap
from sftlab.models import four_bits

__all__ = ["whole"]  # a fixture
FLOAT8 = "sftlab.four_bit_float8"


def build(targets="all", config="llama", whole_down=False, **fields) -> PeftModel:
    """A small model in 4 bits that multiplies in float8, whose LoRA, in float32, is not zero."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(CONFIGS[config]).bfloat16()
    for name, module in list(base.named_modules()):
        if not isinstance(module, nn.Linear) or name == "lm_head":
            continue
        parent, _, child = name.rpartition(".")
        sizes = module.in_features, module.out_features
        made = bitsandbytes.Linear4bit(*sizes, bias=False, compute_dtype=torch.bfloat16)
        made.load_state_dict(module.state_dict())
        setattr(base.get_submodule(parent), child, made.bfloat16().to("cpu"))
    four_bits.mend(base)
    base.is_loaded_in_4bit = True  # as from_pretrained leaves it
    lora = {"r": 8, "lora_alpha": 24, "target_modules": TARGETS[targets]} | fields
    found = get_peft_model(base, LoraConfig(**lora))
    for name, parameter in found.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    linears = [one for one in four_bit_linears(found) if not (whole_down and one.out_features > 64)]
    assert swap(linears, torch.bfloat16, float8=True) == {}
    return found.train()


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("targets", TARGETS)
def test_the_output_and_every_gradient_are_those_of_linears_one_by_one(config, targets, whole):
    model = build(targets, config)
    plain = output_and_gradients(mlp(model))
    names = list(model.state_dict())
    assert whole == [] and fuse_float8_mlps(model) == 1
    found = output_and_gradients(mlp(model))
    assert whole == [80]
    assert difference(found, plain) < ROUNDING
    assert list(model.state_dict()) == names
    module = mlp(model)
    again = output_and_gradients(module, lambda x: checkpoint(module, x, use_reentrant=False))
    assert difference(found, again) == 0 and len(whole) == 3


def test_an_evaluation_is_bitsandbytes_own(whole):
    model = build()
    assert fuse_float8_mlps(model) == 1
    module, x = mlp(model).eval(), torch.randn(2, 40, 64).bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), Ran() as ran:
        module(x)
    assert ran.names == [BITSANDBYTES] * 3 and whole == []


def test_some_linears_in_16_bits_leave_the_mlp_alone():
    model = build(whole_down=True)
    kinds = [type(one) for one in four_bit_linears(mlp(model))]
    assert Float8Linear4bit in kinds and bitsandbytes.Linear4bit in kinds
    assert fuse_float8_mlps(model) == 0


@pytest.mark.parametrize("targets", ["none", "all"])
def test_compiled_it_is_one_graph_that_keeps_no_weight(targets):
    model, graphs = build(targets), Graphs()
    assert fuse_float8_mlps(model) == 1
    plain = output_and_gradients(mlp(model))
    torch._dynamo.reset()
    compiled = torch.compile(mlp(model), backend=graphs.backend, fullgraph=True)
    assert difference(output_and_gradients(mlp(model), compiled), plain) < ROUNDING
    assert graphs.count(FLOAT8) == [3, 3]
    assert len(graphs.kept()) > 1 and (64, 96) not in graphs.kept()
    for node in (one for one in graphs.backward[0].nodes if str(one.target).startswith(FLOAT8)):
        assert node.args[-1].meta["val"].shape[0] == 80, "no forward can work it out"


def test_its_backward_keeps_the_4_bits_and_no_activation():
    model, sizes = build("none"), {}
    assert fuse_float8_mlps(model) == 1

    def pack(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = torch.randn(50, 64).bfloat16().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        mlp(model)(x)
    held = {}
    for layer in four_bit_linears(mlp(model)):
        for one in (tensor for tensor in layer.stored() if tensor is not None):
            held[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
    assert held.items() <= sizes.items()
    assert sum(sizes.values()) == sum(held.values()) + 2 * 2 * 50 * 96
