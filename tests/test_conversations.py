"""A conversation is one sequence with every answer in the loss, where its template allows it."""

import random

import pytest
import torch
from chat_templates import COUNTS, TEMPLATES, shown, tokenizer_with
from tokenizing import ODD
from transformers import AutoModelForCausalLM

from sftlab.data.chat_template import encode, encoder_of
from sftlab.data.messages import Conversation
from sftlab.data.template_facts import fields_written
from sftlab.data.token_sequence import labels_of

ASKED = [
    {"role": "user", "content": "q1"},
    {"role": "assistant", "content": "a1"},
    {"role": "user", "content": "q2"},
    {"role": "assistant", "content": "a2"},
]


def sequences(tokenizer, messages, answers=None, tools=(), shortcut=True):
    answers = answers or [n for n, one in enumerate(messages) if one["role"] == "assistant"]
    (made,) = encoder_of(tokenizer, shortcut)([Conversation(messages, answers, list(tools))])
    return made


def texts(name, messages, **how):
    tokenizer = tokenizer_with(name)
    made = sequences(tokenizer, messages, **how)
    return [shown(tokenizer, one.ids, labels_of(one.ids, one.spans)) for one in made]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "chatml",
            "<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\nq1<|im_end|>\n"
            "<|im_start|>assistant\n[[a1<|im_end|>\n]]<|im_start|>user\nq2<|im_end|>\n"
            "<|im_start|>assistant\n[[a2<|im_end|>\n]]",
        ),
        (
            "gemma",
            "<bos><turn>user\nq1<end>\n<turn>model\n[[a1<end>\n]]<turn>user\nq2<end>\n"
            "<turn>model\n[[a2<end>\n]]",
        ),
        (
            "marked",
            "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n[[a1<|im_end|>]]\n"
            "<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\n[[a2<|im_end|>]]\n",
        ),
        ("plain", "user: q1\nassistant:[[ a1\n]]user: q2\nassistant:[[ a2\n]]"),
    ],
)
def test_a_conversation_is_one_sequence_with_every_answer_and_its_end_in_the_loss(name, text):
    assert texts(name, ASKED) == [text]


def test_a_template_with_a_date_allows_one_sequence():
    (text,) = texts("llama", ASKED)
    assert text.startswith("<bos><|h|>system<|/h|>\n\nToday Date: ")
    assert text.endswith(
        "<|h|>user<|/h|>\n\nq1<|eot|><|h|>assistant<|/h|>\n\n[[a1<|eot|>]]"
        "<|h|>user<|/h|>\n\nq2<|eot|><|h|>assistant<|/h|>\n\n[[a2<|eot|>]]"
    )


def test_reasoning_that_later_turns_drop_is_trained_in_a_row_for_each_answer():
    thought = [
        one | ({"reasoning_content": f"t{n}"} if one["role"] == "assistant" else {})
        for n, one in enumerate(ASKED)
    ]
    first = "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n"
    assert texts("qwen3", thought) == [
        f"{first}[[<think>\nt1\n</think>\n\na1<|im_end|>\n]]",
        f"{first}a1<|im_end|>\n<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\n"
        "[[<think>\nt3\n</think>\n\na2<|im_end|>\n]]",
    ]
    assert len(texts("qwen3", ASKED)) == 1


def test_only_the_answers_asked_for_are_in_the_loss():
    (text,) = texts("plain", ASKED, answers=[3])
    assert text == "user: q1\nassistant: a1\nuser: q2\nassistant:[[ a2\n]]"
    (text,) = texts("marked", ASKED, answers=[3])
    assert text.count("[[") == 1
    assert "[[a2<|im_end|>]]" in text
    assert texts("plain", ASKED[:3], answers=[1]) == ["user: q1\nassistant:[[ a1\n]]"]


def test_calls_and_results_of_tools_are_written_and_the_call_is_trained():
    tools = [{"type": "function", "function": {"name": "clock", "parameters": {}}}]
    call = {"type": "function", "function": {"name": "clock", "arguments": {"city": "Rome"}}}
    messages = [
        {"role": "user", "content": "Time?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "12:00"},
        {"role": "assistant", "content": "Noon."},
    ]
    (text,) = texts("chatml", messages, tools=tools)
    assert '# Tools\n{"type": "function", "function": {"name": "clock", "parameters": {}}}' in text
    assert (
        '[[<tool_call>\n{"name": "clock", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>\n'
        "]]<|im_start|>user\n<tool_response>\n12:00\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n[[Noon.<|im_end|>\n]]" in text
    )


def test_a_template_that_takes_arguments_as_text_gets_text():
    tokenizer = tokenizer_with("plain")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content }}{% for c in m.tool_calls or [] %}"
        "{{ c.function.name + c.function.arguments }}{% endfor %}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    call = {"type": "function", "function": {"name": "clock", "arguments": {"city": "Rome"}}}
    messages = [ASKED[0], {"role": "assistant", "content": "", "tool_calls": [call]}]
    (made,) = sequences(tokenizer, messages)
    text = shown(tokenizer, made.ids, labels_of(made.ids, made.spans))
    assert text == 'user: q1<eos>assistant: [[clock{"city": "Rome"}<eos>]]'
    assert "tool_calls" in fields_written(tokenizer, [])


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_mask_of_a_conversation_is_that_of_a_row_for_each_answer(name):
    tokenizer, draw = tokenizer_with(name), random.Random(3)
    for _ in range(40):
        messages = [
            {"role": role, "content": "".join(draw.choices([*ODD, "<|im_end|>"], k=9)) + "."}
            for role in ("user", "assistant") * draw.choice([1, 2, 4])
        ]
        (made,) = sequences(tokenizer, messages)
        assert [made] == sequences(tokenizer, messages, shortcut=False)
        labels = [-100] * len(made.ids)
        for number in range(1, len(messages), 2):
            row = {"prompt": messages[:number], "completion": messages[number : number + 1]}
            alone = encode(tokenizer, row, None)
            length = len(alone["input_ids"])
            assert made.ids[:length] == alone["input_ids"]
            labels[:length] = [
                max(pair) for pair in zip(labels[:length], alone["labels"], strict=True)
            ]
        assert labels_of(made.ids, made.spans) == labels


def test_what_a_template_marks_as_generated_is_what_transformers_finds():
    tokenizer = tokenizer_with("marked")
    found = tokenizer.apply_chat_template(
        ASKED, return_dict=True, return_assistant_tokens_mask=True
    )
    (made,) = sequences(tokenizer, ASKED)
    assert made.ids == found["input_ids"]
    assert [int(one != -100) for one in labels_of(made.ids, made.spans)] == found["assistant_masks"]


@pytest.mark.parametrize("name", ["chatml", "llama", "gemma", "plain"])
def test_loss_and_gradients_are_those_of_a_row_for_each_answer(name, base):
    tokenizer = tokenizer_with(name)
    model = AutoModelForCausalLM.from_pretrained(base).double()
    model.resize_token_embeddings(len(tokenizer))

    def loss_and_gradient(rows):
        model.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        for ids, labels in rows:
            logits = model(torch.tensor([ids])).logits[0, :-1]
            total = total + torch.nn.functional.cross_entropy(
                logits, torch.tensor(labels[1:]), ignore_index=-100, reduction="sum"
            )
        total.backward()
        return total.item(), torch.cat([p.grad.flatten() for p in model.parameters()])

    (made,) = sequences(tokenizer, ASKED)
    rows = [
        encode(tokenizer, {"prompt": ASKED[:n], "completion": ASKED[n : n + 1]}, None)
        for n in (1, 3)
    ]
    whole, gradient = loss_and_gradient([(made.ids, labels_of(made.ids, made.spans))])
    parts, gradients = loss_and_gradient([(row["input_ids"], row["labels"]) for row in rows])
    assert whole == pytest.approx(parts, abs=1e-5)
    assert torch.allclose(gradient, gradients, atol=1e-5)


SYSTEM_LAST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}Q {% if loop.revindex0 < 2 %}"
    "Be brief. {% endif %}{{ m.content }} A{% else %} {{ m.content }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)


@pytest.mark.parametrize("template", [COUNTS, SYSTEM_LAST])
def test_templates_that_rewrite_earlier_turns_get_a_row_for_each_answer(template):
    tokenizer = tokenizer_with("plain")
    tokenizer.chat_template = template
    made = sequences(tokenizer, ASKED)
    rows = [
        encode(tokenizer, {"prompt": ASKED[:n], "completion": ASKED[n : n + 1]}, None)
        for n in (1, 3)
    ]
    assert [one.ids for one in made] == [row["input_ids"] for row in rows]
    assert [labels_of(one.ids, one.spans) for one in made] == [row["labels"] for row in rows]


def test_turns_whose_tokens_merge_with_the_next_ones_get_a_row_for_each_answer():
    tokenizer = tokenizer_with("plain")
    tokenizer.add_tokens(["\nuser"])
    assert len(sequences(tokenizer, ASKED)) == 2
    assert len(sequences(tokenizer, ASKED[:2])) == 1
    # here texts are cut before answers, and not behind them
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<turn>' if m.role == 'assistant' }}{{ m.role }}: "
        "{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<turn>assistant:{% endif %}"
    )
    assert len(sequences(tokenizer, ASKED)) == 2
    system = {"role": "system", "content": "s"}
    assert len(sequences(tokenizer, [*ASKED[:2], system, *ASKED[1:2]])) == 1
