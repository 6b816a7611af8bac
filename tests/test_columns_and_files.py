"""Data sets as people have them: other names of columns, several files, packed files, numbers."""

import gzip
import json

import pandas as pd
import pytest
from conftest import arguments, instruction_rows, load_script, write_jsonl
from test_data import load
from tokenizing import fields_of, tokenized

from sftlab.config.launch import Launch
from sftlab.config.parser import parse_recipe
from sftlab.config.recipe import DataArguments
from sftlab.data.before_training import data_lines
from sftlab.data.column_names import read_columns
from sftlab.data.converter import turn_of
from sftlab.data.splits import load_splits

PAIR = ("Two and two?", "Four.")


def pairs(splits):
    turns = map(turn_of, splits.train)
    return [(one["prompt"][-1]["content"], one["completion"][0]["content"]) for one in turns]


@pytest.mark.parametrize(
    ("columns", "shape", "read"),
    [
        (
            ["prompt", "response"],
            "prompt_completion",
            {"prompt": "prompt", "completion": "response"},
        ),
        (["input", "output"], "prompt_completion", {"prompt": "input", "completion": "output"}),
        (["Query", "Response"], "prompt_completion", {"prompt": "Query", "completion": "Response"}),
        (
            ["id", "Question", "Answer"],
            "prompt_completion",
            {"prompt": "Question", "completion": "Answer"},
        ),
        (
            ["system", "prompt", "response"],
            "openorca",
            {"question": "prompt", "response": "response", "system_prompt": "system"},
        ),
        (["dialogue"], "messages", {"messages": "dialogue"}),
        (
            ["inputs", "targets"],
            "prompt_completion",
            {"prompt": "inputs", "completion": "targets"},
        ),
        (["instruction", "input", "response"], "dolly", {"context": "input"}),
        (["question", "answer", "level"], "gsm8k", {}),
    ],
)
def test_common_names_of_columns_are_recognised(columns, shape, read):
    assert read_columns(columns, None, {}, "rows.csv") == (shape, read)


@pytest.mark.parametrize(
    ("columns", "typed"),
    [
        (["prompt", "response", "answer"], "--columns prompt=prompt completion=response"),
        (["title", "text of it"], "--columns prompt=title 'completion=text of it'"),
        (["question", "input", "reply"], "--columns prompt=question completion=reply"),
        (["question", "text of it", "id"], "--columns prompt=question 'completion=text of it'"),
    ],
)
def test_columns_that_could_be_several_things_are_asked_about(columns, typed):
    with pytest.raises(ValueError, match="match no data format") as caught:
        read_columns(columns, None, {}, "rows.csv")
    assert f"for example {typed}; the first line" in str(caught.value)


@pytest.mark.parametrize(
    ("columns", "typed"),
    [
        (["prompt", "chosen", "rejected"], "prompt=prompt completion=chosen"),
        (["chosen", "rejected"], "messages=chosen"),
        (["chosen", "rejected", "score"], "messages=chosen"),
        (["prompt", "note", "rejected_response"], "prompt=prompt completion=note"),
        (
            ["input", "preferred_output", "non_preferred_output"],
            "prompt=input completion=preferred_output",
        ),
    ],
)
def test_pairs_are_named_and_their_rejected_answers_never_proposed(columns, typed):
    with pytest.raises(ValueError, match=r"hold preference pairs: .* --method dpo") as caught:
        read_columns(columns, None, {}, "rows.csv")
    assert str(caught.value).endswith(f"wanted answers alone with --columns {typed}")


@pytest.mark.parametrize(
    ("columns", "name", "message"),
    [
        (["input_ids", "labels"], "a.jsonl", "are token ids of an unknown tokenizer"),
        (["A cat?", "Yes."], "a.csv.gz", "first line of the file must name the columns$"),
        (["A cat?", "Yes."], "a.jsonl", r"completion=Yes\.$"),
    ],
)
def test_what_no_columns_can_say_is_said(columns, name, message):
    with pytest.raises(ValueError, match=message):
        read_columns(columns, None, {}, name)


def test_a_column_of_conversations_is_told_how_to_be_mapped():
    with pytest.raises(ValueError, match=r"is read with --columns messages=dialogs$"):
        read_columns(["dialogs"], None, {}, "rows.jsonl")


def test_columns_are_mapped_as_typed(tmp_path):
    rows = [{"input": PAIR[0], "output": PAIR[1], "question": "No.", "note": "x"}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    splits = load(path, columns=["question=input", "answer=output"])
    assert pairs(splits) == [PAIR]
    assert splits.facts["columns"] == {"question": "input", "answer": "output"}
    assert splits.facts["not_used"] == {"column note": 1, "column question of the file": 1}
    assert any("question=input answer=output" in line for line in data_lines(splits.facts))


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_every_file_type_is_mapped_and_counts_the_rest(suffix, tmp_path):
    path = tmp_path / f"rows.{suffix}"
    rows = [{"Query": PAIR[0], "Reply": PAIR[1], "id": "7"}] * 3
    frame = pd.DataFrame(rows)
    if suffix == "jsonl":
        write_jsonl(path, rows)
    elif suffix == "csv":
        frame.to_csv(path, index=False)
    else:
        frame.to_parquet(path)
    splits = load(path)
    assert pairs(splits) == [PAIR] * 3
    assert splits.facts["not_used"] == {"column id": 3}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (["question=inptu", "answer=output"], "no column 'inptu' .did you mean 'input'"),
        (["qestion=input", "answer=output"], "has a column 'qestion' .did you mean 'question'"),
        (["question"], "columns has the word 'question': expected"),
        (["question=input", "question=output"], "columns names 'question' twice"),
        ({"question": 5}, "columns has 5 for question"),
    ],
)
def test_columns_that_are_not_there_are_one_sentence(columns, message, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"input": "a", "output": "b"}])
    with pytest.raises(ValueError, match=message):
        load(path, columns=columns)


def test_a_recipe_may_map_columns_and_name_several_files(fields, tmp_path):
    recipe = tmp_path / "it.yaml"
    text = "columns: {question: input, answer: the output}\ndataset_name: [a b.jsonl, c.jsonl]\n"
    recipe.write_text(text)
    del fields["dataset_name"]
    rest = arguments(fields)[2:]
    data = parse_recipe(["--config", str(recipe), *rest], Launch.from_environment()).data
    assert data.columns == {"question": "input", "answer": "the output"}
    assert data.dataset_name == "'a b.jsonl' c.jsonl"
    words = ["--columns", "question=input", "--dataset_name", "d.jsonl", "e.jsonl"]
    recipe = parse_recipe(["--config", str(recipe), *words, *rest], Launch.from_environment())
    assert (recipe.data.columns, recipe.data.dataset_name) == (
        {"question": "input"},
        "d.jsonl e.jsonl",
    )


@pytest.fixture
def three_files(tmp_path, monkeypatch):
    """Rows 0 to 9 in JSON lines, a list and packed JSON lines, in a folder to work in."""
    rows = instruction_rows(10)
    write_jsonl(tmp_path / "a.jsonl", rows[:4])
    (tmp_path / "b.json").write_text(json.dumps(rows[4:7]))
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows[7:]))
    monkeypatch.chdir(tmp_path)
    return [row["response"] for row in rows]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "name", [["a.jsonl", "b.json", "c.jsonl.gz"], "a.jsonl b.json c.jsonl.gz", "*.js*", "."]
)
def test_several_files_a_pattern_and_a_folder_are_one_data_set(name, streaming, three_files):
    splits = load_splits(
        DataArguments(
            dataset_name=name, dataset_streaming=streaming, split_fractions=[1.0, 0.0, 0.0]
        )
    )
    assert [answer for _, answer in pairs(splits)] == three_files


@pytest.mark.parametrize("suffix", ["csv.gz", "tsv", "json.gz", "ndjson"])
def test_packed_and_tab_separated_files_are_read(suffix, tmp_path):
    path = tmp_path / f"rows.{suffix}"
    frame = pd.DataFrame([{"question": "a\tb", "answer": "00199"}])
    if "json" in suffix:
        frame.to_json(path, orient="records", lines="nd" in suffix)
    else:
        frame.to_csv(path, index=False, sep="\t" if suffix == "tsv" else ",")
    assert pairs(load(path)) == [("a\tb", "00199")]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("*.tsv", r"no file matches '\*.tsv'"),
        ("a.jsonl nowhere.jsonl", "data file nowhere.jsonl not found"),
        ("a.jsonl a.jsonl", "a.jsonl is named twice"),
        ("a.jsonl d.csv", "files of the types .csv, .jsonl: give files of one type"),
        ("a.jsonl org/set", "org/set not found .*mixed with --datasets"),
        ("e.jsonl.zst", "e.jsonl.zst cannot be read: "),
        ("f.jsonl.gz", "f.jsonl.gz cannot be read"),
        ("g.xlsx", "unknown file type '.xlsx'; known are .json, "),
    ],
)
def test_files_that_cannot_be_read_are_one_sentence(name, message, three_files, tmp_path):
    (tmp_path / "d.csv").write_text("question,answer\na,b\n")
    for other in ("e.jsonl.zst", "f.jsonl.gz", "g.xlsx"):
        (tmp_path / other).write_bytes(b"\x28\xb5\x2f\xfd nothing")
    with pytest.raises(ValueError, match=message) as caught:
        load(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_bad_row_is_named_with_its_file_and_its_number_there(streaming, three_files, tmp_path):
    rows = instruction_rows(3)
    rows[2]["response"] = 5
    write_jsonl(tmp_path / "d.jsonl", rows)
    with pytest.raises(ValueError, match=r"row 2 of d\.jsonl .*not text but int"):
        list(load("a.jsonl b.json d.jsonl", dataset_streaming=streaming).train)


def test_files_of_several_formats_are_told_of_mixtures(three_files, tmp_path):
    write_jsonl(tmp_path / "d.jsonl", [{"question": "a", "answer": "b"}])
    with pytest.raises(ValueError, match="files of several formats are mixed with --datasets"):
        load("a.jsonl d.jsonl")
    with pytest.raises(ValueError, match=r"row 0 of d\.jsonl .*has no instruction.*--datasets"):
        load("a.jsonl d.jsonl", dataset_shape="dolly")


def test_numbers_are_text_as_they_are_written_where_it_is_asked_for(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": 1.50, "answer": 100000000000000000001e0, "level": 3}\n')
    with pytest.raises(ValueError, match="dataset_text_from_numbers"):
        load(path)
    assert pairs(load(path, dataset_text_from_numbers=True)) == [
        ("1.50", "100000000000000000001e0")
    ]
    turns = '[{"role": "user", "content": 7.0}, {"role": "assistant", "content": 8, "weight": 1}]'
    path.write_text(f'{{"messages": {turns}}}\n')
    assert pairs(load(path, dataset_text_from_numbers=True)) == [("7.0", "8")]
    pd.DataFrame({"question": ["a"], "answer": [12]}).to_parquet(tmp_path / "rows.parquet")
    parquet = load(tmp_path / "rows.parquet", dataset_text_from_numbers=True)
    assert pairs(parquet) == [("a", "12")]


def test_tokens_of_mapped_columns_of_several_files_are_those_of_the_text(base, tmp_path):
    rows = [{"Query": f"{i}?", "Reply": i + 0.50} for i in range(40)]
    write_jsonl(tmp_path / "a.jsonl", rows[:25])
    write_jsonl(tmp_path / "b.jsonl", rows[25:])
    fields = fields_of(base, f"{tmp_path}/*.jsonl", tmp_path, dataset_text_from_numbers="true")
    tokenized(load_script("slurm/tokenize_dataset.py"), fields, tmp_path / "out", size=16)
    text = load_splits(parse_recipe(arguments(fields), Launch.from_environment()).data)
    fields["dataset_name"] = str(tmp_path / "out")
    tokens = load_splits(parse_recipe(arguments(fields), Launch.from_environment()).data)
    assert tokens.facts == text.facts
    assert tokens.facts["columns"] == {"prompt": "Query", "completion": "Reply"}
    assert list(tokens.test) == list(text.test)
