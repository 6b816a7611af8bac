"""Preference tuning: what it begins from, what it learns, and how it is continued."""

import pytest
from conftest import pair_rows, read, write_jsonl
from safetensors.torch import load_file


@pytest.fixture
def pairs(base, tmp_path):
    """Fields of a preference training of six steps."""
    rows = write_jsonl(tmp_path / "pairs.jsonl", pair_rows(100))
    return {
        "method": "dpo",
        "model_name_or_path": str(base),
        "dataset_name": str(rows),
        "output_dir": str(tmp_path / "run"),
        "max_steps": "6",
        "global_batch_size": "8",
        "per_device_train_batch_size": "4",
        "max_length": "128",
        "logging_steps": "1",
        "warmup_steps": "1",
        "save_steps": "3",
        "learning_rate": "0.01",
    }


def weights(folder):
    return load_file(f"{folder}/adapter/adapter_model.safetensors")


def test_it_learns_to_prefer_the_chosen_answers(pairs, trained_here):
    trained_here(pairs)
    run = read(pairs["output_dir"])
    losses = [loss for _, loss in run["losses"]]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)
    assert losses[-1] < 0.5
    assert run["measured"]["validation_reward_accuracy"] > 0.9
    assert run["ran"]["reference"] == "the base model"


def test_the_reference_is_the_adapter_that_it_starts_from(pairs, finished, trained_here, tmp_path):
    first = finished[0]
    trained_here(pairs | {"adapter_name_or_path": str(first)})
    run = read(pairs["output_dir"])
    assert run["losses"][0][1] == pytest.approx(0.6931, abs=1e-3)
    assert run["ran"]["reference"] == "the adapter that it started from"
    assert not (tmp_path / "run" / "adapter" / "ref").exists()
    assert weights(first).keys() == weights(pairs["output_dir"]).keys()
