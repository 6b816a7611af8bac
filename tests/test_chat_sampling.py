"""The chat engine draws tokens as its settings say."""

import json
import threading

import pytest
import torch
from chat_letters import GREEDY, QUESTION, letters_alone, pieces, texts
from conftest import byte_tokenizer, copy_of
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from sftlab.chat.engine import Chat
from sftlab.chat.sampling import Draw, Settings
from sftlab.data.chat_template import prompt_ids
from sftlab.evaluation.base_and_tuned import finished_run


@pytest.fixture(scope="module")
def chat(finished):
    chat = Chat(finished[0])
    letters_alone(chat._model)
    return chat


def test_every_setting_changes_what_is_generated(chat):
    greedy = texts(chat)
    drawn = texts(chat, settings=Settings(2.0, 1.0, 0, 24))
    assert drawn != greedy
    assert drawn == texts(chat, settings=Settings(2.0, 1.0, 0, 24))
    assert drawn != texts(chat, settings=Settings(2.0, 1.0, 0, 24, seed=1))
    assert drawn != texts(chat, settings=Settings(0.3, 1.0, 0, 24))
    assert texts(chat, settings=Settings(2.0, 1.0, 1, 24)) == greedy
    assert texts(chat, settings=Settings(2.0, 1e-6, 0, 24)) == greedy
    assert texts(chat, settings=Settings(0, repetition_penalty=5, max_new_tokens=24)) != greedy
    for tokens in (1, 9):
        last = pieces(chat, settings=Settings(0, max_new_tokens=tokens))[-1]
        assert last.tokens == {"base": tokens, "tuned": tokens}
        assert last.finished == {"base": "length", "tuned": "length"}


def test_tokens_are_drawn_with_their_probabilities(chat):
    prompt = torch.tensor([prompt_ids(chat._tokenizer, QUESTION)])
    with torch.no_grad():
        logits = chat._model(input_ids=prompt, adapter_names=["__base__"]).logits[0, -1]
    expected = (logits / 0.5).softmax(-1).max()
    best = chat._tokenizer.decode([int(logits.argmax())])
    drawn = [
        texts(chat, sides=["base"], settings=Settings(0.5, 1.0, 0, 1, seed=seed))["base"]
        for seed in range(400)
    ]
    assert best.strip()
    assert drawn.count(best) / 400 == pytest.approx(float(expected), abs=0.1)


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"), [(0.7, 0.9, 50), (2.0, 0.6, 0), (0.5, 1.0, 9), (1.3, 1.0, 0)]
)
def test_what_may_be_drawn_is_what_transformers_processors_keep(temperature, top_p, top_k):
    scores = torch.randn(2, 1000, generator=torch.Generator().manual_seed(3)) * 3
    processors = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    processors += [TopKLogitsWarper(top_k)] if top_k else []
    processors += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    logits, tokens = Draw(Settings(temperature, top_p, top_k), 2, scores.device).kept(scores)
    found = (
        logits
        if tokens is None
        else torch.full_like(scores, -torch.inf).scatter(-1, tokens, logits)
    )
    assert torch.equal(found, processors(None, scores.clone()))
    assert found.isfinite().any(dim=-1).all()


def test_the_models_own_defaults_and_padding_do_not_count(
    finished, tmp_path, base, chat, monkeypatch
):
    model = AutoModelForCausalLM.from_pretrained(base)
    model.generation_config.update(
        repetition_penalty=5.0, no_repeat_ngram_size=1, min_new_tokens=20
    )
    model.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    folder = copy_of(finished[0], tmp_path / "run")
    run = finished_run(folder)
    run["recipe"]["model_name_or_path"] = str(tmp_path / "base")
    (folder / "run.json").write_text(json.dumps(run))
    other = Chat(folder)
    letters_alone(other._model)
    assert texts(other) == texts(chat)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1),
        ("temperature", float("nan")),
        ("temperature", 1e-9),
        ("temperature", None),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_k", -1),
        ("top_k", 2.5),
        ("max_new_tokens", 0),
        ("max_new_tokens", 1.5),
        ("repetition_penalty", 0),
        ("repetition_penalty", "1"),
        ("seed", -1),
        ("seed", 2**63),
        ("seed", True),
    ],
)
def test_settings_that_cannot_be_are_refused(field, value):
    with pytest.raises(ValueError, match=f"^{field} must be [^.]*(0.01|0.1)?[^.]*, got"):
        Settings(**{field: value})


@pytest.mark.parametrize("sides", [[], ["base", "base"], ["other"]])
def test_sides_that_cannot_be_are_refused(chat, sides):
    with pytest.raises(ValueError, match="sides"):
        chat.reply(QUESTION, sides, GREEDY, threading.Event())


def test_a_model_that_gives_no_probabilities_is_named(finished, tmp_path):
    folder = copy_of(finished[0], tmp_path / "nan")
    path = folder / "adapter" / "adapter_model.safetensors"
    save_file({name: weight * float("nan") for name, weight in load_file(path).items()}, path)
    with pytest.raises(ValueError, match="the tuned model gives no probabilities"):
        pieces(Chat(folder))
