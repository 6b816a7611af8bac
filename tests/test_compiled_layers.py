"""Compiled layers and float8 linears compute what the plain ones do."""

import pytest
import torch
from conftest import short_fields
from packed_training import (
    FOUR_BITS,
    build,
    examples,
    losses_and_gradients,
    pack_on_a_cpu,
    reference_attention,
    train,
    with_trained_lora,
)
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPTNeoXJapaneseConfig,
    GPTNeoXJapaneseForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from sftlab.fastpath import compile_layers
from sftlab.fastpath.float8 import FrozenFloat8Linear, freeze_in_float8
from sftlab.fastpath.float8_mlp import fuse_float8_mlps
from sftlab.measurement.flops import flops_per_token

# each of these takes half a minute to trace
KEPT, CHECKPOINTED = {}, {"gradient_checkpointing": "true"}
QUICK = (("whole", KEPT), ("4 bits", CHECKPOINTED))
# every kind of weights with and without checkpointing; each compiles for half a minute
CASES = [
    pytest.param(
        weights,
        dropped,
        id=f"{weights}-{'checkpointed' if dropped else 'kept'}",
        marks=[] if (weights, dropped) in QUICK else pytest.mark.long,
    )
    for weights in ("whole", "4 bits", "float8", "float8 MLPs", "4 bits gathered")
    for dropped in (KEPT, CHECKPOINTED)
]


@pytest.fixture
def on_a_cpu(monkeypatch):
    """Let packing run here, with the reference attention."""
    pack_on_a_cpu(monkeypatch, reference_attention)


@pytest.fixture
def fields(base, rows, tmp_path) -> dict[str, str]:
    short = short_fields(base, rows, tmp_path / "run")
    return {**short, "per_device_train_batch_size": "4", "lora_dropout": "0"}


@pytest.mark.long
def test_compiled_layers_are_one_graph_that_batches_of_other_sizes_do_not_compile_anew(
    fields, on_a_cpu, monkeypatch
):
    graphs = []

    def compiler(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compile_ = torch.compile
    monkeypatch.setattr(
        torch,
        "compile",
        lambda f, **kwargs: compile_(f, backend=compiler, fullgraph=True, **kwargs),
    )
    torch._dynamo.reset()
    compiled = train(build(fields, packing="true", compile_layers="true"))
    found = len(graphs)
    torch._dynamo.reset()
    assert found == 2, "all layers, and the last norm"
    plain = train(build(fields, packing="true", compile_layers="false"))
    assert [e["loss"] for e in compiled] == pytest.approx([e["loss"] for e in plain], abs=1e-5)


@pytest.mark.parametrize(("weights", "dropped"), CASES)
def test_compiled_layers_have_the_gradients_of_uncompiled_ones(
    fields, on_a_cpu, monkeypatch, weights, dropped
):
    compile_ = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, **kwargs: compile_(f, backend="aot_eager", **kwargs)
    )
    if weights != "whole":  # any size of tokens takes twice as long to trace as one size
        monkeypatch.setattr(torch._dynamo, "maybe_mark_dynamic", lambda *_: None)
    more = dropped | (FOUR_BITS if "4 bits" in weights else {})
    found = []
    torch._dynamo.utils.counters.clear()
    for compiled in (False, True):
        torch._dynamo.reset()
        trainer = with_trained_lora(build(fields, packing="true", compile_layers="false", **more))
        if "float8" in weights:
            freeze_in_float8(trainer.model)
        if weights == "float8 MLPs":
            assert fuse_float8_mlps(trainer.model) == 2
        if weights == "4 bits gathered":  # FSDP gives them back as plain parameters
            for linear in (m for m in trainer.model.modules() if "quant_state" in vars(m)):
                linear.weight = torch.nn.Parameter(linear.weight.data, requires_grad=False)
        if compiled:
            compile_layers.compile_layers(trainer.model.get_base_model())
        with torch.autocast("cpu", torch.bfloat16, enabled=weights != "whole"):
            found.append(losses_and_gradients(trainer, examples(5)))
    assert not torch._dynamo.utils.counters["graph_break"]
    (nats, gradients), (nats_compiled, gradients_compiled) = found
    rounding = {"whole": 1e-6, "float8": 0.03, "float8 MLPs": 0.03}.get(weights, 0.01)
    assert (nats_compiled - nats).abs().mean() < rounding
    for name, gradient in gradients.items():
        pair = (gradient.flatten().double(), gradients_compiled[name].flatten().double())
        assert torch.cosine_similarity(*pair, dim=0) > 1 - rounding, name


def test_frozen_float8_linears_are_near_the_linears_they_replace():
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 48, bias=False).bfloat16().requires_grad_(False)
    x, gradient = torch.randn(32, 64).bfloat16(), torch.randn(32, 48).bfloat16()
    found = []
    for layer in (linear, FrozenFloat8Linear(linear)):
        mine = x.clone().requires_grad_()
        y = layer(mine)
        y.backward(gradient)
        found.append((y.detach(), mine.grad))
    for exact, rounded in zip(*found, strict=True):
        assert rounded.dtype == torch.bfloat16
        assert (
            torch.cosine_similarity(exact.flatten().float(), rounded.flatten().float(), dim=0)
            > 0.998
        )


def test_a_large_token_costs_the_others_no_digits_in_float8():
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 48, bias=False).bfloat16().requires_grad_(False)
    x, gradient = torch.randn(32, 64).bfloat16(), torch.randn(32, 48).bfloat16()
    large = torch.ones(32, 1)
    large[0] = 1e6
    found = []
    for factor in (torch.ones(32, 1), large):
        mine = (x * factor).bfloat16().requires_grad_()
        y = FrozenFloat8Linear(linear)(mine)
        y.backward((gradient * factor).bfloat16())
        found.append((y.detach()[1:], mine.grad[1:]))
    for alone, beside in zip(*found, strict=True):
        torch.testing.assert_close(alone, beside, rtol=0, atol=0)


def test_fp8_leaves_a_head_of_any_name():
    config = GPTNeoXJapaneseConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    base = GPTNeoXJapaneseForCausalLM(config)
    model = get_peft_model(base, LoraConfig(r=8, target_modules=["query_key_value"]))
    freeze_in_float8(model)
    head = base.get_output_embeddings()
    assert type(head) is torch.nn.Linear and head is base.embed_out


@pytest.mark.parametrize("family", ["mamba", "falcon_mamba", "mamba2"])
def test_fp8_leaves_what_a_mixer_reads_itself(family):
    """Of Mamba's linears of such sizes all are multiples of 16."""
    sizes = {"vocab_size": 64, "hidden_size": 256, "num_hidden_layers": 2, "pad_token_id": 0}
    sizes |= {"bos_token_id": 1, "eos_token_id": 2}
    if family == "mamba2":
        sizes |= {"num_heads": 16, "head_dim": 32, "n_groups": 1, "state_size": 16}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes))
    model.requires_grad_(requires_grad=False)
    ids = torch.arange(3, 40)[None]
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(input_ids=ids, labels=ids).loss
        assert freeze_in_float8(model) == 2, "in_proj of two layers"
        found = model(input_ids=ids, labels=ids).loss
    assert found.item() == pytest.approx(expected.item(), rel=0.02)


def test_fp8_freezes_the_decoders_linears_and_no_others():
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model = get_peft_model(
        LlamaForCausalLM(config), LoraConfig(r=8, target_modules=["q_proj", "down_proj"])
    )
    before = flops_per_token(model)
    assert freeze_in_float8(model) == 7
    kept = [
        n
        for n, m in model.named_modules()
        if isinstance(m, torch.nn.Linear) and type(m) is torch.nn.Linear
    ]
    assert all("lora_" in name or "lm_head" in name for name in kept)
    assert flops_per_token(model) == before
    saved = LoraConfig(r=8, target_modules=["q_proj"], modules_to_save=["down_proj"])
    model = get_peft_model(LlamaForCausalLM(config), saved)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    freeze_in_float8(model)
    assert {
        name for name, parameter in model.named_parameters() if parameter.requires_grad
    } == trained
    with pytest.raises(ValueError, match="no frozen linear whose sizes are multiples of 16"):
        freeze_in_float8(torch.nn.Linear(8, 8))
