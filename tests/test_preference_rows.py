"""Preference pairs: how rows are read, what is left out, and which tokens are an answer."""

import pytest
from conftest import arguments, pair_rows, write_jsonl

from sftlab.config.launch import Launch
from sftlab.config.parser import parse_recipe
from sftlab.data.encoded_pairs import encode_pair
from sftlab.data.formats import DATA_FORMATS
from sftlab.data.messages import Conversation
from sftlab.data.pair_collator import PairCollator
from sftlab.data.splits import load_splits
from sftlab.data.token_sequence import TokenSequence

ASKED = {"role": "user", "content": "Why?"}
YES, NO = ({"role": "assistant", "content": word} for word in ("Yes.", "No."))
SHAPES = {
    "texts": {"prompt": "Why?", "chosen": "Yes.", "rejected": "No."},
    "messages behind a prompt": {"prompt": [ASKED], "chosen": [YES], "rejected": [NO]},
    "UltraFeedback": {"prompt": "Why?", "chosen": [ASKED, YES], "rejected": [ASKED, NO]},
    "whole conversations": {"chosen": [ASKED, YES], "rejected": [ASKED, NO]},
    "HH": {
        "chosen": "\n\nHuman: Why?\n\nAssistant: Yes.",
        "rejected": "\n\nHuman: Why?\n\nAssistant: No.",
    },
    "HH with a prompt": {
        "prompt": "\n\nHuman: Why?\n\nAssistant:",
        "chosen": "Yes.",
        "rejected": "No.",
    },
}


@pytest.mark.parametrize("row", SHAPES.values(), ids=SHAPES)
def test_every_shape_of_a_pair_is_read_alike(row):
    found = DATA_FORMATS["preference"][2](row)
    assert [one["content"] for one in found.messages] == ["Why?", "Yes."]
    assert found.answers == [1]
    assert [one["content"] for one in found.rejected] == ["No."]
    assert found.rejected_side().messages[-1]["content"] == "No."


def test_sides_after_different_prompts_are_no_pair():
    other = {"role": "user", "content": "How?"}
    found = DATA_FORMATS["preference"][2]({"chosen": [ASKED, YES], "rejected": [other, NO]})
    assert not found.answers


def test_a_text_without_a_prompt_is_refused():
    with pytest.raises(ValueError, match="there is no prompt, and chosen is neither messages"):
        DATA_FORMATS["preference"][2]({"chosen": "Yes.", "rejected": "No."})


def recipe_of(path, fields, *more):
    words = [*arguments(fields | {"dataset_name": str(path), "method": "dpo"}), *more]
    return parse_recipe(words, Launch.from_environment())


def test_pairs_without_a_choice_are_counted_and_left_out(fields, tmp_path):
    rows = pair_rows(60)
    rows[3]["rejected"] = rows[3]["chosen"]
    rows[5]["rejected"] = " "
    path = write_jsonl(tmp_path / "pairs.jsonl", rows)
    facts = load_splits(recipe_of(path, fields).data).facts
    assert facts["equal_pairs_dropped"] == 1
    assert facts["empty_responses_dropped"] == 1
    assert sum(facts[name]["rows"] for name in ("train", "validation", "test")) == 58


def test_a_pair_has_the_split_of_its_question(fields, tmp_path):
    pairs = write_jsonl(tmp_path / "pairs.jsonl", pair_rows(60))
    answers = [{"prompt": r["prompt"], "completion": "x"} for r in pair_rows(60)]
    plain = write_jsonl(tmp_path / "plain.jsonl", answers)
    sft = parse_recipe(arguments(fields | {"dataset_name": str(plain)}), Launch.from_environment())
    ours, theirs = load_splits(recipe_of(pairs, fields).data), load_splits(sft.data)
    for name in ("train", "validation", "test"):
        assert getattr(ours, name)["opening"] == getattr(theirs, name)["opening"]


def test_the_rejected_answer_is_part_of_the_fingerprint(fields, tmp_path):
    rows = pair_rows(60)
    first = write_jsonl(tmp_path / "one.jsonl", rows)
    other = [row | {"rejected": "Something else."} for row in rows]
    second = write_jsonl(tmp_path / "two.jsonl", other)
    prints = [load_splits(recipe_of(p, fields).data).facts["train"] for p in (first, second)]
    assert prints[0]["fingerprint"] != prints[1]["fingerprint"]


def side(answer):
    return TokenSequence([1, 2, 3, *answer], [3, len(answer)])


def test_the_answers_begin_behind_the_prompt_and_lose_their_end():
    found = encode_pair(side([7, 8, 9]), side([7, 6]), 5)
    assert found["chosen_ids"] == [1, 2, 3, 7, 8]
    assert found["rejected_ids"] == [1, 2, 3, 7, 6]
    assert (found["prompt_length"], found["kept"], found["cut"]) == (3, 1, 1)
    assert (found["loss_tokens"], found["loss_kept"]) == (5, 4)


@pytest.mark.parametrize(("limit", "equal"), [(4, 1), (3, 0)])
def test_pairs_that_the_cut_makes_equal_or_empty_are_not_kept(limit, equal):
    found = encode_pair(side([7, 8]), side([7, 6]), limit)
    assert (found["kept"], found["equal"]) == (0, equal)


def test_a_batch_has_the_chosen_sides_first():
    pair = {"chosen_ids": [1, 2, 7, 8], "rejected_ids": [1, 2, 6], "prompt_length": 2}
    batch = PairCollator(0)([pair])
    assert batch["input_ids"].tolist() == [[1, 2, 7, 8], [1, 2, 6, 0]]
    assert batch["completion_mask"].tolist() == [[0, 0, 1, 1], [0, 0, 1, 0]]
    assert (batch["real_tokens"], batch["real_rows"], batch["loss_tokens"]) == (7, 1, 3)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--dataset_shape=dolly"], "dataset_shape is dolly, and method dpo trains on pairs"),
        (["--use_peft=false"], "use_peft is false, and the reference"),
        (["--init_lora_weights=pissa"], "pissa changes the base model, which is the reference"),
        (["--init_lora_weights=eva"], "eva reads rows of one answer, and pairs have two"),
        (
            ["--init_lora_weights=loftq", "--load_in_4bit=true"],
            "loftq changes the answers at the start",
        ),
        (["--lora_dropout=0.1"], "lora_dropout is 0.1, and method dpo trains without dropout"),
        (["--loss_type=nll"], "loss_type is 'nll': expected sigmoid or"),
        (["--beta=0"], "beta is 0.0: it must be a finite number above 0"),
        (["--method=ppo"], "invalid choice: 'ppo'"),
    ],
)
def test_what_preference_tuning_cannot_do_is_refused(fields, tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        recipe_of(tmp_path / "pairs.jsonl", fields, *more)


def test_pairs_are_for_preference_tuning_alone(fields):
    words = [*arguments(fields), "--dataset_shape=preference"]
    with pytest.raises(ValueError, match="holds pairs, which method dpo trains on: add method"):
        parse_recipe(words, Launch.from_environment())


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "completion": "b", "label": True}, "hold one answer and a label a row"),
        (
            {"prompt": "a", "response_0": "b", "response_1": "c"},
            "method dpo trains on pairs, in the columns chosen and rejected; found prompt, "
            "response_0, response_1: say which columns they are with --columns",
        ),
    ],
)
def test_rows_that_are_no_pairs_say_what_to_do(fields, tmp_path, row, message):
    path = write_jsonl(tmp_path / "rows.jsonl", [row] * 20)
    with pytest.raises(ValueError, match=message):
        load_splits(recipe_of(path, fields).data)


def test_a_pair_may_end_in_a_call_of_a_tool(fields, tmp_path):
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    rows = [
        {
            "prompt": [{"role": "user", "content": f"Number {n}?"}],
            "chosen": [{"role": "assistant", "content": "", "tool_calls": [call]}],
            "rejected": [{"role": "assistant", "content": "No."}],
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
        }
        for n in range(60)
    ]
    splits = load_splits(recipe_of(write_jsonl(tmp_path / "rows.jsonl", rows), fields).data)
    assert splits.facts["rows_with"]["tools"] == 60
    pair = Conversation.from_row(splits.train[0])
    assert pair.tools == pair.rejected_side().tools != []
    assert pair.messages[-1]["tool_calls"] and "tool_calls" not in pair.rejected[0]
