"""Planned memory is what torch, autograd and inductor allocate."""

import contextlib
import dataclasses
from functools import partial

import pytest
import torch
from conftest import arguments
from peft import LoraConfig, get_peft_model
from planned_steps import ALL, ATTENTION, PARTITIONED, forecast, kernels_without_numbers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    Glm4Config,
    GraniteMoeConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from sftlab.config.launch import exported, launched
from sftlab.config.parser import parse_recipe
from sftlab.data.tiles import tiles
from sftlab.fastpath import compile_layers
from sftlab.fastpath.experts import GROUPED
from sftlab.fastpath.fused_lora import fuse_lora
from sftlab.models.layers import describe
from sftlab.models.loading import model_class
from sftlab.planning.row_lengths import RowLengths
from sftlab.planning.step import Shape, Step
from sftlab.planning.step_memory import kept_bytes
from sftlab.planning.weight_memory import (
    FUSED,
    Weights,
    count_weights,
    optimizer_bytes,
    packed_bytes,
)

HIDDEN, MLP, HEADS, KEY_HEADS, TOKENS, RANK = 64, 160, 4, 2, 256, 4
EXPERTS, TAKEN, EXPERT_MLP = 8, 3, 40


@pytest.mark.parametrize(
    "peft, targets", [("true", ATTENTION), ("true", ALL), ("false", ATTENTION)]
)
def test_weights_gradients_and_optimizer_state_are_torchs_own(base, fields, peft, targets):
    with launched(exported("accelerate_configs/fp32.yaml")) as launch:
        argv = [*arguments(fields), f"--use_peft={peft}", "--lora_target_modules", *targets]
        recipe = parse_recipe(argv, launch)
        counted = count_weights(recipe, AutoConfig.from_pretrained(base))
    model = AutoModelForCausalLM.from_pretrained(base)
    own = sum(p.nbytes for p in model.parameters())
    if peft == "true":
        model = get_peft_model(
            model, LoraConfig(r=recipe.model.lora_r, target_modules=targets, task_type="CAUSAL_LM")
        )
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    model(input_ids=torch.arange(9)[None], labels=torch.arange(9)[None]).loss.backward()
    optimizer.step()
    state = sum(value.nbytes for one in optimizer.state.values() for value in one.values())
    assert (counted.base, counted.adapter) == (own, sum(p.nbytes for p in model.parameters()) - own)
    assert counted.gradients == sum(p.grad.nbytes for p in trained)
    assert counted.optimizer_state == state


@pytest.mark.parametrize("nested", [True, False])
def test_4_bit_weights_are_bitsandbytes_own(nested):
    functional = pytest.importorskip("bitsandbytes.functional")
    packed, state = functional.quantize_4bit(
        torch.randn(192, 352), compress_statistics=nested, quant_type="nf4"
    )
    scales = state.absmax.nbytes + (state.state2.absmax.nbytes if nested else 0)
    assert packed_bytes(192 * 352, nested) == packed.nbytes + scales


def test_an_unknown_optimizer_is_refused():
    assert optimizer_bytes("adamw_8bit", [10_000], 4) < optimizer_bytes("adamw_torch", [10_000], 4)
    with pytest.raises(ValueError, match="no plan for optim adafactor: known are adamw_torch"):
        optimizer_bytes("adafactor", [1], 4)


@pytest.fixture
def attention_on_cpu(monkeypatch):
    """The variable-length kernels' shapes without the kernels."""
    kernels_without_numbers(monkeypatch)


def llama(targets, dtype, casts, dropout):
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=HIDDEN,
        intermediate_size=MLP,
        num_hidden_layers=3,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        attn_implementation="varlen",
    )
    lora = LoraConfig(r=RANK, target_modules=targets, lora_dropout=dropout, task_type="CAUSAL_LM")
    model = get_peft_model(LlamaForCausalLM(config).to(dtype), lora)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(torch.float32 if casts else dtype)
    return model.train()


def kept_by_autograd(model, dtype, casts):
    """Bytes of activations that the second of three layers keeps.

    Weights and what is as large as they are left out.
    """
    sizes, marks = {}, []
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        long = {TOKENS, TAKEN * TOKENS} & set(tensor.shape)
        if long and storage.data_ptr() not in weights:
            sizes.setdefault(storage.data_ptr(), (storage.nbytes(), tensor))
        return tensor

    for layer in model.get_base_model().model.layers[1:]:
        layer.register_forward_pre_hook(lambda *_: marks.append(len(sizes)))
    autocast = (
        torch.autocast("cpu", dtype)
        if casts and dtype != torch.float32
        else contextlib.nullcontext()
    )
    ids = torch.randint(0, 64, (1, TOKENS))
    with autocast, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.get_base_model().model(
            input_ids=ids,
            position_ids=torch.arange(TOKENS)[None],
            tiles=tiles([TOKENS]),
            use_cache=False,
        )
    return sum(size for size, _ in list(sizes.values())[slice(*marks)])


def planned_step(targets, precision, casts, compiled, dropout):
    weights = Weights(*[0] * 10, None)
    shape = (HIDDEN, MLP, 2, HEADS, KEY_HEADS, HIDDEN // HEADS, 64)

    return Step(
        Shape(*shape),
        weights,
        precision,
        frozenset(targets),
        RANK,
        TOKENS,
        TOKENS,
        quantized=not casts,
        weight_bytes=4 if precision == "fp32" else 2,
        compiled=compiled,
        dropout=dropout > 0,
    )


@pytest.mark.parametrize("targets", [ATTENTION, ALL], ids=["attention", "all"])
@pytest.mark.parametrize(
    "precision, casts, dropout",
    [
        ("bf16", True, 0.0),
        ("bf16", False, 0.0),
        ("fp32", True, 0.0),
        ("bf16", True, 0.1),
        ("bf16", False, 0.1),
    ],
)
def test_what_a_layer_keeps_is_what_autograd_keeps(
    attention_on_cpu, targets, precision, casts, dropout
):
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    held = kept_by_autograd(llama(targets, dtype, casts, dropout), dtype, casts)
    planned = TOKENS * kept_bytes(planned_step(targets, precision, casts, False, dropout))
    # on a CPU the mask of dropout has the dtype of what is dropped
    inputs = {
        "q_proj": HIDDEN,
        "k_proj": HIDDEN,
        "v_proj": HIDDEN,
        "o_proj": HIDDEN,
        "gate_proj": HIDDEN,
    }
    wide = sum((inputs | {"up_proj": HIDDEN, "down_proj": MLP})[name] for name in targets)
    extra = TOKENS * wide * (3 if casts else 1) if dropout else 0
    assert planned == pytest.approx(held - extra, rel=0.01)


def test_what_a_layer_of_fused_lora_keeps_is_what_autograd_keeps(attention_on_cpu):
    model = llama(ALL, torch.bfloat16, True, 0.0)
    assert fuse_lora(model, torch.bfloat16) == {}
    step = planned_step(ALL, "bf16", True, False, 0.0)
    planned = TOKENS * kept_bytes(dataclasses.replace(step, fused_lora=True))
    kept_by_autograd(model, torch.bfloat16, True)  # the first forward moves the weights
    assert planned == pytest.approx(kept_by_autograd(model, torch.bfloat16, True), rel=0.01)


@pytest.mark.long
@pytest.mark.parametrize("targets", [ATTENTION, ALL], ids=["attention", "all"])
@pytest.mark.parametrize(
    "fused, dropout, casts, checkpointed",
    [
        (False, 0.0, True, False),
        (False, 0.0, False, False),
        (True, 0.0, True, False),
        (True, 0.1, True, False),
        (True, 0.0, True, True),
    ],
)
def test_what_a_compiled_layer_keeps_is_what_inductors_partitioner_keeps(
    attention_on_cpu, targets, monkeypatch, fused, dropout, casts, checkpointed
):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=PARTITIONED))
    torch.compiler.reset()
    model = llama(targets, torch.bfloat16, casts, dropout)
    if fused:
        assert fuse_lora(model, torch.bfloat16) == {}
    compile_layers.compile_layers(model.get_base_model(), checkpointed)
    kept_by_autograd(model, torch.bfloat16, casts)  # the first forward moves the weights
    held = kept_by_autograd(model, torch.bfloat16, casts)
    step = planned_step(targets, "bf16", casts, True, dropout)
    step = dataclasses.replace(step, fused_lora=fused, checkpointing=checkpointed)
    assert TOKENS * kept_bytes(step) == pytest.approx(held, rel=0.01)


@pytest.mark.parametrize(
    "config_class, targets",
    [
        (Qwen3Config, ATTENTION),
        (Gemma2Config, ATTENTION),
        (Olmo2Config, ATTENTION),
        (Phi3Config, ("qkv_proj", "o_proj")),
        (Phi3Config, ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")),
        (Glm4Config, (*ATTENTION, "gate_up_proj", "down_proj")),
    ],
)
def test_other_layers_than_llamas_keep_what_autograd_keeps(attention_on_cpu, config_class, targets):
    sizes = {"vocab_size": 64, "hidden_size": HIDDEN, "intermediate_size": MLP, "head_dim": 16}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KEY_HEADS}
    config = config_class(**sizes, **heads, num_hidden_layers=3, pad_token_id=0)
    held = kept_by_autograd(of_config(config, targets, torch.float32), torch.bfloat16, True)
    shape = Shape.of(config, describe(config, model_class(config)))
    assert (shape.norm_elements > 0) == (config_class is not Phi3Config)
    named = frozenset(one for name in targets for one in FUSED.get(name, (name,)))
    step = planned_step(named, "bf16", True, False, 0.0)
    weights = step.weights._replace(fused=frozenset(targets) & set(FUSED))
    step = dataclasses.replace(step, shape=shape, weights=weights)
    assert TOKENS * kept_bytes(step) == pytest.approx(held, rel=0.01)


def of_config(config, targets, dtype):
    """A tiny model in bf16 with LoRA in `dtype`."""
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation="varlen", dtype=torch.bfloat16
    )
    model = get_peft_model(
        model, LoraConfig(r=RANK, target_modules=list(targets), task_type="CAUSAL_LM")
    )
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    return model.train()


@pytest.mark.long
@pytest.mark.parametrize("config_class, norms_first", [(Qwen3Config, True), (Olmo2Config, False)])
def test_compiled_layers_with_norms_in_other_places_keep_what_is_planned(
    attention_on_cpu, monkeypatch, config_class, norms_first
):
    """Where linears read the residual stream itself, there is no norm before them to recompute."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=PARTITIONED))
    torch.compiler.reset()
    sizes = {"vocab_size": 64, "hidden_size": HIDDEN, "intermediate_size": MLP, "pad_token_id": 0}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KEY_HEADS, "head_dim": 16}
    config = config_class(**sizes, **heads, num_hidden_layers=3)
    model = of_config(config, ALL, torch.bfloat16)
    compile_layers.compile_layers(model.get_base_model())
    held = kept_by_autograd(model, torch.bfloat16, False)
    shape = Shape.of(config, describe(config, model_class(config)))
    assert shape.norms_first == norms_first
    step = planned_step(ALL, "bf16", False, True, 0.0)
    step = dataclasses.replace(step, shape=shape)
    assert TOKENS * kept_bytes(step) == pytest.approx(held, rel=0.01)


def mixture(config_class, more):
    """A tiny mixture in bf16 with LoRA on its attention, and its shape."""
    config = config_class(
        **{"vocab_size": 64, "hidden_size": HIDDEN, "num_hidden_layers": 3, "pad_token_id": 0},
        **{"num_attention_heads": HEADS, "num_key_value_heads": KEY_HEADS, "head_dim": 16},
        **{"num_local_experts": EXPERTS, "num_experts_per_tok": TAKEN, **more},
    )
    model = AutoModelForCausalLM.from_config(
        config,
        attn_implementation="varlen",
        experts_implementation=GROUPED,
        dtype=torch.bfloat16,
    )
    lora = LoraConfig(r=RANK, target_modules=ATTENTION, task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    return model.train(), Shape.of(config, describe(config, model_class(config)))


MIXTURES = [
    (Qwen3MoeConfig, {"intermediate_size": MLP, "moe_intermediate_size": EXPERT_MLP}),
    (MixtralConfig, {"intermediate_size": EXPERT_MLP}),
    (GraniteMoeConfig, {"intermediate_size": EXPERT_MLP}),
]


@pytest.mark.parametrize(("config_class", "more"), MIXTURES)
def test_a_mixtures_layer_keeps_what_autograd_keeps(attention_on_cpu, config_class, more):
    model, shape = mixture(config_class, more)
    assert (shape.experts, shape.taken, shape.mlp) == (EXPERTS, TAKEN, TAKEN * EXPERT_MLP)
    step = planned_step(ATTENTION, "bf16", True, False, 0.0)
    planned = TOKENS * kept_bytes(dataclasses.replace(step, shape=shape))
    assert planned == pytest.approx(kept_by_autograd(model, torch.bfloat16, True), rel=0.02)


@pytest.mark.long
def test_a_compiled_mixtures_layer_keeps_what_inductors_partitioner_keeps(
    attention_on_cpu, monkeypatch
):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=PARTITIONED))
    torch.compiler.reset()
    model, shape = mixture(*MIXTURES[0])
    compile_layers.compile_layers(model.get_base_model())
    step = planned_step(ATTENTION, "bf16", True, True, 0.0)
    planned = TOKENS * kept_bytes(dataclasses.replace(step, shape=shape))
    assert planned == pytest.approx(kept_by_autograd(model, torch.bfloat16, True), rel=0.02)


def test_4_bit_weights_are_whole_until_they_are_sharded():
    short = {
        "per_device_train_batch_size": 1,
        "global_batch_size": 4,
        "gradient_checkpointing": "true",
    }
    rows = RowLengths(1000, 64, 0, 64, "said")
    quantized = {"load_in_4bit": "true", "bnb_4bit_quant_storage": "bfloat16", "dtype": "bfloat16"}
    plan = forecast(
        "fsdp", shape="llama2-7b", rows=rows, flags={"num_processes": 4}, **short, **quantized
    ).memory
    assert plan.at == "sharding"
    assert plan.allocated > 1.25 * plan.parameters
    # every linear in 4 bits, embedding and head in 16
    assert 3.5 < plan.parameters / 2**30 < 4
    plain = forecast(
        "fsdp", shape="llama2-7b", rows=rows, flags={"num_processes": 4}, **short
    ).memory
    assert plain.at != "sharding"
    assert plain.parameters == pytest.approx(6.74e9 * 2 / 4, rel=0.01), "read a layer at a time"
