"""Runs of preference tuning for the tests of what reads them.

Its fixtures are those of every test: conftest.py names it as a plugin.
"""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import launched, pair_rows, read, write_jsonl


def pair_fields(base: Path, pairs: Path, folder: Path) -> dict[str, str]:
    """Fields of a preference training of four steps."""
    return {
        "method": "dpo",
        "model_name_or_path": str(base),
        "dataset_name": str(pairs),
        "output_dir": str(folder),
        "max_steps": "4",
        "global_batch_size": "8",
        "per_device_train_batch_size": "8",
        "max_length": "128",
        "logging_steps": "1",
        "warmup_steps": "1",
        "save_steps": "100",
        "learning_rate": "0.01",
    }


def stop_in_the_second_step(
    fields: dict[str, str], monkeypatch: pytest.MonkeyPatch, train_here: Callable
) -> None:
    """Start a preference training that a signal interrupts."""
    from sftlab.training.preference_trainer import PreferenceTrainer

    step = PreferenceTrainer.training_step

    def told_to_stop(self, *args, **kwargs):
        if self.state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(PreferenceTrainer, "training_step", told_to_stop)
        assert train_here(fields).returncode
    assert read(fields["output_dir"])["status"] == "interrupted"


@pytest.fixture(scope="session")
def pairs_file(build_once) -> Path:
    """200 pairs over the questions of `rows`."""
    folder = build_once("pairs", lambda it: write_jsonl(it / "pairs.jsonl", pair_rows(200)))
    return folder / "pairs.jsonl"


@pytest.fixture(scope="session")
def preferred(base, pairs_file, finished, build_once) -> Path:
    """The directory of a run that went on from `finished` with preference pairs."""

    def train(folder: Path) -> None:
        fields = pair_fields(base, pairs_file, folder / "run")
        launched("cpu", fields | {"adapter_name_or_path": str(finished[0])})

    return build_once("preferred", train) / "run"


@pytest.fixture(scope="session")
def preferred_over_base(base, pairs_file, build_once) -> Path:
    """The directory of a run with preference pairs and a new adapter on the base model."""

    def train(folder: Path) -> None:
        launched("cpu", pair_fields(base, pairs_file, folder / "run"))

    return build_once("preferred_over_base", train) / "run"
