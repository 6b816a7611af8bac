"""Messages of every shape reach the chat template with all their fields, or are named."""

import json

import pandas as pd
import pytest
from chat_templates import tokenizer_with
from conftest import write_jsonl

from sftlab.config.recipe import DataArguments
from sftlab.data.before_training import data_lines
from sftlab.data.messages import Conversation
from sftlab.data.row_notes import unused_lines, unwritten
from sftlab.data.splits import load_splits
from sftlab.data.template_facts import fields_written

TOOL = {"name": "clock", "description": "The time.", "parameters": {"type": "object"}}
SCHEMA = {"type": "function", "function": TOOL}
CALL = {"type": "function", "function": {"name": "clock", "arguments": {"city": "Rome"}}}
ASK, SAY = {"role": "user", "content": "Time?"}, {"role": "assistant", "content": "Noon."}


def loaded(path, **fields):
    fields = {"split_fractions": [1.0, 0.0, 0.0]} | fields
    return load_splits(DataArguments(dataset_name=str(path), **fields))


@pytest.fixture
def read_row(tmp_path):
    def read(row):
        (found,) = loaded(write_jsonl(tmp_path / "rows.jsonl", [row])).train
        return Conversation.from_row(found)

    return read


CALLED = [
    ASK,
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "12:00"},
    SAY,
]
TEXT_CALL = {"function": {"name": "clock", "arguments": '{"city": "Rome"}'}}


@pytest.mark.parametrize("tools", [[SCHEMA], [TOOL], json.dumps([SCHEMA])])
@pytest.mark.parametrize("calls", [[CALL], [TEXT_CALL], json.dumps([CALL]), [CALL["function"]]])
def test_tools_and_calls_of_every_writing_become_the_ones_of_transformers(tools, calls, read_row):
    messages = [ASK, {"role": "assistant", "content": None, "tool_calls": calls}, *CALLED[2:]]
    found = read_row({"messages": messages, "tools": tools})
    assert found.messages == CALLED
    assert found.tools == [SCHEMA]
    assert found.answers == [1, 3]


@pytest.mark.parametrize(
    ("asked", "said"),
    [("User", "Assistant"), ("human", "ai"), ("prompter", "bot"), ("user", "model")],
)
@pytest.mark.parametrize("keys", [("role", "content"), ("from", "value"), ("speaker", "text")])
def test_roles_and_keys_of_other_writers_are_known(asked, said, keys, read_row):
    role, content = keys
    turns = [{role: asked, content: "Time?"}, {role: said, content: "Noon.", "mood": "calm"}]
    assert read_row({"messages": turns}).messages == [ASK, SAY | {"mood": "calm"}]


def test_a_system_column_stands_before_messages(read_row):
    brief = {"role": "system", "content": "Be brief."}
    assert read_row({"messages": [ASK, SAY], "system": "Be brief."}).messages == [brief, ASK, SAY]
    chat = {"prompt": [ASK], "completion": [SAY], "system": "Be brief."}
    assert read_row(chat).messages == [brief, ASK, SAY]


def test_texts_are_the_users_and_the_assistants_in_turn(read_row):
    found = read_row({"messages": ["Time?", "Noon.", "Sure?"]})
    assert found.messages[:2] == [ASK, SAY] and found.answers == [1]


@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_a_conversation_may_be_json_text(column, read_row):
    assert read_row({column: json.dumps([ASK, SAY])}).messages == [ASK, SAY]


def test_a_request_of_openai_is_its_messages_and_tools(read_row):
    request = {"messages": [ASK], "tools": [TOOL], "parallel_tool_calls": True}
    found = read_row({"prompt": request, "completion": [SAY]})
    assert (found.messages, found.tools) == ([ASK, SAY], [SCHEMA])


@pytest.mark.parametrize("row", [{}, {"tools": [TOOL]}])
def test_tools_of_a_message_are_the_rows(row, read_row):
    system = {"role": "system", "content": "Be brief."}
    found = read_row({"messages": [system | {"tools": [TOOL]}, ASK, SAY]} | row)
    assert (found.messages, found.tools) == ([system, ASK, SAY], [SCHEMA])


def test_answers_of_xlam_are_calls(read_row):
    row = {"id": 0, "query": "Time?", "answers": json.dumps([CALL["function"]])}
    found = read_row(row | {"tools": json.dumps([TOOL])})
    assert found == Conversation(CALLED[:2], [1], [SCHEMA])


def test_calls_of_sharegpt_and_of_openais_first_format_are_calls(read_row):
    turns = [
        {"from": "human", "value": "Time?"},
        {"from": "function_call", "value": json.dumps(CALL["function"])},
        {"from": "observation", "value": "12:00"},
        {"from": "gpt", "value": "Noon."},
    ]
    system = {"role": "system", "content": "Be brief."}
    found = read_row({"conversations": turns, "system": "Be brief.", "tools": json.dumps([TOOL])})
    assert found[:3] == ([system, *CALLED], [2, 4], [SCHEMA])
    old = [
        ASK,
        {"role": "assistant", "content": None, "function_call": TEXT_CALL["function"]},
        {"role": "function", "name": "clock", "content": "12:00"},
        SAY,
    ]
    found = read_row({"messages": old, "functions": [TOOL]})
    assert found.messages == [*CALLED[:2], CALLED[2] | {"name": "clock"}, SAY]
    assert found.tools == [SCHEMA]


@pytest.mark.parametrize("field", ["weight", "train", "trainable", "loss"])
def test_an_answer_of_weight_0_is_context(field, read_row):
    off, on = (False, True) if field != "weight" else (0, 1)
    messages = [ASK, SAY | {field: off}, {"role": "user", "content": "And now?"}, SAY | {field: on}]
    found = read_row({"messages": messages})
    assert found.answers == [3]
    assert found.messages == [ASK, SAY, messages[2], SAY]


def test_fields_of_messages_arrive_and_empty_ones_do_not(tmp_path):
    rows = [
        {"messages": [ASK, SAY | {"reasoning_content": "Twelve."}]},
        {"messages": [ASK | {"name": "Ann"}, SAY | {"tool_calls": [CALL]}]},
    ]
    path = tmp_path / "rows.parquet"
    pd.DataFrame(rows).to_parquet(path)  # its columns have every field in every message
    first, second = (Conversation.from_row(row).messages for row in loaded(path).train)
    assert first == [ASK, SAY | {"reasoning_content": "Twelve."}]
    assert second == [ASK | {"name": "Ann"}, SAY | {"tool_calls": [CALL]}]
    empty = [ASK | {"name": None}, SAY | {"tool_calls": [], "reasoning_content": ""}]
    (row,) = loaded(write_jsonl(tmp_path / "rows.jsonl", [{"messages": empty}])).train
    assert Conversation.from_row(row).messages == [ASK, SAY]


def test_parts_of_text_are_text_and_other_parts_are_refused(read_row):
    parts = [{"type": "text", "text": "One"}, {"type": "text", "text": "two"}]
    found = read_row({"messages": [ASK | {"content": parts}, SAY]})
    assert found.messages[0]["content"] == "One\ntwo"
    image = [*parts, {"type": "image_url", "image_url": {"url": "x.png"}}]
    with pytest.raises(ValueError, match=r"row 0 .*message 0 has a part of type 'image_url'"):
        read_row({"messages": [ASK | {"content": image}, SAY]})


def test_a_developers_message_is_the_systems_and_a_blank_one_is_none(read_row):
    developer = {"role": "developer", "content": "Be brief."}
    assert read_row({"messages": [developer, ASK, SAY]}).messages[0]["role"] == "system"
    assert read_row({"messages": [developer | {"content": " "}, ASK, SAY]}).messages == [ASK, SAY]
    turns = [{"from": "human", "value": "Time?"}, {"from": "gpt", "value": "Noon."}]
    assert read_row({"conversations": turns, "system": ""}).messages == [ASK, SAY]


@pytest.mark.parametrize(
    ("question", "answer", "system"),
    [
        ("instruction", "output", "system"),
        ("instruction", "response", "system"),
        ("query", "response", "system"),
        ("question", "response", "system_prompt"),
        ("question", "answer", "system"),
        ("prompt", "completion", "system_prompt"),
    ],
)
def test_system_and_history_are_earlier_messages(question, answer, system, read_row):
    row = {question: "And now?", answer: "One.", system: "Be brief."}
    found = read_row(row | {"history": [["Time?", "Noon."]]})
    assert found.messages == [
        {"role": "system", "content": "Be brief."},
        ASK,
        SAY,
        {"role": "user", "content": "And now?"},
        {"role": "assistant", "content": "One."},
    ]
    assert found.answers == [2, 4]


def test_what_is_left_out_is_counted_and_named(tmp_path):
    rows = [
        {"messages": [SAY, ASK, SAY]},
        {"messages": [ASK]},
        {"messages": [SAY]},
        {"messages": [ASK, SAY | {"weight": 0}]},
        {"messages": [ASK, SAY], "parallel_tool_calls": False, "loss_mask": [0, 1]},
        {"messages": [ASK, SAY, ASK]},
        {"messages": [ASK, SAY, SAY | {"loss_weight": 0}], "": 0, "role": "x"},
    ]
    facts = loaded(write_jsonl(tmp_path / "rows.jsonl", rows)).facts
    assert facts["rows_without_an_answer"] == 3
    assert "3 without an answer to a user (the first is row 1)" in "\n".join(data_lines(facts))
    said = "\n".join(unused_lines(facts["not_used"]))
    assert "message of the assistant before the first user's (2 rows)" in said
    assert "column loss_mask (1 rows), column role (1 rows)" in said
    assert "column without a name (1 rows), message behind the last answer (2 rows)" in said
    assert "columns and fields that no training uses: column parallel_tool_calls (1 rows)" in said
    assert said.startswith("warning: not used in training: column loss_mask")


def test_fields_of_a_message_that_nothing_reads_are_counted(tmp_path):
    part = {"type": "text", "text": "Time?", "cache_control": {"type": "ephemeral"}}
    rows = [
        {"messages": [ASK | {"weight": 1}, SAY]},
        {"messages": [ASK | {"train": True}, SAY | {"weight": 1}]},
        {"messages": [ASK | {"weight": 0}, SAY | {"value": "One.", "weight": 1}]},
        {"messages": [{"role": "user", "content": [part]}, SAY | {"value": SAY["content"]}]},
        {"messages": [ASK, SAY | {"reasoning": "a", "reasoning_content": "b", "thinking": "a"}]},
    ]
    facts = loaded(write_jsonl(tmp_path / "rows.jsonl", rows)).facts
    assert facts["not_used"] == {
        "cache_control of a part of content": 1,
        "content of a message that has value too": 1,
        "reasoning of a message that has reasoning_content too": 1,
        "thinking of a message that has reasoning_content too": 1,
        "train of a message that is not the assistant's": 1,
        "weight of a message that is not the assistant's": 1,
    }
    warning, remark = unused_lines(facts["not_used"])
    assert warning.count("not the assistant's (1 rows)") == 2
    assert remark.endswith("uses: cache_control of a part of content (1 rows)")


def test_fields_that_the_template_does_not_write_are_said(tmp_path):
    rows = [
        {"tools": [TOOL], "messages": [ASK, SAY | {"tool_calls": [CALL], "mood": "calm"}]},
        {"messages": [ASK, SAY | {"reasoning_content": "Twelve."}]},
    ]
    with_ = loaded(write_jsonl(tmp_path / "rows.jsonl", rows)).facts["rows_with"]
    written = fields_written(tokenizer_with("gemma"), ["mood"])
    warnings, remarks = unwritten(with_, written)
    assert warnings == [
        "the chat template does not write reasoning_content (1 rows), tool_calls (1 rows), "
        "tools (1 rows)"
    ]
    assert remarks == ["fields that the chat template does not write: mood (1 rows)"]
    written = fields_written(tokenizer_with("chatml"), ["mood"])
    assert unwritten(with_, written)[0] == [
        "the chat template does not write reasoning_content (1 rows)"
    ]


def test_answers_that_are_calls_alone_need_a_template_for_calls(tmp_path):
    with_ = loaded(write_jsonl(tmp_path / "rows.jsonl", [{"messages": CALLED}])).facts["rows_with"]
    with pytest.raises(ValueError, match="answers of 1 rows are tool calls alone"):
        unwritten(with_, fields_written(tokenizer_with("gemma"), []))
    assert unwritten(with_, fields_written(tokenizer_with("chatml"), [])) == ([], [])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [ASK, SAY | {"weight": 0.5}]}, "weight is 0.5: expected 0 or 1"),
        ({"messages": [ASK, SAY | {"tool_calls": [{"id": 1}]}]}, "a tool call has no name"),
        ({"messages": [ASK, SAY], "tools": "[{"}, "tools: .* is not JSON"),
        ({"messages": [ASK, SAY], "tools": [{"type": "x"}]}, "a tool has no name"),
        ({"messages": [ASK, {"role": "robot", "content": "a"}]}, "unknown role 'robot'"),
        ({"messages": [{"Role": "user", "Content": "a"}]}, "message 0 has no role: it has Role, C"),
        ({"messages": [{"role": "user", "message": "a"}, SAY]}, "message 0 of the user has no te"),
        ({"messages": "user: a"}, "a list of messages, or such a list as JSON text, got str 'user"),
        ({"prompt": ["a", "b"], "completion": "c"}, "prompt is a list of texts"),
        ({"prompt": "a", "completion": ["b", "c"]}, "completion is a list of texts"),
        ({"prompt": {"messages": [ASK], "n": 2}, "completion": "c"}, "a request with n: leave"),
        ({"prompt": None, "completion": "c"}, "the prompt is empty: write one, or leave"),
        (
            {"messages": [ASK, SAY | {"tool_calls": [{"name": "clock", "arguments": "{a"}]}]},
            "the arguments of a call of clock are no JSON",
        ),
        (
            {"tools": [TOOL], "messages": [ASK | {"tools": [{"name": "other"}]}, SAY]},
            "message 0 has other tools than stand before it",
        ),
        (
            {"prompt": [ASK], "completion": [SAY], "history": [["a", "b"]]},
            "a history, and messages in prompt or completion",
        ),
        ({"query": " ", "answers": "[]", "tools": "[]"}, "the query is empty"),
        (
            {"conversations": [{"from": "system", "value": "a"}], "system": "b"},
            "a system column and a system message that differ",
        ),
        (
            {"instruction": "a", "output": "b", "history": [["c"]]},
            "expected pairs of question and answer; rename the column to leave it out",
        ),
    ],
)
def test_what_is_no_message_is_one_sentence_with_the_row(row, message, read_row):
    with pytest.raises(ValueError, match=f"row 0 .*{message}") as caught:
        read_row(row)
    assert "\n" not in str(caught.value)
