"""Trainings that are killed and checkpoints that are broken end as undisturbed ones:

a sample, and all of it.
"""

import subprocess
import sys
from pathlib import Path

import pytest

CAMPAIGN = Path(__file__).parent / "campaign.py"


def campaign(*words, seconds):
    """Its own process, for its starts are forked: nothing here may have started a thread before."""
    done = subprocess.run(
        [sys.executable, CAMPAIGN, *words], capture_output=True, text=True, timeout=seconds
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.long
def test_a_sample_of_kills_and_broken_files_is_exact_and_controls_are_caught():
    said = campaign(
        *(
            "--cases",
            "DDP",
            "--kinds",
            "saving",
            "steps",
            "signal",
            "--trials",
            "1",
            "--faults",
            "2",
        ),
        seconds=300,
    )
    damaged_records = said.count("run.json cannot be read")  # each is refused, and nothing is lost
    assert said.count(": exact") + damaged_records == 5
    assert said.count(": caught") == 3


@pytest.mark.faults
def test_every_kind_of_kill_and_every_broken_file():
    campaign(seconds=7200)
