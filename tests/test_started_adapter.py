"""A training goes on from an adapter that another one made."""

import shutil

import pytest
import torch
from conftest import copy_of, pair_rows, read, write_jsonl
from preference_runs import pair_fields
from safetensors.torch import load_file


def weights(folder):
    return load_file(f"{folder}/adapter/adapter_model.safetensors")


def test_a_training_goes_on_from_the_weights_of_another(finished, fields, trained_here, tmp_path):
    first, own, _ = finished
    still = own | {"output_dir": str(tmp_path / "still"), "adapter_name_or_path": str(first)}
    still |= {"max_steps": "1", "learning_rate": "1e-12", "warmup_steps": "0"}
    trained_here(still)
    before, after = weights(first), weights(tmp_path / "still")
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[name], after[name], atol=1e-9) for name in before)
    assert any(before[name].abs().max() > 1e-4 for name in before if "lora_B" in name)
    found = read(tmp_path / "still")
    assert found["started_from"]["adapter"] == str(first / "adapter")
    on = read(first)["measured"]["validation_loss"]
    assert found["measured"]["validation_loss"] == pytest.approx(on, rel=1e-6)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"lora_r": "4"}, "lora_r is 4, and the adapter in .* has 16: give the adapter's"),
        ({"use_rslora": "true"}, "use_rslora is True, and the adapter"),
        ({"adapter_name_or_path": "nowhere"}, "nowhere not found: give a run's directory"),
        ({"use_peft": "false"}, "adapter_name_or_path needs use_peft"),
    ],
)
def test_an_adapter_of_another_shape_is_refused(more, message, finished, fields, train_here):
    done = train_here(fields | {"adapter_name_or_path": str(finished[0])} | more)
    assert done.returncode
    assert done.stderr.count("error: ") == 1
    with pytest.raises(ValueError, match=message):
        raise ValueError(done.stderr)


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_rows_that_the_run_before_is_tested_on_are_not_trained_on(
    finished, fields, base, pairs_file, train_here, tmp_path, method
):
    own = pair_fields(base, pairs_file, tmp_path / "run") if method == "dpo" else fields
    other = {"split_fractions": ["1", "0", "0"], "adapter_name_or_path": str(finished[0])}
    done = train_here(own | other)
    assert done.returncode
    assert "training rows ask what the test split of" in done.stderr
    assert "give both trainings the same split_fractions" in done.stderr
    assert not (tmp_path / "run" / "run.json").exists()


def test_where_the_data_of_the_run_before_are_gone_it_is_said(
    finished, base, tmp_path, trained_here
):
    before = copy_of(finished[0], tmp_path / "before")
    record = (before / "run.json").read_text()
    data = read(before)["recipe"]["dataset_name"]
    data = data[0] if isinstance(data, list) else data
    (before / "run.json").write_text(record.replace(data, str(tmp_path / "gone.jsonl")))
    pairs = write_jsonl(tmp_path / "pairs.jsonl", pair_rows(60))
    own = pair_fields(base, pairs, tmp_path / "run") | {"max_steps": "1"}
    done = trained_here(own | {"adapter_name_or_path": str(before)})
    assert "note: whether training rows ask what the test rows of" in done.stdout
    # an adapter without its run has no test rows
    shutil.copytree(before / "adapter", tmp_path / "bare")
    bare = own | {"adapter_name_or_path": str(tmp_path / "bare"), "overwrite": "true"}
    assert "note: whether" not in trained_here(bare).stdout
