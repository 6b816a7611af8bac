"""A template that breaks or never ends over a late row, in files and streams; the day it writes."""

import json
import re
from datetime import date
from types import SimpleNamespace

import pytest
from conftest import copy_of, read
from loss_templates import CHATML, ENDLESS, HEADER, chats, in_template, with_template

from sftlab.data.chat_template import template_hash
from sftlab.data.converter import split_index
from sftlab.data.loss_check import refuse_unrendered
from sftlab.evaluation.base_and_tuned import model_settings, run_tokenizer

ODD = "{% if messages[0]['content'].endswith(' 77.') %}IT{% endif %}" + CHATML
LATE = {
    "an endless loop": (ENDLESS.removesuffix(CHATML), r"rendering it .* takes longer than 0\.3 s"),
    "no number": ("{{ messages[0]['content'] + 1 }}", "refuses it: can only concatenate str"),
    "nothing": ("{{ 1 / (messages | length - 2) }}", "refuses it: division by zero"),
    "no text": ("{{ messages[0]['content'].index('%') }}", "refuses it: substring not found"),
}


@pytest.mark.parametrize("name", LATE)
def test_what_a_template_does_to_a_late_row_names_the_row(name, monkeypatch):
    monkeypatch.setattr("sftlab.data.template_errors.LIMIT_S", 0.3)
    code, said = LATE[name]
    rows = [
        {
            "messages": json.dumps(
                [
                    {"role": "user", "content": f"Name {i}."},
                    {"role": "assistant", "content": f"{i}"},
                ]
            ),
            "tools": "",
            "answers": [1],
        }
        for i in range(90)
    ]
    with pytest.raises(ValueError, match=f"test row 77: .*{said}"):
        refuse_unrendered(with_template(ODD.replace("IT", code)), rows, "test")


@pytest.mark.parametrize("name", ["an endless loop", "no number"])
def test_a_late_training_row_is_named_before_anything_is_trained(
    name, sft, train_here, fields, tmp_path, monkeypatch
):
    monkeypatch.setattr("sftlab.data.template_errors.LIMIT_S", 0.3)
    monkeypatch.setattr(sft, "train", lambda *a: pytest.fail("it was trained"))
    asked = [[{"role": "user", "content": f"Name the number {i}."}] for i in range(90)]
    late = next(i for i in range(70, 90) if split_index(asked[i], (0.8, 0.1, 0.1)) == 0)
    code = ODD.replace("IT", LATE[name][0]).replace("77", str(late)).replace(CHATML, HEADER)
    template = in_template(tmp_path, code)
    rows = chats(tmp_path / "rows.jsonl", 90)
    done = train_here(fields | {"dataset_name": str(rows), "chat_template_path": template})
    last = done.stderr.strip().splitlines()[-1]
    assert re.search(f"training row .*{LATE[name][1]}", last)


def test_evaluation_writes_the_day_of_the_training(finished, tmp_path):
    run = copy_of(finished[0], tmp_path / "run")
    template = "{{ strftime_now('%d %b %Y') }}" + HEADER
    (run / "adapter" / "chat_template.jinja").write_text(template)
    digest = template_hash(SimpleNamespace(chat_template=template))
    record = read(run)
    for day, written in (("2025-03-09", "09 Mar 2025"), (None, f"{date.today():%d %b %Y}")):
        record["template"] = {"hash": digest} | ({"day": day} if day else {})
        tokenizer = run_tokenizer(run, record)
        text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
        assert text.startswith(written)
        assert model_settings(run, record).get("day") == day


STREAMED = {
    "dataset_streaming": "true",
    "streaming_eval_rows": "3",
    "global_batch_size": "64",
    "per_device_train_batch_size": "64",
    "max_length": "40",
    "save_strategy": "no",
}


@pytest.mark.parametrize("broken", ["the template", "the row"])
def test_a_late_row_of_a_stream_ends_the_training_in_a_sentence(
    broken, train_here, fields, tmp_path
):
    code = LATE["no number"][0] if broken == "the template" else ""
    late = ODD.replace("IT", code).replace(" 77.", " 377.").replace(CHATML, HEADER)
    template = in_template(tmp_path, late)
    role = "user" if broken == "the template" else "robot"
    odd = {"row_377": [{"role": role, "content": "Name the number 377."}]}
    rows = chats(tmp_path / "rows.jsonl", 400, **odd)
    given = {"dataset_name": str(rows), "chat_template_path": template}
    done = train_here(fields | given | STREAMED)
    last = done.stderr.strip().splitlines()[-1]
    assert re.match(r"error: (the chat template refuses a row: can only|row 377 .*robot)", last)
    assert "Traceback" not in done.stderr
    if broken == "the template":
        assert read(tmp_path / "run")["status"] == "failed"
