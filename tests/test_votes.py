"""A vote is one for a finished turn, kept or said not to be."""

import threading

import pytest

from sftlab.chat import votes
from sftlab.chat.conversation import Turn
from sftlab.chat.service import Lab
from sftlab.runs.run_directory import SIDES

PAIR = ("start", "tuned")


def turn(**changes: object) -> Turn:
    answered = {"texts": {"base": "a", "tuned": "b"}, "finished": dict.fromkeys(SIDES, "stop")}
    told = {"message": "x", "order": SIDES, "blind": True, "run": "r", "settings": {"seed": 0}}
    return Turn(**told | answered | changes)


@pytest.fixture
def lab(tmp_path) -> Lab:
    return Lab(tmp_path, None, tmp_path, tmp_path / "votes.jsonl", False)


@pytest.mark.parametrize(
    "turns, choice, named",
    [
        ([], "left", "ask something first"),
        ([turn(texts={}, finished={})], "left", "not finished"),
        ([turn(finished={"base": "stop", "tuned": None})], "tie", "not finished"),
        ([turn(vote="base")], "right", "its vote already: base"),
        ([turn(order=("tuned",))], "left", "ask two"),
        ([turn()], "best", "expected left, right or tie"),
        ([turn()], None, "expected left, right or tie"),
    ],
)
def test_a_vote_needs_two_answers_and_one_voter(lab, turns, choice, named):
    with pytest.raises(ValueError, match=named):
        lab.vote(turns, "", choice)
    assert not lab.ballot.exists()


def test_a_turn_has_one_vote_however_many_come_at_once(lab):
    turns, said = [turn()], []

    def vote() -> None:
        try:
            said.append(lab.vote(turns, "", "left"))
        except ValueError as error:
            said.append(str(error))

    threads = [threading.Thread(target=vote) for _ in range(8)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert len(votes.read(lab.ballot).votes) == 1
    assert sum("already" in one for one in said) == 7


@pytest.mark.parametrize(
    "line",
    [
        b"{broken\n",
        b"[]\n",
        b'{"run": ["a"], "adapter_hash": null, "blind": true, "vote": "tuned"}\n',
        b'{"run": "a", "adapter_hash": null, "blind": 5, "vote": "tie"}\n',
        b'{"run": "a", "adapter_hash": null, "blind": true, "vote": "zzz"}\n',
        b'{"run": "a", "adapter_hash": null, "blind": true, "vote": ["tie"]}\n',
        b'{"run": "a", "adapter_hash": null, "blind": true, "vote": "tie", "order": ["base"]}\n',
        b'{"run": "a", "adapter_hash": null, "blind": true, "vote": "tie", "order": 5}\n',
        b'{"run": "a", "adapter_hash": null, "blind": true, "vote": "base", '
        b'"order": ["start", "tuned"]}\n',
        b"\xff\xfe\x00\n",
        b'{"run": "a"',  # cut off by a kill
    ],
)
def test_a_broken_line_is_named_and_hinders_no_vote(lab, line):
    lab.ballot.write_bytes(line)
    assert lab.vote([turn()], "", "left").startswith("Voted")
    kept = votes.read(lab.ballot)
    assert [one["vote"] for one in kept.votes] == ["base"]
    assert "line 1 is no vote and is left out" in kept.broken[0]
    table = lab.votes_table()
    assert "| r | blind | base | 1 | 0 | 0 |" in table
    assert "line 1 is no vote" in table


def test_a_vote_that_cannot_be_kept_is_not_said_to_be(lab):
    lab.ballot.mkdir()
    voted = turn()
    with pytest.raises(ValueError, match="not kept"):
        lab.vote([voted], "", "left")
    assert voted.vote is None
    assert "No votes yet" in lab.votes_table()


def test_votes_on_other_models_of_a_run_are_counted_apart(lab):
    for models in ("one", "two"):
        lab.vote([turn(models=models, adapter="same")], "", "right")
    assert lab.votes_table().count("| r | blind | base | 0 | 1 | 0 |") == 2


def test_votes_against_base_and_against_the_start_are_counted_apart(lab):
    pair = {"texts": {"start": "a", "tuned": "b"}, "finished": dict.fromkeys(PAIR, "stop")}
    lab.vote([turn()], "", "right")
    for choice in ("left", "left", "right", "tie"):
        assert "start" in lab.vote([turn(order=PAIR, **pair)], "", choice)
    lab.vote([turn(order=PAIR[::-1], **pair)], "", "right")
    table = lab.votes_table()
    assert "| r | blind | base | 0 | 1 | 0 |" in table
    assert "| r | blind | start | 3 | 1 | 1 | 0.25 " in table


def test_html_in_a_votes_file_is_shown_not_rendered(lab):
    votes.cast(lab.ballot, "tie", run="<img src=x onerror=alert(1)>", adapter_hash=None, blind=True)
    assert "&lt;img" in lab.votes_table()
    assert "<img" not in lab.votes_table()
