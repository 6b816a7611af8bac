"""Every name in a LoRA field matches a module of the model, or is refused before it is loaded."""

import pytest
from conftest import load_script
from transformers import (
    JambaConfig,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    Phi4MultimodalConfig,
)

from sftlab.config.launch import Launch
from sftlab.config.recipe import ModelArguments
from sftlab.models.adapter_names import check_adapter_names

CONFIG = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
ALONE = Launch("bf16", "single", 1, 1, False, {})
SHARDED = Launch("bf16", "fsdp", 2, 2, False, {})


def check(launch=ALONE, tied=False, **fields):
    config = LlamaConfig(**CONFIG, tie_word_embeddings=tied)
    given = {"lora_target_modules": ["q_proj"]} | fields
    check_adapter_names(ModelArguments(use_peft=True, **given), config, launch, False)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"lora_target_modules": ["q_projj", "v_proj"]}, "no such linear layer; it has down_proj"),
        ({"lora_target_modules": ["self_attention.q_proj"]}, "has no such linear layer"),
        ({"lora_target_modules": ["layers.7.q_proj", "v_proj"]}, "modules layers.7.q_proj: Llama"),
        ({"lora_target_modules": ["layers.1.q_proj"]}, "has no such linear layer"),
        ({"lora_target_modules": ["embed_tokens", "q_proj"]}, "no such linear layer"),
        ({"lora_target_modules": ["proj"]}, "has no such linear layer"),
        ({"lora_target_modules": ["self_attn"]}, "has no such linear layer"),
        ({"lora_target_modules": r".*layers\.7\..*"}, "is a pattern that no module of Llama"),
        ({"lora_target_modules": "(q_proj"}, "is no pattern"),
        ({"lora_modules_to_save": ["embed_token"]}, "has no such name; it has .*embed_tokens"),
        ({"lora_modules_to_save": ["tokens"]}, "has no such name"),
        ({"exclude_modules": ["k_projj"]}, "exclude_modules k_projj: .* has no such name"),
        ({"exclude_modules": ["k_proj"]}, "leaves out no layer that lora_target_modules asks for"),
        ({"exclude_modules": ["q_proj"]}, "leaves out every layer that lora_target_modules"),
        ({"exclude_modules": [".*layers.7.*"]}, "exclude_modules '.*' is a pattern that no module"),
        ({"lora_target_parameters": ["experts.gate_up_proj"]}, "gate_up_proj is no parameter of"),
        ({"lora_target_parameters": ["q_prj.weight"]}, r"give one of .*q_proj\.weight, k_proj"),
        ({"lora_target_parameters": ["weight"]}, r"names \S*norm.weight too, which is no matrix"),
        ({"lora_modules_to_save": ["norm"], "load_in_4bit": True}, "without float32 copies"),
        ({"lora_modules_to_save": ["norm"], "dtype": "bfloat16"}, "pass --dtype float32"),
    ],
)
def test_a_name_that_matches_nothing_is_refused(fields, said):
    with pytest.raises(ValueError, match=said) as caught:
        check(**fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"lora_target_modules": "all-linear"},
        {"lora_target_modules": r".*layers\.0\..*q_proj"},
        {"lora_target_modules": ["self_attn.q_proj", "layers.1.mlp.up_proj"]},
        {"lora_target_modules": ["model.layers.0.self_attn.q_proj"]},
        {"lora_modules_to_save": ["embed_tokens", "lm_head"]},
        {"lora_target_parameters": ["q_proj.weight"], "lora_dropout": 0.0},
        {"lora_target_modules": "all-linear", "exclude_modules": ["layers.0.mlp.up_proj"]},
        {"lora_target_modules": "all-linear", "exclude_modules": [r".*layers\.0\..*"]},
    ],
)
def test_names_as_peft_matches_them_are_taken(fields):
    check(**fields)


def test_tied_weights_are_not_trained_apart_under_fsdp2():
    with pytest.raises(ValueError, match="FSDP2 cannot shard apart"):
        check(SHARDED, tied=True, lora_modules_to_save=["embed_tokens"])
    check(SHARDED, tied=False, lora_modules_to_save=["embed_tokens"])
    check(SHARDED, tied=True, lora_modules_to_save=["norm"])


@pytest.mark.parametrize(
    ("targets", "whys", "without"),
    [
        ("all-linear", "peft does not adapt out_proj and LoRA has no effect on dt_proj", "both"),
        (".*proj", "peft does not adapt out_proj and LoRA has no effect on dt_proj", "both"),
        ("out_proj", "peft does not adapt out_proj", None),
        (["x_proj", "out_proj"], "peft does not adapt out_proj", "out_proj"),
        (["in_proj", "dt_proj"], "LoRA has no effect on dt_proj", "dt_proj"),
    ],
)
def test_linears_of_a_mamba_mixer_are_refused_with_the_names_to_give(targets, whys, without):
    config = MambaConfig(num_hidden_layers=1, hidden_size=32)
    arguments = ModelArguments(use_peft=True, lora_target_modules=targets)
    said = f"^{whys} of mamba: pass --lora_target_modules in_proj x_proj, or some of them"
    with pytest.raises(ValueError, match=said):
        check_adapter_names(arguments, config, ALONE, False)
    if without:
        arguments.exclude_modules = ["dt_proj", "out_proj"] if without == "both" else [without]
        check_adapter_names(arguments, config, ALONE, False)
    arguments = ModelArguments(use_peft=True, lora_target_modules=["in_proj", "x_proj"])
    check_adapter_names(arguments, config, ALONE, False)


@pytest.mark.parametrize(("targets", "fine"), [(["out_proj"], True), ("all-linear", False)])
def test_jambas_mixers_are_adapted_but_for_dt_proj(targets, fine):
    config = JambaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, attn_layer_period=2, attn_layer_offset=1,
        num_experts=1, num_experts_per_tok=1, mamba_d_state=4, use_mamba_kernels=False,
    )  # fmt: skip
    arguments = ModelArguments(use_peft=True, lora_target_modules=targets)
    if fine:
        check_adapter_names(arguments, config, ALONE, False)
    else:
        with pytest.raises(ValueError, match=r"^LoRA has no effect on dt_proj of jamba: pass"):
            check_adapter_names(arguments, config, ALONE, False)
        arguments.load_in_4bit = True  # the mixer calls the layer then
        check_adapter_names(arguments, config, ALONE, False)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "router"]])
def test_a_router_that_returns_more_than_its_product_is_refused(targets):
    config = Llama4TextConfig(**CONFIG, num_local_experts=2, intermediate_size_mlp=32)
    arguments = ModelArguments(use_peft=True, lora_target_modules=targets)
    said = "does not adapt router of llama4_text, .* leave it out with --exclude_modules router"
    with pytest.raises(ValueError, match=said):
        check_adapter_names(arguments, config, ALONE, False)
    arguments.exclude_modules = ["router"]
    check_adapter_names(arguments, config, ALONE, False)


@pytest.mark.parametrize(
    ("family", "targets", "parameters", "refused"),
    [
        ("Qwen 3 MoE", "all-linear", None, "lora_target_modules"),
        ("Qwen 3 MoE", ["q_proj"], ["mlp.experts.down_proj"], "lora_target_parameters"),
        ("Qwen 3 MoE", ["q_proj"], None, None),
        ("gpt-oss", "all-linear", None, None),
        ("gpt-oss", ["q_proj"], ["mlp.router.weight"], "lora_target_parameters"),
    ],
)
def test_dropout_is_refused_where_lora_is_on_experts(family, targets, parameters, refused):
    config = load_script("docs/make_models.py").config_of(family)
    arguments = ModelArguments(
        use_peft=True, lora_target_modules=targets, lora_target_parameters=parameters
    )
    assert arguments.lora_dropout > 0
    if refused:
        said = f"lora_dropout is 0.05, .* router, which {refused} means here: pass --lora_dropout 0"
        with pytest.raises(ValueError, match=said):
            check_adapter_names(arguments, config, ALONE, False)
        arguments.lora_dropout = 0.0
    check_adapter_names(arguments, config, ALONE, False)


@pytest.mark.parametrize(
    "spoilt",
    [{"vocab_size": 5, "pad_token_id": 9}, {"rope_parameters": {"rope_type": "none such"}}],
)
def test_a_config_that_makes_no_model_is_one_sentence(spoilt):
    config = LlamaConfig(**CONFIG)
    for name, value in spoilt.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=r"config\.json of the base model .* makes no model \("):
        check_adapter_names(ModelArguments(use_peft=True), config, ALONE, False)


def test_what_sees_and_hears_beside_a_text_model_is_refused():
    config = Phi4MultimodalConfig(**CONFIG, num_key_value_heads=2, pad_token_id=0)
    model = ModelArguments(use_peft=True, lora_target_modules="all-linear", lora_dropout=0.0)
    with pytest.raises(ValueError, match="linears of audio_embed, image_embed of phi4_multimodal"):
        check_adapter_names(model, config, ALONE, False)
    model.exclude_modules = ".*(audio_embed|image_embed).*"
    check_adapter_names(model, config, ALONE, False)
