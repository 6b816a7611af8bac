"""Trains the cells of benchmarks/plan_accuracy_measure.py, which starts it, in one process a GPU.

accelerate launch --config_file accelerate_configs/single.yaml \
    benchmarks/plan_accuracy_worker.py --cells cells.json --out lines.jsonl

Every cell is recipes/sft.py's own `main` under its own launch config. Accelerate's state and the
allocator are reset between cells; only the processes and their process group stay. `cells.json`
holds a list of {"name", "variables", "argv", "limit_gb"}. A line of measurements a cell is added to
`--out`, and the file `begun` beside it names the cell that began last. Where several processes run,
a cell that fails ends them all, since the others may be waiting for it. So does a cell that leaves
memory behind.
"""

import sftlab.startup.filter_warnings  # noqa: I001  (before the libraries that it quiets)
import sftlab.startup.single_process  # noqa: F401  (before they see the devices)

import gc
import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from accelerate import PartialState

from sftlab.planning.gpu_specs import measure_host
from sftlab.measurement.throughput import Meter
from sftlab.paths import ROOT
from sftlab.script_options import Options
from sftlab.training.trainer import LabTrainer

# GB that may stay allocated between cells (compiled kernels' constants and the like)
LEFT_BEHIND = 0.3


class Watch:
    """Notes what run.json lacks: memory once the model is loaded, and the largest micro-batch."""

    def __init__(self) -> None:
        self.facts: dict[str, Any] = {}
        build, count = LabTrainer.__init__, Meter.count

        def built(trainer: LabTrainer, *args: Any, **kwargs: Any) -> None:
            build(trainer, *args, **kwargs)
            if torch.cuda.is_available():
                self.facts["loaded_gb"] = gb(torch.cuda.memory_allocated())
                self.facts["loading_peak_gb"] = gb(torch.cuda.max_memory_allocated())

        def counted(meter: Meter, tokens: int, rows: int, loss_tokens: int) -> None:
            count(meter, tokens, rows, loss_tokens)
            for name, value in (("largest_tokens", tokens), ("largest_loss_tokens", loss_tokens)):
                self.facts[name] = max(value, self.facts.get(name, 0))

        LabTrainer.__init__, Meter.count = built, counted


def main() -> None:
    """Train the cells."""
    parser = Options(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    # run.json of every cell ends by ending the process group; the next cell needs it
    PartialState.destroy_process_group = lambda self, group=None: None
    sft, watch, rank = load_sft(), Watch(), int(os.environ.get("RANK", 0))
    for cell in json.loads(arguments.cells.read_text(encoding="utf-8")):
        began = time.perf_counter()
        held = begin(cell, watch)
        if held > LEFT_BEHIND:
            sys.exit(f"{held} GB are left of what ran before")
        if rank == 0:
            arguments.out.with_name("begun").write_text(cell["name"], encoding="utf-8")
        reason = train(sft, cell["argv"])
        facts = watch.facts | {
            "held_before_gb": held,
            "seconds": round(time.perf_counter() - began, 1),
        }
        facts["host_us"] = measure_host()
        if rank == 0:
            with arguments.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"cell": cell["name"], "raised": reason, **facts}) + "\n")
        print(f"{cell['name']}: {reason or 'trained'}, {facts['seconds']} s", flush=True)
        if reason and "RANK" in os.environ:
            os._exit(1)


def begin(cell: dict[str, Any], watch: Watch) -> float:
    """Set the launch config and empty the memory. Returns the GB that are still allocated."""
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
        del os.environ[name]
    os.environ.update(cell["variables"])
    torch.compiler.reset()
    gc.collect()
    watch.facts = {}
    if not torch.cuda.is_available():
        return 0.0
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    whole = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(
        min(1.0, cell["limit_gb"] * 2**30 / whole) if cell["limit_gb"] else 1.0
    )
    return gb(torch.cuda.memory_allocated())


def train(sft: ModuleType, argv: list[str]) -> str | None:
    """Run sft.py's main. Returns what it raised, in a line."""
    try:
        sft.main(argv)
    except (RuntimeError, TypeError, AttributeError, NotImplementedError, SystemExit) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None


def load_sft() -> ModuleType:
    """Returns recipes/sft.py as a module."""
    spec = importlib.util.spec_from_file_location("sft", ROOT / "recipes" / "sft.py")
    sft = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sft)
    return sft


def gb(size: int) -> float:
    """Returns bytes in GB (2**30 bytes)."""
    return round(size / 2**30, 3)


if __name__ == "__main__":
    main()
