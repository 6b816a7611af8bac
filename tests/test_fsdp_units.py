"""How many decoder layers FSDP2 gathers at once, and when it is one."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from peft import LoraConfig, get_peft_model
from torch.distributed import fsdp
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import LlamaConfig, LlamaForCausalLM

from sftlab.fastpath.compile_layers import decoder_layers
from sftlab.fastpath.fsdp import resolve_plugin
from sftlab.fastpath.fsdp_units import (
    gathered_bytes,
    layers_in_units,
    layers_per_unit,
    take_units,
    units_of,
)


@pytest.mark.parametrize(
    ("layers", "megabytes", "size"),
    [
        *((16, 122, 4), (28, 201, 2), (32, 405, 1), (80, 1700, 1)),
        # two units at least, of whatever small layers; a model of one layer has one
        *((30, 7, 15), (5, 0, 3), (2, 1, 1), (1, 0, 1)),
    ],
)
def test_a_unit_has_as_many_layers_as_have_half_a_gigabyte(layers, megabytes, size):
    assert layers_per_unit(layers, megabytes * 1_000_000) == size


def test_units_are_consecutive_and_the_last_one_may_be_short():
    assert units_of("abcde", 2) == [["a", "b"], ["c", "d"], ["e"]]


@pytest.fixture
def model():
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=5,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    return get_peft_model(LlamaForCausalLM(config), LoraConfig(r=4, target_modules=["q_proj"]))


@pytest.fixture
def plugin(model):
    """As accelerate_configs/fsdp.yaml makes it."""
    made = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        mixed_precision_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16),
    )
    assert resolve_plugin(made, model)
    return made


def asked(units=None, checkpointing=False, **options):
    return SimpleNamespace(
        fsdp_layers_per_unit=units,
        gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs=options or None,
    )


def test_a_layer_gathers_its_frozen_weights_in_the_compute_dtype(model, plugin):
    layer = decoder_layers(model.get_base_model())[0]
    frozen = sum(p.numel() for p in layer.parameters() if not p.requires_grad)
    assert gathered_bytes(layer, plugin) == 2 * frozen
    plugin.mixed_precision_policy = None
    assert gathered_bytes(layer, plugin) == 4 * frozen
    plugin.ignored_modules = None
    assert gathered_bytes(layer, plugin) == 4 * sum(p.numel() for p in layer.parameters())


def taken(model, plugin, args):
    fast = SimpleNamespace(layers_per_unit=None, reasons={})
    take_units(model, fast, plugin, args)
    return fast.layers_per_unit, fast.reasons.get("fsdp_layers_per_unit", "")


def test_what_is_asked_for_is_taken(model, plugin):
    assert taken(model, plugin, asked()) == (3, "")
    assert taken(model, plugin, asked(2)) == (2, "")
    assert taken(model, plugin, asked(5, checkpointing=True)) == (5, "")
    with pytest.raises(ValueError, match="is 6, and the model has 5 decoder layers"):
        taken(model, plugin, asked(6))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda p: asked(checkpointing=True, use_reentrant=True), "reentrant checkpointing"),
        (lambda p: setattr(p, "activation_checkpointing", True), "fsdp_activation_checkpointing"),
        (
            lambda p: setattr(p, "transformer_cls_names_to_wrap", ["LlamaMLP"]),
            "does not make every decoder layer a unit",
        ),
        (
            lambda p: setattr(
                p, "transformer_cls_names_to_wrap", ["LlamaMLP", "LlamaDecoderLayer"]
            ),
            "makes parts of a decoder layer units too",
        ),
    ],
)
def test_a_unit_is_one_layer_where_several_are_not_possible(model, plugin, change, reason):
    args = change(plugin) or asked()
    size, said = taken(model, plugin, args)
    assert size == 1 and reason in said
    args.fsdp_layers_per_unit = 1
    assert taken(model, plugin, args)[0] == 1
    args.fsdp_layers_per_unit = 2
    with pytest.raises(ValueError, match=f"fsdp_layers_per_unit is 2, and .*{reason}"):
        taken(model, plugin, args)


def test_whole_units_are_sharded_within_the_context_alone(model, monkeypatch):
    sharded = []
    monkeypatch.setattr(
        fsdp, "fully_shard", lambda module, **given: sharded.append((module, given))
    )
    layers = list(decoder_layers(model.get_base_model()))
    with layers_in_units(model.get_base_model(), 2):
        for module in (layers[1], layers[4], model):
            fsdp.fully_shard(module, reshard_after_forward=True)
    fsdp.fully_shard(layers[1])
    given = {"reshard_after_forward": True}
    assert sharded == [
        (layers[:2], given),
        (layers[4], given),
        (model, given),
        (layers[1], {}),
    ]
