"""A recipe under a launch config on a GPU, before it is launched:

does it fit, how long does it take, what helps.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from trl import SFTTrainer

from sftlab.config.launch import BF16_CAPABILITY, Launch, check_precision
from sftlab.config.parser import parse_recipe
from sftlab.config.recipe import Recipe
from sftlab.data.chat_template import encode, set_template
from sftlab.data.collator import TOKENS_MULTIPLE
from sftlab.data.samplers import row_lengths
from sftlab.data.sources import read_source
from sftlab.data.splits import Converter
from sftlab.data.tokenized_dataset import SPLITS, is_tokenized, open_tokens
from sftlab.fastpath.selection import FastPath, choose
from sftlab.planning.gpu_specs import GPU
from sftlab.planning.step_memory import Memory, Step, memory, step_of
from sftlab.planning.step_time import Pace, pace

# Rows of a data set that are read for their lengths.
SAMPLE = 400
MOST_ROWS = 2**14
# How far from the measured figure a plan may be.
LIMITS = {"memory": 0.05, "speed": 0.15}


class RowLengths(NamedTuple):
    """Training rows: how many (None:

    not known), the mean, spread and greatest of their tokens, where that is from.
    """

    count: int | None
    mean: float
    deviation: float
    longest: int
    source: str

    @property
    def attended(self) -> float:
        """Tokens of the row that the average token stands in."""
        return self.mean + self.deviation**2 / self.mean

    def largest(self, rows: int, micro_batches: int, packed: bool, steps: int) -> int:
        """Tokens of the largest micro-batch of `rows` rows that `steps` steps are likely to have,
        padding included.

        A step has `micro_batches`, of all processes together.
        """
        if not packed:
            return rows * self.longest
        # the largest of so many normal sums (Blom 1958); dealt evenly, a global batch shares its
        # spread out
        far = NormalDist().inv_cdf((steps - 0.375) / (steps + 0.25))
        spread = self.deviation * math.sqrt(rows / micro_batches)
        likely = min(rows * self.mean + far * spread, rows * self.longest)
        return math.ceil(likely / TOKENS_MULTIPLE) * TOKENS_MULTIPLE


class Forecast(NamedTuple):
    """What is expected of a recipe under a launch config:

    of its largest micro-batch, and of an average step.
    """

    gpu: GPU
    step: Step
    rows: RowLengths
    micro_batch: int
    steps: int | None
    memory: Memory
    pace: Pace

    @property
    def fits(self) -> bool:
        """Whether the GPU has the memory."""
        return self.memory.needed <= self.gpu.memory_gb * 2**30

    @property
    def step_seconds(self) -> float:
        """Of an optimizer step."""
        return self.step.accumulation * self.pace.seconds

    @property
    def rows_per_s(self) -> float:
        """Of all processes together."""
        return self.micro_batch * self.step.processes / self.pace.seconds

    @property
    def tokens_per_s(self) -> float:
        """Real tokens, of all processes together."""
        return self.rows_per_s * self.rows.mean

    @property
    def hours(self) -> float | None:
        """Of training, evaluation and saving left out.

        None where the number of steps is not known.
        """
        return None if self.steps is None else self.steps * self.step_seconds / 3600

    @property
    def total_flops(self) -> float | None:
        """Model FLOPs of the training, as if every token were in the loss."""
        if self.steps is None:
            return None
        flops = self.step.weights.flops
        rows = self.steps * self.step.accumulation * self.micro_batch * self.step.processes
        return rows * self.rows.mean * (flops.token + flops.loss_token)


def read_recipe(argv: list[str], launch: Launch, gpu: GPU, gpus: int | None) -> Recipe:
    """The recipe as sft.py would read it.

    ValueError also where the GPU lacks the precision, or GPUs lack.
    """
    if gpus is not None and launch.world_size > gpus:
        raise ValueError(
            f"the launch config starts {launch.world_size} processes and there are {gpus} GPUs: "
            "pass "
            f"--num_processes {gpus}"
        )
    if launch.hides_gpus:
        raise ValueError("the launch config runs on the CPU: plans are made for GPUs")
    check_precision(launch.precision, gpu.capability, gpu.name)
    return parse_recipe(argv, launch)


def no_kernels(gpu: GPU) -> str | None:
    """Why Triton's kernels do not run on a GPU; None where they do."""
    return (
        f"{gpu.name} is older than compute capability 8.0"
        if gpu.capability < BF16_CAPABILITY
        else None
    )


def foresee(
    recipe: Recipe, config: PreTrainedConfig, launch: Launch, gpu: GPU, rows: RowLengths
) -> Forecast:
    """The forecast of a parsed recipe."""
    fast = choose(recipe, config, launch, lambda: no_kernels(gpu))
    training, micro_batch = recipe.training, recipe.training.per_device_train_batch_size
    steps = training.max_steps if training.max_steps > 0 else None
    if steps is None and rows.count is not None:
        steps = int(rows.count // recipe.data.global_batch_size * training.num_train_epochs)
    step = step_of(recipe, config, launch, fast, 0, rows.attended)
    return _forecast(step, gpu, rows, micro_batch, training.gradient_accumulation_steps, steps)


def _forecast(
    step: Step, gpu: GPU, rows: RowLengths, micro_batch: int, accumulation: int, steps: int | None
) -> Forecast:
    many, step = step.processes * accumulation, replace(step, accumulation=accumulation)
    largest = replace(step, tokens=rows.largest(micro_batch, many, step.packed, steps or 1000))
    average = micro_batch * (rows.mean if step.packed else rows.longest)
    step = replace(step, tokens=round(average))
    return Forecast(gpu, step, rows, micro_batch, steps, memory(largest), pace(step, gpu))


def resized(forecast: Forecast, micro_batch: int, **changes: object) -> Forecast:
    """The forecast with another micro-batch at the same global batch, and a changed step."""
    accumulation = math.ceil(forecast.step.accumulation * forecast.micro_batch / micro_batch)
    step = replace(forecast.step, **changes)
    return _forecast(step, forecast.gpu, forecast.rows, micro_batch, accumulation, forecast.steps)


def most_rows(forecast: Forecast) -> int:
    """The largest micro-batch that fits; 0 where one row does not."""
    low, high = 0, 1
    while high <= MOST_ROWS and resized(forecast, high).fits:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if resized(forecast, middle).fits else (low, middle)
    return low


def remedies(recipe: Recipe, forecast: Forecast) -> Iterator[list[str]]:
    """Single changes that save memory, as fields for the command line."""
    if not recipe.training.gradient_checkpointing:
        yield ["--gradient_checkpointing=true"]
    if forecast.micro_batch > 1 and (rows := dividing(most_rows(forecast), forecast.micro_batch)):
        yield [
            f"--per_device_train_batch_size={rows}",
            f"--global_batch_size={recipe.data.global_batch_size}",
        ]
    if (
        not recipe.model.load_in_4bit
        and recipe.model.use_peft
        and forecast.step.precision == "bf16"
    ):
        yield [
            "--load_in_4bit=true",
            "--use_bnb_nested_quant=true",
            "--bnb_4bit_quant_storage=bfloat16",
        ]
    if "8bit" not in recipe.training.optim and forecast.step.strategy != "fsdp":
        yield ["--optim=adamw_bnb_8bit"]


def dividing(limit: int, rows: int) -> int:
    """The largest number up to `limit` that divides `rows`; 0 where there is none."""
    return next((n for n in range(min(limit, rows), 0, -1) if rows % n == 0), 0)


def measure_rows(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> RowLengths:
    """Lengths of the training rows: all of a tokenized data set, `SAMPLE` of a local file's.

    ValueError for a data set that is not on this machine.
    """
    data, training = recipe.data, recipe.training
    name, limit = str(data.dataset_name), training.max_length or np.iinfo(np.int64).max
    if is_tokenized(name):
        lengths = np.minimum(row_lengths(open_tokens(data)[0]), limit)
        return of_lengths(lengths, len(lengths), "its tokens")
    if not Path(name).exists():
        raise ValueError(
            f"data set {name} is not a file on this machine: pass --rows COUNT and --row_tokens "
            "MEAN, what a row has"
        )
    if data.dataset_streaming:
        raise ValueError(
            "the rows of a stream are not read for a plan: pass --row_tokens MEAN, what a row has"
        )
    source, shape = read_source(data)
    picked = np.unique(np.linspace(0, len(source) - 1, SAMPLE).astype(int))
    convert = Converter(shape, tuple(data.split_fractions), name)
    rows = convert(source[picked], picked.tolist())
    set_template(tokenizer, training.chat_template_path)
    train = [i for i, split in enumerate(rows["split"]) if split == SPLITS.index("train")]
    pairs = ({"prompt": rows["prompt"][i], "completion": rows["completion"][i]} for i in train)
    lengths = np.array(
        [len(encode(tokenizer, pair, training.max_length)["input_ids"]) for pair in pairs]
    )
    if not len(lengths):
        raise ValueError(
            f"none of {len(picked)} rows of {name} is a training row: see split_fractions"
        )
    count = round(len(source) * len(train) / len(picked))
    return of_lengths(lengths, count, f"{len(train)} of its rows")


def planned_memory(
    recipe: Recipe, launch: Launch, fast: FastPath, trainer: SFTTrainer
) -> dict[str, Any]:
    """The plan of a run that has been trained, by part in GB (2**30 bytes), for run.json.

    Why there is none.
    """
    lengths, training = row_lengths(trainer.train_dataset), recipe.training
    rows = of_lengths(lengths, len(lengths), "its tokens")
    many = launch.world_size * training.gradient_accumulation_steps
    tokens = rows.largest(
        training.per_device_train_batch_size, many, fast.packing, trainer.state.max_steps
    )
    try:
        plan = memory(step_of(recipe, trainer.model.config, launch, fast, tokens, rows.attended))
    except ValueError as error:
        return {"reason": str(error)}
    parts = {
        f"{name}_gb": round(size / 2**30, 3)
        for name, size in plan._asdict().items()
        if name != "at"
    }
    return {
        "allocated_gb": round(plan.allocated / 2**30, 3),
        **parts,
        "at": plan.at,
        "largest_tokens": tokens,
    }


def of_lengths(lengths: np.ndarray, count: int | None, source: str) -> RowLengths:
    """Returns the summary of rows with these lengths."""
    return RowLengths(
        count, float(lengths.mean()), float(lengths.std()), int(lengths.max()), source
    )
