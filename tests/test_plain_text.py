"""Documents of plain text: every token is in the loss, nothing is lost, and nothing is answered."""

import json
from pathlib import Path

import pytest
from conftest import byte_tokenizer, load_script, read, write_jsonl
from test_data import load
from tokenizing import fields_of, recipe_of, tokenized

from sftlab.data.chat_template import encoder_of, set_template
from sftlab.data.column_names import read_columns
from sftlab.data.encoded_rows import encode_rows, encode_splits
from sftlab.data.messages import Conversation
from sftlab.data.splits import load_splits
from sftlab.planning.row_lengths import measure_rows

STORY = "Once upon a time there was a fox. "


@pytest.fixture
def tokenizer():
    made = byte_tokenizer()
    set_template(made)
    return made


@pytest.fixture
def stories(tmp_path):
    """Sixty documents of one to six sentences, and an empty one."""
    rows = [{"text": f"{i}: {STORY * (1 + i % 6)}"} for i in range(60)]
    return write_jsonl(tmp_path / "stories.jsonl", [*rows, {"text": " "}])


def training(base, rows, folder, **more):
    return recipe_of(fields_of(base, rows, folder, **more)).training


def test_a_document_is_its_text_and_an_end_token_all_in_the_loss(tokenizer):
    document = Conversation([{"role": "text", "content": "a<eos>b"}], [0], [])
    chat = Conversation(
        [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], [1], []
    )
    found = list(encoder_of(tokenizer)([document, chat, document]))
    ids = [*tokenizer("a<eos>b")["input_ids"], tokenizer.eos_token_id]
    assert [one[0].ids == ids for one in found] == [True, False, True]
    assert found[0][0].spans == [0, len(ids)]


def test_long_documents_are_divided_and_join_to_the_whole(tokenizer, base, stories, tmp_path):
    splits = load(stories)
    assert splits.facts["shape"] == "text"
    assert splits.facts["empty_responses_dropped"] == 1
    limited, whole = (
        encode_rows(
            splits.train, tokenizer, training(base, stories, tmp_path, max_length=size), "train"
        )
        for size in ("64", "null")
    )
    assert max(len(row["input_ids"]) for row in limited.rows) == 64
    assert all(row["labels"] == row["input_ids"] for row in limited.rows)
    joined = [token for row in limited.rows for token in row["input_ids"]]
    assert joined == [token for row in whole.rows for token in row["input_ids"]]
    assert joined.count(tokenizer.eos_token_id) == 60
    facts = limited.facts
    assert (facts["cut"], facts["dropped"], facts["conversations_split"]) == (0, 0, 0)
    assert facts["loss_tokens_cut"] == 0


def test_tokens_of_documents_are_those_of_the_text(tokenizer, base, stories, tmp_path):
    fields = fields_of(base, stories, tmp_path, max_length="64")
    tokenized(load_script("slurm/tokenize_dataset.py"), fields, tmp_path / "out", size=16)
    made = []
    for name in (stories, tmp_path / "out"):
        recipe = recipe_of(fields | {"dataset_name": str(name)})
        made.append(encode_splits(load_splits(recipe.data), tokenizer, recipe.training))
    for name in ("train", "validation"):
        assert list(made[0][name].rows) == list(made[1][name].rows)
        assert made[0][name].facts == made[1][name].facts
    lengths = measure_rows(recipe_of(fields), tokenizer)
    assert (lengths.longest, lengths.count) == (64, made[0]["train"].facts["kept"])


def test_files_of_text_are_a_document_each(tmp_path):
    for name in "ba":
        (tmp_path / f"{name}.txt").write_text(f"{name}\n\n{STORY}")
    for streaming in (False, True):
        splits = load(f"{tmp_path}/*.txt", dataset_streaming=streaming)
        texts = [json.loads(row["messages"])[0]["content"] for row in splits.train]
        assert texts == [f"a\n\n{STORY}", f"b\n\n{STORY}"]


@pytest.mark.parametrize(
    ("columns", "shape"),
    [
        (["id", "text"], "text"),
        (["instruction", "input", "output", "text"], "alpaca"),
        (["query", "reply", "text"], "prompt_completion"),
    ],
)
def test_a_text_column_beside_a_question_and_an_answer_is_no_document(columns, shape):
    assert read_columns(columns, None, {}, "rows.csv")[0] == shape


def test_a_run_on_text_is_judged_by_its_perplexity(stories, fields, trained_here, capfd):
    fields |= {"dataset_name": str(stories), "max_length": "64"}
    done = trained_here(fields)
    assert "warning" not in done.stdout
    quality = load_script("eval/quality.py")
    capfd.readouterr()
    quality.main(["--run", fields["output_dir"]])
    said = capfd.readouterr().out
    assert "no answers are generated, as text has none" in said
    assert "whole-text perplexity" in said
    assert "BLEU" not in said
    assert "warning: fewer than 30 documents: the intervals are wide" in said
    report = json.loads((Path(fields["output_dir"]) / "eval" / "perplexity.json").read_text())
    assert report["documents"] == read(fields["output_dir"])["data"]["test"]["rows"]
    assert report["pieces"] > report["documents"]
