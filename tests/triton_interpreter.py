"""Triton's kernels without a GPU: its interpreter runs them, in a process of its own.

Whether Triton interprets is decided when it is imported.
"""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from conftest import ROOT

with_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
interpreted = os.environ.get("TRITON_INTERPRET") == "1"
on_a_gpu = torch.cuda.is_available()
runs_kernels = pytest.mark.skipif(
    not (on_a_gpu or interpreted),
    reason="run under Triton's interpreter, by test_interpreted_kernels.py",
)
starts_interpreter = pytest.mark.skipif(
    interpreted or on_a_gpu, reason="the kernels run here themselves"
)


def interpret(*words: str, timeout: int = 300) -> str:
    """Runs python with these arguments, Triton interpreting; returns what it printed."""
    done = subprocess.run(
        [sys.executable, *words],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def interpret_tests(*words: str) -> str:
    """Runs tests so, which `words` name as pytest takes them; returns what it printed."""
    return interpret("-m", "pytest", "-q", "-p", "no:cacheprovider", *words)
