"""A hundred broken inputs, read by the real scripts; make test-fuzz reads more."""

import subprocess

import fork_server
import pytest
from conftest import ROOT


@pytest.mark.long
def test_a_hundred_broken_inputs_end_in_a_sentence():
    command = [fork_server.python(), "tests/fuzz/campaign.py", "--cases", "100", "--quick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
