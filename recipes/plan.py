"""Say before a launch whether a recipe fits a GPU, how fast it will train, and what would make it
fit.

python recipes/plan.py --config recipes/llama3.2-1b/attn_r16.yaml --config_file accelerate_configs/single.yaml
    [--num_processes n] [--gpu h200|h100-80|a100-40|...|here] [--gpus n] [--host_us x] [--compare] [--any_field value]
python recipes/plan.py --random llama3.2-1b --rows 38105 --row_tokens 315 --config RECIPE.yaml --config_file LAUNCH.yaml

Needs the model's config alone, no weights and no GPU. Row lengths are read from a local data set;
of one on the hub say `--rows` and `--row_tokens` (what a row has on average). `--random` takes a
published shape instead of the recipe's model; rows count as `max_length` tokens then, unless said.
`--compare` plans the recipe under every launch config. Short steps wait for the host: `--host_us`
is what recipes/doctor.py says of it, and `--gpu here` measures it.
"""

import sftlab.startup.filter_warnings  # noqa: I001  (before the libraries that it quiets)
import sftlab.startup.preload  # noqa: F401

import argparse
import contextlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import LlamaConfig, PreTrainedConfig

from sftlab.config.recipe import Recipe
from sftlab.config.validation import is_bitsandbytes
from sftlab.planning.plan import (
    LIMITS,
    Forecast,
    RowLengths,
    foresee,
    measure_rows,
    most_rows,
    read_recipe,
    remedies,
)
from sftlab.planning.gpu_specs import GPU, GPUS, MEASURED_ON, find_gpu, gpu_seen_as
from sftlab.config.launch import exported, launched
from sftlab.models.loading import load_config, load_tokenizer
from sftlab.models.random_models import MODEL_SHAPES
from sftlab.tables import aligned, figure, read_csv

ROOT = Path(__file__).parent.parent
GB = 2**30


class Asked:
    """The command line: what is planned, and on what."""

    def __init__(self, argv: Sequence[str]) -> None:
        parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
        parser.add_argument(
            "--config_file", default="accelerate_configs/single.yaml", help="launch config"
        )
        parser.add_argument("--num_processes", type=int)
        parser.add_argument("--mixed_precision")
        parser.add_argument("--gpu", default=MEASURED_ON, help=f"{', '.join(GPUS)}, or here")
        parser.add_argument("--gpus", type=int, help="how many there are")
        parser.add_argument(
            "--host_us", type=float, help="microseconds of a small operation on the GPUs' host"
        )
        parser.add_argument("--compare", action="store_true", help="under every launch config")
        parser.add_argument(
            "--random",
            metavar="SHAPE",
            help=f"one of {', '.join(MODEL_SHAPES)} instead of the model",
        )
        parser.add_argument("--rows", type=int, help="training rows")
        parser.add_argument("--row_tokens", type=float, help="tokens of a row on average")
        self.given, self.fields = parser.parse_known_args(argv)
        if not any(word.startswith("--config=") or word == "--config" for word in self.fields):
            raise ValueError(
                "--config is missing: give a recipe, for example recipes/llama3.2-1b/attn_r16.yaml"
            )
        if self.given.random and self.given.random not in MODEL_SHAPES:
            raise ValueError(f"no shape {self.given.random!r}: there are {', '.join(MODEL_SHAPES)}")
        if self.given.host_us is not None and self.given.host_us <= 0:
            raise ValueError(
                f"--host_us {self.given.host_us}: give the microseconds that recipes/doctor.py says"
            )
        for name in ("num_processes", "gpus", "rows", "row_tokens"):
            if getattr(self.given, name) is not None and getattr(self.given, name) <= 0:
                raise ValueError(f"--{name} {getattr(self.given, name):g}: give a number above 0")
        self.gpu: GPU = find_gpu(self.given.gpu)
        if self.given.host_us:
            self.gpu = replace(self.gpu, host_us=self.given.host_us)
        self._rows: RowLengths | None = None

    def flags(self) -> dict[str, Any]:
        """accelerate's flags."""
        asked = {
            "num_processes": self.given.num_processes,
            "mixed_precision": self.given.mixed_precision,
        }
        return {name: value for name, value in asked.items() if value is not None}

    def plan(
        self, file: str, flags: Mapping[str, Any], more: Sequence[str] = ()
    ) -> tuple[Recipe, Forecast]:
        """The recipe, with `more` fields, under a launch config."""
        with launched(exported(file, flags)) as launch:
            recipe = read_recipe([*self.fields, *more], launch, self.gpu, self.given.gpus)
            return recipe, foresee(
                recipe, self._config(recipe), launch, self.gpu, self._lengths(recipe)
            )

    def _config(self, recipe: Recipe) -> PreTrainedConfig:
        if self.given.random:
            return LlamaConfig(
                **MODEL_SHAPES[self.given.random] | (recipe.training.model_init_kwargs or {})
            )
        model = recipe.model
        return load_config(
            model.model_name_or_path, model.model_revision, recipe.training, with_weights=False
        )

    def _lengths(self, recipe: Recipe) -> RowLengths:
        if self._rows is None:
            self._rows = self._asked_lengths(recipe)
        return self._rows

    def _asked_lengths(self, recipe: Recipe) -> RowLengths:
        longest, mean = recipe.training.max_length, self.given.row_tokens
        if mean is not None or self.given.rows is not None or self.given.random:
            if longest is None:
                raise ValueError(
                    "max_length is null, so the longest row is not known: pass --max_length"
                )
            said = "as said" if mean else "not known: every row as long as max_length"
            # rows of text spread about half as far as their mean
            mean = min(mean or longest, longest)
            return RowLengths(self.given.rows, mean, min(0.5 * mean, longest - mean), longest, said)
        model = recipe.model
        return measure_rows(
            recipe, load_tokenizer(model.model_name_or_path, model.model_revision, recipe.training)
        )


def main(argv: list[str]) -> None:
    """Plan and print."""
    try:
        asked = Asked(argv)
        if asked.given.compare:
            return print(compare(asked))
        recipe, forecast = asked.plan(asked.given.config_file, asked.flags())
        print(described(asked, recipe, forecast))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")


def described(asked: Asked, recipe: Recipe, forecast: Forecast) -> str:
    """The plan in words and tables."""
    step, rows, memory = forecast.step, forecast.rows, forecast.memory
    largest = memory_rows(forecast)
    measured_on, known = accuracy(forecast.gpu.name)
    there = forecast.gpu.name == MEASURED_ON
    said = "" if there else f"; on {forecast.gpu.name} extrapolated from its published rates"
    lines = [
        f"{step.processes} x {forecast.gpu.name}, {step.precision}, {step.strategy}",
        f"  rows: {rows.source}; {rows.mean:,.0f} tokens on average, {rows.longest:,} at most",
        f"  micro-batch: {forecast.micro_batch} rows, x {forecast.step.accumulation} x "
        f"{step.processes} a step",
        f"  host: {host_said(asked)}",
        "",
        f"memory a GPU at the peak, GB (in the {memory.at})",
        aligned(largest),
        "",
        verdict(asked, recipe, forecast),
        "",
        "speed",
        aligned(speed_rows(forecast)),
        "",
        f"how sure ({measured_on}): memory {known['memory']}, speed {known['speed']}{said}",
    ]
    return "\n".join(lines)


def host_said(asked: Asked) -> str:
    """How fast the host is, and how that is known."""
    how = (
        "as said" if asked.given.host_us else "measured" if asked.given.gpu == "here" else "assumed"
    )
    return f"{asked.gpu.host_us:g} us a small operation ({how})"


def memory_rows(forecast: Forecast) -> list[tuple[str, str]]:
    """Memory by part."""
    memory = forecast.memory
    names = (
        "parameters",
        "adapter",
        "gradients",
        "optimizer_state",
        "activations",
        "logits",
        "communication",
        "workspace",
    )
    parts = [(name.replace("_", " "), gb(getattr(memory, name))) for name in names]
    parts += [("allocated", gb(memory.allocated)), ("fragmentation", gb(memory.fragmentation))]
    return [
        *parts,
        ("needed, CUDA's context too", gb(memory.needed)),
        ("there is", f"{forecast.gpu.memory_gb:.2f}"),
    ]


def speed_rows(forecast: Forecast) -> list[tuple[str, str]]:
    """Speed, time and work."""
    hours, processes = forecast.hours, forecast.step.processes
    waits = (
        "the GPU"
        if forecast.pace.bound == "GPU"
        else "the host, which launches kernels: larger micro-batches are faster"
    )
    lines = [
        (
            "real tokens/s, rows/s",
            f"{figure(forecast.tokens_per_s)}, {figure(forecast.rows_per_s)}",
        ),
        ("a step, s", f"{figure(forecast.step_seconds)} ({waits})"),
    ]
    if hours is None:
        return [*lines, ("time", "not known: pass --rows COUNT, the training rows, or max_steps")]
    return [
        *lines,
        ("steps", f"{forecast.steps:,}"),
        ("time", clock(hours)),
        ("GPU-hours", figure(hours * processes)),
        ("model FLOPs", f"{forecast.total_flops:.3g}"),
    ]


def verdict(asked: Asked, recipe: Recipe, forecast: Forecast) -> str:
    """Whether it fits, and what would make it fit: the cheapest in time first."""
    most = most_rows(forecast)
    if forecast.fits:
        most_said = f"{most} rows" if most < 2**14 else "more than 16,000 rows"
        return f"fits; the largest micro-batch that does is {most_said}"
    file, flags = asked.given.config_file, asked.flags()
    tried = [(" ".join(words), file, flags, words) for words in remedies(recipe, forecast)]
    several = max(2, forecast.step.processes)
    if forecast.step.strategy != "fsdp" and (
        asked.given.gpus is None or asked.given.gpus >= several
    ):
        sharded, more = "accelerate_configs/fsdp.yaml", flags | {"num_processes": several}
        tried.append((f"{sharded} --num_processes {several}", sharded, more, fsdp_fields(recipe)))
    found = []
    for said, *change in tried:
        with contextlib.suppress(ValueError):  # a change that this recipe refuses is no remedy
            found.append((asked.plan(*change)[1], said))
    helping = sorted(
        (plan.step_seconds * plan.step.processes, words, plan) for plan, words in found if plan.fits
    )
    short = forecast.memory.needed / GB - forecast.gpu.memory_gb
    lines = [
        f"does NOT fit: {short:.1f} GB short"
        + (f"; {most} rows a micro-batch would fit" if most else "")
    ]
    if not helping:
        return "\n".join(
            [*lines, "no single change makes it fit: combine several, or take a larger GPU"]
        )
    lines.append("single changes that make it fit, the fewest GPU-seconds a step first:")
    table = [
        [words, f"{gb(plan.memory.needed)} GB", f"{figure(s)} GPU-s a step"]
        for s, words, plan in helping
    ]
    return "\n".join([*lines, aligned(table)])


def fsdp_fields(recipe: Recipe) -> list[str]:
    """What a recipe needs besides under FSDP2: an optimizer that updates its shards."""
    return ["--optim=adamw_torch_fused"] if is_bitsandbytes(recipe.training.optim) else []


def compare(asked: Asked) -> str:
    """The recipe under every launch config that a GPU can run."""
    recipe, refused = None, {}
    table = [
        [
            "launch config",
            "GPUs",
            "peak GB",
            "needed GB",
            "fits",
            "largest rows",
            "real tokens/s",
            "time",
        ]
    ]
    for path in sorted((ROOT / "accelerate_configs").glob("*.yaml")):
        if path.stem.startswith("cpu"):
            continue
        several = path.stem in ("ddp", "fsdp")
        flags = {k: v for k, v in asked.flags().items() if k == "num_processes" and several}
        try:
            more = fsdp_fields(recipe) if recipe and path.stem == "fsdp" else []
            recipe, plan = asked.plan(str(path), flags, more)
        except ValueError as error:
            refused[path.stem] = str(error)
            continue
        memory, hours = plan.memory, plan.hours
        table.append(
            [
                path.stem,
                str(plan.step.processes),
                gb(memory.allocated),
                gb(memory.needed),
                "yes" if plan.fits else "NO",
                str(most_rows(plan)),
                figure(plan.tokens_per_s),
                clock(hours) if hours is not None else "not known",
            ]
        )
    if recipe is None:
        raise ValueError(next(iter(refused.values())))
    cannot = [f"  {name} cannot run: {why}" for name, why in refused.items()]
    return "\n".join([f"{asked.gpu.name}, {asked.gpu.memory_gb:g} GB", aligned(table), *cannot])


def accuracy(gpu: str) -> tuple[str, dict[str, str]]:
    """What results/plan_accuracy/plan_accuracy.csv says of a GPU's cells, or else of the H200's: the GPU, and by
    what is planned.

    Cells that the planner's constants are from count only where there are no others.
    """
    lines = [
        line
        for line in read_csv(ROOT / "results" / "plan_accuracy" / "plan_accuracy.csv")
        if line["hardware"]
    ]
    own = [line for line in lines if (seen := gpu_seen_as(line["hardware"])) and seen.name == gpu]
    lines = own or [line for line in lines if line["held_out"] != "extrapolated"]
    found = {}
    for what, limit in LIMITS.items():
        errors = {
            kind: [
                abs(float(x[f"{what}_error"]))
                for x in lines
                if x["held_out"] == kind and x[f"{what}_error"]
            ]
            for kind in ("extrapolated", "yes", "no")
        }
        kind = next((kind for kind in errors if errors[kind]), "no")
        near, title = (
            sum(error <= limit for error in errors[kind]),
            {"yes": "held-out ", "no": "fitted "}.get(kind, ""),
        )
        counted = f"within {limit:.0%} on {near} of {len(errors[kind])} {title}cells"
        found[what] = counted if errors[kind] else "not measured"
    return (gpu if own else MEASURED_ON), found


def gb(size: float) -> str:
    """GB (2**30 bytes)."""
    return f"{size / GB:.2f}"


def clock(hours: float) -> str:
    """A time as a person says it."""
    return f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"


if __name__ == "__main__":
    main(sys.argv[1:])
