"""A training goes on from an adapter that another one made."""

import pytest
import torch
from conftest import read
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
