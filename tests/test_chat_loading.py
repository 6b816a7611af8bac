"""Runs that the chat engine loads, and those it refuses."""

import json

import pytest
import torch
from chat_letters import QUESTION, letters_alone, pieces, texts
from conftest import copy_of
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
)

from sftlab.chat.engine import Chat
from sftlab.data.chat_template import prompt_ids
from sftlab.evaluation.base_and_tuned import answering, finished_run, load_pair
from sftlab.evaluation.generation import Generator, Sampling
from sftlab.runs.run_directory import SIDES


@pytest.fixture(scope="module")
def chat(finished):
    chat = Chat(finished[0])
    letters_alone(chat._model)
    return chat


def test_a_run_that_cannot_be_loaded_is_refused_in_a_sentence(finished, tmp_path):
    def broken(name, change):
        folder = copy_of(finished[0], tmp_path / name)
        change(folder)
        with pytest.raises(ValueError) as caught:
            Chat(folder)
        message = str(caught.value)
        assert "\n" not in message, message
        return message

    def rewrite(**facts):
        return lambda folder: (folder / "run.json").write_text(
            json.dumps(finished_run(finished[0]) | facts)
        )

    weights, config = "adapter/adapter_model.safetensors", "adapter/adapter_config.json"
    recipe = finished_run(finished[0])["recipe"]
    assert "does not load" in broken("no_weights", lambda x: (x / weights).unlink())
    assert "does not load" in broken(
        "torn", lambda x: (x / weights).write_bytes((x / weights).read_bytes()[:999])
    )
    assert "does not load" in broken("empty", lambda x: (x / weights).write_bytes(b""))
    assert "does not load" in broken("config", lambda x: (x / config).write_text("{"))
    assert "holds no tokenizer" in broken(
        "tokens", lambda x: (x / "adapter/tokenizer.json").unlink()
    )
    assert "did not succeed" in broken("failed", rewrite(status="failed", reason="boom"))
    assert "line 1" in broken("json", lambda x: (x / "run.json").write_text("{"))
    assert "cannot be loaded" in broken(
        "base", rewrite(recipe=recipe | {"model_name_or_path": "nowhere/at_all"})
    )
    with pytest.raises(ValueError, match="no run directory"):
        Chat(tmp_path / "nowhere")


def test_an_adapter_that_peft_cannot_mix_answers_one_side_after_the_other(finished, tmp_path, base):
    folder = copy_of(finished[0], tmp_path / "dora")
    torch.manual_seed(1)
    config = LoraConfig(
        r=4, use_dora=True, target_modules=["q_proj", "v_proj"], init_lora_weights=False
    )
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(
        folder / "adapter"
    )
    chat = Chat(folder)
    letters_alone(chat._model)
    found = pieces(chat)
    model = letters_alone(load_pair(folder, finished_run(folder)))
    for side in SIDES:
        with answering(model, side):
            generator = Generator(model, chat._tokenizer, Sampling(24))
            assert (
                found[-1].texts[side]
                == generator.answers([prompt_ids(chat._tokenizer, QUESTION)])[0].text
            )
    assert found[-1].texts["base"] != found[-1].texts["tuned"]
    assert found[-1].finished == {"base": "length", "tuned": "length"}
    assert texts(chat, sides=["tuned"]) == {"tuned": found[-1].texts["tuned"]}


@pytest.mark.parametrize("width", [32, 64])
def test_four_bits_answer_both_sides(finished, tmp_path, base, width):
    config = AutoConfig.from_pretrained(
        base, hidden_size=width, head_dim=width // 2, intermediate_size=64
    )
    torch.manual_seed(2)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "base")
    folder = copy_of(finished[0], tmp_path / "run")
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(model, adapter).save_pretrained(folder / "adapter")
    run = finished_run(folder)
    run["recipe"]["model_name_or_path"] = str(tmp_path / "base")
    (folder / "run.json").write_text(json.dumps(run))
    chat = Chat(folder, load_in_4bit=True)
    assert chat._model.get_base_model().is_loaded_in_4bit
    letters_alone(chat._model)
    both = texts(chat)
    assert both["base"] != both["tuned"]
    assert {side: texts(chat, sides=[side])[side] for side in SIDES} == both
    for side in SIDES:
        with answering(chat._model, side):
            generator = Generator(chat._model, chat._tokenizer, Sampling(24))
            assert both[side] == generator.answers([prompt_ids(chat._tokenizer, QUESTION)])[0].text
