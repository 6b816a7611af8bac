"""What splits, runs and tokenized shards hold of conversations."""

import pytest
from chat_templates import COUNTS
from conftest import load_script, read, write_jsonl
from tokenizing import tokenized

from sftlab.config.recipe import DataArguments
from sftlab.data.messages import Conversation
from sftlab.data.splits import load_splits


def conversations(count=40):
    """ShareGPT's rows of one to three questions."""
    return [
        {
            "conversations": [
                turn
                for n in range(1 + i % 3)
                for turn in (
                    {"from": "human", "value": f"Question {n} of {i}?"},
                    {"from": "gpt", "value": f"Answer {n} of {i}."},
                )
            ]
        }
        for i in range(count)
    ]


def splits_of(path, **fields):
    return load_splits(DataArguments(dataset_name=str(path), **fields))


@pytest.mark.parametrize(
    ("loss_on", "answers"),
    [
        ("all", [[1, 3, 5], [1], [1, 3]]),
        ("last", [[5], [1], [3]]),
        ("completion", [[1], [3], [5], [1], [1], [3]]),
    ],
)
def test_loss_on_says_which_answers_of_a_row_are_in_the_loss(loss_on, answers, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", conversations()[2:5])
    train = splits_of(path, loss_on=loss_on, split_fractions=[1.0, 0.0, 0.0]).train
    assert train["answers"] == answers
    for row in train:
        assert len(Conversation.from_row(row).messages) == row["answers"][-1] + 1


@pytest.mark.parametrize("loss_on", ["all", "last", "completion"])
def test_test_rows_hold_one_answer_each_and_name_their_conversation(loss_on, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", conversations())
    test = splits_of(path, loss_on=loss_on, split_fractions=[0.5, 0.0, 0.5]).test
    assert all(len(answers) == 1 for answers in test["answers"])
    turns = {number: test["conversation"].count(number) for number in test["conversation"]}
    assert turns == {number: 1 + number % 3 for number in turns}


def test_an_empty_answer_is_context_and_is_counted(tmp_path):
    (row,) = conversations(3)[2:]
    row["conversations"][3]["value"] = " "
    splits = splits_of(write_jsonl(tmp_path / "rows.jsonl", [row]), split_fractions=[1.0, 0.0, 0.0])
    assert splits.train["answers"] == [[1, 5]]
    assert splits.facts["empty_responses_dropped"] == 1


@pytest.fixture(scope="module")
def script():
    return load_script("slurm/tokenize_dataset.py")


@pytest.fixture
def talk(tmp_path, fields):
    """Fields of a run on conversations."""
    path = write_jsonl(tmp_path / "talk.jsonl", conversations(90))
    return fields | {"dataset_name": str(path), "max_length": "200", "save_strategy": "no"}


def test_a_run_trains_conversations_whole_and_says_it(talk, trained_here):
    done = trained_here(talk)
    found = read(talk["output_dir"])["data"]
    assert found["tokenized"]["sequences"] == found["train"]["rows"]
    assert found["tokenized"]["conversations_split"] == 0
    assert f"training rows: {found['train']['rows']} of " in done.stdout


def test_a_run_says_which_conversations_are_a_row_for_each_answer(talk, trained_here, tmp_path):
    (tmp_path / "it.jinja").write_text(COUNTS)
    done = trained_here(talk | {"chat_template_path": str(tmp_path / "it.jinja")})
    found = read(talk["output_dir"])["data"]
    split = found["tokenized"]["conversations_split"]
    assert 0 < split < found["train"]["rows"] < found["tokenized"]["sequences"]
    assert f"{split} conversations are a row for each answer: the chat template" in done.stdout


def test_what_max_length_takes_from_the_loss_is_a_warning(talk, trained_here):
    done = trained_here(talk | {"max_length": "80"})
    found = read(talk["output_dir"])["data"]["tokenized"]
    lost = found["loss_tokens_cut"] / (found["loss_tokens_cut"] + found["loss_tokens"])
    longest = found["longest_before_cut"]
    assert f"max_length 80 leaves out {lost:.0%} of the tokens in the loss" in done.stdout
    assert f"--max_length {longest} would keep them all" in done.stdout


@pytest.mark.parametrize("how", [{}, {"loss_on": "last"}, {"template": COUNTS, "cut": "60"}])
def test_tokenized_shards_hold_what_training_on_the_text_makes(
    how, script, base, tmp_path, trained_here, talk
):
    if "template" in how:
        (tmp_path / "it.jinja").write_text(how["template"])
        talk |= {"chat_template_path": str(tmp_path / "it.jinja"), "max_length": how["cut"]}
    talk |= {"loss_on": how.get("loss_on", "all"), "max_steps": "2"}
    tokenized(script, talk, tmp_path / "tokens", size=16)
    trained_here(talk)
    text = read(talk["output_dir"])
    trained_here(
        talk | {"dataset_name": str(tmp_path / "tokens"), "output_dir": str(tmp_path / "on")}
    )
    tokens = read(tmp_path / "on")
    assert tokens["losses"] == text["losses"]
    assert tokens["data"] == text["data"]
