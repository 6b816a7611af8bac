"""The ways to train that the campaign interrupts: fields, launch config, processes."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent.parent
FIELDS = {
    "max_steps": 24,
    "save_steps": 5,
    "logging_steps": 4,
    "global_batch_size": 16,
    "per_device_train_batch_size": 16,
    "max_length": 128,
    "warmup_steps": 2,
    "lora_r": 4,
    "lora_alpha": 8,
    "learning_rate": 0.003,
    "disable_tqdm": "true",
}
QLORA = {
    "load_in_4bit": "true",
    "use_bnb_nested_quant": "true",
    "bnb_4bit_quant_type": "nf4",
    "dtype": "bfloat16",
    "bnb_4bit_quant_storage": "bfloat16",
    "optim": "paged_adamw_8bit",
}
BEST = {
    "load_best_model_at_end": "true",
    "eval_strategy": "steps",
    "eval_steps": 5,
    "save_total_limit": 1,
    "metric_for_best_model": "eval_loss",
}
# preference tuning, of a new adapter against the base model
PAIRS = {"method": "dpo"}
DROPPED = {"lora_dropout": 0.1}
TWO_RANKS = {"per_device_train_batch_size": 8}
# Nothing but the number of steps decides when a GPU's run logs, saves and ends.
ON_A_GPU = DROPPED | {"deterministic": "true"}


class Case(NamedTuple):
    """A way to train; `config` names a launch config of a GPU.

    There each start imports its libraries anew: a process that has looked at a GPU is not forked.
    """

    fields: dict[str, Any] = {}
    processes: int = 1
    prepare: Callable[[], None] | None = None
    precision: str = "no"
    config: str | None = None


def packed_on_a_cpu() -> None:
    """Sampler, collator and loss of packed rows, with plain attention instead of GPU kernels."""
    from packed_training import reference_attention

    from sftlab.fastpath import varlen_attention

    varlen_attention.why_not = lambda layers, longest: None
    varlen_attention.varlen_attention = reference_attention


CPU_CASES = {
    "one process": Case(),
    "dropout 0.1": Case(DROPPED),
    "DDP": Case(DROPPED, processes=2),
    # gradients of more than a megabyte, which is where DDP divides them among buckets
    "DDP of 3": Case(DROPPED | {"lora_r": 512, "global_batch_size": 12}, processes=3),
    "accumulation 4": Case(DROPPED | {"per_device_train_batch_size": 4}),
    "packed": Case(
        DROPPED | {"packing": "true", "per_device_train_batch_size": 8}, prepare=packed_on_a_cpu
    ),
    "packed DDP": Case(
        DROPPED | TWO_RANKS | {"packing": "true"}, processes=2, prepare=packed_on_a_cpu
    ),
    "QLoRA": Case(DROPPED | QLORA, precision="bf16"),
    "best model": Case(DROPPED | BEST),
    "DPO": Case(PAIRS),
    "DPO DDP": Case(PAIRS | TWO_RANKS, processes=2),
    "DPO packed DDP": Case(
        PAIRS | TWO_RANKS | {"packing": "true"}, processes=2, prepare=packed_on_a_cpu
    ),
}
GPU_CASES = {
    "GPU bf16": Case(ON_A_GPU, config="single", precision="bf16"),
    "GPU fp16": Case(ON_A_GPU, config="single", precision="fp16"),
    "GPU fp8": Case(ON_A_GPU, config="fp8", precision="fp8"),
    "GPU QLoRA": Case(ON_A_GPU | QLORA, config="single", precision="bf16"),
    "GPU DDP bf16": Case(ON_A_GPU | TWO_RANKS, 2, config="ddp", precision="bf16"),
    "GPU FSDP2 bf16": Case(ON_A_GPU | TWO_RANKS, 2, config="fsdp", precision="bf16"),
    "GPU FSDP2 fp8": Case(ON_A_GPU | TWO_RANKS, 2, config="fsdp", precision="fp8"),
}
CASES = CPU_CASES | GPU_CASES
_EVERYWHERE = {
    "ACCELERATE_DYNAMO_BACKEND": "NO",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "HF_HUB_OFFLINE": "1",
    "MASTER_ADDR": "127.0.0.1",
}


def environment(case: Case) -> dict[str, str]:
    """Returns the variables that `accelerate launch` would export for a rank of this case."""
    if case.config is None:
        hidden = {"CUDA_VISIBLE_DEVICES": "-1,-1", "ACCELERATE_MIXED_PRECISION": case.precision}
        return _EVERYWHERE | hidden
    return dict(_exported(case.config, case.processes, case.precision)) | _EVERYWHERE


@cache
def _exported(config: str, processes: int, precision: str) -> dict[str, str]:
    # elsewhere, for accelerate looks at the GPUs, and a process that has may not be forked
    code = (
        "import json, sys; from sftlab.config.launch import exported; "
        "print(json.dumps(exported(sys.argv[1], json.loads(sys.argv[2]))))"
    )
    flags = {"num_processes": processes, "mixed_precision": precision}
    path = f"accelerate_configs/{config}.yaml"
    command = [sys.executable, "-c", code, path, json.dumps(flags)]
    seen = os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(processes)))}
    done = subprocess.run(command, cwd=ROOT, env=seen, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return found | {"CUDA_VISIBLE_DEVICES": seen["CUDA_VISIBLE_DEVICES"]}
