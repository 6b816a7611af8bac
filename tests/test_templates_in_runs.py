"""What a run does with a template and its rows: it says it, refuses it, or renders it anew."""

import shutil
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import read
from loss_templates import (
    HEADER,
    R1,
    REFUSES,
    chats,
    in_template,
    with_template,
)
from transformers import AutoTokenizer

from sftlab.config.recipe import DataArguments, TrainingArguments
from sftlab.data.before_training import rows_with_marks
from sftlab.data.converter import split_index
from sftlab.data.encoded_rows import encode_rows
from sftlab.data.splits import load_splits
from sftlab.files import write_json


def test_a_run_says_what_its_template_does_and_keeps_it(trained_here, fields, tmp_path):
    rows = chats(tmp_path / "rows.jsonl", answer="<think>Half.</think>{} <pad>")
    given = {"dataset_name": str(rows), "chat_template_path": in_template(tmp_path, R1)}
    done = trained_here(fields | given | {"save_strategy": "no", "max_steps": "1"})
    assert "warning: the chat template drops the thoughts of answers" in done.stdout
    assert "60 rows have texts in them that the tokenizer reads as control tokens" in done.stdout
    assert ": 60 read; train " in done.stdout
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
