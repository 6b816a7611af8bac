"""Text arrives as it stands in the file, and what is not used of a row is counted."""

import csv
import json

import pandas as pd
import pytest
from conftest import answered, write_jsonl

from sftlab.config.recipe import DataArguments
from sftlab.data.splits import load_splits

LOOKS_LIKE_SOMETHING = [
    *(
        "00199",
        "99.50",
        "True",
        "2024-01-02",
        "None",
        "NA",
        "null",
        "1e5",
        "12345678901234567890123",
    ),
    *("0x1F", "-0", "1,000", 'a "q"\r\nb', " x ", "a\u2028b", "NaN", "12:30", "é\x85"),
]


def answers(path, **fields):
    data = DataArguments(dataset_name=str(path), split_fractions=[1.0, 0.0, 0.0], **fields)
    return [row["completion"][0]["content"] for row in answered(load_splits(data).train)]


def written(path, words, before=0):
    """`words` as the answers of a file, after as many rows of plain text as one block takes."""
    rows = [{"question": f"Plain {i}?", "answer": f"w{i}"} for i in range(before)]
    rows += [{"question": f"Odd {i}?", "answer": word} for i, word in enumerate(words)]
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["question", "answer"])
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif path.suffix == ".parquet":
        pd.DataFrame(rows).to_parquet(path)
    else:
        write_jsonl(path, rows)
    return path


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", ["csv", "json", "jsonl", "parquet"])
def test_text_that_looks_like_something_else_stays_as_it_is(suffix, streaming, tmp_path):
    path = written(tmp_path / f"rows.{suffix}", LOOKS_LIKE_SOMETHING)
    assert answers(path, dataset_streaming=streaming) == LOOKS_LIKE_SOMETHING


@pytest.mark.parametrize("words", [["1", "2"], ["True"], ["2024-01-02"], ["2024-01-02T10:00:00Z"]])
@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_a_whole_column_of_one_kind_is_text(suffix, words, tmp_path):
    assert answers(written(tmp_path / f"rows.{suffix}", words)) == words


def test_a_later_block_is_text_too(tmp_path):
    words = ["00199", "99.50", "True"]
    assert answers(written(tmp_path / "rows.csv", words, before=10_000))[-3:] == words


def test_files_of_a_folder_are_read_as_one_is(tmp_path):
    for part in range(2):
        written(tmp_path / f"part-{part}.csv", [f"00{part}", "True"])
    assert answers(tmp_path) == ["000", "True", "001", "True"]


@pytest.mark.parametrize("value", [5, 99.5, True, ["a"], {"a": 1}])
def test_json_that_is_no_text_is_refused_with_its_row(value, tmp_path):
    path = written(tmp_path / "rows.jsonl", ["a", value])
    with pytest.raises(ValueError, match=r"row 1 of .*answer is not text .* in quotes"):
        answers(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "question,answer\na,b\na,b,c\n", "has 3 fields and the heading 2"),
        ("a.csv", "question,answer,answer\na,b,c\n", "names answer twice"),
        ("a.csv", 'question,answer\n"a,b\n', "line 2: unexpected end of data"),
        ("a.jsonl", '{"question": "a", "answer": "b"}\n{"question": "a"\n', "row 1 .*is not JSON"),
        ("a.jsonl", '{"question": "a", "answer": "b"}\n{"text": "a"}\n', "row 1 .*has no question"),
        ("a.jsonl", '{"question": "a", "answer": "b"}\n5\n', "row 1 .*expected an object"),
        ("a.jsonl", '{"question": "a", "answer": "b", "answer": "c"}\n', "'answer' .* twice"),
        ("a.jsonl", '{"question": "a", "answer": "\\ud83d"}\n', "row 0 .*surrogates"),
        ("a.json", '[{"question": "a", "answer": "b"} {}]', "cannot be read: Expecting ',' or"),
    ],
)
def test_files_that_are_not_whole_are_one_sentence(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        answers(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_text_that_is_not_utf_8_names_its_file(tmp_path):
    (tmp_path / "a.jsonl").write_bytes('{"question": "a", "answer": "é"}\n'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.jsonl is not UTF-8 text"):
        answers(tmp_path / "a.jsonl")


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "json"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
def test_a_byte_order_mark_says_how_text_is_written(suffix, encoding, tmp_path):
    path = tmp_path / f"a.{suffix}"
    text = {
        "csv": "question;answer\r\na;é, „ü“\r\n",
        "jsonl": '{"question": "a", "answer": "é, „ü“"}\r\n',
        "json": '[\n{"question": "a",\n"answer": "é, „ü“"}]',
    }[suffix]
    path.write_bytes(text.encode(encoding))
    assert answers(path) == ["é, „ü“"]


def test_utf_16_without_a_mark_is_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes("It is late.".encode("utf-16-le"))
    with pytest.raises(ValueError, match=r"a\.txt is not text, or UTF-16 without"):
        answers(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("question;answer\na;b, c\n", "b, c"),
        ("question\tanswer\na\tb; c\n", "b; c"),
        ('question|answer\n"a|a"|b\n', "b"),
        ("sep=;\r\nquestion;answer\r\na;b\r\n", "b"),
        ('"question;one",answer\na,b;c\n', "b;c"),
    ],
)
def test_the_heading_says_what_stands_between_fields(text, answer, tmp_path):
    (tmp_path / "a.csv").write_text(text, newline="")
    mapped = {"columns": ["prompt=question;one", "completion=answer"]} if "one" in text else {}
    assert answers(tmp_path / "a.csv", **mapped) == [answer]


def test_objects_over_several_lines_are_rows(tmp_path):
    rows = [{"question": "a", "answer": one} for one in ("b", "c")]
    (tmp_path / "a.json").write_text("\n".join(json.dumps(row, indent=2) for row in rows))
    assert answers(tmp_path / "a.json") == ["b", "c"]


def test_rows_under_a_key_are_told_how_to_be_written(tmp_path):
    rows = [{"question": "a", "answer": "b"}]
    (tmp_path / "a.json").write_text(json.dumps({"version": 1, "data": rows}, indent=2))
    with pytest.raises(ValueError, match="the rows are a list under the key 'data': write the"):
        answers(tmp_path / "a.json")


@pytest.mark.parametrize("orient", ["list", "dict"])
def test_a_file_of_whole_columns_is_no_conversation(orient, tmp_path):
    table = pd.DataFrame({"prompt": ["q", "r"], "completion": ["a", "b"]}).to_dict(orient)
    (tmp_path / "a.json").write_text(json.dumps(table))
    with pytest.raises(
        ValueError, match=r"a\.json cannot be read: it is one object that holds who"
    ):
        answers(tmp_path / "a.json")


def test_the_first_row_that_is_no_object_is_named_with_its_file(tmp_path):
    (tmp_path / "a.json").write_text('[["q", "a"]]')
    with pytest.raises(ValueError, match=r"a\.json cannot be read: expected an object of columns"):
        answers(tmp_path / "a.json")


def test_an_empty_cell_of_a_typed_file_is_an_empty_question(tmp_path):
    table = pd.DataFrame({"prompt": ["q", None], "completion": ["a", "b"]})
    table.to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"row 1 of .*a\.parquet .*: the prompt is empty"):
        answers(tmp_path / "a.parquet")


def test_columns_of_two_formats_are_asked_about(tmp_path):
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [{"question": "x", "answer": "y", "messages": messages}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ValueError, match=r"match the data formats gsm8k and messages: say which"):
        answers(path)
    assert answers(path, dataset_shape="gsm8k") == ["y"]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_what_is_not_used_of_rows_is_counted(suffix, tmp_path):
    ask = {"role": "user", "content": "q", "weight": 1, "tool_calls": None}
    rows = [
        {
            "id": f"x{i}",
            "loss_mask": "[1]" if i else None,
            "messages": [
                ask,
                {"role": "assistant", "content": "a", "weight": i, "reasoning_content": "r"},
            ],
        }
        for i in range(2)
    ]
    rows.append({"id": "z", "loss_mask": None, "messages": [ask]})
    path = tmp_path / f"rows.{suffix}"
    pd.DataFrame(rows).to_parquet(path) if suffix == "parquet" else write_jsonl(path, rows)
    data = DataArguments(dataset_name=str(path), split_fractions=[1.0, 0.0, 0.0])
    facts = load_splits(data).facts
    assert facts["not_used"] == {
        "column id": 3,
        "column loss_mask": 1,
        "weight of a message that is not the assistant's": 3,
    }
    assert facts["rows_with"] == {"field reasoning_content": 1, "turns of weight 0": 1}
    assert facts["rows_without_an_answer"] == 2
    assert facts["first_without_an_answer"] == 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "no such file or folder"),
        ("data/nowhere", "no such file or folder"),
        ("a/b/c", "no such file or folder"),
        ("rows[1]", "no file matches"),
        ("zip://a.jsonl::b.zip", "neither a local|not found"),
        ("https://example.org/a/b.txt", "neither a local"),
    ],
)
def test_names_that_are_no_data_set_are_refused_before_the_hub_is_asked(name, message, monkeypatch):
    monkeypatch.setattr("sftlab.data.read_rows.load_dataset", lambda *a, **k: pytest.fail("asked"))
    with pytest.raises(ValueError, match=message):
        answers(name)


def test_hub_fields_are_refused_for_a_local_file(tmp_path):
    path = written(tmp_path / "rows.jsonl", ["a"])
    with pytest.raises(ValueError, match=r"dataset_config is 'main', and .* is a local file"):
        answers(path, dataset_config="main")
    with pytest.raises(ValueError, match=r"dataset_train_split is 'test', and .* is a local file"):
        answers(path, dataset_train_split="test")


def test_folders_without_one_kind_of_data_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no data files"):
        answers(tmp_path / "empty")
    written(tmp_path / "rows.jsonl", ["a"])
    with pytest.raises(ValueError, match="has no split 'test'"):
        answers(tmp_path, dataset_train_split="test")
