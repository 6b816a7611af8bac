"""A launch config is read before accelerate reads it: a mistake is one sentence."""

import dataclasses

import pytest
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.commands.launch import launch_command_parser
from conftest import ROOT

from sftlab.config.launch import exported
from sftlab.config.launch_file import (
    FSDP_CHOICES,
    FSDP_OTHERS,
    FSDP_SWITCHES,
    KEYS,
    read_launch_config,
)
from sftlab.yaml_files import read_yaml

FOLDER = ROOT / "accelerate_configs"
WRONG = [
    ("num_procesess: 2", "unknown key 'num_procesess'; did you mean 'num_processes'?"),
    ("gpus: 2", "unknown key 'gpus'"),
    ("num_processes: two", "num_processes is 'two': expected a whole number of at least 1"),
    ("num_processes: 0", "num_processes is 0"),
    ("num_processes: true", "num_processes is True"),
    ("num_machines: 1.5", "num_machines is 1.5"),
    ("distributed_type: MULTI_GPUS", "distributed_type is 'MULTI_GPUS': expected NO or MULTI_CPU"),
    ("distributed_type: DEEPSPEED", "distributed_type is 'DEEPSPEED'"),
    ("distributed_type: null", "has no distributed_type"),
    ("mixed_precision: fp4", "mixed_precision is 'fp4': expected no or fp16 or bf16 or fp8"),
    ("mixed_precision: [bf16]", "mixed_precision is ..bf16..: expected"),
    ("compute_environment: AMAZON_SAGEMAKER", "compute_environment is 'AMAZON_SAGEMAKER'"),
    ("fsdp_config: full", "fsdp_config is 'full': expected lines of name: value"),
    ("deepspeed_config: {zero_stage: 3}", "deepspeed_config is set, and DeepSpeed is not"),
    ("main_process_port: 99999", "main_process_port is 99999: expected a port"),
    ("fsdp_config: {fsdp_version: '3'}", "fsdp_config.fsdp_version is '3': expected 1 or 2"),
    ("fsdp_config: {fsdp_reshard: true}", "fsdp_config has the unknown key 'fsdp_reshard': expec"),
    ("fsdp_config: {offload_params: 1}", ".*'offload_params'; did you mean 'fsdp_offload_params'"),
    ("fsdp_config: {fsdp_offload_params: 1}", ".*params is 1: expected true or false"),
    ("fsdp_config: {fsdp_min_num_params: [1]}", ".*params is .1.: expected a whole number"),
    ("use_cpu: perhaps", "use_cpu is 'perhaps': expected true or false"),
]


@pytest.mark.parametrize(("line", "said"), WRONG)
def test_a_malformed_launch_config_names_file_and_key(tmp_path, line, said):
    kept = read_yaml(FOLDER / "single.yaml")
    lines = [f"{k}: {v}" for k, v in kept.items() if k != line.split(":")[0]]
    path = tmp_path / "mine.yaml"
    path.write_text("\n".join([*lines, line]), encoding="utf-8")
    with pytest.raises(ValueError, match=f"mine.yaml:? {said}"):
        exported(path)


def test_every_key_of_accelerate_is_known():
    assert {field.name for field in dataclasses.fields(ClusterConfig)} == set(KEYS)


def test_every_line_of_fsdp_config_that_accelerate_takes_is_known():
    known = vars(launch_command_parser().parse_args(["x.py"]))
    ours = {*FSDP_SWITCHES, *FSDP_CHOICES, *FSDP_OTHERS}
    assert {name for name in known if name.startswith("fsdp_")} == ours


def test_no_two_launch_configs_are_the_same():
    configs = {path.stem: read_launch_config(path) for path in sorted(FOLDER.glob("*.yaml"))}
    same = [(a, b) for a in configs for b in configs if a < b and configs[a] == configs[b]]
    assert same == [] and len(configs) == 8
