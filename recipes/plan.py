"""Does a recipe fit a GPU, how fast will it train, and what would make it fit? Ask before a launch.

python recipes/plan.py --config recipes/llama3.2-1b/attn_r16.yaml
    --config_file accelerate_configs/single.yaml [--num_processes n] [--gpus n] [--host_us x]
    [--gpu h200|h100-80|a100-40|...|here] [--compare] [--any_field value]
python recipes/plan.py --random llama3.2-1b --rows 38105 --row_tokens 315
    --config RECIPE.yaml --config_file LAUNCH.yaml

A plan needs only the model's config, no weights and no GPU. It reads row lengths from a local data
set. For a data set on the hub, pass `--rows` and `--row_tokens` (the tokens of an average row).
A preference pair is a row of both sides.
`--random` plans a published shape instead of the recipe's model; rows then count as `max_length`
tokens, unless `--row_tokens` says otherwise. `--compare` plans for every launch config.

Short steps wait for the host. recipes/doctor.py prints the value of `--host_us`, and `--gpu here`
measures it.
"""

import sftlab.startup.filter_warnings  # noqa: I001  (before the libraries that it quiets)
import sftlab.startup.preload  # noqa: F401

import argparse
import math
import contextlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from transformers import LlamaConfig, PreTrainedConfig

from sftlab.config.launch import Launch, exported, launched
from sftlab.config.launch_file import read_launch_config
from sftlab.config.recipe import Recipe
from sftlab.config.validation import is_bitsandbytes
from sftlab.exit_messages import mistakes_in_one_line, short
from sftlab.models.adapter_names import check_adapter_names
from sftlab.models.loading import load_config, load_tokenizer
from sftlab.models.random_models import MODEL_SHAPES
from sftlab.paths import ROOT
from sftlab.planning.first_settings import rank_line, rate_lines, targets_line
from sftlab.planning.gpu_specs import GPU, GPUS, MEASURED_ON, find_gpu
from sftlab.planning.known_accuracy import known_accuracy
from sftlab.planning.plan import GB, MOST_ROWS, Plan, make_plan, most_rows, read_recipe, remedies
from sftlab.planning.row_lengths import RowLengths, measure_rows
from sftlab.script_options import Options
from sftlab.tables import aligned, figure

ACCURACY = ROOT / "results" / "plan_accuracy" / "plan_accuracy.csv"
PARTS = (
    "parameters",
    "adapter",
    "gradients",
    "optimizer_state",
    "activations",
    "logits",
    "communication",
    "workspace",
)
COMPARED = (
    "launch config",
    "GPUs",
    "peak GB",
    "needed GB",
    "fits",
    "largest micro-batch",
    "real tokens/s",
    "time",
)


class Request:
    """The command line: what is planned, and on what."""

    def __init__(self, argv: Sequence[str]) -> None:
        self.given, self.fields = parsed(argv)
        self.gpu: GPU = find_gpu(self.given.gpu)
        if self.given.host_us:
            self.gpu = replace(self.gpu, host_us=self.given.host_us)
        self._rows: RowLengths | None = None

    def flags(self) -> dict[str, Any]:
        """Returns accelerate's flags."""
        names = ("num_processes", "mixed_precision")
        asked = {name: getattr(self.given, name) for name in names}
        return {name: value for name, value in asked.items() if value is not None}

    def plan(
        self, file: str, flags: Mapping[str, Any], more: Sequence[str] = ()
    ) -> tuple[Recipe, Plan]:
        """Returns the recipe, with `more` fields, and its plan under a launch config."""
        with launched(exported(file, flags)) as launch:
            recipe = self._recipe([*self.fields, *more], launch)
            config, rows = self._config(recipe), self._row_lengths(recipe)
            if recipe.model.use_peft:
                trust = recipe.training.trust_remote_code
                check_adapter_names(recipe.model, config, launch, trust)
            return recipe, make_plan(recipe, config, launch, self.gpu, rows)

    def _recipe(self, fields: Sequence[str], launch: Launch) -> Recipe:
        """Returns the recipe, which needs no data set where the rows are given."""
        try:
            return read_recipe(fields, launch, self.gpu, self.given.gpus)
        except ValueError as error:
            if self.given.row_tokens is None or not str(error).startswith(
                "dataset_name is missing"
            ):
                raise
        named = [*fields, "--dataset_name", "rows as given"]
        return read_recipe(named, launch, self.gpu, self.given.gpus)

    def _config(self, recipe: Recipe) -> PreTrainedConfig:
        training, model = recipe.training, recipe.model
        if self.given.random:
            changes = training.model_init_kwargs or {}
            return LlamaConfig(**MODEL_SHAPES[self.given.random] | changes)
        name, revision = model.model_name_or_path, model.model_revision
        return load_config(name, revision, training, with_weights=False)

    def _row_lengths(self, recipe: Recipe) -> RowLengths:
        if self._rows is None:
            given = self.given
            if given.row_tokens is None and given.rows is None and not given.random:
                model, training = recipe.model, recipe.training
                tokenizer = load_tokenizer(model.model_name_or_path, model.model_revision, training)
                self._rows = measure_rows(recipe, tokenizer)
            else:
                sides = 2 if recipe.training.method == "dpo" else 1
                longest = recipe.training.max_length
                self._rows = given_rows(given.rows, given.row_tokens, longest, sides)
        return self._rows


def parsed(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Returns the options, and the words that are recipe fields; ValueError for a mistake."""
    parser = Options(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--config_file", default="accelerate_configs/single.yaml", help="launch config")
    add("--num_processes", type=int)
    add("--mixed_precision")
    add("--gpu", default=MEASURED_ON, help=f"{', '.join(GPUS)}, or here")
    add("--gpus", type=int, help="how many there are")
    add("--host_us", type=float, help="microseconds of a small operation on the GPUs' host")
    add("--compare", action="store_true", help="plan under every launch config")
    add("--random", metavar="SHAPE", help=f"{', '.join(MODEL_SHAPES)} instead of the model")
    add("--rows", type=int, help="training rows")
    add("--row_tokens", type=float, help="tokens of an average row")
    given, fields = parser.parse_known_args(argv)
    if not any(word.startswith("--config=") or word == "--config" for word in fields):
        raise ValueError(
            "--config is missing: give a recipe, for example recipes/llama3.2-1b/attn_r16.yaml"
        )
    if given.random and given.random not in MODEL_SHAPES:
        raise ValueError(f"no shape {given.random!r}: there are {', '.join(MODEL_SHAPES)}")
    if given.host_us is not None and not 0 < given.host_us < math.inf:
        raise ValueError(
            f"--host_us {given.host_us}: give the microseconds that recipes/doctor.py says"
        )
    for name in ("num_processes", "gpus", "rows", "row_tokens"):
        value = getattr(given, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name} {value:g}: give a number above 0")
    return given, fields


def given_rows(
    count: int | None, mean: float | None, longest: int | None, sides: int
) -> RowLengths:
    """Returns the row lengths of `--rows` and `--row_tokens`, up to `max_length` tokens a side.

    A pair has two `sides`, and a row one.
    """
    if longest is None:
        raise ValueError("max_length is null, so the longest row is not known: pass --max_length")
    longest *= sides
    source = "as given" if mean else "unknown lengths, so every row counts as max_length"
    mean = min(mean or longest, longest)
    # the lengths of texts deviate about half as far as their mean
    deviation = min(0.5 * mean, longest - mean)
    return RowLengths(count, mean, deviation, longest, source, sides)


def main(argv: list[str]) -> None:
    """Plan and print."""
    try:
        request = Request(argv)
        if request.given.compare:
            return print(compared(request))
        recipe, plan = request.plan(request.given.config_file, request.flags())
        print("\n".join([*notes_of(recipe), described(request, recipe, plan)]))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(short(f"error: {error}"))


def described(request: Request, recipe: Recipe, plan: Plan) -> str:
    """Returns the plan in words and tables."""
    step, rows, memory = plan.step, plan.rows, plan.memory
    how = "measured" if request.given.gpu == "here" else "assumed"
    how = "as given" if request.given.host_us else how
    measured_on, near = known_accuracy(plan.gpu.name, ACCURACY)
    sure = f"accuracy on {measured_on}: memory {near['memory']}, speed {near['speed']}"
    if plan.gpu.name != MEASURED_ON:
        sure += f"; {plan.gpu.name} is extrapolated from its published rates"
    if step.shape.experts:
        sure = "mixtures of experts were not measured: memory and speed are arithmetic"
    if step.measured:
        sure = (
            "layers of this kind were not measured on a GPU: memory is counted, speed is arithmetic"
        )
        if step.measured.recurrent:
            sure += "; recurrences are planned as torch computes them, and kernels need less"
    lines = [
        f"{step.processes} x {plan.gpu.name}, {step.precision}, {step.strategy}",
        f"  rows: {rows.source}; {rows.mean:,.0f} tokens on average, {rows.longest:,} at most"
        + "; a pair is a row of both sides" * (step.reference or step.reference_once),
        f"  global batch: {plan.micro_batch * step.accumulation * step.processes} rows = "
        f"micro-batch {plan.micro_batch} x accumulation {step.accumulation} x "
        f"{step.processes} processes",
        f"  host: {request.gpu.host_us:g} us a small operation ({how})",
        "",
        f"peak memory of a GPU, GB (reached in the {memory.at})",
        aligned(memory_rows(plan)),
        "",
        verdict(request, recipe, plan),
        "",
        "speed",
        aligned(speed_rows(plan)),
        "",
        *first_lines(recipe, plan),
        sure,
    ]
    return "\n".join(lines)


def first_lines(recipe: Recipe, plan: Plan) -> list[str]:
    """Returns what sweeps of fine-tuning say of the recipe's settings: nothing of pairs."""
    if recipe.training.method == "dpo":
        return []
    weights, model = plan.step.weights, recipe.model
    rate = rate_lines(
        recipe.training.learning_rate,
        weights.trained + weights.frozen,
        model.use_peft,
        model.lora_alpha,
        model.use_rslora,
        recipe.training.loraplus_lr_ratio,
    )
    if not model.use_peft:
        return [*rate, ""]
    return [*rate, rank_line(model.lora_r), targets_line(model.lora_target_modules), ""]


def memory_rows(plan: Plan) -> list[tuple[str, str]]:
    """Returns the memory by part, in GB."""
    memory = plan.memory
    return [
        *((name.replace("_", " "), gb(getattr(memory, name))) for name in PARTS),
        ("allocated", gb(memory.allocated)),
        ("fragmentation", gb(memory.fragmentation)),
        ("needed, CUDA's context too", gb(memory.needed)),
        ("the GPU has", f"{plan.gpu.memory_gb:.2f}"),
    ]


def speed_rows(plan: Plan) -> list[tuple[str, str]]:
    """Returns speed, time and FLOPs."""
    waits = "the GPU is the bottleneck"
    if plan.time.bound == "host":
        waits = "the host is the bottleneck: larger micro-batches are faster"
    if plan.time.captured:
        waits += "; steps are captured"
    speed = f"{figure(plan.tokens_per_s)}, {figure(plan.rows_per_s)}"
    lines = [
        ("real tokens/s, rows/s", speed),
        ("a step, s", f"{figure(plan.step_seconds)} ({waits})"),
    ]
    if plan.hours is None:
        return [*lines, ("time", "unknown: pass --rows COUNT, the training rows, or --max_steps")]
    return [
        *lines,
        ("steps", f"{plan.steps:,}"),
        ("time", clock(plan.hours)),
        ("GPU-hours", figure(plan.hours * plan.step.processes)),
        ("model FLOPs", f"{plan.total_flops:.3g}"),
    ]


def verdict(request: Request, recipe: Recipe, plan: Plan) -> str:
    """Returns whether it fits, and single changes that would make it fit, the fastest first."""
    most = most_rows(plan)
    if plan.fits:
        rows = f"{most} rows" if most < MOST_ROWS else f"more than {MOST_ROWS:,} rows"
        return f"fits; the largest micro-batch that does is {rows}"
    short = plan.memory.needed / GB - plan.gpu.memory_gb
    smaller = f"; a micro-batch of {most} rows would fit" if most else ""
    lines = [f"does NOT fit: {short:.1f} GB short{smaller}"]
    helping = sorted(
        (changed.step_seconds * changed.step.processes, words, changed)
        for words, changed in changes(request, recipe, plan)
        if changed.fits
    )
    if not helping:
        no_remedy = "no single change makes it fit: combine several, or take a larger GPU"
        return "\n".join([*lines, no_remedy])
    lines.append("single changes that make it fit, the fewest GPU-seconds a step first:")
    table = [
        [words, f"{gb(changed.memory.needed)} GB", f"{figure(seconds)} GPU-s a step"]
        for seconds, words, changed in helping
    ]
    return "\n".join([*lines, aligned(table)])


def changes(request: Request, recipe: Recipe, plan: Plan) -> list[tuple[str, Plan]]:
    """Returns single changes that save memory, as words for the command line, with their plans."""
    file, flags = request.given.config_file, request.flags()
    tried = [(" ".join(words), file, flags, words) for words in remedies(recipe, plan)]
    several = max(2, plan.step.processes)
    enough = request.given.gpus is None or request.given.gpus >= several
    if plan.step.strategy != "fsdp" and enough:
        sharded, more = "accelerate_configs/fsdp.yaml", flags | {"num_processes": several}
        words = f"--config_file {sharded} --num_processes {several}"
        tried.append((words, sharded, more, fsdp_fields(recipe)))
    found = []
    for words, *change in tried:
        with contextlib.suppress(ValueError):  # the recipe refuses this change
            found.append((words, request.plan(*change)[1]))
    return found


def fsdp_fields(recipe: Recipe) -> list[str]:
    """Returns what a recipe needs under FSDP2: an optimizer that updates sharded parameters."""
    return ["--optim=adamw_torch_fused"] if is_bitsandbytes(recipe.training.optim) else []


def compared(request: Request) -> str:
    """Returns a table of the recipe under every launch config for GPUs."""
    recipe, refused, table = None, {}, [list(COMPARED)]
    for path in sorted((ROOT / "accelerate_configs").glob("*.yaml")):
        if path.stem.startswith("cpu"):
            continue
        config = read_launch_config(path)
        several = (config.get("num_processes") or 1) > 1
        sharded = config["distributed_type"] == "FSDP"
        flags = {k: v for k, v in request.flags().items() if k == "num_processes" and several}
        try:
            more = fsdp_fields(recipe) if recipe and sharded else []
            recipe, plan = request.plan(str(path), flags, more)
        except ValueError as error:
            refused[path.stem] = str(error)
            continue
        needed = [gb(plan.memory.allocated), gb(plan.memory.needed), "yes" if plan.fits else "NO"]
        hours = "unknown" if plan.hours is None else clock(plan.hours)
        speed = [str(most_rows(plan)), figure(plan.tokens_per_s), hours]
        table.append([path.stem, str(plan.step.processes), *needed, *speed])
    if recipe is None:
        raise ValueError(next(iter(refused.values())))
    cannot = [f"  {name} cannot run: {why}" for name, why in refused.items()]
    heading = f"{request.gpu.name}, {request.gpu.memory_gb:g} GB"
    return "\n".join([*notes_of(recipe), heading, aligned(table), *cannot])


def notes_of(recipe: Recipe) -> list[str]:
    """Returns what was made of the recipe, a line each."""
    return [f"note: {one}" for one in recipe.notes]


def gb(size: float) -> str:
    """Returns bytes in GB (2**30 bytes)."""
    return f"{size / GB:.2f}"


def clock(hours: float) -> str:
    """Returns a time in hours or minutes."""
    return f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"


if __name__ == "__main__":
    with mistakes_in_one_line():
        main(sys.argv[1:])
