"""Checkpoints that take images too: their text trains, and the adapter is the checkpoint's."""

import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import load_script, read
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from sftlab.evaluation.base_and_tuned import answering, load_pair
from sftlab.export.formats import adapted_base
from sftlab.fastpath.compile_layers import decoder_layers
from sftlab.models.layers import decoder_of
from sftlab.models.loading import load_config, load_weights
from sftlab.models.text_part import name_adapted_layers, unnested

models = load_script("docs/make_models.py")
IDS = torch.arange(3, 30)[None]
PATCHES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
SIGLIP = {**PATCHES, "intermediate_size": 64, "patch_size": 14}
QWEN = {"depth": 1, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64, "patch_size": 8}
TWO = {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32}
# The checkpoint's class, the family of its text in docs/make_models.py, its part for images.
CHECKPOINTS = {
    "Gemma3": ("Gemma 3 (text)", SIGLIP),
    "Mistral3": (
        "Mistral 7B v0.2 and later",
        {**SIGLIP, "model_type": "pixtral", "head_dim": 16},
    ),
    "Qwen2_5_VL": ("Qwen 2.5-VL (text)", {**QWEN, "hidden_size": 32}),
    "Qwen3VL": (
        "Qwen 3-VL (text)",
        {**QWEN, "hidden_size": 32, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    ),
    "Llama4": ("Llama 4 (text)", SIGLIP | TWO),
    "Mllama": ("Llama 2, 3; SmolLM2", SIGLIP),
    "Glm4vMoe": ("GLM-4", {**PATCHES, "depth": 1, "num_heads": 2, "out_hidden_size": 64}),
    "Llava": ("Llama 2, 3; SmolLM2", SIGLIP),
    "Qwen3VLMoe": (
        "Qwen 3-VL (text)",
        {**QWEN, "hidden_size": 32, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    ),
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
# What the text has beside its family.
MORE = {
    "Glm4vMoe": {**EXPERTS, "n_routed_experts": 4, "n_group": 1, "topk_group": 1}
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}},
    "Mllama": {"cross_attention_layers": [1]},
    "Qwen3VLMoe": EXPERTS,
}
# transformers reads the text of the others itself
TEXT_ALONE = [name for name in CHECKPOINTS if name not in ("Llama4", "Mllama")]
# Whose head is the embeddings, though its text's own config says that it is not.
TIED = {"Llava": {"tie_word_embeddings": True, "image_seq_length": 4}}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Folder and model of each checkpoint, made once."""
    made = {}

    def make(name):
        if name not in made:
            family, vision = CHECKPOINTS[name]
            text = models.config_of(family).to_dict() | {"vocab_size": 1400} | MORE.get(name, {})
            folder = tmp_path_factory.mktemp(name)
            made_of = {"text_config": text, "vision_config": vision, **TIED.get(name, {})}
            config = getattr(transformers, f"{name}Config")(**made_of)
            torch.manual_seed(0)
            whole = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
            whole.save_pretrained(folder)
            made[name] = folder, whole
        return made[name]

    return make


def load(folder):
    text = load_weights(str(folder), {"trust_remote_code": False, "dtype": "float32"}, None, None)
    return text.eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def tuned_on(text, folder, *targets, **more):
    """An adapter with numbers in it, saved as a run saves it."""
    more |= {"init_lora_weights": False, "task_type": "CAUSAL_LM"}
    lora = LoraConfig(target_modules=[*targets] or ["q_proj"], **more)
    tuned = get_peft_model(text, lora).eval()
    name_adapted_layers(tuned)
    tuned.save_pretrained(folder)
    return tuned


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_text_model_is_that_of_the_checkpoint(name, checkpoints, caplog):
    folder, whole = checkpoints(name)
    config = load_config(
        str(folder), None, SimpleNamespace(model_init_kwargs=None, trust_remote_code=False)
    )
    text = load(folder)
    assert "takes images too: its text model alone is trained" in caplog.text
    assert torch.equal(logits(text), logits(whole))
    assert text.config.model_type == config.get_text_config().model_type
    assert len(decoder_layers(text)) == 2
    assert "norm" in dict(decoder_of(text).named_children())
    assert not any("vis" in key for key, _ in text.named_parameters())


@pytest.mark.parametrize("name", TEXT_ALONE)
def test_its_adapter_loads_into_the_checkpoint_with_plain_peft(name, checkpoints, tmp_path):
    folder, _ = checkpoints(name)
    tuned = tuned_on(load(folder), tmp_path)
    whole = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # peft's, of missing keys
        again = PeftModel.from_pretrained(whole, tmp_path).eval()
    assert torch.equal(logits(again), logits(tuned))
    adapted = {key for key, _ in again.named_parameters() if "lora_" in key}
    assert adapted and all(".language_model." in key for key in adapted)
    assert torch.equal(logits(adapted_base(tmp_path, torch.float32, False).eval()), logits(tuned))


def test_an_adapter_of_experts_loads_into_the_checkpoint(checkpoints, tmp_path):
    folder, _ = checkpoints("Qwen3VLMoe")
    experts = [f"mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")]
    tuned = tuned_on(load(folder), tmp_path, target_parameters=experts)
    whole = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    again = PeftModel.from_pretrained(whole, tmp_path).eval()
    assert torch.allclose(logits(again), logits(tuned), atol=1e-5)


def test_names_that_peft_takes_for_those_of_experts_are_refused(checkpoints, tmp_path):
    text = load(checkpoints("Glm4vMoe")[0])
    with pytest.raises(
        ValueError, match=r"take down_proj .* its experts .* --exclude_modules down_"
    ):
        tuned_on(text, tmp_path, "q_proj", "down_proj")


def test_an_adapter_for_llama_4_loads_where_transformers_reads_its_text(checkpoints, tmp_path):
    folder, _ = checkpoints("Llama4")
    tuned = tuned_on(load(folder), tmp_path)
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    again = PeftModel.from_pretrained(again, tmp_path).eval()
    assert torch.equal(logits(again), logits(tuned))


@pytest.mark.parametrize("name, kind", [("Gemma3", "Gemma3"), ("Llava", "Llama")])
def test_merged_weights_are_a_text_model(name, kind, checkpoints, tmp_path):
    text = load(checkpoints(name)[0])
    expected = logits(text)
    unnested(text).save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(again).__name__ == f"{kind}ForCausalLM"
    assert torch.equal(logits(again), expected)


def test_weights_that_transformers_could_not_read_alone_are_not_merged(checkpoints):
    with pytest.raises(ValueError, match=r"no text-only class for mllama_text_model"):
        unnested(load(checkpoints("Mllama")[0]))
    with pytest.raises(ValueError, match=r"no text-only class for qwen3_vl_text.*--to adapter"):
        unnested(load(checkpoints("Qwen3VL")[0]))


def test_a_text_model_with_other_logits_is_refused(tmp_path):
    vision = SIGLIP | {"vision_use_head": False}
    text = models.config_of("Command R7B").to_dict()
    config = transformers.AyaVisionConfig(text_config=text, vision_config=vision)
    transformers.AyaVisionForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="gives other logits than the whole model"):
        load(tmp_path)


def test_overrides_that_would_not_reach_the_text_are_refused(checkpoints):
    training = SimpleNamespace(model_init_kwargs={"num_hidden_layers": 1}, trust_remote_code=False)
    with pytest.raises(ValueError, match="takes images too, and model_init_kwargs"):
        load_config(str(checkpoints("Gemma3")[0]), None, training)


@pytest.mark.parametrize("name", ["Mllama", "Qwen3VLMoe"])
def test_a_run_where_the_head_lacks_images_and_one_on_a_mixture(
    name, checkpoints, tokenizer, fields, trained_here
):
    folder, _ = checkpoints(name)
    tokenizer.save_pretrained(folder)
    done = trained_here(fields | {"model_name_or_path": str(folder), "max_steps": "2"})
    assert read(fields["output_dir"])["status"] == "succeeded", done.stderr


@pytest.mark.parametrize("name", ["Gemma3", "Llava"])
def test_full_fine_tuning_is_evaluated_beside_its_base(
    name, checkpoints, tokenizer, fields, trained_here
):
    folder, whole = checkpoints(name)
    tokenizer.save_pretrained(folder)
    fields |= {"model_name_or_path": str(folder), "max_steps": "2", "use_peft": "false"}
    trained_here(fields)
    run = Path(fields["output_dir"])
    pair = load_pair(run, read(run))
    tuned = AutoModelForCausalLM.from_pretrained(run / "adapter", dtype=torch.float32).eval()
    assert torch.equal(logits(pair), logits(tuned))
    with answering(pair, "base"):
        assert torch.equal(logits(pair), logits(whole))


@pytest.mark.parametrize("name", ["Gemma3", "Llava"])
def test_the_config_says_whether_the_head_is_tied(name, checkpoints):
    folder, whole = checkpoints(name)
    training = SimpleNamespace(model_init_kwargs=None, trust_remote_code=False)
    config = load_config(str(folder), None, training)
    tied = whole.lm_head.weight is whole.get_input_embeddings().weight
    assert config.tie_word_embeddings is load(folder).config.tie_word_embeddings is tied is True


def test_a_run_on_such_a_checkpoint(checkpoints, tokenizer, fields, trained_here, caplog):
    folder, _ = checkpoints("Gemma3")
    tokenizer.save_pretrained(folder)
    fields |= {"model_name_or_path": str(folder), "max_steps": "2"}
    trained_here(fields)
    assert "its text model alone is trained" in caplog.text
    run = read(fields["output_dir"])
    assert run["ran"]["text_of"] == "Gemma3ForConditionalGeneration"
    pair = load_pair(Path(fields["output_dir"]), run)
    whole = adapted_base(Path(fields["output_dir"]) / "adapter", torch.float32, False)
    assert torch.equal(logits(pair), logits(whole.eval()))
