"""Does a recipe fit a GPU, how long will it take, and what would make it fit?"""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig, Trainer

from sftlab.config.launch import BF16_CAPABILITY, Launch, check_precision
from sftlab.config.parser import parse_recipe
from sftlab.config.recipe import Recipe
from sftlab.fastpath.cuda_graphs import FOR_OTHERS
from sftlab.fastpath.selection import FastPath, choose
from sftlab.planning.gpu_specs import GPU, gpu_seen_as
from sftlab.planning.recipe_step import step_of, step_of_trainer
from sftlab.planning.row_lengths import RowLengths, of_encoded
from sftlab.planning.step import Step
from sftlab.planning.step_memory import Memory, memory
from sftlab.planning.step_time import StepTime, is_captured, step_time
from sftlab.tables import counted

GB = 2**30
MOST_ROWS = 2**14


class Plan(NamedTuple):
    """What is expected of a recipe under a launch config on a GPU.

    `memory` is of the largest micro-batch, `time` of an average one.
    """

    gpu: GPU
    step: Step
    rows: RowLengths
    micro_batch: int
    memory: Memory
    time: StepTime

    @property
    def steps(self) -> int | None:
        """Optimizer steps of the training; None where the number of rows is unknown."""
        return self.step.steps

    @property
    def fits(self) -> bool:
        """Whether the GPU has the memory."""
        return self.memory.needed <= self.gpu.memory_gb * GB

    @property
    def step_seconds(self) -> float:
        """Seconds of an optimizer step."""
        return self.step.accumulation * self.time.seconds

    @property
    def rows_per_s(self) -> float:
        """Rows a second of all processes together."""
        return self.micro_batch * self.step.processes / self.time.seconds

    @property
    def tokens_per_s(self) -> float:
        """Real tokens a second of all processes together."""
        return self.rows_per_s * self.rows.mean

    @property
    def hours(self) -> float | None:
        """Hours of training without evaluation and saving; None where `steps` is unknown."""
        if self.steps is None:
            return None
        return (self.steps * self.step_seconds + self.reference_seconds) / 3600

    @property
    def reference_seconds(self) -> float:
        """Seconds before the first step in which the reference of all rows is computed."""
        if not self.step.reference_once or self.rows.count is None:
            return 0.0
        both = step_time(replace(self.step, reference=True), self.gpu).seconds
        return (
            self.rows.count / (self.micro_batch * self.step.processes) * (both - self.time.seconds)
        )

    @property
    def total_flops(self) -> float | None:
        """Model FLOPs of the training, as if every token were in the loss."""
        if self.steps is None:
            return None
        flops = self.step.weights.flops
        rows = self.steps * self.step.accumulation * self.micro_batch * self.step.processes
        # of a frozen weight's 4 FLOPs, 2 are the forward's
        forward = rows * self.step.reference + (self.rows.count or 0) * self.step.reference_once
        return (rows + forward / 2) * self.rows.mean * (flops.token + flops.loss_token)


def read_recipe(argv: list[str], launch: Launch, gpu: GPU, gpus: int | None) -> Recipe:
    """Returns the recipe as sft.py would read it.

    Raises ValueError also for a GPU without the precision, and for too few GPUs.
    """
    if gpus is not None and launch.world_size > gpus:
        raise ValueError(
            f"the launch config starts {launch.world_size} processes and there "
            f"{'is' if gpus == 1 else 'are'} {counted(gpus, 'GPU')}: "
            f"pass --num_processes {gpus}"
        )
    if launch.hides_gpus:
        raise ValueError(
            "the launch config runs on the CPU, and plans are made for GPUs: pass --config_file "
            "accelerate_configs/single.yaml"
        )
    check_precision(launch.precision, gpu.capability, gpu.name)
    return parse_recipe(argv, launch)


def no_kernels(gpu: GPU) -> str | None:
    """Returns why Triton's kernels do not run on a GPU; None where they do."""
    if gpu.capability < BF16_CAPABILITY:
        return f"{gpu.name} is older than compute capability 8.0"
    return None


def make_plan(
    recipe: Recipe, config: PreTrainedConfig, launch: Launch, gpu: GPU, rows: RowLengths
) -> Plan:
    """Returns the plan of a parsed recipe."""
    fast = choose(recipe, config, launch, lambda: no_kernels(gpu))
    training = recipe.training
    step = step_of(recipe, config, launch, fast, 0, rows)
    micro_batch, accumulation = (
        training.per_device_train_batch_size,
        training.gradient_accumulation_steps,
    )
    return _plan(step, gpu, rows, micro_batch, accumulation)


def _plan(step: Step, gpu: GPU, rows: RowLengths, micro_batch: int, accumulation: int) -> Plan:
    many, step = step.processes * accumulation, replace(step, accumulation=accumulation)
    largest = replace(step, tokens=rows.largest(micro_batch, many, step.packed, step.steps or 1000))
    average, needed = micro_batch * (rows.mean if step.packed else rows.longest), memory(largest)
    step = replace(step, tokens=round(average))
    room = needed.needed <= (1 - FOR_OTHERS) * gpu.memory_gb * GB  # nothing is captured without
    captured = room and is_captured(step, gpu)
    return Plan(gpu, step, rows, micro_batch, needed, step_time(step, gpu, captured))


def resized(plan: Plan, micro_batch: int, **changes: object) -> Plan:
    """Returns the plan with another micro-batch at the same global batch.

    `changes` are changed fields of its step.
    """
    accumulation = math.ceil(plan.step.accumulation * plan.micro_batch / micro_batch)
    step = replace(plan.step, **changes)
    return _plan(step, plan.gpu, plan.rows, micro_batch, accumulation)


def most_rows(plan: Plan) -> int:
    """Returns the largest micro-batch that fits; 0 where one row does not."""
    low, high = 0, 1
    while high <= MOST_ROWS and resized(plan, high).fits:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if resized(plan, middle).fits else (low, middle)
    return low


def remedies(recipe: Recipe, plan: Plan) -> Iterator[list[str]]:
    """Give single changes that save memory, as recipe fields for the command line."""
    if not recipe.training.gradient_checkpointing:
        yield ["--gradient_checkpointing=true"]
    if plan.micro_batch > 1 and (rows := largest_divisor(plan.micro_batch, most_rows(plan))):
        yield [
            f"--per_device_train_batch_size={rows}",
            f"--global_batch_size={recipe.data.global_batch_size}",
        ]
    model = recipe.model
    sharded_fp8 = plan.step.precision == "fp8" and plan.step.strategy == "fsdp"
    rounds = plan.step.precision in ("bf16", "fp8") and not sharded_fp8
    if not model.load_in_4bit and model.use_peft and rounds:
        yield [
            "--load_in_4bit=true",
            "--use_bnb_nested_quant=true",
            "--bnb_4bit_quant_storage=bfloat16",
        ]
    if "8bit" not in recipe.training.optim and plan.step.strategy != "fsdp":
        yield ["--optim=adamw_bnb_8bit"]


def largest_divisor(number: int, limit: int) -> int:
    """Returns the largest divisor of `number` up to `limit`; 0 where there is none."""
    return next((n for n in range(min(limit, number), 0, -1) if number % n == 0), 0)


def captures_by_itself(recipe: Recipe, launch: Launch, fast: FastPath, trainer: Trainer) -> bool:
    """Returns whether a training on this GPU captures its micro-batches where it is not asked."""
    gpu = gpu_seen_as(torch.cuda.get_device_name()) if fast.may_capture_step else None
    if gpu is None or not fast.fused_loss:
        return False
    return is_captured(step_of_trainer(recipe, launch, fast, trainer), gpu)


def planned_memory(
    recipe: Recipe, launch: Launch, fast: FastPath, trainer: Trainer
) -> dict[str, Any]:
    """Returns the memory plan of a run after its training, by part in GB, for run.json.

    Where no plan can be made, it has the reason instead.
    """
    rows, training = of_encoded(trainer.train_dataset), recipe.training
    many = launch.world_size * training.gradient_accumulation_steps
    tokens = rows.largest(
        training.per_device_train_batch_size, many, fast.packing, trainer.state.max_steps
    )
    try:
        step = step_of(recipe, trainer.model.config, launch, fast, tokens, rows)
        planned = memory(step)
    except ValueError as error:
        return {"reason": str(error)}
    parts = {
        f"{name}_gb": round(size / GB, 3)
        for name, size in planned._asdict().items()
        if name != "at"
    }
    allocated = {"allocated_gb": round(planned.allocated / GB, 3)}
    return {**allocated, **parts, "at": planned.at, "largest_tokens": tokens}
