"""What a run measures of itself: steady-state throughput, share of the hardware limit, peak memory, times."""

import resource
import time
from typing import Any

import psutil
import torch
from accelerate.utils import gather_object
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

WARMUP_STEPS = 5


class Meter(TrainerCallback):
    """Counts real tokens and rows over the steady state: warm-up, evaluation and saving excluded.

    Tokens are counted on the device and read once at the end, so that a step waits for nothing. The clock stops where
    an evaluation or a checkpoint follows a step and starts again with the next step.
    """

    def __init__(self) -> None:
        self.first_step_s: float | None = None
        self._tokens: torch.Tensor | int = 0
        self._rows: torch.Tensor | int = 0
        self._seconds = 0.0
        self._steps = 0
        self._window: tuple[float, int] | None = None
        self._counted_tokens: torch.Tensor | int = 0
        self._counted_rows: torch.Tensor | int = 0
        self._first_global_step: int | None = None

    def count(self, inputs: dict[str, Any]) -> None:
        """Add one micro-batch: its tokens that are not padding, and its rows (packed rows counted singly)."""
        if inputs.get("attention_mask") is not None:
            tokens, rows = inputs["attention_mask"].sum(), inputs["input_ids"].shape[0]
        else:
            tokens, rows = inputs["input_ids"].numel(), (inputs["position_ids"] == 0).sum()
        self._tokens, self._rows = self._tokens + tokens, self._rows + rows

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open a window once the warm-up is over."""
        if self._first_global_step is None:
            self._first_global_step = state.global_step
        warmup = min(WARMUP_STEPS, max(1, (state.max_steps - self._first_global_step) // 4))
        if self._window is None and state.global_step >= self._first_global_step + warmup:
            _synchronize()
            self._tokens = self._rows = 0
            self._window = (time.perf_counter(), state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Close the window before an evaluation, a checkpoint or the end."""
        if self.first_step_s is None:
            _synchronize()
            self.first_step_s = time.time() - psutil.Process().create_time()
        pause = control.should_evaluate or control.should_save or control.should_training_stop
        if self._window and (pause or state.global_step >= state.max_steps):
            _synchronize()
            started, first = self._window
            self._seconds += time.perf_counter() - started
            self._steps += state.global_step - first
            self._counted_tokens = self._counted_tokens + self._tokens
            self._counted_rows = self._counted_rows + self._rows
            self._window = None

    def facts(self, flops_per_token: float) -> dict[str, Any]:
        """Throughput over all processes for run.json; every process calls it. None where no step was timed."""
        mine = {"tokens": int(self._counted_tokens), "rows": int(self._counted_rows), "seconds": self._seconds}
        ranks = gather_object([mine])
        seconds = max(r["seconds"] for r in ranks)
        tokens, rows = sum(r["tokens"] for r in ranks), sum(r["rows"] for r in ranks)
        facts: dict[str, Any] = {
            "time_to_first_step_s": self.first_step_s and round(self.first_step_s, 2),
            "timed_steps": self._steps,
            "timed_seconds": round(seconds, 3),
            "tokens_per_s": None,
            "rows_per_s": None,
            "step_time_s": None,
        }
        if seconds > 0:
            facts["tokens_per_s"] = round(tokens / seconds, 1)
            facts["rows_per_s"] = round(rows / seconds, 3)
            facts["step_time_s"] = round(seconds / self._steps, 5)
            facts["model_tflops_per_s"] = round(flops_per_token * tokens / seconds / 1e12, 3)
        return facts


def flops_per_token(model: nn.Module) -> float:
    """Model FLOPs a token, forward and backward.

    4 for each frozen matrix parameter (2 forward, 2 for the gradient of its input) and 6 for each trainable one (2 more
    for its own gradient). The embedding is a lookup; the head counts, tied or not. Attention scores and recomputation
    under checkpointing are left out. 6N for every parameter would count gradients that LoRA never computes.
    """
    frozen = trainable = 0
    lookups = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for parameter in model.parameters():
        if parameter.ndim < 2 or id(parameter) in lookups:
            continue
        size = parameter.numel() * (_packed_factor(parameter))
        frozen, trainable = (frozen, trainable + size) if parameter.requires_grad else (frozen + size, trainable)
    head = model.get_output_embeddings()
    if head is not None and id(head.weight) in lookups:
        frozen += head.weight.numel()
    return 4.0 * frozen + 6.0 * trainable


def _packed_factor(parameter: nn.Parameter) -> float:
    """Weights that one stored element of a bitsandbytes parameter stands for."""
    state = getattr(parameter, "quant_state", None)
    return state.shape.numel() / parameter.numel() if state is not None else 1.0


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a square matrix product of random data on `device`: the best of several, as a limit is."""
    size, repeats = (8192, 20) if device.type == "cuda" else (2048, 5)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times = []
    for _ in range(repeats):
        _synchronize()
        start = time.perf_counter()
        a @ b
        _synchronize()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def share_of_limit(facts: dict[str, Any], device: torch.device, dtype: torch.dtype, world_size: int) -> dict[str, Any]:
    """The measured matrix rate of one device and the share of it that the run's model FLOPs reached."""
    rate = matrix_rate(device, dtype) / 1e12
    reached = facts.get("model_tflops_per_s")
    return {
        "limit": f"measured {str(dtype).removeprefix('torch.')} matrix rate a device",
        "limit_tflops_per_s": round(rate, 2),
        "share_of_limit": round(reached / (rate * world_size), 4) if reached else None,
    }


def peak_memory() -> list[dict[str, float]]:
    """Peak memory of every rank in GB (2**30 bytes): GPU allocated and reserved, or the process's resident set."""
    if torch.cuda.is_available():
        mine = {
            "allocated_gb": round(torch.cuda.max_memory_allocated() / 2**30, 3),
            "reserved_gb": round(torch.cuda.max_memory_reserved() / 2**30, 3),
        }
    else:
        mine = {"resident_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3)}
    return gather_object([mine])


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
