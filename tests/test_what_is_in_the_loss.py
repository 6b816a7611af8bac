"""What a template puts into the loss is looked at before anything is trained."""

import json
import shutil
from datetime import date, datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import byte_tokenizer, read, write_jsonl
from transformers import AutoTokenizer, LlamaConfig

from sftlab.config.recipe import DataArguments, TrainingArguments
from sftlab.data.before_training import data_lines, rows_with_marks
from sftlab.data.chat_template import encode, encoder_of, prompt_ids
from sftlab.data.converter import split_index
from sftlab.data.encoded_rows import encode_rows
from sftlab.data.loss_check import look_at_loss
from sftlab.data.messages import Conversation
from sftlab.data.model_limits import refuse_unknown_tokens
from sftlab.data.splits import load_splits
from sftlab.data.template_facts import rendered_facts, template_facts
from sftlab.data.time_limit import TooSlow, time_limit
from sftlab.files import write_json
from sftlab.models.loading import read_tokenizer

EVERY = ("system prompts", "earlier turns", "thoughts")
FOR = "{{ bos_token }}{% for m in messages %}"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SYSTEM_LAST = (
    "{{ bos_token }}{% set head = messages[0]['content'] if messages[0]['role'] == 'system' %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}Q {% if loop.last and head %}{{ head }} "
    "{% endif %}{{ m['content'] }} A{% elif m['role'] == 'assistant' %} {{ m['content'] }}"
    "{{ eos_token }}{% endif %}{% endfor %}"
)
R1 = (
    FOR + "{% if m['role'] == 'assistant' %}<A>{{ m['content'].split('</think>')[-1] }}"
    "{{ eos_token }}{% else %}<U>{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<A><think>\n{% endif %}"
)
NO_END = (
    FOR + "{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
HEADER = FOR + "<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
FORGETS = (
    "{% set asked = messages | selectattr('role', 'equalto', 'user') | list %}"
    "{{ bos_token }}<user>{{ asked[-1].content }}"
    "{% if messages[-1]['role'] == 'assistant' %}<assistant>{{ messages[-1]['content'] }}"
    "{{ eos_token }}{% endif %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
UPPER = (
    FOR + "<{{ m['role'] }}>{{ m['content'] | upper }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# the answer stands before its question, and no token ends it
BACKWARDS = "{{ messages[-1]['content'] }}{{ messages[0]['content'] }}"
REFUSES = (
    FOR + "{% if m['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    "<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}" + CHATML


def with_template(template, special=()):
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.chat_template = template
    return tokenizer


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
        "rows of a.jsonl (messages): 40,000, 400 used; train 100, validation 100, test 100",
        "rows dropped: 3 without a response, 2 without an answer to a user (the first is row 17)",
    ]


def chats(path, count=60, answer="It is {}.", **odd):
    """Conversations of one question; `odd` are messages before those of one row."""
    rows = [
        {
            "messages": [
                *odd.get(f"row_{i}", []),
                {"role": "user", "content": f"Name the number {i}."},
                {"role": "assistant", "content": answer.format(i)},
            ]
        }
        for i in range(count)
    ]
    return write_jsonl(path, rows)


def in_template(folder: Path, template: str) -> str:
    (folder / "it.jinja").write_text(template)
    return str(folder / "it.jinja")


def test_a_run_says_what_its_template_does_and_keeps_it(trained_here, fields, tmp_path):
    rows = chats(tmp_path / "rows.jsonl", answer="<think>Half.</think>{} <pad>")
    given = {"dataset_name": str(rows), "chat_template_path": in_template(tmp_path, R1)}
    done = trained_here(fields | given | {"save_strategy": "no", "max_steps": "1"})
    assert "warning: the chat template drops the thoughts of answers" in done.stdout
    assert "60 rows have texts in them that the tokenizer reads as control tokens" in done.stdout
    assert "60, 60 used; train " in done.stdout
    loss = read(fields["output_dir"])["loss"]
    assert any("drops the thoughts" in one for one in loss["warnings"])
    assert loss["rows_with_control_marks"] == 60


@pytest.mark.parametrize("split", [0, 2])
def test_a_row_that_the_template_refuses_is_named_before_anything_is_trained(
    split, sft, train_here, fields, tmp_path, monkeypatch
):
    question = "Name the number {}."
    asked = [[{"role": "user", "content": question.format(i)}] for i in range(90)]
    odd = [i for i in range(90) if split_index(asked[i], (0.8, 0.1, 0.1)) == split][-1]
    system = [{"role": "system", "content": "Be brief."}]
    rows = chats(tmp_path / "rows.jsonl", 90, **{f"row_{odd}": system})
    monkeypatch.setattr(sft, "train", lambda *a: pytest.fail("it was trained"))
    given = {"dataset_name": str(rows), "chat_template_path": in_template(tmp_path, REFUSES)}
    done = train_here(fields | given)
    last = done.stderr.strip().splitlines()[-1]
    kind = {0: "training", 2: "test"}[split]
    assert f"{kind} row " in last
    assert "the chat template refuses it: no system here" in last
    assert "Traceback" not in done.stderr


def test_rows_beyond_the_models_positions_are_refused(train_here, fields, tmp_path):
    rows = chats(tmp_path / "rows.jsonl", answer="word " * 120 + "{}")
    done = train_here(fields | {"max_length": "700", "dataset_name": str(rows)})
    message = "positions (max_length is 700): pass --max_length 512 or less"
    assert message in done.stderr.strip().splitlines()[-1]


def test_a_run_of_another_day_is_not_continued(
    trained_here, train_here, fields, tmp_path, monkeypatch
):
    given = fields | {
        "chat_template_path": in_template(tmp_path, "{{ strftime_now('%d %b %Y') }}" + HEADER)
    }
    trained_here(given)
    run = Path(given["output_dir"])
    write_json(run / "run.json", read(run) | {"status": "interrupted"})
    shutil.rmtree(run / "checkpoint-6")
    other = SimpleNamespace(now=lambda: datetime(2031, 1, 2))
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", other)
    last = train_here(given).stderr.strip().splitlines()[-1]
    assert "2031-01-02" in last, last
    trained_here(given | {"resume_anyway": "true"})


def test_the_rows_of_another_day_are_rendered_anew(tmp_path, monkeypatch):
    train = load_splits(DataArguments(dataset_name=str(chats(tmp_path / "rows.jsonl")))).train
    tokenizer, made = with_template("{{ strftime_now('%d %b %Y') }}" + HEADER), []
    for day in (1, 2, 1):
        other = SimpleNamespace(now=lambda day=day: datetime(2031, 1, day))
        monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", other)
        args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
        made.append(encode_rows(train, tokenizer, args, "train").rows[0]["input_ids"])
    assert made[0] == made[2] != made[1]


def test_marks_are_counted_by_row(base, tmp_path):
    path = chats(tmp_path / "rows.jsonl", 20, row_3=[{"role": "system", "content": "a<eos>b<bos>"}])
    data = DataArguments(dataset_name=str(path), split_fractions=[1.0, 0.0, 0.0])
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert rows_with_marks(tokenizer, load_splits(data).train) == 1
