"""Times turns of training steps in a process that waits for another to let it train.

The worker warms up and writes `ready0` into its folder. At `go0` it trains a turn of steps and
writes `done0` (JSON), and so on.
"""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from sftlab.measurement.flops import Flops
from sftlab.measurement.hardware_limit import synchronize
from sftlab.measurement.turn_workers import wait_for_turn_file

PROFILED_STEPS = 10
# Seconds after which a turn, or a warm-up beyond its first two steps, ends at the next step. The
# workers of a group warm up beside one another.
LONGEST_S, LONGEST_WARM_S = 30.0, 240.0
# What a kernel's name says of its work; the first match counts.
KERNELS = {
    "matrix products": ("nvjet", "gemm", "cutlass", "cublas", "splitK"),
    "attention": ("_forward", "_backward_query", "_backward_key", "flash", "fmha"),
    "cross-entropy": ("_cross_entropy",),
    "communication": ("nccl",),
    "norms, sums and casts with scales": ("triton_red", "triton_per"),
    "elementwise": ("triton_poi", "elementwise", "vectorized"),
    "optimizer": ("multi_tensor",),
    "copies": ("Memcpy", "Memset", "index"),
    "dequantisation": ("Dequantize", "dequant"),
}


class Turnstile(TrainerCallback):
    """Lets a turn of steps train when its file appears, times it and counts its tokens.

    The counts are those of all processes.
    """

    def __init__(
        self, folder: Path, turns: int, warm: int, steps: int, profiled: bool = False
    ) -> None:
        self._folder, self._turns, self._turn = folder, turns, 0
        self._warm, self._steps, self._profiled = warm, steps, profiled
        self.total = warm + turns * steps + PROFILED_STEPS * profiled
        self._entered, self._started, self._first = math.nan, math.nan, -1
        self._training = False
        self._profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        self._counts: list[torch.Tensor | int] = [0, 0, 0]
        self._loss: float | None = None
        self.flops: Flops | None = None
        # what of the fast paths runs, asked at the end of a turn
        self.parts: Callable[[], str] = str

    def count(self, *counts: torch.Tensor | int) -> None:
        """Add a micro-batch's tokens, rows and tokens in the loss; counts on the GPU stay there."""
        self._counts = [total + count for total, count in zip(self._counts, counts, strict=True)]

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any
    ) -> None:
        """Keep the training loss."""
        self._loss = logs.get("loss", self._loss)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Wait at the first step of a turn."""
        if self._first < 0:
            self._first = state.global_step
        done = state.global_step - self._first
        if done <= 2 and self._turn == 0:  # the first steps compile
            self._entered = time.perf_counter()
        warm = self._turn > 0 or done >= self._warm or late(self._entered, LONGEST_WARM_S)
        if self._training or not warm:
            return
        synchronize()
        (self._folder / f"ready{self._turn}").touch()
        wait_for_turn_file(self._folder / f"go{self._turn}")
        if self._turn == self._turns:
            self._steps = PROFILED_STEPS
            self._profiler.start()
        self._training, self._first = True, state.global_step
        self._counts, self._started = [0, 0, 0], time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report at the last step of a turn."""
        steps = state.global_step - self._first
        if not self._training or (steps < self._steps and not late(self._started, LONGEST_S)):
            return
        synchronize()
        seconds, report = time.perf_counter() - self._started, {}
        if self._turn == self._turns:
            self._profiler.stop()
            report["kernels"] = kernel_classes(self._profiler, seconds)
        counts, rank = (
            torch.tensor([float(count) for count in self._counts], dtype=torch.float64),
            0,
        )
        if dist.is_initialized():
            counts, rank = counts.cuda(), dist.get_rank()
            dist.all_reduce(counts)
        tokens, rows, loss_tokens = (counts / seconds).tolist()
        work = self.flops.token * tokens + self.flops.loss_token * loss_tokens
        report |= {
            "tokens_per_s": tokens,
            "rows_per_s": rows,
            "model_flops_per_s": work,
            "loss": self._loss,
            "tokens_per_step": tokens * seconds / steps,
            "parts": self.parts(),
        }
        report["peak_gb"] = (
            torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
        )
        if rank == 0:
            (self._folder / "report").write_text(json.dumps(report), encoding="utf-8")
            (self._folder / "report").rename(self._folder / f"done{self._turn}")
        self._turn, self._training = self._turn + 1, False
        if control is not None and self._turn == self._turns + self._profiled:
            control.should_training_stop = True


def late(since: float, longest: float) -> bool:
    """Returns whether a warm-up or a turn has taken long enough; never among several processes."""
    return not dist.is_initialized() and time.perf_counter() - since > longest


def kernel_classes(profiler: torch.profiler.profile, seconds: float) -> dict[str, float]:
    """Returns the milliseconds a step that the GPU spends in each class of kernel, and in none."""
    spent = dict.fromkeys([*KERNELS, "other"], 0.0)
    for event in profiler.key_averages():
        found = (
            name for name, words in KERNELS.items() if any(word in event.key for word in words)
        )
        spent[next(found, "other")] += event.self_device_time_total / 1e3 / PROFILED_STEPS
    return spent | {"none": seconds / PROFILED_STEPS * 1e3 - sum(spent.values())}
