"""Time and memory of a step of preference tuning: this project's, and trl's DPOTrainer.

python benchmarks/preference_step.py [--variants NAME ...] [--turns 3] [--seconds 140] \
    [--out results/preference_step]

On a GPU the model is random-initialised, of Llama-3.2-1B's shape, in bf16. Pairs are random words:
prompts of 16 to 128 tokens, answers of 16 to 512, lognormal(5.75, 0.7). On a CPU it is the demo's
model and pairs (`python recipes/demo/build.py` makes them). A new LoRA adapter, r=16 on q, v and o,
trains on the base model, and trl gets the same tokens. Nothing is checkpointed, and there is no
gradient checkpointing.

trl pads, because padding_free is switched off in it and it cannot pack. Its variants are those of
its best settings: log-probabilities of the reference computed in every step or beforehand (as
dpo.py does where pairs are trained on more than once, and so here), Liger's
and FlashAttention's kernels where they are installed, compiled. dpo.py compiles its layers in the
variant that says so alone.

Every variant is a process of its own (benchmarks/preference_step_worker.py). They start together.
Then they train in turn, each over the same pairs: a turn has an epoch that warms up and one that is
timed. Ratios are of the same round of turns. What compiles has its rounds last, again beside
dpo.py. The table cpu.csv, or the GPU's name, is written again after every turn. At --seconds it
ends with what there is. What did not run says why.
"""

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from sftlab.config.launch_command import as_arguments, launch_command
from sftlab.exit_messages import mistakes_in_one_line
from sftlab.measurement.turn_workers import told_its_command
from sftlab.models.random_models import random_files, random_lengths, save_random_model
from sftlab.paths import ROOT
from sftlab.runs.environment import machine_name, provenance, typed_command
from sftlab.script_options import Options
from sftlab.tables import write_csv

OURS = "dpo.py"
SHAPE = "llama3.2-1b"
FLASH = {"attn_implementation": "flash_attention_2"}
LIGER = {"use_liger_kernel": True}
# the share of the time in which a variant must have started
_START = 0.6
BEFOREHAND = {"precompute_ref_log_probs": True}


class Variant(NamedTuple):
    """Fields of a recipe, or of trl's DPOConfig; `needs` are packages that must be installed.

    `compiles` says that its first turn takes long.
    """

    fields: dict[str, Any]
    trl: bool = True
    gpu: bool = True
    needs: tuple[str, ...] = ()
    compiles: bool = False


VARIANTS = {
    OURS: Variant({"compile_layers": "false"}, trl=False, gpu=False),
    "trl": Variant({}, gpu=False),
    "trl, reference beforehand": Variant(BEFOREHAND, gpu=False),
    "trl, Liger": Variant(LIGER, needs=("liger_kernel",)),
    "trl, Liger, reference beforehand": Variant(LIGER | BEFOREHAND, needs=("liger_kernel",)),
    "trl, FlashAttention": Variant(FLASH, needs=("flash_attn",)),
    "trl, FlashAttention, Liger, reference beforehand": Variant(
        FLASH | LIGER | BEFOREHAND, needs=("flash_attn", "liger_kernel")
    ),
    "trl, FlashAttention, Liger": Variant(FLASH | LIGER, needs=("flash_attn", "liger_kernel")),
    f"{OURS}, reference in each step": Variant(
        {"compile_layers": "false", "precompute_ref_log_probs": "false"}, trl=False, gpu=False
    ),
    f"{OURS}, not packed": Variant({"compile_layers": "false", "packing": "false"}, trl=False),
    f"{OURS}, compiled": Variant({"compile_layers": "true"}, trl=False, compiles=True),
    "trl, compiled": Variant({"torch_compile": True}, compiles=True),
}


class Worker:
    """A variant's process, the reports of its turns by round, and why it has no more."""

    def __init__(self, name: str, folder: Path, words: list[str], turns: int) -> None:
        self.name, self.folder, self.turns = name, folder, turns
        self.reports: dict[int, dict[str, Any]] = {}
        self.facts: dict[str, Any] = {}
        self.why_not: str | None = None
        folder.mkdir()
        variant = VARIANTS[name]
        words = [*words, *as_arguments({"fields": json.dumps(variant.fields), "folder": folder})]
        words.append(f"--turns={turns}")
        words += ["--trl"] if variant.trl else []
        launch = "single" if torch.cuda.is_available() else "cpu"
        with (folder / "log").open("w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                launch_command(launch, "benchmarks/preference_step_worker.py", words),
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                # a compiler process for every core and variant would make hundreds
                env={"TORCHINDUCTOR_COMPILE_THREADS": "4"} | told_its_command(),
                start_new_session=True,
            )

    def appeared(self, file: str, deadline: float) -> bool:
        """Wait for a file of the worker. Returns whether it is there; else `why_not` says why."""
        while not (found := (self.folder / file).exists()):
            if (self.folder / "failed").exists():
                failed = json.loads((self.folder / "failed").read_text(encoding="utf-8"))
                self.why_not = failed["why"]
            elif self.process.poll() is not None:
                self.why_not = f"its process ended with {self.process.returncode}"
            elif time.monotonic() > deadline:
                self.why_not = "no time was left"
            if self.why_not:
                print(f"{self.name}: {self.why_not}", flush=True)
                self.end()
                return False
            time.sleep(0.02)
        return found

    def take_turn(self, round_: int, deadline: float) -> None:
        """Let the worker train a turn; on a CPU it measures its memory after the last one."""
        report = self._waited_for(len(self.reports), deadline)
        if report is None:
            return
        self.facts |= json.loads((self.folder / "facts").read_text(encoding="utf-8"))
        self.reports[round_] = report
        print(f"{self.name}: round {round_ + 1}, {report['seconds']:.3f} s", flush=True)
        if len(self.reports) == self.turns and not torch.cuda.is_available():
            self.facts |= self._waited_for(self.turns, deadline) or {}

    def _waited_for(self, turn: int, deadline: float) -> dict[str, Any] | None:
        if self.why_not or not self.appeared(f"ready{turn}", deadline):
            return None
        (self.folder / f"go{turn}").touch()
        if not self.appeared(f"done{turn}", deadline):
            return None
        return json.loads((self.folder / f"done{turn}").read_text(encoding="utf-8"))

    def end(self) -> None:
        """End the process and those that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def main(argv: list[str] | None = None) -> None:
    """Make model and pairs, let the variants train in turn, and write a row for each."""
    began = time.monotonic()
    options = parse_options(argv)
    deadline = began + options.seconds
    options.out.mkdir(parents=True, exist_ok=True)
    base, pairs, work = inputs(options)
    words = as_arguments({"base": base, "pairs": pairs, **work})
    typed = typed_command("benchmarks/preference_step.py", argv or sys.argv[1:])
    about = provenance() | {"command": typed}
    table = options.out / f"{machine_name()}.csv"
    missing = {name: why for name in options.variants if (why := not_installed(name))}
    rounds = rounds_of([name for name in options.variants if name not in missing], options.turns)
    with tempfile.TemporaryDirectory() as root:
        workers = [
            Worker(name, Path(root, str(number)), words, sum(name in one for one in rounds))
            for number, name in enumerate(options.variants)
            if name not in missing
        ]
        try:
            for worker in workers:
                # one that still starts would disturb the others, and one that hangs stop them all
                worker.appeared("ready0", began + _START * options.seconds)
            print(f"the turns begin after {time.monotonic() - began:.0f} s", flush=True)
            for number, names in enumerate(rounds):
                for worker in (one for one in workers if one.name in names):
                    worker.take_turn(number, deadline)
                    write_csv(table, rows(workers, missing, work, about))
        finally:
            for worker in workers:
                worker.end()
            keep_logs(workers, options.logs)
    print(f"{table}: {time.monotonic() - began:.0f} s\n{shown(rows(workers, missing, work, {}))}")


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    """Returns the command line; the default variants are those of this machine."""
    on_gpu = torch.cuda.is_available()
    here = [name for name, variant in VARIANTS.items() if on_gpu or not variant.gpu]
    parser = Options(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=here, metavar="NAME")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=140, help="when to end (default: 140)")
    parser.add_argument("--batch", type=int, default=8 if on_gpu else 16, help="pairs a step")
    parser.add_argument("--count", type=int, default=64 if on_gpu else 96, help="pairs an epoch")
    parser.add_argument("--base", help="a model's folder (default: random, or the demo's)")
    parser.add_argument("--pairs", help="a file of pairs for it")
    parser.add_argument("--logs", type=Path, help="folder for the output of the variants")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "preference_step")
    options = parser.parse_args(argv)
    for name in ("turns", "batch", "count"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}: expected a number of at least 1")
    if options.count % options.batch:
        parser.error(f"--count {options.count}: expected a multiple of --batch {options.batch}")
    if bool(options.base) != bool(options.pairs):
        parser.error("--base and --pairs belong together: give both, or none")
    return options


def inputs(options: argparse.Namespace) -> tuple[str, str, dict[str, int]]:
    """Returns the base model's folder, the file of pairs and the work of an epoch.

    Raises ValueError where the demo's are needed and not there.
    """
    work = {"count": options.count, "batch": options.batch, "max_length": 256}
    if options.base:
        return options.base, options.pairs, work
    if not torch.cuda.is_available():
        base, pairs = (ROOT / "data" / "demo" / name for name in ("base", "preferences.jsonl"))
        if not (base / "config.json").is_file() or not pairs.is_file():
            raise ValueError(f"{base.parent} has no demo: `python recipes/demo/build.py` makes it")
        return str(base), str(pairs), work
    base, _ = random_files(SHAPE, 512)
    save_random_model(base, shape=SHAPE)
    pairs = base.with_name(f"{SHAPE}-pairs.jsonl")
    if not pairs.is_file():
        write_pairs(pairs, 2000)
    return str(base), str(pairs), work | {"max_length": 768}


def write_pairs(path: Path, count: int) -> None:
    """Write pairs of random words, each of which is one token of a random model's tokenizer."""
    generator = np.random.default_rng(0)

    def words(length: int) -> str:
        return " ".join(f"w{number}" for number in generator.integers(256, 30_000, length))

    prompts = generator.integers(16, 128, count)
    answers = random_lengths(2 * count, 512, generator=generator)
    lines = [
        json.dumps({"prompt": words(prompt), "chosen": words(good), "rejected": words(bad)})
        for prompt, good, bad in zip(prompts, answers[::2], answers[1::2], strict=True)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def not_installed(name: str) -> str | None:
    """Returns why a variant cannot run here, or None."""
    lacking = [package for package in VARIANTS[name].needs if find_spec(package) is None]
    if lacking:
        return f"not installed: {', '.join(lacking)}"
    return "needs a GPU" if VARIANTS[name].gpu and not torch.cuda.is_available() else None


def rounds_of(names: list[str], turns: int) -> list[list[str]]:
    """Returns who has a turn in each round: those that compile are last, beside `dpo.py`."""
    slow = [name for name in names if VARIANTS[name].compiles]
    quick = [name for name in names if name not in slow]
    beside = [name for name in names if name == OURS or name in slow]
    return [quick] * turns * bool(quick) + [beside] * turns * bool(slow)


def rows(
    workers: list[Worker], missing: dict[str, str], work: dict[str, int], about: dict[str, str]
) -> list[dict[str, Any]]:
    """Returns a row a variant: medians and ranges of its turns, and ratios to `dpo.py`."""
    ours = next((one.reports for one in workers if one.name == OURS), {})
    found = [summary(worker, ours, work) for worker in workers]
    found += [{"variant": name, "note": why} for name, why in missing.items()]
    columns = list(dict.fromkeys(column for row in found for column in row))
    return [{column: row.get(column, "") for column in columns} | about for row in found]


def summary(
    worker: Worker, ours: dict[int, dict[str, Any]], work: dict[str, int]
) -> dict[str, Any]:
    """Returns a variant's row. `times_dpo_py` is its time over that of `dpo.py` in the same round.

    A reference that is computed beforehand is in `first_epoch_step_s` alone: a training of one
    epoch takes that long a step, and of n epochs `step_s` + (`first_epoch_step_s` - `step_s`) / n.
    """
    reports, facts = worker.reports, worker.facts
    times = [one["seconds"] for one in reports.values()]
    steps = work["count"] // work["batch"]
    both = [number for number in reports if number in ours]
    ratios = [reports[number]["seconds"] / ours[number]["seconds"] for number in both]
    row = {"variant": worker.name, "turns": len(times)}
    row |= spread("step_s", [one / steps for one in times])
    beforehand = facts.get("reference_s", 0.0) / steps
    row["first_epoch_step_s"] = round(row["step_s"] + beforehand, 4) if facts else ""
    row |= spread("pairs_per_s", [work["count"] / one for one in times], 2)
    tokens = facts.get("tokens", 0)
    row["tokens_per_s"] = round(tokens / statistics.median(times)) if tokens and times else ""
    row |= spread("times_dpo_py", ratios, 3)
    for name in ("step_gb", "peak_gb"):
        found = [one[name] for one in (facts, *reports.values()) if name in one]
        row[name] = round(max(found), 3) if found else ""
    row["loss"] = round(reports[max(reports)]["loss"], 4) if times else ""
    row |= {"parts": facts.get("parts", ""), "note": worker.why_not or ""}
    return row | work


def spread(name: str, values: list[float], digits: int = 4) -> dict[str, Any]:
    """Returns the median of values, the lowest and the highest, as three columns."""
    if not values:
        return dict.fromkeys((name, f"{name}_lowest", f"{name}_highest"), "")
    found = (statistics.median(values), min(values), max(values))
    columns = (name, f"{name}_lowest", f"{name}_highest")
    return {column: round(value, digits) for column, value in zip(columns, found, strict=True)}


def shown(found: list[dict[str, Any]]) -> str:
    """Returns the rows for a reader, a line a variant."""
    lines = []
    for row in found:
        if not row["turns"]:
            lines.append(f"  {row['variant']}: {row['note']}")
            continue
        beside = (
            f"{row['times_dpo_py']} times {OURS} [{row['times_dpo_py_lowest']}, "
            f"{row['times_dpo_py_highest']}]"
        )
        memory = f"a step adds {row['step_gb']} GB" if row["step_gb"] != "" else row["note"]
        first = f" ({row['first_epoch_step_s']} in the first epoch)"
        first = first if row["first_epoch_step_s"] not in ("", row["step_s"]) else ""
        lines.append(f"  {row['variant']}: {row['step_s']} s a step{first}, {beside}, {memory}")
    return "\n".join(lines)


def keep_logs(workers: list[Worker], folder: Path | None) -> None:
    """Copy the workers' output into a folder, and show the end of one that failed."""
    for worker in workers:
        text = (worker.folder / "log").read_text(encoding="utf-8", errors="replace")
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
            name = "".join(c if c.isalnum() else "-" for c in worker.name)
            (folder / f"{name}.log").write_text(text, encoding="utf-8")
        if worker.why_not and worker.why_not != "no time was left":
            print(f"--- {worker.name}\n{text[-2000:]}", flush=True)


if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
