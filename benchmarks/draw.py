"""Draws the plots of measurements from their tables, without measuring anything.

python benchmarks/draw.py results/kv_cache
python benchmarks/draw.py results/throughput results/throughput_2gpus results/float32 \
    results/deterministic
python benchmarks/draw.py results/peers

The name of the table in the first folder says what is drawn: throughput.csv, kv_cache.csv,
loss_curves.csv or tokenize_speed.csv. The plot stands beside that table. Throughput is drawn in
groups, a group a question; a group comes whole from the one folder that has most of its variants.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from sftlab.exit_messages import mistakes_in_one_line
from sftlab.measurement.throughput_variants import FAMILY_OF, family_variants
from sftlab.script_options import Options
from sftlab.tables import read_csv

BLUE, ORANGE, GREY, GREEN = "#0072B2", "#D55E00", "#777777", "#009E73"
# Who trained, by the first word of a variant's name.
TRAINERS = {"sft.py": BLUE, "trl": ORANGE, "Unsloth": GREEN, "published loop": GREY}
KEPT = "sft.py QLoRA, 7B, kept activations"
# Question: the variants that answer it, and what they are called below it.
GROUPS = {
    "1B shape, LoRA on q, v and o, 16 bits, one GPU": {
        "sft.py bf16, 64 rows": "sft.py, bf16, 64 rows",
        "sft.py bf16": "sft.py, bf16, 32 rows",
        "sft.py bf16, 20 rows": "sft.py, bf16, 20 rows",
        "trl bf16, compiled": "trl, bf16, compiled, 20 rows",
        "trl bf16": "trl, bf16, 20 rows",
        "trl as it comes": "trl, default settings, 20 rows",
        "trl bf16, packed, sdpa": "trl, bf16, packed, 20 rows",
        "trl bf16, packed, sdpa, Liger": "trl, bf16, packed, Liger, 20 rows",
        "published loop, bf16": "published loop, bf16, 20 rows",
        "published loop, fp16": "published loop, fp16, 20 rows",
    },
    "1B shape, LoRA on q, v and o: fp8 against bf16": {
        "sft.py fp8, 64 rows": "sft.py, fp8, 64 rows",
        "sft.py fp8": "sft.py, fp8, 32 rows",
        "sft.py bf16, 64 rows": "sft.py, bf16, 64 rows",
        "sft.py bf16": "sft.py, bf16, 32 rows",
    },
    "1B shape, LoRA on all seven linears": {
        "sft.py fp8, all linears, 64 rows": "sft.py, fp8, 64 rows",
        "sft.py fp8, all linears, 64 rows, LoRA not fused": "sft.py, fp8, LoRA in bf16, 64 rows",
        "sft.py fp8, all linears": "sft.py, fp8, 32 rows",
        "sft.py bf16, all linears, 64 rows": "sft.py, bf16, 64 rows",
        "sft.py bf16, all linears": "sft.py, bf16, 32 rows",
    },
    "1B shape, LoRA on q, v and o, bf16, beside the fastest others": {
        "sft.py bf16, 64 rows": "sft.py, 64 rows",
        "sft.py bf16, 20 rows": "sft.py, 20 rows",
        "Unsloth bf16, packed, 64 rows": "Unsloth, 64 full rows",
        "Unsloth bf16, packed, 20 rows": "Unsloth, 20 full rows",
        "trl bf16, packed, FA2, Liger, 64 rows": "trl, FA2, Liger, 64 full rows",
        "trl bf16, packed, FA2, Liger, 20 rows": "trl, FA2, Liger, 20 full rows",
    },
    "1B shape, LoRA on all seven linears, bf16, beside the fastest other": {
        "sft.py bf16, all linears, 64 rows": "sft.py, 64 rows",
        "sft.py bf16, all linears, 64 rows, LoRA not fused": "sft.py, LoRA not fused, 64 rows",
        "sft.py bf16, all linears, 20 rows": "sft.py, 20 rows",
        "sft.py bf16, all linears, 20 rows, LoRA not fused": "sft.py, LoRA not fused, 20 rows",
        "Unsloth bf16, packed, all linears, 64 rows": "Unsloth, 64 full rows",
        "Unsloth bf16, packed, all linears, 20 rows": "Unsloth, 20 full rows",
    },
    "8B shape, LoRA on all seven linears, 2 full rows of 4,096 tokens": {
        "sft.py fp8, 8B, 2 full rows of 4096": "sft.py, fp8",
        "sft.py bf16, 8B, 2 full rows of 4096": "sft.py",
        "Unsloth bf16, 8B, 2 full rows of 4096": "Unsloth",
    },
    "7B shape in 4 bits (QLoRA), activations kept, rows to 1,024 tokens": {
        **{f"{KEPT}, {rows} rows": f"sft.py, {rows} rows" for rows in (42, 16, 11, 4)},
        "Unsloth QLoRA, 7B, packed, 16 rows": "Unsloth, 16 full rows",
        "Unsloth QLoRA, 7B, packed, 4 rows": "Unsloth, 4 full rows",
    },
    "7B shape in 4 bits (QLoRA) under fp8, activations kept, rows to 1,024 tokens": {
        f"sft.py QLoRA fp8, 7B, kept activations, {rows} rows": f"sft.py, fp8, {rows} rows"
        for rows in (42, 11, 4)
    },
    **{
        f"Shape of {family.title}: bf16, LoRA on {', '.join(family.targets)}": {
            name: name.replace(f" bf16, {family.title}", "")
            for name in family_variants(shape, family)
        }
        for shape, family in FAMILY_OF.items()
    },
    "1B shape, with and without LoRA and its linear as one product": {
        f"sft.py bf16, {linears}, {rows} rows, dropout {dropout}{fused}": (
            f"sft.py, {linears}, {rows} rows, dropout {dropout}{fused}"
        )
        for linears, rows in (("all linears", 64), ("all linears", 20), ("q, v and o", 64))
        for dropout in (0, 0.05)
        for fused in (", LoRA fused", "")
    },
    "7B shape in 4 bits, all linears, with and without LoRA and its linear as one product": {
        f"{KEPT}, {rows} rows, LoRA {fused}": f"sft.py, {rows} rows, LoRA {fused}"
        for rows in (42, 16, 11, 4)
        for fused in ("fused", "not fused")
    },
    "1B and 7B shapes, small micro-batches, with and without captured steps": {
        f"sft.py {which}{recorded}": f"sft.py, {about}{recorded}"
        for which, about in (
            ("bf16, 20 rows", "1B, q, v and o, 20 rows"),
            ("bf16, all linears, 20 rows", "1B, all linears, 20 rows"),
            ("QLoRA, 7B, kept activations, 4 rows", "7B in 4 bits, 4 rows"),
            ("QLoRA, 7B, kept activations, 11 rows", "7B in 4 bits, 11 rows"),
        )
        for recorded in (", steps captured", ", steps not captured")
    },
    "1B shape, fp8, 64 rows, captured steps": {
        f"sft.py fp8, {which}64 rows{recorded}": f"sft.py, {about}{recorded}"
        for which, about in (("", "q, v and o"), ("all linears, ", "all linears"))
        for recorded in (", steps captured", ", steps not captured")
    },
    "1B shape, LoRA on q, v and o, fp32": {
        "sft.py fp32, 20 rows": "sft.py, fp32, 20 rows",
        "published loop, fp32": "published loop, fp32, 20 rows",
    },
    "7B shape in 4 bits (QLoRA), all linears, rows to 1,024 tokens": {
        "sft.py QLoRA, 7B": "sft.py, 4 rows",
        "trl QLoRA, 7B": "trl and bitsandbytes, 4 rows",
    },
    "1B shape, two GPUs": {
        "sft.py fp8, DDP": "DDP, fp8, 32 rows a GPU",
        "sft.py bf16, DDP, 64 rows": "DDP, bf16, 64 rows a GPU",
        "sft.py bf16, DDP": "DDP, bf16, 32 rows a GPU",
        "sft.py bf16, DDP, 20 rows": "DDP, bf16, 20 rows a GPU",
        "sft.py bf16, FSDP2, 64 rows": "FSDP2, bf16, 64 rows a GPU",
        "sft.py bf16, FSDP2": "FSDP2, bf16, 32 rows a GPU",
        "sft.py bf16, FSDP2, 20 rows": "FSDP2, bf16, 20 rows a GPU",
        "sft.py bf16, FSDP2, 20 rows, a layer a unit": "FSDP2, bf16, 20 rows, a layer a unit",
        "sft.py fp8": "one GPU, fp8, 32 rows",
        "sft.py bf16, 64 rows": "one GPU, bf16, 64 rows",
        "sft.py bf16": "one GPU, bf16, 32 rows",
    },
    "1B shape, bf16, one part of the fast path switched off": {
        "sft.py bf16": "all parts on, 32 rows",
        "sft.py bf16, 20 rows": "all parts on, 20 rows",
        "sft.py bf16, loss not fused": "loss not fused, 20 rows",
        "sft.py bf16, not compiled": "layers not compiled, 32 rows",
        "sft.py bf16, not packed": "rows not packed, 20 rows",
    },
    "1B shape, longer rows": {
        "sft.py bf16": "bf16, rows to 512 tokens",
        "sft.py bf16, rows to 1024": "bf16, rows to 1,024 tokens",
        "sft.py bf16, rows to 4096": "bf16, rows to 4,096 tokens",
        "sft.py fp8, rows to 4096": "fp8, rows to 4,096 tokens",
    },
    "1B shape, bf16, deterministic and with LoRA dropout": {
        "sft.py bf16": "default",
        "sft.py bf16, deterministic": "deterministic",
        "sft.py bf16, dropout 0.05": "LoRA dropout of 0.05",
    },
}
WINDOW = 20  # steps of a mean in the plot of losses

Row = Mapping[str, str]


def main() -> None:
    """Draw the table of the first folder."""
    parser = Options(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="a folder of results/ with a table")
    parser.add_argument("more", type=Path, nargs="*", help="more folders with a throughput.csv")
    arguments = parser.parse_args()
    name = next((n for n in DRAWN if (arguments.folder / f"{n}.csv").is_file()), None)
    if name is None:
        parser.error(f"{arguments.folder} has no table of {', '.join(DRAWN)}")
    if arguments.more and name != "throughput":
        parser.error(f"{name} is drawn from one folder alone; got {len(arguments.more) + 1}")
    tables = [read_csv(each / f"{name}.csv") for each in (arguments.folder, *arguments.more)]
    figure = DRAWN[name](*tables)
    figure.savefig(arguments.folder / f"{name}.png", dpi=120)
    if name == "kv_cache":
        plt.rcParams["svg.hashsalt"] = name  # equal tables give equal files
        figure.savefig(arguments.folder / f"{name}.svg", metadata={"Date": None})
    plt.close(figure)


def draw_throughput(*tables: Sequence[Row]) -> plt.Figure:
    """Bars of real tokens/s, a panel a question, the fastest on top."""
    panels = {title: sort_by_speed(find_group(title, tables)) for title in GROUPS}
    panels = {title: rows for title, rows in panels.items() if rows}
    names = {title: {row["variant"] for row in rows} for title, rows in panels.items()}
    # a table of a few variants would show them again under every question they also belong to
    panels = {
        title: rows
        for title, rows in panels.items()
        if not any(names[title] < others for others in names.values())
    }
    if not panels:
        raise ValueError("nothing to draw: no variant of the table was measured")
    heights = [len(rows) + 0.9 for rows in panels.values()]
    figure, axes = plt.subplots(
        len(panels),
        figsize=(9.5, 1.0 + 0.27 * sum(heights)),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for (title, rows), panel in zip(panels.items(), axes[:, 0], strict=True):
        draw_group(panel, title, rows)
    kinds = [
        kind for kind in TRAINERS if any(kind == trainer(r) for rs in panels.values() for r in rs)
    ]
    figure.legend(
        handles=[plt.Rectangle((0, 0), 1, 1, color=TRAINERS[kind], label=kind) for kind in kinds],
        loc="outside upper right",
        ncols=len(kinds),
        frameon=False,
    )
    first = next(iter(panels.values()))[0]
    figure.suptitle(f"Real tokens/s on {first['hardware']}", x=0.01, ha="left", fontweight="bold")
    figure.supxlabel(
        "median of the turns, line from the lowest to the highest; "
        "MFU against the measured bf16 matrix rate; each panel has its own scale",
        fontsize=8,
    )
    return figure


def find_group(title: str, tables: Sequence[Sequence[Row]]) -> list[Row]:
    """Returns the measured rows of a group, from the table that has most of them."""
    found = [
        [row for row in table if row["variant"] in GROUPS[title] and int(row["repeats"])]
        for table in tables
    ]
    return max(found, key=len)


def sort_by_speed(rows: Sequence[Row]) -> list[Row]:
    """Returns the rows, the fastest first."""
    return sorted(rows, key=lambda row: -float(row["tokens_per_s"]))


def trainer(row: Row) -> str:
    """Returns whose code trained a variant."""
    return next(name for name in TRAINERS if row["variant"].startswith(name))


def draw_group(panel: plt.Axes, title: str, rows: Sequence[Row]) -> None:
    """Draw the bars of one question, with their speeds in figures."""
    for place, row in enumerate(rows):
        speed, low, high = (float(row[name]) for name in ("tokens_per_s", "lowest", "highest"))
        panel.barh(place, speed, height=0.72, color=TRAINERS[trainer(row)])
        panel.plot([low, high], [place, place], color="black", linewidth=1.2)
        share = f"MFU {float(row['share_of_limit']):.0%}"
        panel.annotate(
            f"{speed:,.0f}   {share}",
            (max(speed, high), place),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    panel.set_yticks(range(len(rows)), [GROUPS[title][row["variant"]] for row in rows], fontsize=8)
    panel.set_ylim(len(rows) - 0.5, -0.5)
    panel.set_xlim(0, 1.22 * float(rows[0]["highest"]))
    panel.set_xticks([])
    panel.tick_params(axis="y", length=0)
    panel.spines[["top", "right", "bottom"]].set_visible(False)
    panel.set_title(title, loc="left", fontsize=9, fontweight="bold")


def draw_kv_cache(rows: Sequence[Row]) -> plt.Figure:
    """Seconds and peak memory over the batch, a column a length of prompt and answer."""
    columns = list(dict.fromkeys((row["prompt"], row["output"]) for row in rows))
    figure, panels = plt.subplots(
        2,
        len(columns),
        figsize=(2.6 * len(columns) + 1, 5.4),
        squeeze=False,
        sharex=True,
        layout="constrained",
    )
    for (prompt, output), (above, below) in zip(columns, panels.T, strict=True):
        mine = [row for row in rows if (row["prompt"], row["output"]) == (prompt, output)]
        for name, colour, style in (("with", BLUE, "o-"), ("without", ORANGE, "s--")):
            lines = [row for row in mine if row["cache"] == name]
            batches = [int(row["batch"]) for row in lines]
            seconds, low, high, peak = (
                [float(row[column]) for row in lines]
                for column in ("seconds", "lowest", "highest", "peak_mb")
            )
            above.plot(batches, seconds, style, color=colour, label=f"{name} the cache")
            above.vlines(batches, low, high, color=colour)
            below.plot(batches, peak, style, color=colour)
        tokens = f"prompt {int(prompt):,}, answer {int(output):,}"
        above.set_title(f"{tokens} tokens", fontsize=9)
        above.set_ylim(0, 1.08 * max(float(row["highest"]) for row in mine))
        below.set(xlabel="batch (rows)", ylim=(0, None), xticks=batches)
    panels[0, 0].set_ylabel("seconds: median and range")
    panels[1, 0].set_ylabel("peak MB beyond the weights")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    facts = [rows[0][name] for name in ("model", "dtype", "hardware")]
    figure.suptitle(f"Generation with and without the KV cache: {', '.join(facts)}", fontsize=10)
    return figure


def draw_loss_curves(rows: Sequence[Row]) -> plt.Figure:
    """The curves, and below them the distance of the others from the reference."""
    labels = {
        "plain": "reference: padded, not compiled, trl's loss, bf16",
        "fast": "fast path, bf16",
        "fp8": "fast path, fp8",
    }
    colours = {"plain": GREY, "fast": BLUE, "fp8": ORANGE}
    losses = {name: means([float(row[name]) for row in rows]) for name in labels}
    steps = (np.arange(len(losses["plain"])) + 1) * WINDOW
    figure, (above, below) = plt.subplots(
        2, 1, sharex=True, figsize=(8, 6), height_ratios=[3, 2], layout="constrained"
    )
    for (name, values), style in zip(losses.items(), ("-", "--", ":"), strict=True):
        above.plot(steps, values, style, color=colours[name], linewidth=2, label=labels[name])
        off = 100 * (values / losses["plain"] - 1)
        if name != "plain":
            most = f"{labels[name]}: at most {np.abs(off).max():.2f} %"
            below.plot(steps, off, style, color=colours[name], linewidth=2, label=most)
    above.set_ylabel("training loss (nats a token)")
    above.legend(frameon=False)
    below.axhline(0, color=GREY, linewidth=1)
    below.set_ylabel("difference from\nthe reference (%)")
    below.set_xlabel(f"step (means of {WINDOW} steps)")
    below.legend(frameon=False)
    figure.suptitle(f"1B shape, LoRA r=16 on q, v and o, {rows[0]['hardware']}", fontsize=10)
    return figure


def means(losses: Sequence[float]) -> np.ndarray:
    """Returns means of `WINDOW` steps each, [steps // WINDOW]."""
    whole = len(losses) // WINDOW * WINDOW
    return np.array(losses[:whole]).reshape(-1, WINDOW).mean(axis=1)


def draw_tokenize_speed(rows: Sequence[Row]) -> plt.Figure:
    """Measured rows/s against one thread; beside them the model of a whole data set."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    bars = sorted((row for row in rows if row["ratio"]), key=lambda row: -float(row["ratio"]))
    for place, row in enumerate(bars):
        ratio, low, high = (float(row[name]) for name in ("ratio", "lowest", "highest"))
        colour = GREY if row["variant"] == "published design" else BLUE
        left.barh(place, ratio, height=0.7, color=colour)
        left.plot([low, high], [place, place], color="black", linewidth=1.2)
        left.annotate(
            f"{ratio:.2f} x   {float(row['rows_per_s']):,.0f} rows/s",
            (high, place),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    workers = [
        f"{r['variant']}\n({r['workers']} worker{'s' * (r['workers'] != '1')})" for r in bars
    ]
    left.set_yticks(range(len(bars)), workers)
    left.set_ylim(len(bars) - 0.5, -0.5)
    left.set_xlim(0, 1.5 * max(float(row["highest"]) for row in bars))
    left.set_title(f"Measured, {rows[0]['hardware']}", loc="left", fontsize=10)
    left.set_xlabel("rows/s over those of one thread that only encodes")
    model = [row for row in rows if row["variant"].startswith("model")]
    counts, minutes = ([float(row[name]) for row in model] for name in ("workers", "minutes"))
    right.loglog(counts, minutes, "o-", color=BLUE, label="model from the local workers")
    for row, style in zip(
        (r for r in rows if r["variant"].startswith("published:")), (":", "--"), strict=True
    ):
        label = f"{row['variant']}, {row['minutes']} min"
        right.axhline(float(row["minutes"]), color=ORANGE, linestyle=style, label=label)
    right.set_xticks(counts, [f"{count:.0f}" for count in counts])
    right.set_yticks(
        [0.5, 1, 2, 5, 10, 20, 50, 100], ["0.5", "1", "2", "5", "10", "20", "50", "100"]
    )
    right.minorticks_off()
    right.set_title("Modelled: OpenOrca, 3 million rows", loc="left", fontsize=10)
    right.set(xlabel="workers of one core", ylabel="minutes")
    right.legend(fontsize=8, frameon=False, loc="lower left")
    return figure


DRAWN: dict[str, Callable[..., Any]] = {
    "throughput": draw_throughput,
    "kv_cache": draw_kv_cache,
    "loss_curves": draw_loss_curves,
    "tokenize_speed": draw_tokenize_speed,
}


if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
