"""How far the planner's memory and speed are from measured ones, over models and launch configs.

python benchmarks/plan_accuracy.py [--measured runs/plan_1gpu/measured.csv ...] \
    [--out results/plan_accuracy]

Plans every measured cell with today's planner, and writes plan_accuracy.csv with both. Cells of
the files of `--measured` (benchmarks/plan_accuracy_measure.py writes them) replace those of the
table. sftlab/planning/accuracy_cells.py says which cells are held out of the fitting; on GPUs other
than the H200 all are (`extrapolated`). A speed counts only where the host's was measured
(`host_us`), since a plan depends on it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from transformers import LlamaConfig

from sftlab.config.launch import exported, launched
from sftlab.config.parser import parse_recipe
from sftlab.exit_messages import mistakes_in_one_line
from sftlab.models.random_models import MODEL_SHAPES, random_lengths
from sftlab.paths import ROOT
from sftlab.planning.accuracy_cells import CELL_SHAPES, CELLS, Cell
from sftlab.planning.gpu_specs import GPU, GPUS, HOST_US, MEASURED_ON, gpu_seen_as
from sftlab.planning.known_accuracy import LIMITS
from sftlab.planning.plan import make_plan, resized
from sftlab.planning.row_lengths import RowLengths, of_lengths
from sftlab.planning.step_memory import FRAGMENTATION, memory
from sftlab.script_options import Options
from sftlab.tables import read_csv, write_csv


def main() -> None:
    """Plan the measured cells, write the table, print how near the plans are."""
    parser = Options(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--measured",
        type=Path,
        nargs="+",
        default=[],
        help="measured.csv of benchmarks/plan_accuracy_measure.py, a file a host",
    )
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "plan_accuracy")
    arguments = parser.parse_args()
    table = arguments.out / "plan_accuracy.csv"
    measured = newest(table, arguments.measured)
    found = [
        (cell, measured[cell.name, name])
        for name in GPUS
        for cell in CELLS
        if (cell.name, name) in measured
    ]
    lines = [predicted(cell, line) for cell, line in found]
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_csv(table, [*lines, *published()])
    print(summary(lines))


def newest(table: Path, measured: Sequence[Path]) -> dict[tuple[str, str], dict[str, str]]:
    """Returns rows by cell and GPU; those of `measured` replace the table's."""
    found = [read_csv(table), *(on_one_host(read_csv(path)) for path in measured)]
    return {
        (line["cell"], gpu.name): line
        for lines in found
        for line in lines
        if (gpu := measured_on(line))
    }


def measured_on(line: Mapping[str, str]) -> GPU | None:
    """Returns the GPU of a row with the speed of its host; None for a published row.

    ValueError where the GPU is not known.
    """
    if not line["hardware"]:
        return None
    if gpu := gpu_seen_as(line["hardware"]):
        return replace(gpu, host_us=float(line["host_us"] or HOST_US))
    raise ValueError(
        f"{line['cell']}: no figures for {line['hardware']}, known are {', '.join(GPUS)}"
    )


def on_one_host(lines: list[dict[str, str]]) -> list[dict[str, str]]:
    """Returns the rows of one command with one speed of the host, the median of its cells.

    Single cells vary by a third.
    """
    seen = [float(line["host_us"]) for line in lines if line.get("host_us")]
    return [line | {"host_us": round(median(seen), 2)} for line in lines] if seen else lines


def predicted(cell: Cell, line: Mapping[str, str]) -> dict[str, Any]:
    """Returns a measured row with today's plan of the cell beside it."""
    file, flags = cell.launch()
    shape, gpu = CELL_SHAPES[cell.shape], measured_on(line)
    rows = of_lengths(random_lengths(3000, *cell.files()[1:]), None, "the cell's")
    with launched(exported(ROOT / file, flags)) as launch:
        recipe = parse_recipe(cell.argv(), launch)
        forecast = make_plan(recipe, LlamaConfig(**MODEL_SHAPES[shape]), launch, gpu, rows)
    # results/plan_accuracy was measured before float8's MLPs were one function, before gradients
    # came out of a head in float8, and before norms were computed again
    before = {"float8_mlp": False, "float8_head": False, "keeps_inputs": True}
    forecast = resized(forecast, forecast.micro_batch, **before)
    peak, speed = forecast.memory.allocated / 2**30, forecast.tokens_per_s
    limit = cell.within_gb or gpu.memory_gb
    facts = {
        "predicted_peak_gb": round(peak, 3),
        "predicted_tokens_per_s": round(speed),
        "limit_gb": limit,
    }
    ran_out = line["status"] == "out of memory"
    facts["predicted_fits"] = "yes" if peak * (1 + FRAGMENTATION) <= limit else "no"
    facts["fits"] = "no" if ran_out else "yes" if line["status"] == "succeeded" else ""
    # a plan of speed is for a host of a given speed; without it the plan is shown but not counted
    judged = line["tokens_per_s"] if line["host_us"] else ""
    for name, ours, theirs in (
        ("memory", peak, line["peak_allocated_gb"]),
        ("speed", speed, judged),
    ):
        facts[f"{name}_error"] = round(ours / float(theirs) - 1, 4) if theirs else ""
    made = {name for name in line if name.startswith("predicted")} | {
        "held_out",
        "memory_error",
        "speed_error",
    }
    kept = {name: value for name, value in line.items() if name not in made | set(facts) | {"cell"}}
    held_out = "extrapolated" if gpu.name != MEASURED_ON else "yes" if cell.held_out else "no"
    return {"cell": cell.name, "held_out": held_out, **facts, **kept}


def published() -> list[dict[str, Any]]:
    """Returns the peaks of the published 1B study (H100) with the plan for its settings.

    It padded rows to 512, with float32 weights and LoRA r=16 on q, v and o. Its loss with label
    smoothing kept five float32 copies of the logits: the loss's, log-probabilities and three
    gradients. GB are taken as 10**9 bytes here; with 2**30, the errors would be 7 % lower.
    """
    lines = []
    for file, rows, peak in (("fp32", 20, 57.6588), ("fp16", 20, 45.6404), ("fp16", 24, 55.5422)):
        fields = [
            "--dtype=float32",
            "--packing=false",
            "--compile_layers=false",
            f"--per_device_train_batch_size={rows}",
        ]
        argv = [
            "--config",
            "recipes/llama3.2-1b/attn_r16.yaml",
            *fields,
            "--global_batch_size=0",
            "--lora_dropout=0",
        ]
        with launched(exported(ROOT / f"accelerate_configs/{file}.yaml", {})) as launch:
            recipe, lengths = parse_recipe(argv, launch), RowLengths(None, 512, 0, 512, "padded")
            config = LlamaConfig(**MODEL_SHAPES["llama3.2-1b"])
            step = make_plan(recipe, config, launch, GPUS["h100-80"], lengths).step
        ours = memory(replace(step, whole_logits=5.0)).allocated / 1e9
        lines.append(
            {
                "cell": f"published {file}, batch {rows}",
                "held_out": "published",
                "predicted_peak_gb": round(ours, 1),
            }
        )
        lines[-1] |= {"peak_allocated_gb": peak, "memory_error": round(ours / peak - 1, 4)}
    return lines


def summary(lines: Sequence[Mapping[str, Any]]) -> str:
    """Returns how many cells are within the limits, and names the others.

    Fitted cells, held-out cells and other GPUs are counted apart, as are speeds on hosts of
    unknown speed.
    """
    said = []
    for name, limit in LIMITS.items():
        for held_out, title in (
            ("no", "fitted"),
            ("yes", "held out"),
            ("extrapolated", "other GPUs"),
        ):
            errors = [(x[f"{name}_error"], x["cell"]) for x in lines if x["held_out"] == held_out]
            errors = sorted((x for x in errors if x[0] != ""), key=lambda x: -abs(x[0]))
            far = [f"    {error:+.1%}  {cell}" for error, cell in errors if abs(error) > limit]
            if errors:
                said += [
                    f"{name}, {title}: {len(errors) - len(far)} of {len(errors)} within "
                    f"{limit:.0%}",
                    *far,
                ]
    aside = [x for x in lines if x["tokens_per_s"] and not x["host_us"]]
    near = sum(
        abs(x["predicted_tokens_per_s"] / float(x["tokens_per_s"]) - 1) <= LIMITS["speed"]
        for x in aside
    )
    if aside:
        within = f"{near} of {len(aside)} within {LIMITS['speed']:.0%}"
        said.append(f"speed, on hosts of unknown speed, not counted: {within}")
    wrong = [x["cell"] for x in lines if x["fits"] == "no" and x["predicted_fits"] == "yes"]
    return "\n".join([*said, f"said to fit, but ran out of memory: {', '.join(wrong) or 'none'}"])


if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
