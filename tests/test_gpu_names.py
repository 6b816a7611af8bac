"""A GPU is found by the names that people give it, and never taken for another one."""

import pytest

from sftlab.planning.gpu_specs import GPUS, find_gpu

NAMES = {
    "4090": "rtx4090",
    "RTX 4090": "rtx4090",
    "rtx-4090": "rtx4090",
    "NVIDIA GeForce RTX 4090": "rtx4090",
    "3090": "rtx3090",
    "A100 80GB": "a100-80",
    "a100-40gb": "a100-40",
    "NVIDIA A100-SXM4-40GB": "a100-40",
    "H100 SXM": "h100-80",
    "H100 80GB": "h100-80",
    "h100 pcie": "h100-pcie",
    "nvidia H200": "h200",
    "Tesla T4": "t4",
    "v100 16GB": "v100-16",
    "RTX 6000 Ada": "rtx6000-ada",
    "L4": "l4",
    "L40S": "l40s",
}
OTHERS = ("L40", "A10G", "A1", "H100 NVL", "GH200", "RTX A6000", "RTX 4090 Laptop", "40", "", "tpu")


@pytest.mark.parametrize(("name", "found"), [*NAMES.items(), *((one, one) for one in GPUS)])
def test_the_names_of_a_gpu(name, found):
    assert find_gpu(name).name == found


@pytest.mark.parametrize(("name", "both"), [("A100", "a100-80 or a100-40"), ("v100", "v100-32 or")])
def test_a_name_of_two_gpus_is_asked_about(name, both):
    with pytest.raises(ValueError, match=f"--gpu {name} may be {both}.*: name one"):
        find_gpu(name)


@pytest.mark.parametrize("name", OTHERS)
def test_another_gpu_is_not_guessed(name):
    with pytest.raises(ValueError, match="no figures for GPU"):
        find_gpu(name)
