"""Workers that take turns end with the command that started them, however that ended."""

import subprocess
import sys

from conftest import ROOT

WAITS = (
    "import sys; from pathlib import Path; from sftlab.measurement import turn_workers; "
    "turn_workers.wait_for_turn_file(Path(sys.argv[1]))"
)
COMMAND = (
    "import subprocess, sys; from sftlab.measurement import turn_workers; "
    f"subprocess.Popen([sys.executable, '-c', {WAITS!r}, sys.argv[1]], start_new_session=True, "
    "env=turn_workers.told_its_command()); "
)


def test_a_worker_whose_command_was_killed_ends(tmp_path):
    killed = COMMAND + "import os; os.kill(os.getpid(), 9)"
    words = [sys.executable, "-c", killed, str(tmp_path / "never")]
    done = subprocess.run(words, cwd=ROOT, stderr=subprocess.PIPE, timeout=60)
    assert done.stderr == b"error: the command that started this worker has ended\n"


def test_a_worker_waits_while_its_command_runs_and_goes_on_with_the_file(tmp_path):
    file = tmp_path / "go0"
    waits = COMMAND.replace("subprocess.Popen", "worker = subprocess.Popen", 1)
    waits += "from pathlib import Path; early = worker.poll(); Path(sys.argv[1]).touch(); "
    waits += "print(early, worker.wait())"
    words = [sys.executable, "-c", waits, str(file)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "None 0\n"
