"""Which parts of the fast path a run takes, and what it refuses."""

import dataclasses

import pytest
import torch
from conftest import arguments, read, short_fields
from packed_training import FOUR_BITS, build, pack_on_a_cpu, reference_attention, train
from transformers import (
    BertConfig,
    DbrxConfig,
    GemmaConfig,
    Lfm2Config,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    RecurrentGemmaConfig,
    TrainerCallback,
)

from sftlab.config.launch import Launch
from sftlab.config.parser import parse_recipe
from sftlab.fastpath import selection, varlen_attention
from sftlab.models.layers import describe
from sftlab.models.loading import model_class


@pytest.fixture
def on_a_cpu(monkeypatch):
    """Let packing run here, with the reference attention."""
    pack_on_a_cpu(monkeypatch, reference_attention)


@pytest.fixture
def fields(base, rows, tmp_path) -> dict[str, str]:
    short = short_fields(base, rows, tmp_path / "run")
    return {**short, "per_device_train_batch_size": "4", "lora_dropout": "0"}


CHUNKED = {
    "layer_types": ["chunked_attention", "full_attention"],
    "attention_chunk_size": 64,
    "intermediate_size": 64,
    "intermediate_size_mlp": 64,
    "num_local_experts": 2,
}
EIGHT_BITS = {"load_in_8bit": "true"}


def test_where_packing_cannot_be_had_rows_are_padded_and_the_run_says_why(finished):
    run = read(finished[0])
    assert (run["ran"]["packing"], run["ran"]["compile_layers"], run["ran"]["fused_loss"]) == (
        False,
        False,
        True,
    )
    assert finished[2].stdout.count("packing is off: a CPU has no variable-length attention") == 1
    assert "non_blocking" not in finished[2].stderr, "a setting for GPUs warns on a CPU"


@pytest.mark.parametrize(
    "asked, named",
    [
        (
            {"packing": "true"},
            "packing is not possible here: a CPU has no variable-length attention",
        ),
        ({"attn_implementation": "varlen"}, "a CPU has no variable-length attention"),
        (
            {"packing": "true", "attn_implementation": "sdpa"},
            "attention sdpa would need a dense mask",
        ),
        (
            {"packing": "true", "neftune_noise_alpha": "5"},
            "NEFTune scales its noise by the length of a row",
        ),
        ({"padding_free": "true"}, "padding_free is not used here: packing decides"),
        ({"packing_strategy": "bfd"}, "packing_strategy is not used here"),
        (
            {"fused_loss": "true", "label_smoothing_factor": "0.1"},
            "fused_loss is not possible here",
        ),
    ],
)
def test_what_cannot_be_had_is_refused(fields, asked, named):
    with pytest.raises(ValueError, match=named):
        build(fields, **asked)


@pytest.mark.parametrize(
    "strategy, asked, compiled",
    [
        ("fsdp", {}, True),
        ("fsdp", FOUR_BITS, True),
        ("fsdp", EIGHT_BITS, False),
        ("fsdp", EIGHT_BITS | {"compile_layers": "true"}, True),
        ("ddp", EIGHT_BITS, True),
    ],
)
def test_layers_of_8_bit_weights_are_not_compiled_under_fsdp(
    fields, on_a_cpu, monkeypatch, strategy, asked, compiled
):
    monkeypatch.setattr(varlen_attention, "no_triton", lambda: None)
    recipe = parse_recipe(arguments({**fields, **asked}), Launch.from_environment())
    fast = selection.choose(
        recipe, LlamaConfig(), dataclasses.replace(Launch.from_environment(), strategy=strategy)
    )
    assert (fast.packing, fast.fused_loss, fast.compile_layers) == (True, None, compiled)
    assert ("compile_layers" in fast.reasons) == (not compiled)


SMALL = {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}


@pytest.mark.parametrize(
    "config, longest, why",
    [
        (LlamaConfig(**SMALL), None, None),
        (LlamaConfig(**SMALL, head_dim=24), None, None),
        (LlamaConfig(**SMALL, head_dim=512), None, "heads have 512 elements, more than 256"),
        (LlamaConfig(**SMALL, attention_dropout=0.1), None, "the attention has dropout"),
        (MistralConfig(**SMALL, sliding_window=16), 512, None),
        (Llama4TextConfig(**SMALL, **CHUNKED), 512, "needs a max_length of at most 64"),
        (Llama4TextConfig(**SMALL, **CHUNKED), 64, None),
        (MambaConfig(num_hidden_layers=1, hidden_size=32), 64, "does not take another attention"),
        (Lfm2Config(**SMALL, layer_types=["conv", "full_attention"]), 64, None),
        (RecurrentGemmaConfig(**SMALL, lru_width=64), 64, "2 convolutions would mix packed rows"),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_models_whose_attention_the_kernels_do_not_have_are_not_packed(
    monkeypatch, config, longest, why
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(varlen_attention, "find_spec", lambda name: name)
    found = varlen_attention.why_not(describe(config, model_class(config)), longest)
    assert found is None if why is None else why in found


TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
TWO_WAYS = [  # encoders have classes for generation too; PaliGemma's text part looks both ways
    BertConfig(**TINY, intermediate_size=32),
    GemmaConfig(**TINY, intermediate_size=32, head_dim=8, use_bidirectional_attention=True),
]


@pytest.mark.parametrize("config", TWO_WAYS, ids=lambda one: one.model_type)
def test_a_model_whose_tokens_see_later_ones_is_refused(fields, config):
    recipe = parse_recipe(arguments(fields), Launch.from_environment())
    said = f"{config.model_type} lets tokens attend to later ones, so .* a causal language model"
    for elsewhere in (None, lambda: None):  # a run, and a plan for another machine
        with pytest.raises(ValueError, match=said):
            selection.choose(recipe, config, Launch.from_environment(), elsewhere)
    causal = BertConfig(**TINY, intermediate_size=32, is_decoder=True)
    selection.choose(recipe, causal, Launch.from_environment())


def test_experts_in_two_dimensions_count_as_whole_though_the_layers_are_unknown(fields):
    config = DbrxConfig(
        d_model=32, n_heads=4, n_layers=2, max_seq_len=64, vocab_size=64,
        ffn_config={"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
        attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
    )  # fmt: skip
    layers = describe(config, model_class(config))
    assert layers.unknown and layers.experts > 0.3
    recipe = parse_recipe(arguments(fields | FOUR_BITS), Launch.from_environment())
    with pytest.raises(ValueError, match=r"rounds linear layers alone, and .* stacked"):
        selection.choose(recipe, config, Launch.from_environment())


def test_a_parameter_that_something_unfroze_stops_the_run(fields, on_a_cpu):
    class Unfreeze(TrainerCallback):
        def on_train_begin(self, args, state, control, model, **kwargs):
            model.get_input_embeddings().weight.requires_grad_(True)

    trainer = build(fields)
    trainer.add_callback(Unfreeze())
    with pytest.raises(
        RuntimeError,
        match=r"1 parameters would be trained but no optimizer has them, first .*embed_tokens",
    ):
        train(trainer)
