"""Training and inference see the same tokens.

The loss is on the response and its end token alone.
"""

import pytest
from conftest import SHARED, answered, needs_shared
from datasets import Dataset
from transformers import AutoConfig, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from sftlab.config.recipe import DataArguments
from sftlab.data.chat_template import encode, prompt_ids, set_template, template_hash
from sftlab.data.loss_check import end_tokens_of
from sftlab.data.model_limits import refuse_unknown_tokens
from sftlab.data.splits import load_splits
from sftlab.data.template_facts import fields_written

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}{{ eos_token }}\n{% "
    "endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ROWS = [
    ("Say hello.", "Hello!"),
    ("  Spaces around. \n", "\n  An answer with spaces around.  \n"),
    ("Many\n\nlines\n### Response:\nhere", "one\n\ntwo"),
    ("Ünïcödé ☃", "日本語 🙂"),
    ("Sum up.\n\n### Context:\nA text.", "Short."),
]


def row(prompt, response):
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "completion": [{"role": "assistant", "content": response}],
    }


def conversation():
    prompt = [("system", "Be brief."), ("user", "q1"), ("assistant", "a1"), ("user", "q2")]
    return {
        "prompt": [{"role": r, "content": c} for r, c in prompt],
        "completion": [{"role": "assistant", "content": "a2"}],
    }


@pytest.fixture(params=["instruction.jinja", "chatml"])
def templated(request, base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    if request.param == "chatml":
        tokenizer.chat_template = CHATML
    set_template(tokenizer)
    return tokenizer


def trl_rows(base, tokenizer, rows, tmp_path, max_length=256):
    config = SFTConfig(
        output_dir=str(tmp_path),
        bf16=False,
        max_length=max_length,
        report_to="none",
        gradient_checkpointing=False,
    )
    trainer = SFTTrainer(
        str(base), config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    return trainer.train_dataset


def test_what_training_sees_is_what_generation_sees(base, templated, tmp_path):
    rows = [row(*r) for r in ROWS] + [conversation()]
    for given, seen in zip(rows, trl_rows(base, templated, rows, tmp_path), strict=True):
        prompt = prompt_ids(templated, given["prompt"])
        length = len(prompt)
        assert seen["input_ids"][:length] == prompt
        assert seen["labels"][:length] == [-100] * length
        assert seen["labels"][length:] == seen["input_ids"][length:]
        first = templated.decode(seen["input_ids"][length:][:12])
        assert first.strip()[:1] == given["completion"][0]["content"].strip()[:1]
        assert templated.eos_token_id in seen["labels"][length:]
        assert seen["labels"].count(templated.eos_token_id) == 1


def test_evaluation_encodes_as_trl_does(base, templated, tmp_path):
    rows = [row(*r) for r in ROWS] + [conversation()]
    for max_length in (256, 60):
        seen = list(trl_rows(base, templated, rows, tmp_path, max_length))
        own = [encode(templated, r, max_length) for r in rows]
        own = [r for r in own if any(label != -100 for label in r["labels"])]
        assert [(r["input_ids"], r["labels"]) for r in own] == [
            (r["input_ids"], r["labels"]) for r in seen
        ]


def test_the_instruction_template_is_the_published_form(base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    set_template(tokenizer)
    text = tokenizer.apply_chat_template(
        conversation()["prompt"], add_generation_prompt=True, tokenize=False
    )
    assert text == (
        "<bos>Be brief.\n\n### Instruction:\nq1\n\n### Response:\na1<eos>\n\n### "
        "Instruction:\nq2\n\n### Response:\n"
    )


def test_white_space_around_a_turn_cannot_merge_into_its_frame(base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    set_template(tokenizer)
    given = row("\n Ask. \n", "\n  Tell. \n")
    text = tokenizer.apply_chat_template(given["prompt"] + given["completion"], tokenize=False)
    assert text == "<bos>### Instruction:\nAsk.\n\n### Response:\nTell.<eos>"


def test_a_model_with_a_template_keeps_it_and_a_named_one_replaces_it(base, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert set_template(tokenizer) == "instruction.jinja"
    tokenizer.chat_template = CHATML
    assert set_template(tokenizer) == "the model's own"
    own = template_hash(tokenizer)
    named = tmp_path / "t.jinja"
    named.write_text("{{ messages[0]['content'] }}")
    assert set_template(tokenizer, str(named)) == str(named)
    assert template_hash(tokenizer) != own
    with pytest.raises(ValueError, match="not found"):
        set_template(tokenizer, str(tmp_path / "missing.jinja"))
    with pytest.raises(ValueError, match=r"t\.txt is no \.jinja file"):
        set_template(tokenizer, str(named.rename(tmp_path / "t.txt")))


def test_a_tokenizer_without_an_end_token_is_refused(base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        set_template(tokenizer)


def test_the_template_travels_with_the_tokenizer(base, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(base)
    set_template(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    assert template_hash(AutoTokenizer.from_pretrained(tmp_path)) == template_hash(tokenizer)


@needs_shared
def test_no_prompt_of_the_real_data_merges_with_its_response(base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    set_template(tokenizer)
    for name in ("alpaca_en_1k.json", "gsm8k_test.jsonl"):
        rows = load_splits(
            DataArguments(dataset_name=str(SHARED / name), split_fractions=[1.0, 0.0, 0.0])
        ).train
        for given in answered(rows.select(range(300))):
            encoded = encode(tokenizer, given, None)
            assert encoded["labels"].count(-100) == len(prompt_ids(tokenizer, given["prompt"]))


@pytest.mark.parametrize("reader", ["end tokens", "unknown tokens", "fields"])
def test_a_fault_of_this_program_is_not_told_as_the_template_s(base, monkeypatch, reader):
    def broken(*_, **__):
        raise TypeError("a fault of ours")

    tokenizer, config = AutoTokenizer.from_pretrained(base), AutoConfig.from_pretrained(base)
    monkeypatch.setattr(tokenizer, "apply_chat_template", broken)
    readers = {
        "end tokens": lambda: end_tokens_of(tokenizer, None),
        "unknown tokens": lambda: refuse_unknown_tokens(tokenizer, config),
        "fields": lambda: fields_written(tokenizer, ["tools"]),
    }
    with pytest.raises(TypeError, match="a fault of ours"):
        readers[reader]()


def test_a_template_that_is_no_text_is_named(base, tmp_path):
    path = tmp_path / "t.jinja"
    path.write_bytes(b"{{ 1 }}\xff")
    with pytest.raises(ValueError, match=r"t\.jinja is not UTF-8 text \(byte 7\)"):
        set_template(AutoTokenizer.from_pretrained(base), str(path))
