"""Trainings that start together are timed one at a time, whatever becomes of them or of who gives
the turns.
"""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from conftest import ROOT

from sftlab.comparison.timed_turns import Command, in_turn
from sftlab.measurement.timing_turn import VARIABLE

# Warms up for some time, waits, and is timed; notes when. Told to stop, it does so in its turn, as
# a training does.
TRAINING = """
import os, pathlib, signal, sys, time
told = []
signal.signal(signal.SIGTERM, lambda *_: told.append(1))
sys.path.insert(0, {root!r})
from sftlab.measurement.timing_turn import wait_for_turn
said = open({log!r}, "a", buffering=1)
time.sleep({warm})
said.write(f"{name} warm {{time.monotonic()}}\\n")
wait_for_turn()
said.write(f"{name} begins {{time.monotonic()}}\\n")
end = time.monotonic() + {timed}
while time.monotonic() < end and not told:
    time.sleep(0.01)
if told:
    said.write("{name} stopped 0\\n")
    sys.exit(3)
said.write(f"{name} ends {{time.monotonic()}}\\n")
if {leaving}:
    time.sleep({leaving})
    said.write(f"{name} exits {{time.monotonic()}}\\n")
"""
GIVER = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
from sftlab.comparison.timed_turns import Command, in_turn
commands = [Command([sys.executable, name], Path(name + ".log")) for name in sys.argv[1:]]
try:
    list(in_turn(commands))
except KeyboardInterrupt:
    sys.exit("stopped")
"""


@pytest.fixture
def training(tmp_path):
    """Make a training that takes so many seconds to warm up, to be timed and, where it says so, to
    exit.
    """

    def make(name, warm=0.0, timed=0.2, leaving=0.0):
        script = tmp_path / f"{name}.py"
        times = {"warm": warm, "timed": timed, "leaving": leaving}
        script.write_text(
            TRAINING.format(root=str(ROOT), log=str(tmp_path / "said"), name=name, **times), "utf-8"
        )
        return str(script)

    return make


def said(tmp_path):
    """(name, what, when) in order."""
    path = tmp_path / "said"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [(name, what, float(when)) for name, what, when in (line.split() for line in lines)]


def commands(*scripts):
    return [
        Command([sys.executable, *script.split(" ")], ROOT / f"{script.split(' ')[0]}.log")
        for script in scripts
    ]


def test_all_warm_up_together_and_each_is_timed_alone(training, tmp_path):
    scripts = [training("quick"), training("slow", warm=1.0), training("middling", warm=0.5)]
    assert list(in_turn(commands(*scripts))) == [0, 1, 2]
    when = {(name, what): at for name, what, at in said(tmp_path)}
    last_warm = max(at for (_, what), at in when.items() if what == "warm")
    order = [(name, what) for name, what, _ in said(tmp_path) if what != "warm"]
    assert order == [
        (name, what) for name in ("quick", "slow", "middling") for what in ("begins", "ends")
    ]
    assert when["quick", "begins"] > last_warm
    assert when["slow", "warm"] - when["quick", "warm"] > 0.5, "they did not start together"


def test_the_next_one_waits_until_the_process_is_gone(training, tmp_path):
    scripts = [training("a", leaving=1.0), training("b")]
    assert list(in_turn(commands(*scripts))) == [0, 1]
    when = {(name, what): at for name, what, at in said(tmp_path)}
    assert when["a", "ends"] < when["a", "exits"] < when["b", "begins"]


def test_one_that_fails_before_its_turn_holds_up_nobody(training, tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("raise SystemExit('no')", encoding="utf-8")
    assert list(in_turn(commands(training("a"), str(broken), training("b")))) == [0, 1, 2]
    assert [name for name, what, _ in said(tmp_path) if what == "ends"] == ["a", "b"]
    assert (tmp_path / "broken.py.log").read_text(encoding="utf-8") == "no\n"


def test_one_alone_waits_for_nobody(training, tmp_path):
    script = tmp_path / "alone.py"
    script.write_text(f"import os; print({VARIABLE!r} in os.environ)", encoding="utf-8")
    assert list(in_turn(commands(str(script)))) == [0]
    assert (tmp_path / "alone.py.log").read_text(encoding="utf-8") == "False\n"


def started(training, tmp_path, timed):
    """Two trainings given turns by a process of its own, the first of them in its turn."""
    giver = tmp_path / "giver.py"
    giver.write_text(GIVER.format(root=str(ROOT)), encoding="utf-8")
    scripts = [training("a", timed=timed), training("b", timed=timed)]
    process = subprocess.Popen(
        [sys.executable, str(giver), *scripts], stderr=subprocess.PIPE, start_new_session=True
    )
    while ("a", "begins") not in {(name, what) for name, what, _ in said(tmp_path)}:
        time.sleep(0.02)
        assert process.poll() is None
    return process


def test_where_the_giver_is_told_to_stop_all_are(training, tmp_path):
    process = started(training, tmp_path, timed=60)
    process.send_signal(signal.SIGTERM)
    _, words = process.communicate(timeout=20)
    assert words == b"stopped\n"
    assert {(name, what) for name, what, _ in said(tmp_path)} >= {
        ("a", "stopped"),
        ("b", "stopped"),
    }


def test_where_the_giver_is_killed_nobody_waits_for_ever(training, tmp_path):
    process = started(training, tmp_path, timed=1)
    children = psutil.Process(process.pid).children()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not psutil.wait_procs(children, timeout=20)[1]
    assert [name for name, what, _ in said(tmp_path) if what == "ends"] in (["a", "b"], ["b", "a"])


STOPPED_EARLY = """
import os, signal, subprocess, time
plain = subprocess.Popen
class Popen(plain):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)
subprocess.Popen = Popen
"""


def test_a_signal_that_comes_while_the_first_one_starts_is_not_lost(training, tmp_path):
    script = training("a", timed=60)
    giver = tmp_path / "giver.py"
    giver.write_text(STOPPED_EARLY + GIVER.format(root=str(ROOT)), encoding="utf-8")
    done = subprocess.run([sys.executable, str(giver), script], capture_output=True, timeout=30)
    assert done.stderr == b"stopped\n"
    assert [what for _, what, _ in said(tmp_path)] == ["warm", "begins", "stopped"]
