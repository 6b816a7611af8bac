"""Forward and backward of a micro-batch, recorded once for each shape and then replayed.

A step of a small micro-batch is thousands of short kernels, and Python needs longer to start them
than the GPU to run them. A recorded step starts them all at once. What it reads and writes must
stay where it is in memory: the batch (StaticBatch), the gradients (StaticGradients), the weights,
which the optimizer changes in place. sftlab/fastpath/cuda_graphs.py does the recording.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import nn

from sftlab.exit_messages import first_line

# Runs before the first recording and before others: kernels are compiled, libraries take memory.
WARM_UPS, WARM_UPS_LATER = 3, 1
# recorded shapes; batches of others are trained on without a recording
MOST_SHAPES = 64
# A recording takes about as long as three steps, so a shape is recorded when it comes again.
RECORDED_WHEN_MET = 2
# Largest relative differences from the step that is not replayed. Its kernels are the same, so that
# only sums in another order may differ.
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-3, 1e-2
# gradients begin at multiples of this many elements, as the kernels of optimizers like it
_ALIGNED = 128

Batch = Mapping[str, torch.Tensor]
# runs forward and backward and returns results [n], the loss first
Step = Callable[[Batch], torch.Tensor]


class NotCaptured(RuntimeError):
    """Steps cannot be recorded, or compute something else once they are; the message says why."""


class Recorder(Protocol):
    """What records work on a device and replays it."""

    def warm(self, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Run work as it will be recorded, and wait for it; returns its result."""

    def record(self, work: Callable[[], torch.Tensor]) -> tuple[Callable[[], object], torch.Tensor]:
        """Returns what runs the work again, and the result that it then fills."""

    def forget(self, drop: Callable[[], object]) -> None:
        """Call `drop`, which lets go of all recordings, and give their memory back."""

    def short_of_memory(self) -> bool:
        """Returns whether little memory is left for other work than the recordings."""

    def on_its_stream(self) -> AbstractContextManager[None]:
        """Inside, work is done where it is when it is recorded; in order with what is outside."""


class StaticBatch:
    """Tensors of a batch that stay where they are, for all batches of one shape."""

    def __init__(self, batch: Batch) -> None:
        self.tensors = {name: one.clone() for name, one in batch.items()}

    def take(self, batch: Batch) -> None:
        """Copy a batch of the same shape into the tensors."""
        for name, one in self.tensors.items():
            one.copy_(batch[name], non_blocking=True)


class StaticGradients:
    """Gradients of parameters that stay where they are from one step to the next.

    They are parts of one tensor for each dtype. The first of these also has a note, a number that
    `average` adds up over all processes.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = tuple(parameters)
        starts: dict[tuple, int] = {}
        places = []
        for one in self._parameters:
            kind = one.device, one.dtype
            places.append(starts.get(kind, 0))
            starts[kind] = places[-1] + -(-one.numel() // _ALIGNED) * _ALIGNED
        self._whole = {
            kind: torch.zeros(size + 1, device=kind[0], dtype=kind[1])
            for kind, size in starts.items()
        }
        self._note = next(iter(self._whole.values()))[-1:]
        self._views = tuple(
            self._whole[one.device, one.dtype][start : start + one.numel()].view(one.shape)
            for one, start in zip(self._parameters, places, strict=True)
        )
        self._weights = self._addresses()

    def _addresses(self) -> tuple[int, ...]:
        return tuple(one.data_ptr() for one in self._parameters)

    def attach(self) -> None:
        """Let every parameter have its gradient here; one that it has elsewhere is copied.

        Raises NotCaptured where the weights have moved since.
        """
        if self._addresses() != self._weights:
            raise NotCaptured("the trained weights were moved in memory")
        self.take()

    @torch.no_grad()
    def take(self) -> None:
        """Do what `attach` does, wherever the weights are."""
        for parameter, view in zip(self._parameters, self._views, strict=True):
            if parameter.grad is not view:
                if parameter.grad is None:
                    view.zero_()
                else:
                    view.copy_(parameter.grad)
                parameter.grad = view

    def add(self, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Run a backward, and add all its gradients to those here at once; returns its result.

        Autograd alone would add them one by one, in a kernel each.
        """
        try:
            for parameter in self._parameters:
                parameter.grad = None
            result = work()
            pairs = zip(self._views, self._parameters, strict=True)
            given = [(view, one.grad) for view, one in pairs if one.grad is not None]
            torch._foreach_add_([view for view, _ in given], [grad for _, grad in given])
        finally:
            for parameter, view in zip(self._parameters, self._views, strict=True):
                parameter.grad = view
        return result

    def zero(self) -> None:
        """Set all gradients to zero, in place."""
        for whole in self._whole.values():
            whole.zero_()

    def average(self, note: float) -> torch.Tensor:
        """Average the gradients over all processes, in as many messages as there are dtypes.

        Each is divided and then added up, as DDP does. Returns whether a process gave a note above
        0: a number above 0 then, on the device, [1]. Every process calls it.
        """
        self._note.fill_(note)
        for whole in self._whole.values():
            whole.div_(dist.get_world_size())
            dist.all_reduce(whole)
        return self._note

    def clone(self) -> list[torch.Tensor]:
        """Returns a copy of all gradients."""
        return [whole.clone() for whole in self._whole.values()]

    def restore(self, copies: Sequence[torch.Tensor]) -> None:
        """Set all gradients to those of a copy."""
        for whole, copy in zip(self._whole.values(), copies, strict=True):
            whole.copy_(copy)


class _Shape(NamedTuple):
    batch: StaticBatch
    replay: Callable[[], object]
    results: torch.Tensor


class CapturedSteps:
    """Runs micro-batches by replaying one that was recorded for their shape.

    What a replay leaves is what the step itself would leave: gradients are added to those that are
    there, and as many random numbers are drawn, whether or not the shape is recorded for it. A
    shape is recorded when it comes again, and the first of all at once. `captures` counts
    recordings, and `plain` micro-batches without one.
    """

    def __init__(self, step: Step, gradients: StaticGradients, recorder: Recorder) -> None:
        self._step, self.gradients, self._recorder = step, gradients, recorder
        self._shapes: dict[tuple, _Shape] = {}
        self._met: Counter[tuple] = Counter()
        self._full = False
        self.captures = self.plain = 0

    def run(self, batch: Batch) -> torch.Tensor:
        """Run a micro-batch; returns the step's results [n]. Raises NotCaptured.

        All batches have tensors of the same names, on one device.
        """
        self.gradients.attach()
        key = tuple(tuple(one.shape) for one in batch.values())
        if key not in self._shapes:
            if not self._is_to_be_recorded(key):
                return self.run_plain(batch)
            self._shapes[key] = self._recorded(batch)
        shape = self._shapes[key]
        shape.batch.take(batch)
        shape.replay()
        return shape.results.clone()  # the next replay overwrites them

    def _is_to_be_recorded(self, key: tuple) -> bool:
        """Whether a shape that is not recorded shall be, now that it has come.

        Raises NotCaptured where there is no memory for even one.
        """
        self._met[key] += 1
        rare = self._met[key] < RECORDED_WHEN_MET and self.captures > 0
        if rare or self._full or len(self._shapes) >= MOST_SHAPES:
            return False
        self._full = self._recorder.short_of_memory()
        if self._full and self.captures == 0:
            raise NotCaptured("too little of the GPU's memory is left for recordings")
        return not self._full

    def run_plain(self, batch: Batch) -> torch.Tensor:
        """Run a micro-batch without a recording; its gradients are where those of others are."""
        self.gradients.take()
        self.plain += 1
        return self.gradients.add(lambda: self._step(batch))

    def _recorded(self, batch: Batch) -> _Shape:
        """Record a step and compare a replay with the step; nothing else changes.

        Raises NotCaptured.
        """
        static = StaticBatch(batch)
        device = next(iter(batch.values())).device
        held, drawn = self.gradients.clone(), random_state(device)

        def from_here(work: Callable[..., Any], *args: Any) -> Any:
            self.gradients.zero()
            set_random_state(drawn)
            return work(*args)

        def step() -> torch.Tensor:
            return self.gradients.add(lambda: self._step(static.tensors))

        try:
            for _ in range(WARM_UPS_LATER if self.captures else WARM_UPS):
                expected = from_here(self._recorder.warm, step).clone()
            gradients = self.gradients.clone()
            replay, results = from_here(self._recorder.record, step)
            self.captures += 1
            from_here(replay)
            compare(expected, gradients, results, self.gradients.clone())
        except NotCaptured:
            raise
        except RuntimeError as error:
            raise NotCaptured(_reason(error)) from error
        finally:
            self.gradients.restore(held)
            set_random_state(drawn)
        return _Shape(static, replay, results)

    def forget(self) -> None:
        """Drop all recordings, and give their memory back."""
        self._full = False
        self._recorder.forget(self._shapes.clear)


def compare(
    expected: torch.Tensor,
    gradients: Sequence[torch.Tensor],
    found: torch.Tensor,
    found_gradients: Sequence[torch.Tensor],
) -> None:
    """Raise NotCaptured where a replayed step's loss or gradients are not those expected.

    The first of the results is the loss. Waits for the device.
    """
    loss, other = float(expected[0]), float(found[0])
    apart = abs(other - loss) / max(abs(loss), 1e-12)
    if not apart <= LOSS_TOLERANCE:
        raise NotCaptured(f"the replayed step's loss is {other:.6g}, that of the step {loss:.6g}")
    pairs = list(zip(gradients, found_gradients, strict=True))
    squares = sum(float((one - same).double().square().sum()) for one, same in pairs)
    whole = sum(float(one.double().square().sum()) for one, _ in pairs)
    apart = (squares / max(whole, 1e-24)) ** 0.5
    if not apart <= GRADIENT_TOLERANCE:
        raise NotCaptured(f"the replayed step's gradients differ by {apart:.2%} from the step's")


def random_state(device: torch.device) -> list[torch.Tensor]:
    """Returns the state of the random numbers of the CPU and, on a GPU, of the device."""
    return [
        torch.get_rng_state(),
        *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else []),
    ]


def set_random_state(state: Sequence[torch.Tensor]) -> None:
    """Go back to a state of the random numbers; that of a GPU is the current device's."""
    torch.set_rng_state(state[0])
    for one in state[1:]:
        torch.cuda.set_rng_state(one)


def _reason(error: BaseException) -> str:
    """Returns the first line of the error that others followed."""
    while error.__context__ is not None:
        error = error.__context__
    return first_line(error)
