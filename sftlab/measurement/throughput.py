"""What a run measures of itself: steady-state throughput, share of the hardware limit, peak memory, times."""

import resource
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from torch import nn
from transformers import PreTrainedConfig, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sftlab.comparison.timed_turns import wait_for_turn
from sftlab.measurement.collectives import Collectives, several_processes
from sftlab.measurement.memory import MemorySplit

WARMUP_STEPS = 5
QUICK_S = 0.05  # a product of twice the size takes eight times as long


class Meter(TrainerCallback):
    """Counts real tokens and rows over the steady state: warm-up, evaluation and saving excluded.

    The clock stops where an evaluation or a checkpoint follows a step and starts again with the next step.
    """

    def __init__(self) -> None:
        self.first_step_s: float | None = None
        self.waited_s = 0.0
        self._counts, self._counted = np.zeros(3), np.zeros(3)
        self._began = self._warmed_up = 0.0
        self._warmup_steps = 0
        self._seconds = 0.0
        self._steps = 0
        self._window: tuple[float, int] | None = None
        self._first_global_step: int | None = None
        self.collectives = Collectives()

    def count(self, tokens: int, rows: int, loss_tokens: int) -> None:
        """Add one micro-batch: its tokens that are not padding, its rows, and its tokens that are in the loss."""
        self._counts += (tokens, rows, loss_tokens)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open a window once the warm-up is over."""
        if self._first_global_step is None:
            self._first_global_step = state.global_step
            self._began = time.perf_counter()
        warmup = self._warmup(state)
        if state.global_step == self._first_global_step + warmup - 1:
            synchronize()
            self.waited_s += wait_for_turn(torch.cuda.empty_cache)
        if self._window is None and state.global_step >= self._first_global_step + warmup:
            synchronize()
            if not self._warmed_up:
                self._warmed_up, self._warmup_steps = time.perf_counter() - self._began - self.waited_s, warmup
            self._counts[:] = 0
            self._window = (time.perf_counter(), state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Close the window before an evaluation, a checkpoint or the end."""
        self.collectives.end()
        # the last step of a whole warm-up: no timed one is slowed
        done = state.global_step - self._first_global_step
        if done + 1 == WARMUP_STEPS == self._warmup(state) and several_processes():
            self.collectives.begin()
        if self.first_step_s is None:
            synchronize()
            self.first_step_s = time.time() - psutil.Process().create_time()
        self._close(state, control, state.global_step >= state.max_steps)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the window before an evaluation or a checkpoint of the epoch."""
        self._close(state, control)

    def _close(self, state: TrainerState, control: TrainerControl, ended: bool = False) -> None:
        pause = control.should_evaluate or control.should_save or control.should_training_stop
        if self._window and (pause or ended):
            synchronize()
            started, first = self._window
            self._seconds += time.perf_counter() - started
            self._steps += state.global_step - first
            self._counted += self._counts
            self._window = None

    def state(self) -> dict[str, Any]:
        """What was measured before a checkpoint, for the start that goes on from it."""
        return {
            "counted": self._counted.tolist(),
            "seconds": self._seconds,
            "steps": self._steps,
            "warm_up": [self._warmed_up, self._warmup_steps],
            "first_step_s": self.first_step_s,
            "collectives": self.collectives.facts,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on counting; times to the first step and of the warm-up stay those of the first start."""
        self._counted[:] = state["counted"]
        self._seconds, self._steps = state["seconds"], state["steps"]
        self._warmed_up, self._warmup_steps = state["warm_up"]
        self.first_step_s, self.collectives.facts = state["first_step_s"], state["collectives"]

    def _warmup(self, state: TrainerState) -> int:
        return min(WARMUP_STEPS, max(1, (state.max_steps - self._first_global_step) // 4))

    def facts(self, flops: "Flops") -> dict[str, Any]:
        """Throughput over all processes for run.json; every process calls it. None where no step was timed.

        `warm_up_s` is what the first steps took longer than as many steady ones: compilation, first allocations.
        """
        ranks = gather_object([[*self._counted.tolist(), self._seconds]])
        tokens, rows, loss_tokens, _ = (sum(column) for column in zip(*ranks, strict=True))
        seconds = max(rank[3] for rank in ranks)
        facts: dict[str, Any] = {
            "time_to_first_step_s": self.first_step_s and round(self.first_step_s, 2),
            "timed_steps": self._steps,
            "timed_seconds": round(seconds, 3),
            "tokens_per_s": None,
            "rows_per_s": None,
            "step_time_s": None,
            "warm_up_s": None,
            **({"waited_for_turn_s": round(self.waited_s, 2)} if self.waited_s else {}),
            "collectives": self.collectives.facts,
        }
        if seconds > 0:
            facts["tokens_per_s"] = round(tokens / seconds, 1)
            facts["rows_per_s"] = round(rows / seconds, 3)
            facts["step_time_s"] = round(seconds / self._steps, 5)
            facts["warm_up_s"] = round(self._warmed_up - self._warmup_steps * seconds / self._steps, 2)
            work = flops.token * tokens + flops.loss_token * loss_tokens
            facts["model_tflops_per_s"] = _significant(work / seconds / 1e12)
        return facts


def _significant(value: float) -> float:
    """Five digits: of a tiny model on a busy machine too."""
    return float(f"{value:.5g}")


class Flops(NamedTuple):
    """Model FLOPs of a token, and what a token in the loss takes beyond them: the head's."""

    token: float
    loss_token: float


def flops_per_token(model: nn.Module) -> Flops:
    """Model FLOPs a token, forward and backward.

    4 for each frozen matrix parameter (2 forward, 2 for the gradient of its input) and 6 for each trainable one (2 more
    for its own gradient). The embedding is a lookup; the head, tied or not, counts where a token is in the loss.
    Attention scores and recomputation under checkpointing are left out. 6N for every parameter would count gradients
    that LoRA never computes; of experts those that a token goes to are counted, of a module saved whole its copy.
    """
    head = model.get_output_embeddings()
    head = next(iter(getattr(head, "modules_to_save", {}).values()), head).weight
    left_out = {id(head), *(id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding))}
    left_out |= {id(p) for name, p in model.named_parameters() if ".original_module." in name}
    taken = _experts_taken(model.config.get_text_config())
    matrices = {name: p for name, p in model.named_parameters() if p.ndim > 1 and id(p) not in left_out}
    return Flops(sum(_flops(p) * (taken if ".experts." in name else 1) for name, p in matrices.items()), _flops(head))


def _flops(parameter: nn.Parameter) -> float:
    return (6.0 if parameter.requires_grad else 4.0) * parameter.numel() * _packed_factor(parameter)


def _experts_taken(config: PreTrainedConfig) -> float:
    """The share of a mixture's experts that work on a token; 1 where the config does not say it in one number."""
    fields = config.to_dict()
    experts, taken = (
        next((fields[name] for name in names if isinstance(fields.get(name), int)), None)
        for names in (
            ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
            ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k"),
        )
    )
    return taken / experts if experts and taken else 1.0


def _packed_factor(parameter: nn.Parameter) -> float:
    """Weights that one stored element of a bitsandbytes parameter stands for."""
    state = getattr(parameter, "quant_state", None)
    return state.shape.numel() / parameter.numel() if state is not None else 1.0


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a square matrix product of random data on `device`: the best of several, as a limit is.

    A CPU does a linear layer's product, of growing sizes while they are quick: without instructions for 16 bits one
    of size 2,048 takes a second, and a minute with its second matrix in the other order.
    """
    on_gpu = device.type == "cuda"
    sizes, repeats, product = ((8192,), 20, torch.matmul) if on_gpu else ((256, 512, 1024, 2048), 5, F.linear)
    best = 0.0
    for size in sizes:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        seconds = min(_seconds(product, a, b) for _ in range(repeats))
        best = max(best, 2 * size**3 / seconds)
        if seconds > QUICK_S:
            break
    return best


def _seconds(product: Callable[..., torch.Tensor], a: torch.Tensor, b: torch.Tensor) -> float:
    synchronize()
    start = time.perf_counter()
    product(a, b)
    synchronize()
    return time.perf_counter() - start


def share_of_limit(facts: dict[str, Any], device: torch.device, dtype: torch.dtype, world_size: int) -> dict[str, Any]:
    """The measured matrix rate of one device and the share of it that the run's model FLOPs reached."""
    rate = matrix_rate(device, dtype) / 1e12
    reached = facts.get("model_tflops_per_s")
    return {
        "limit": f"measured {str(dtype).removeprefix('torch.')} matrix rate a device",
        "limit_tflops_per_s": round(rate, 2),
        "share_of_limit": _significant(reached / (rate * world_size)) if reached else None,
    }


def peak_memory(split: MemorySplit | None = None, earlier: dict[str, Any] | None = None) -> list[dict[str, float]]:
    """`peak_of_process` of every rank; every process calls it."""
    return gather_object([peak_of_process(split, earlier)])


def peak_of_process(split: MemorySplit | None = None, earlier: dict[str, Any] | None = None) -> dict[str, Any]:
    """Peak memory in GB (2**30 bytes): GPU allocated and reserved, or the process's resident set.

    With `split`, a step's memory by part as well. With `earlier`, what an earlier start of the run had, the larger one.
    """
    before, parts = (split.peak_before, split.facts) if split else (0, {})
    earlier = earlier or {}
    if torch.cuda.is_available():
        mine = {
            "allocated_gb": round(max(before, torch.cuda.max_memory_allocated()) / 2**30, 3),
            "reserved_gb": round(torch.cuda.max_memory_reserved() / 2**30, 3),
        }
    else:
        mine = {"resident_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3)}
    mine = {name: max(peak, earlier.get(name, 0.0)) for name, peak in mine.items()}
    parts = parts or earlier.get("step", {})
    return mine | ({"step": parts} if parts else {})


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
