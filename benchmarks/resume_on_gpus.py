"""Kill and continue on GPUs: losses and adapters against undisturbed runs, and what it costs.

python benchmarks/resume_on_gpus.py [--seconds 230] [--at_once 5] [--only ddp-bf16 ...] \
    [--out results/resume_on_gpus]

DDP and FSDP need two GPUs. Every case is three launches of recipes/sft.py on the first 4 layers of
a random Llama-3.2-1B shape: undisturbed, killed (SIGKILL to every process after its first
checkpoint), and continued. The costs of saving and of listening for signals come first, on the
whole shape with nothing beside it (benchmarks/checkpoint_cost.py).

Writes a row a case as it goes, and keeps the other rows of the table. A case that does not begin
within `--seconds` has a row that says so; `--only NAME ...` runs it later. Without GPUs the demo
model is trained, and what a CPU cannot do is refused.
"""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

from sftlab.config.launch_command import as_arguments, launch_command
from sftlab.exit_messages import mistakes_in_one_line
from sftlab.models.random_models import make_random_files, random_files
from sftlab.paths import ROOT
from sftlab.runs import progress
from sftlab.runs.environment import provenance
from sftlab.runs.run_directory import adapter_hash, read_run
from sftlab.script_options import Options
from sftlab.tables import read_csv, write_csv

RUNS = ROOT / "runs" / "continuation"
STEPS, SAVED, KILLED = 60, 20, 24
BATCH = {"global_batch_size": 16, "per_device_train_batch_size": 8}


class Case(NamedTuple):
    """A strategy, a precision, and the recipe fields that differ."""

    strategy: str
    precision: str
    deterministic: bool
    compiled: bool | None = None

    @property
    def name(self) -> str:
        """The name of the case and of its folder."""
        words = [self.strategy, self.precision, *(["deterministic"] if self.deterministic else [])]
        return "-".join([*words, *(["uncompiled"] if self.compiled is False else [])])

    @property
    def processes(self) -> int:
        """The processes that it takes, one a GPU."""
        return 1 if self.strategy == "single" else 2


CASES = [
    Case(s, p, d)
    for d in (True, False)
    for s in ("single", "ddp", "fsdp")
    for p in ("bf16", "fp16")
]
CASES += [Case(strategy, "bf16", True, False) for strategy in ("single", "ddp", "fsdp")]


def main() -> None:
    """Measure the costs, then run the cases, and write a row for each."""
    parser = Options(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "resume_on_gpus")
    parser.add_argument("--seconds", type=float, default=230.0, help="no case begins after these")
    parser.add_argument("--at_once", type=int, default=5, help="cases that run beside each other")
    parser.add_argument(
        "--only", nargs="+", choices=[case.name for case in CASES], help="these cases, and no costs"
    )
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.seconds
    gpus = torch.cuda.device_count()
    if gpus:
        make_random_files("llama3.2-1b", 512)
    shutil.rmtree(RUNS, ignore_errors=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    table = Table(arguments.out / "resume_on_gpus.csv")
    for strategy in () if arguments.only else ("ddp", "fsdp") if gpus > 1 else ("single",):
        table.add(*cost(strategy, gpus))
    cases = [case for case in CASES if not arguments.only or case.name in arguments.only]

    def run(number: int) -> None:
        case = cases[number]
        late = time.monotonic() > deadline
        what = (
            {"result": f"not run: {arguments.seconds:.0f} s were over"}
            if late
            else kill_and_continue(case, number, gpus)
        )
        table.add({"what": "continuation", "case": case.name} | what)

    with ThreadPoolExecutor(arguments.at_once) as pool:
        list(pool.map(run, range(len(cases))))


class Table:
    """The rows of a CSV file that is written again with every new row."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock, self._rows = path, threading.Lock(), read_csv(path)
        self._about = provenance() | {
            "command": f"python benchmarks/resume_on_gpus.py {' '.join(sys.argv[1:])}".strip()
        }

    def add(self, *rows: dict[str, Any]) -> None:
        """Print the rows, and write the table with them."""
        with self._lock:
            new = {(row["what"], row["case"]) for row in rows}
            self._rows = [row for row in self._rows if (row["what"], row["case"]) not in new]
            self._rows += [row | self._about for row in rows]
            for row in rows:
                print(
                    "  ".join(
                        f"{key} {value}" for key, value in row.items() if value not in ("", None)
                    ),
                    flush=True,
                )
            write_csv(self._path, self._rows)


def kill_and_continue(case: Case, number: int, gpus: int) -> dict[str, Any]:
    """Train undisturbed, and killed and continued. Returns what differs."""
    whole, cut = RUNS / case.name / "undisturbed", RUNS / case.name / "continued"
    began = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        undisturbed = pool.submit(launch, case, whole, number, gpus, None)
        killed = launch(case, cut, number, gpus, lambda: step_of(cut) >= KILLED)
        undisturbed.result()
    if refused := refusal(whole):
        return {"result": refused}
    reached = step_of(cut)
    if (status := read_run(cut)["status"]) != "running":
        reason = read_run(cut).get("reason")
        return {"result": f"not shown: the run ended before it was killed: {status} ({reason})"}
    launch(case, cut, number, gpus, None)
    runs = {"undisturbed": read_run(whole), "continued": read_run(cut)}
    for name, run in runs.items():
        if run["status"] != "succeeded":
            return {"result": f"failed: {name} {run['status']}: {run.get('reason')}"}
    (stop,) = runs["continued"]["interruptions"]
    losses = [dict(map(tuple, run["losses"])) for run in runs.values()]
    apart = {step: abs(loss - losses[1][step]) for step, loss in losses[0].items()}
    equal = sum(d == 0 for step, d in apart.items() if step > stop["step"])
    hashes = [adapter_hash(folder) for folder in (whole, cut)]
    return {
        "result": "same adapter" if hashes[0] == hashes[1] else "another adapter",
        "killed_at": reached if killed else None,
        "from_step": stop["step"],
        "largest_loss_difference_before": max(
            d for step, d in apart.items() if step <= stop["step"]
        ),
        "largest_loss_difference_after": max(d for step, d in apart.items() if step > stop["step"]),
        "steps_equal_after": f"{equal} of {STEPS - stop['step']}",
        "validation_loss_difference": abs(
            difference(*(run["measured"].get("validation_loss") for run in runs.values()))
        ),
        "adapter_undisturbed": hashes[0],
        "adapter_continued": hashes[1],
        "step_time_s": runs["undisturbed"]["measured"]["step_time_s"],
        "ran": "{precision} {strategy}, packing {packing}, compiled {compile_layers}".format(
            **runs["continued"]["ran"]
        ),
        "checkpoint_mb": runs["undisturbed"]["measured"]["checkpoints"]["mb"],
        "seconds": round(time.monotonic() - began, 1),
    }


def difference(a: float | None, b: float | None) -> float:
    """Returns a - b; 0 where neither run has a validation split."""
    return (a or 0.0) - (b or 0.0)


def launch(
    case: Case, folder: Path, number: int, gpus: int, kill_when: Callable[[], bool] | None
) -> bool:
    """Run recipes/sft.py to its end, or until `kill_when`. Returns whether it was killed.

    Its output goes to a log beside the folder.
    """
    fields = {
        "output_dir": folder,
        "max_steps": STEPS,
        "save_steps": SAVED,
        "logging_steps": 1,
        "warmup_steps": 3,
        "lora_dropout": 0.05,
        "save_total_limit": 2,
        "eval_strategy": "no",
        "disable_tqdm": "true",
        "deterministic": str(case.deterministic).lower(),
        **BATCH,
    }
    fields |= base_fields(gpus, 256) | (
        {"model_init_kwargs": '{"num_hidden_layers": 4}'} if gpus else {}
    )
    fields |= {} if case.compiled is None else {"compile_layers": str(case.compiled).lower()}
    config, flags = config_and_flags(case.strategy, case.precision, gpus)
    words = ["--config", recipe(gpus), *as_arguments(fields)]
    command = launch_command(config, "recipes/sft.py", words, flags)
    # many compile at once
    environment = (
        os.environ
        | {"TORCHINDUCTOR_COMPILE_THREADS": "2"}
        | ({"CUDA_VISIBLE_DEVICES": str(number % gpus)} if case.processes == 1 and gpus else {})
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".log").open("a", encoding="utf-8") as log:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        while process.poll() is None:
            if kill_when and kill_when():
                kill_tree(process.pid)
                process.wait()
                return True
            time.sleep(0.005)
    return False


def kill_tree(pid: int) -> None:
    """Send SIGKILL to a process and all that it started, workers first."""
    for each in reversed([psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]):
        try:
            each.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue


def step_of(folder: Path) -> int:
    """Returns the steps that a run has done."""
    found = progress.read(folder)
    return found.step if found else 0


def refusal(folder: Path) -> str | None:
    """Returns what sft.py said where it refused to begin."""
    if (folder / "run.json").is_file():
        return None
    lines = folder.with_suffix(".log").read_text(encoding="utf-8", errors="replace").splitlines()
    return next(
        (f"refused: {line[7:]}" for line in lines if line.startswith("error: ")),
        f"failed: {lines[-1:]}",
    )


def config_and_flags(strategy: str, precision: str, gpus: int) -> tuple[str, list[str]]:
    """Returns the launch config of a strategy (without GPUs its CPU counterpart), and flags."""
    on_a_cpu = {"single": "cpu", "ddp": "cpu_ddp", "fsdp": "fsdp"}
    return strategy if gpus else on_a_cpu[strategy], ["--mixed_precision", precision]


def recipe(gpus: int) -> str:
    """Returns the recipe that is trained."""
    return f"recipes/{'llama3.2-1b' if gpus else 'demo'}/attn_r16.yaml"


def base_fields(gpus: int, longest: int) -> dict[str, Any]:
    """Returns the recipe fields of the model and its rows."""
    if not gpus:
        return {}
    model, rows = random_files("llama3.2-1b", 512)
    return {
        "model_name_or_path": model,
        "dataset_name": rows,
        "dataset_fraction": 1.0,
        "max_length": longest,
    }


def cost(strategy: str, gpus: int) -> list[dict[str, Any]]:
    """Returns the rows of benchmarks/checkpoint_cost.py under a strategy."""
    folder = RUNS / f"cost-{strategy}"
    table, log = folder / "checkpoint_cost.csv", folder.with_suffix(".log")
    RUNS.mkdir(parents=True, exist_ok=True)
    fields = base_fields(gpus, 512) | {"output_dir": folder / "run"} | (BATCH if gpus else {})
    words = ["--out", str(folder), "--config", recipe(gpus), *as_arguments(fields)]
    config, flags = config_and_flags(strategy, "bf16" if gpus else "no", gpus)
    command = launch_command(config, "benchmarks/checkpoint_cost.py", words, flags)
    with log.open("w", encoding="utf-8") as output:
        done = subprocess.run(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
    if done.returncode or not table.is_file():
        return [{"what": "cost", "case": strategy, "result": f"failed: see {log}"}]
    return [{"what": row.pop("what"), "case": strategy} | row for row in read_csv(table)]


if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
