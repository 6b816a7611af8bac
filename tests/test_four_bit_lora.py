"""LoRA on 4-bit linears, written beside them for one product, computes what peft's layers do."""

import pytest
import torch
from bitsandbytes import nn as bitsandbytes
from conftest import short_fields
from packed_training import (
    FOUR_BITS,
    assert_continues_exactly,
    build,
    examples,
    losses_and_gradients,
    pack_on_a_cpu,
    reference_attention,
    with_trained_lora,
)
from peft import LoraConfig, get_peft_model
from test_four_bit_linear import Graphs
from test_lora_products import ALL, MODELS, difference, loss_and_gradients
from torch import nn

from sftlab.fastpath import four_bit_linear, fused_lora_check, lora_mlp
from sftlab.fastpath.four_bit_layers import take_four_bits
from sftlab.fastpath.four_bit_lora import FourBitInput
from sftlab.fastpath.fused_lora import fuse_lora, take_fused_lora, unfuse_lora
from sftlab.fastpath.lora_products import LoraProduct
from sftlab.fastpath.selection import FastPath


@pytest.fixture(autouse=True)
def taken_on_a_cpu(monkeypatch):
    """The operations are taken on a CPU too, where they are made of bitsandbytes' own."""
    monkeypatch.setattr(four_bit_linear, "has_kernels", lambda x: True)


def adapted(model="llama", dtype=torch.float32, nested=True, kind="nf4", was=None, **fields):
    """A small model in 4 bits whose B is not zero."""
    torch.manual_seed(0)
    found = MODELS[model]()
    for name, module in list(found.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            parent, _, child = name.rpartition(".")
            made = bitsandbytes.Linear4bit(
                module.in_features, module.out_features, module.bias is not None,
                compute_dtype=dtype, compress_statistics=nested, quant_type=kind,
            )  # fmt: skip
            made.load_state_dict(module.state_dict())
            setattr(found.get_submodule(parent), child, made.to(was or dtype).to("cpu"))
    found.is_loaded_in_4bit = True  # as from_pretrained leaves it
    config = LoraConfig(**{"r": 8, "lora_alpha": 24, "target_modules": ALL} | fields)
    found = get_peft_model(found.to(dtype), config, autocast_adapter_dtype=False)
    for name, parameter in found.named_parameters():
        if "lora_B" in name or name.endswith("base_layer.bias"):
            nn.init.normal_(parameter, std=0.1)
    take_four_bits(found, FastPath(True, True, True, None, None), "single", dtype)
    return found.train()


def fused(model, dtype=torch.float32):
    left = fuse_lora(model, dtype)
    assert left.keys() <= {"Linear4bit has a bias"}
    return model


FORMS = [
    {},
    {"nested": False},
    {"kind": "fp4"},
    {"target_modules": ["q_proj", "v_proj", "o_proj"]},
    {"target_modules": ["down_proj"]},
    {"use_rslora": True, "r": 20},
    {"r": 48},  # q, k and v share no product
]


@pytest.mark.parametrize("fields", FORMS, ids=str)
def test_losses_and_gradients_are_pefts(fields):
    plain = loss_and_gradients(adapted(**fields))
    mine = fused(adapted(**fields))
    for _ in range(2):  # the second step's copies stand where the first one's do
        assert difference(plain, loss_and_gradients(mine)) < 1e-5
    asked = set(fields.get("target_modules", ALL))
    found = [m for m in mine.modules() if isinstance(m, LoraProduct)]
    assert len(found) == 2 * len(asked)
    assert {type(one.together) for one in found} == {FourBitInput}
    assert any(isinstance(m, lora_mlp.LoraMlp) for m in mine.modules()) == (asked == set(ALL))
    unfuse_lora(mine)
    assert not any(isinstance(m, LoraProduct) for m in mine.modules())
    assert difference(plain, loss_and_gradients(mine)) < 1e-6


def test_layers_whose_frozen_linear_has_a_bias_stay_pefts():
    """q, k and v of Qwen2; o and the MLP are fused beside them."""
    mine = adapted("qwen2")
    plain = loss_and_gradients(mine)
    assert fuse_lora(mine, torch.float32) == {"Linear4bit has bitsandbytes' own products": 6}
    assert difference(plain, loss_and_gradients(mine)) < 1e-5


def test_half_precision_is_as_far_from_exact_results_as_peft():
    exact = loss_and_gradients(adapted(was=torch.bfloat16))
    plain = loss_and_gradients(adapted(dtype=torch.bfloat16))
    found = loss_and_gradients(fused(adapted(dtype=torch.bfloat16), torch.bfloat16))
    assert difference(exact, found) < 1.5 * difference(exact, plain)


def test_layers_with_dropout_stay_pefts():
    """A forward without gradients is peft's, as reentrant checkpointing's first: other masks."""
    model = adapted(lora_dropout=0.5)
    assert fuse_lora(model, torch.float32) == {"in 4 bits LoRA with dropout stays peft's": 14}


def test_an_adapter_of_another_rank_finds_nothing_of_the_one_before():
    plain, mine = adapted(), fused(adapted())
    for model in (plain, mine):
        loss_and_gradients(model)
        model.add_adapter("other", LoraConfig(r=4, lora_alpha=8, target_modules=ALL))
        model.set_adapter("other")
        model.delete_adapter("default")
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.1)
    assert difference(loss_and_gradients(plain), loss_and_gradients(mine)) < 1e-5


def test_without_gradients_bitsandbytes_own_products_run(monkeypatch):
    plain, mine = adapted(), fused(adapted())
    loss_and_gradients(mine)
    ids = torch.arange(12)[None]
    monkeypatch.setattr(FourBitInput, "output", None)
    monkeypatch.setattr(lora_mlp, "_Mlp", None)
    with torch.no_grad():
        assert torch.equal(mine(ids).logits, plain(ids).logits)


def test_parameters_and_saved_adapter_are_pefts():
    plain, mine = adapted(), fused(adapted())
    loss_and_gradients(mine)
    assert list(plain.state_dict()) == list(mine.state_dict())
    for name, value in plain.state_dict().items():
        assert torch.equal(mine.state_dict()[name], value), name


@pytest.mark.parametrize("was, dtype", [(torch.float16, torch.bfloat16)], ids=str)
def test_weights_that_were_rounded_from_another_dtype_stay_pefts(was, dtype):
    (reason,) = fuse_lora(adapted(dtype=dtype, was=was), dtype)
    assert reason.startswith("the weights were torch.float16 before they had 4 bits")


def test_a_fused_layer_that_computes_something_else_is_found(monkeypatch):
    mine = fused(adapted())
    assert fused_lora_check.differs(mine) is None
    own = FourBitInput.tensors

    def other(self):
        b, a, *weights = own(self)
        return [b, a * 1.1, *weights]

    monkeypatch.setattr(FourBitInput, "tensors", other)
    assert "computes something else than peft's layers" in fused_lora_check.differs(mine)


@pytest.mark.parametrize("needed", [False, True])
def test_where_bitsandbytes_multiplies_nothing_is_fused(monkeypatch, needed):
    monkeypatch.setattr(four_bit_linear, "has_kernels", lambda x: False)
    fast = FastPath(True, True, True, None, None, fused_lora=True, needs_fused_lora=needed)
    model = adapted()
    if needed:
        with pytest.raises(ValueError, match="fused_lora is not possible here: 14 of 14"):
            take_fused_lora(model, fast, "single", torch.float32)
        return
    take_fused_lora(model, fast, "single", torch.float32)
    assert not fast.fused_lora
    assert "14 of 14 LoRA layers: Linear4bit has" in fast.reasons["fused_lora"]


@pytest.fixture
def fields(base, rows, tmp_path, monkeypatch):
    pack_on_a_cpu(monkeypatch, reference_attention)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # trl has LoRA's matrices in bfloat16
    # any size of tokens takes twice as long to trace as one size
    monkeypatch.setattr(torch._dynamo, "maybe_mark_dynamic", lambda *_: None)
    short = short_fields(base, rows, tmp_path / "run") | FOUR_BITS
    targets = {"lora_target_modules": ALL, "lora_dropout": "0"}
    return {**short, **targets, "packing": "true", "overwrite": "true"}


def test_compiled_a_training_is_pefts_and_no_whole_weight_waits_for_the_backward(
    fields, monkeypatch
):
    found = {}
    for taken in (False, True):
        graphs = Graphs()
        graphs.take_compile(monkeypatch)
        more = {"fused_lora": str(taken).lower(), "compile_layers": "true"}
        trainer = with_trained_lora(build(fields, **more))
        assert trainer.fast.fused_lora == taken
        found[taken] = losses_and_gradients(trainer, examples(5))
        products = 4 * taken  # of q, k and v; o; gate and up; down: all layers are one graph
        assert graphs.count("sftlab.four_bit_beside") == [products, 0]
        assert graphs.count("sftlab.four_bit_above") == [0, products]
        if taken:
            nodes = [node for graph in graphs.forward for node in graph.nodes]
            whole = [n for n in nodes if str(n.target).startswith("sftlab.four_bit_beside")]
            sizes = {tuple(sorted(one.meta["val"].shape)) for one in whole}
            assert len(sizes) == 4 and not sizes & set(graphs.kept(made=True))
    (nats, gradients), (mine, own) = found.values()
    assert torch.allclose(mine, nats, rtol=5e-3)
    assert difference(gradients, own) < 0.03


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_train_as_pefts(fields, monkeypatch, reentrant):
    monkeypatch.setattr(torch, "compile", lambda forward: forward)
    found, forwards = [], []
    for switch in ("true", "false"):
        more = {"fused_lora": switch, "compile_layers": "true", "gradient_checkpointing": "true"}
        trainer = with_trained_lora(build(fields, **more))
        assert trainer.fast.fused_lora == (switch == "true")
        trainer.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        trainer.model.enable_input_require_grads()
        norm = trainer.model.get_base_model().model.layers[0].input_layernorm
        norm.register_forward_pre_hook(lambda *_: forwards.append(1))
        found.append(losses_and_gradients(trainer, examples(5)))
    (nats, gradients), (expected, right) = found
    assert torch.allclose(nats, expected, rtol=5e-3)
    assert difference(right, gradients) < 0.03
    assert len(forwards) == 4, "each layer runs again in the backward"


def test_a_training_continues_exactly(fields, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda forward: forward)
    more = {"fused_lora": "true", "compile_layers": "true"}
    assert_continues_exactly(fields | more)
