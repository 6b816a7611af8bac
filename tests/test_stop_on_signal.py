"""A signal stops a training at once or after the step, on all ranks alike."""

import os
import signal
import time

import pytest

from sftlab.training import stop_on_signal
from sftlab.training.stop_on_signal import StopOnSignal, Stopped


def test_a_signal_stops_at_once_before_the_training_and_changes_nothing_after_it(handlers):
    stop = StopOnSignal()
    with pytest.raises(Stopped, match="signal 15"):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
    stop = StopOnSignal()
    stop.on_train_begin(None, None, None)
    stop.on_train_end(None, None, None)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.05)
    assert stop.agreed == 0


def test_one_of_several_ranks_does_not_leave_before_the_others_know(handlers, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    stop = StopOnSignal()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.05)
    monkeypatch.setattr("sftlab.training.stop_on_signal.dist.is_initialized", lambda: True)
    monkeypatch.setattr("sftlab.training.stop_on_signal.dist.get_world_size", lambda: 2)
    monkeypatch.setattr("sftlab.training.stop_on_signal.dist.new_group", lambda backend: "all")
    told = []
    monkeypatch.setattr(
        "sftlab.training.stop_on_signal.dist.all_reduce",
        lambda flag, **kwargs: told.append(int(flag)),
    )
    with pytest.raises(Stopped, match="signal 15"):
        stop.on_train_begin(None, None, None)
    assert told == [signal.SIGTERM]


def test_a_second_ctrl_c_stops_at_once_but_one_press_counts_once(handlers, monkeypatch):
    stop = StopOnSignal()
    stop.on_train_begin(None, None, None)
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)
    monkeypatch.setattr(stop_on_signal, "ONE_PRESS_S", 0.0)
    with pytest.raises(Stopped):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
