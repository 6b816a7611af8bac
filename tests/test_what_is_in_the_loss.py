"""What a template puts into the loss is looked at before anything is trained."""

import json
import shutil
from datetime import date

import pytest
from loss_templates import (
    BACKWARDS,
    CHATML,
    ENDLESS,
    FORGETS,
    HEADER,
    NO_END,
    R1,
    SYSTEM_LAST,
    UPPER,
    with_template,
)
from transformers import LlamaConfig

from sftlab.data.before_training import data_lines
from sftlab.data.chat_template import encode, encoder_of, prompt_ids
from sftlab.data.loss_check import look_at_loss
from sftlab.data.messages import Conversation
from sftlab.data.model_limits import refuse_unknown_tokens
from sftlab.data.template_facts import rendered_facts, template_facts
from sftlab.data.time_limit import TooSlow, time_limit
from sftlab.models.loading import read_tokenizer

EVERY = ("system prompts", "earlier turns", "thoughts")


def test_a_template_that_is_right_gives_no_warning():
    right = with_template(CHATML, ("<|im_start|>", "<|im_end|>"))
    assert look_at_loss(right, [], EVERY) == []


@pytest.mark.parametrize("answer", ["d", "end", "|", "<", "im_end"])
def test_an_answer_that_is_a_part_of_its_end_token_gives_no_warning(answer):
    right = with_template(CHATML, ("<|im_start|>", "<|im_end|>"))
    turns = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": answer}]
    assert look_at_loss(right, [Conversation(turns, [1], [])], EVERY) == []
    (warning,) = look_at_loss(with_template(CHATML), [Conversation(turns, [1], [])], EVERY)
    assert warning.startswith("no end token is in the loss")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (HEADER + "<assistant>", "writes '<assistant>' after an answer's end"),
        (UPPER, r"does not write the answer 'It is Quagga\.' as it is"),
        (BACKWARDS, "puts the question into the loss"),
    ],
)
def test_templates_whose_loss_is_not_the_answer_are_refused(template, message):
    with pytest.raises(ValueError, match=message) as caught:
        look_at_loss(with_template(template), [], EVERY)
    assert "--chat_template_path" in str(caught.value)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            SYSTEM_LAST,
            "renders a prompt differently once an answer follows; each answer is trained",
        ),
        (R1, "drops the thoughts of answers"),
        (R1, r"ends prompts with '<think>\n' only where an answer is asked for"),
        (NO_END, "no end token is in the loss, so"),
        (CHATML, "no end token is in the loss ('<|im_end|>' is no token of this tokenizer)"),
        (HEADER, "puts '<assistant>' into the loss"),
        (FORGETS, "leaves earlier answers out"),
        (FORGETS, "leaves system prompts out"),
    ],
)
def test_what_a_template_does_is_said(template, message):
    assert any(message in one for one in look_at_loss(with_template(template), [], EVERY))


def test_a_prompt_that_moves_once_it_is_answered_is_trained_as_it_is_asked():
    """A row for each answer: the system prompt stands in the question that it answers."""
    tokenizer = with_template(SYSTEM_LAST)
    chat = [
        {"role": role, "content": text}
        for role, text in (
            *(("system", "Be brief."), ("user", "One?"), ("assistant", "Yes.")),
            *(("user", "Two?"), ("assistant", "No.")),
        )
    ]
    (made,) = encoder_of(tokenizer)([Conversation(chat, [2, 4], [])])
    assert len(made) == 2
    for one, end, answer in zip(made, (2, 4), (" Yes.<eos>", " No.<eos>"), strict=True):
        asked = prompt_ids(tokenizer, chat[:end])
        assert one.ids[: len(asked)] == asked
        assert tokenizer.decode(one.ids[len(asked) :]) == answer
        assert one.spans == [len(asked), len(one.ids) - len(asked)]


def test_only_what_the_rows_have_is_warned_of():
    assert look_at_loss(with_template(SYSTEM_LAST), [], ()) == []
    assert len(look_at_loss(with_template(R1), [], ())) == 1


def test_the_fields_that_a_template_would_write_are_named():
    template = CHATML.replace(
        "{{ m['content'] }}", "{{ m['tool_calls'] }}{{ tools }}{{ m['content'] }}"
    )
    assert template_facts(with_template(template), "it")["writes"] == ["tool_calls", "tools"]


def test_the_day_that_a_template_writes_is_a_fact():
    dated = rendered_facts(with_template("{{ strftime_now('%d %b %Y') }}" + CHATML))
    assert dated["day"] == date.today().isoformat()
    assert set(rendered_facts(with_template(CHATML))) == {"rendered"}


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ strftime_now('%H:%M') }}", "writes the time of day"),
        ("{{ ['a', 'b'] | random }}", "draws at random"),
        ("{{ lipsum() }}", "draws at random"),
    ],
)
def test_templates_that_never_render_alike_are_refused(template, message):
    with pytest.raises(ValueError, match=message):
        rendered_facts(with_template(template + CHATML))


def test_a_template_that_never_ends_is_stopped(monkeypatch):
    monkeypatch.setattr("sftlab.data.template_facts.LIMIT_S", 0.2)
    with pytest.raises(ValueError, match=r"takes longer than 0\.2 s"):
        rendered_facts(with_template(ENDLESS))
    with pytest.raises(TooSlow), time_limit(0.05, "counting"):
        while True:
            pass


def test_tokens_beyond_the_embedding_are_refused_before_the_model_is_loaded():
    marks = ("<|im_start|>", "<|im_end|>")
    with pytest.raises(ValueError, match=r"'<\|im_start\|>' \(id 259\).* 259 embeddings"):
        refuse_unknown_tokens(with_template(CHATML, marks), LlamaConfig(vocab_size=259))
    tokenizer = with_template(CHATML)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    with pytest.raises(ValueError, match=r"'\[PAD\]' \(id 259\)"):
        refuse_unknown_tokens(tokenizer, LlamaConfig(vocab_size=259))


def test_a_template_that_includes_a_file_is_left_to_the_rows():
    refuse_unknown_tokens(with_template("{% include 'x' %}"), LlamaConfig(vocab_size=259))


def test_a_tokenizer_of_odd_values_is_named(base, tmp_path):
    shutil.copytree(base, tmp_path / "model")
    path = tmp_path / "model" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": "long"}))
    with pytest.raises(ValueError, match=r"tokenizer of .*model cannot encode a text: '>' not"):
        read_tokenizer(tmp_path / "model")


def test_rows_cut_at_their_beginning_keep_their_end():
    prompt = [{"role": "user", "content": "word " * 40}]
    row = {"prompt": prompt, "completion": [{"role": "assistant", "content": "Yes."}]}
    tokenizer = with_template(HEADER)
    kept = encode(tokenizer, row, 30, "keep_end")
    assert len(kept["input_ids"]) == 30
    assert kept["input_ids"][-1] == tokenizer.eos_token_id
    assert kept["labels"][-5:] == kept["input_ids"][-5:]


def test_the_summary_says_what_was_dropped_and_why():
    facts = {
        **{"dataset": "a.jsonl", "shape": "messages", "rows_there": 40_000, "rows_read": 400},
        **{"empty_responses_dropped": 3, "rows_without_an_answer": 2},
        "first_without_an_answer": 17,
        **{name: {"rows": 100} for name in ("train", "validation", "test")},
    }
    assert data_lines(facts) == [
        "rows of a.jsonl (messages): 400 of 40,000 read; train 100, validation 100, test 100",
        "rows dropped: 3 without a response, 2 without an answer to a user (the first is row 17)",
    ]
