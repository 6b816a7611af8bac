"""Data sets of every shape become the same rows; splits hold for every subset.

Bad data are refused in a sentence.
"""

import json

import pandas as pd
import pytest
from conftest import SHARED, answered, instruction_rows, needs_shared, write_jsonl

from sftlab.config.recipe import DATA_FORMAT_NAMES, DataArguments
from sftlab.data.converter import split_index
from sftlab.data.formats import DATA_FORMATS
from sftlab.data.splits import SPLITS, load_splits

QUESTION, ANSWER = "What is two and two?", "Four."
SHAPED = {
    "openorca": {"id": "x", "system_prompt": "Be brief.", "question": QUESTION, "response": ANSWER},
    "dolly": {"instruction": QUESTION, "context": "", "response": ANSWER, "category": "open_qa"},
    "alpaca": {"instruction": QUESTION, "input": "", "output": ANSWER},
    "gsm8k": {"question": QUESTION, "answer": ANSWER},
    "sharegpt": {
        "conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]
    },
    "messages": {
        "messages": [
            {"role": "user", "content": QUESTION},
            {"role": "assistant", "content": ANSWER},
        ]
    },
    "prompt_completion": {"prompt": QUESTION, "completion": ANSWER},
}


def test_a_recipe_knows_every_format():
    assert list(DATA_FORMATS) == DATA_FORMAT_NAMES


def load(path, **fields):
    return load_splits(
        DataArguments(dataset_name=str(path), **{"split_fractions": [1.0, 0.0, 0.0], **fields})
    )


def all_rows(splits):
    return [row for part in splits[:3] for row in part]


@pytest.mark.parametrize("shape", SHAPED)
def test_every_shape_is_recognised_and_gives_the_same_turn(shape, tmp_path):
    splits = load(write_jsonl(tmp_path / "rows.jsonl", [SHAPED[shape]] * 3))
    assert splits.facts["shape"] == shape
    system = [{"role": "system", "content": "Be brief."}] if shape == "openorca" else []
    assert answered(splits.train)[0] == {
        "prompt": [*system, {"role": "user", "content": QUESTION}],
        "completion": [{"role": "assistant", "content": ANSWER}],
    }


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet", "arrow"])
def test_every_file_type_gives_the_same_rows(suffix, tmp_path):
    rows, path = instruction_rows(40), tmp_path / f"rows.{suffix}"
    frame = pd.DataFrame(rows)
    if suffix == "json":
        path.write_text(json.dumps(rows))
    elif suffix == "jsonl":
        write_jsonl(path, rows)
    elif suffix == "csv":
        frame.to_csv(path, index=False)
    elif suffix == "parquet":
        frame.to_parquet(path)
    else:
        import pyarrow as pa

        table = pa.table({k: [r[k] for r in rows] for k in rows[0]})
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    reference = load(
        write_jsonl(tmp_path / "reference.jsonl", rows), split_fractions=[0.8, 0.1, 0.1]
    )
    splits = load(path, split_fractions=[0.8, 0.1, 0.1])
    for name in SPLITS:
        assert splits.facts[name] == reference.facts[name]


@pytest.mark.parametrize("streaming", [False, True])
def test_words_that_pandas_reads_as_nothing_are_text_in_a_csv_file(streaming, tmp_path):
    words = ["None", "NA", "null", "nan", "NULL", ""]
    path = tmp_path / "rows.csv"
    pd.DataFrame([{"instruction": f"Which {word}?", "response": word} for word in words]).to_csv(
        path, index=False
    )
    rows = load(path, dataset_streaming=streaming).train
    assert [row["completion"][0]["content"] for row in answered(rows)] == words[:-1]


def test_context_and_input_become_part_of_the_prompt(tmp_path):
    rows = [{"instruction": "Sum up.", "context": "A long text.", "response": "Short."}]
    prompt = answered(load(write_jsonl(tmp_path / "rows.jsonl", rows)).train)[0]["prompt"]
    assert prompt == [{"role": "user", "content": "Sum up.\n\n### Context:\nA long text."}]


def test_a_conversation_may_give_one_row_for_each_answer(tmp_path):
    turns = [("system", "s"), ("human", "q1"), ("gpt", "a1"), ("human", "q2"), ("gpt", "a2")]
    rows = [{"conversations": [{"from": a, "value": b} for a, b in turns]}]
    train = answered(load(write_jsonl(tmp_path / "rows.jsonl", rows), loss_on="completion").train)
    assert [r["completion"][0]["content"] for r in train] == ["a1", "a2"]
    assert [m["content"] for m in train[1]["prompt"]] == ["s", "q1", "a1", "q2"]


@pytest.mark.parametrize(
    "prompt",
    [QUESTION, [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "?"}]],
)
def test_every_answer_of_a_completion_is_a_row(prompt, tmp_path):
    turns = [("assistant", "a1"), ("user", "q2"), ("assistant", "a2")]
    rows = [{"prompt": prompt, "completion": [{"role": a, "content": b} for a, b in turns]}]
    train = answered(load(write_jsonl(tmp_path / "rows.jsonl", rows), loss_on="completion").train)
    before = [QUESTION] if isinstance(prompt, str) else [QUESTION, "?"]
    assert [r["completion"] for r in train] == [
        [{"role": "assistant", "content": a}] for a in ("a1", "a2")
    ]
    assert [[m["content"] for m in r["prompt"]] for r in train] == [before, [*before, "a1", "q2"]]


def test_splits_are_disjoint_by_prompt_and_the_same_for_every_subset_and_order(tmp_path):
    rows = instruction_rows(600)
    duplicates = [{**r, "response": r["response"] + " Again."} for r in rows[:200]]
    spaced = [{**r, "instruction": f"  {r['instruction']} \n"} for r in rows[:100]]
    fractions = {"split_fractions": [0.8, 0.1, 0.1]}
    whole = load(write_jsonl(tmp_path / "a.jsonl", rows + duplicates + spaced), **fractions)
    part = load(write_jsonl(tmp_path / "b.jsonl", rows[::-1][:300]), **fractions)
    first = load(tmp_path / "a.jsonl", dataset_fraction=0.3, **fractions)
    where = {}
    for splits in (whole, part, first):
        for name, rows_of in zip(SPLITS, splits[:3], strict=True):
            for row in answered(rows_of):
                key = " ".join(row["prompt"][0]["content"].split())
                assert where.setdefault(key, name) == name
    assert first.facts["rows_read"] == 270
    assert abs(len(whole.test) - 90) < 35
    assert abs(len(whole.train) - 720) < 60


def test_one_question_under_several_system_prompts_stays_in_one_split():
    question = {"role": "user", "content": "Why?"}
    for system in ("", "Be brief.", "You are a pirate."):
        prompt = [{"role": "system", "content": system}, question]
        assert split_index(prompt, (0.8, 0.1, 0.1)) == split_index([question], (0.8, 0.1, 0.1))


def test_split_assignment_is_pinned():
    """The assignment must never change: published test splits depend on it."""
    found = [
        split_index([{"role": "user", "content": f"prompt {i}"}], (0.8, 0.1, 0.1))
        for i in range(40)
    ]
    assert "".join(map(str, found)) == "0000000000220000002000000001000000000020"


def test_empty_responses_are_dropped_and_counted(tmp_path):
    rows = instruction_rows(30)
    rows[3]["response"], rows[5]["response"], rows[7]["response"] = "", " \n", None
    splits = load(write_jsonl(tmp_path / "rows.jsonl", rows))
    assert splits.facts["empty_responses_dropped"] == 3
    assert len(splits.train) == 27


def test_the_fingerprint_sees_a_changed_response_and_a_changed_order(tmp_path):
    rows = instruction_rows(30)
    prints = [load(write_jsonl(tmp_path / "a.jsonl", rows)).facts["train"]["fingerprint"]]
    prints.append(load(write_jsonl(tmp_path / "b.jsonl", rows[::-1])).facts["train"]["fingerprint"])
    rows[4]["response"] += "."
    prints.append(load(write_jsonl(tmp_path / "c.jsonl", rows)).facts["train"]["fingerprint"])
    assert len(set(prints)) == 3


def test_a_stream_gives_the_rows_of_the_loaded_data_set(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", instruction_rows(100))
    fractions = {"split_fractions": [0.6, 0.2, 0.2]}
    loaded, stream = (
        load(path, **fractions),
        load(path, dataset_streaming=True, streaming_eval_rows=5, **fractions),
    )
    assert list(stream.train) == list(loaded.train)
    assert list(stream.test) == list(loaded.test)[:5]
    assert stream.facts["streaming"] is True


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        (
            '{"story": "a"}\n',
            r"columns story match no data format; known are openorca \(question, response\)",
        ),
        ('{"instruction": "a", "response": 5}\n', "row 0 .*response is not text but int"),
        ('{"instruction": "", "response": "b"}\n', "row 0 .*the prompt is empty"),
        ('{"messages": [{"role": "robot", "content": "a"}]}\n', "unknown role 'robot'"),
        ('{"messages": "hello"}\n', "must be a list of messages"),
        (
            '{"messages": ["hi", 5]}\n',
            "row 0 .*message 0 has no role and content but is 'hi'",
        ),
        (
            '{"messages": [null, {"role": "user", "content": "a"}]}\n',
            "row 0 .*message 0 .* but is None",
        ),
        (
            '{"prompt": [{"role": "system", "content": "a"}], "completion": "b"}\n',
            "row 0 .*follows a user's",
        ),
        (
            '{"prompt": "a", "completion": [{"role": "user", "content": "b"}]}\n',
            "row 0 .*no assistant's message",
        ),
        ("not json at all", "cannot be read"),
    ],
)
def test_bad_rows_are_one_sentence(content, message, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_missing_files_and_unreachable_data_sets_are_one_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"data file .*nowhere\.jsonl not found"):
        load(tmp_path / "nowhere.jsonl")
    with pytest.raises(ValueError, match=r"hub cannot be reached|neither a local file"):
        load("nobody/nothing")
    (tmp_path / "rows.doc").write_text("a")
    with pytest.raises(ValueError, match=r"unknown file type '.doc'"):
        load(tmp_path / "rows.doc")


def test_a_shape_named_wrongly_says_which_columns_it_needs(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", instruction_rows(5))
    with pytest.raises(ValueError, match="dataset_shape gsm8k needs the columns question, answer"):
        load(path, dataset_shape="gsm8k")


def test_an_empty_split_is_refused_and_an_unwanted_one_is_not(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", instruction_rows(1))
    with pytest.raises(ValueError, match=r"split of .* is empty: 1 usable rows"):
        load(path, split_fractions=[0.4, 0.3, 0.3])


def test_a_split_that_is_empty_says_what_became_of_the_rows(tmp_path):
    rows = [{"instruction": "Hi", "output": f"Hello {i}"} for i in range(20)]
    path = write_jsonl(tmp_path / "rows.jsonl", [*rows, {"instruction": "Hi", "output": ""}])
    said = r"20 usable rows \(and 1 without a response\), which begin with 1 different question"
    with pytest.raises(ValueError, match=said + ".*stay together"):
        load(path, split_fractions=[0.8, 0.1, 0.1])


@needs_shared
def test_real_data_sets_are_recognised():
    alpaca = load(SHARED / "alpaca_en_1k.json", split_fractions=[0.8, 0.1, 0.1])
    assert alpaca.facts["shape"] == "alpaca"
    assert sum(alpaca.facts[n]["rows"] for n in SPLITS) == 999
    gsm8k = load(SHARED / "gsm8k_train.jsonl", split_fractions=[0.8, 0.1, 0.1])
    assert gsm8k.facts["shape"] == "gsm8k"
    assert sum(gsm8k.facts[n]["rows"] for n in SPLITS) == 7473
    prompts = [{json.dumps(r["prompt"]) for r in answered(part)} for part in alpaca[:3]]
    assert not prompts[0] & prompts[2]
    assert not prompts[0] & prompts[1]
