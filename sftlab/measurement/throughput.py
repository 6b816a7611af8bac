"""Steady-state throughput of a run, and the time until it is reached."""

import time
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sftlab.measurement.collectives import Collectives, several_processes
from sftlab.measurement.flops import Flops
from sftlab.measurement.hardware_limit import significant, synchronize
from sftlab.measurement.timing_turn import wait_for_turn
from sftlab.startup.phases import (
    FIRST_STEP,
    phase_ended,
    seconds_of_phases,
    seconds_since_start,
)

WARMUP_STEPS = 5


class Meter(TrainerCallback):
    """Counts real tokens and rows in the steady state, without warm-up, evaluation and saving.

    The clock stops before an evaluation or a checkpoint and starts again with the next step.
    """

    def __init__(self) -> None:
        self.first_step_s: float | None = None
        self.start_s: dict[str, float] | None = None
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
        """Add one micro-batch: its real tokens, its rows, and its tokens in the loss."""
        self._counts += (tokens, rows, loss_tokens)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock once the warm-up is over."""
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
                self._warmed_up, self._warmup_steps = (
                    time.perf_counter() - self._began - self.waited_s,
                    warmup,
                )
            self._counts[:] = 0
            self._window = (time.perf_counter(), state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop the clock before an evaluation, a checkpoint or the end."""
        self.collectives.end()
        # profile the last step of a full warm-up, so that no timed step is slowed
        done = state.global_step - self._first_global_step
        if done + 1 == WARMUP_STEPS == self._warmup(state) and several_processes():
            self.collectives.begin()
        if self.first_step_s is None:
            synchronize()
            self.first_step_s = seconds_since_start()
            phase_ended(FIRST_STEP)
            self.start_s = seconds_of_phases()
        self._close(state, control, state.global_step >= state.max_steps)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop the clock before an evaluation or a checkpoint of the epoch."""
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
        """Returns the measurements so far, for a run that is resumed from this checkpoint."""
        return {
            "counted": self._counted.tolist(),
            "seconds": self._seconds,
            "steps": self._steps,
            "warm_up": [self._warmed_up, self._warmup_steps],
            "first_step_s": self.first_step_s,
            "start_s": self.start_s,
            "collectives": self.collectives.facts,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from `state()`; the times of first step and warm-up stay the first start's."""
        self._counted[:] = state["counted"]
        self._seconds, self._steps = state["seconds"], state["steps"]
        self._warmed_up, self._warmup_steps = state["warm_up"]
        self.first_step_s, self.collectives.facts = state["first_step_s"], state["collectives"]
        self.start_s = state.get("start_s")

    def _warmup(self, state: TrainerState) -> int:
        return min(WARMUP_STEPS, max(1, (state.max_steps - self._first_global_step) // 4))

    def facts(self, flops: Flops) -> dict[str, Any]:
        """Returns the throughput over all processes, for run.json. Every process calls it.

        Rates are None if no step was timed. `warm_up_s` is the time that the first steps took
        beyond that of as many steady steps: compilation and first allocations.
        """
        ranks = gather_object([[*self._counted.tolist(), self._seconds]])
        tokens, rows, loss_tokens, _ = (sum(column) for column in zip(*ranks, strict=True))
        seconds = max(rank[3] for rank in ranks)
        facts: dict[str, Any] = {
            "time_to_first_step_s": self.first_step_s and round(self.first_step_s, 2),
            "start_s": self.start_s,
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
            steady = self._warmup_steps * seconds / self._steps
            facts["warm_up_s"] = round(max(0.0, self._warmed_up - steady), 2)
            work = flops.token * tokens + flops.loss_token * loss_tokens
            facts["model_tflops_per_s"] = significant(work / seconds / 1e12)
        return facts
