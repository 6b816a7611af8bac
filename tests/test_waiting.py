"""A long wait says what it is for, a short one nothing."""

import time
from functools import partial

import pytest

from sftlab.startup.waiting import says_if_long
from sftlab.training.first_step_wait import FirstStepWait


def test_a_long_wait_says_what_it_is_for_and_how_long_it_was(capsys):
    with says_if_long("loading the weights", after_s=0.01):
        time.sleep(0.2)
    first, second = capsys.readouterr().out.splitlines()
    assert first == "loading the weights ..."
    assert second.startswith("loading the weights: ") and second.endswith(" s")


def test_a_short_wait_another_rank_and_a_failure_say_nothing_more(capsys, monkeypatch):
    with says_if_long("loading the weights", after_s=60):
        pass
    with pytest.raises(ValueError), says_if_long("loading the weights", after_s=60):
        raise ValueError
    monkeypatch.setenv("RANK", "1")
    with says_if_long("loading the weights", after_s=0.0):
        time.sleep(0.05)
    assert capsys.readouterr().out == ""


def test_only_the_first_step_is_waited_for(capsys, monkeypatch):
    monkeypatch.setattr(
        "sftlab.training.first_step_wait.says_if_long", partial(says_if_long, after_s=0.01)
    )
    wait = FirstStepWait(compiles=True)
    for _ in range(2):
        wait.on_step_begin(None, None, None)
        time.sleep(0.1)
        wait.on_step_end(None, None, None)
    first, second = capsys.readouterr().out.splitlines()
    assert first == "checking and running the first step, and compiling the layers ..."
    assert second.endswith(" s")
