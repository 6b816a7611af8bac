"""Records work on a GPU as CUDA graphs."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

# An evaluation may need this share of the GPU's memory, and rather has it than recordings do.
FOR_OTHERS = 0.25


class CudaGraphs:
    """Records work on the current GPU, a graph each; the graphs share one pool of memory.

    Graphs of one pool may overwrite one another's tensors: what one leaves is read before the next
    one is replayed. Work runs on a stream of its own before it is recorded there, so that libraries
    have their memory for that stream and gradients are added on it. The pool begins as one block
    that the first work fits into. Later work takes parts of it too, where pieces of the first one's
    sizes would seldom fit.
    """

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()
        self._pool = torch.cuda.graph_pool_handle()
        self._room = 0  # bytes that work took at its last run before the first recording
        self._began = False

    @contextmanager
    def on_its_stream(self) -> Iterator[None]:
        """Inside, work is on the stream of the recordings; in order with what is outside.

        What DDP keeps of the gradients belongs to the stream that it is wrapped on, and a recording
        must not use another one.
        """
        outside = torch.cuda.current_stream()
        self._stream.wait_stream(outside)
        with torch.cuda.stream(self._stream):
            yield
        outside.wait_stream(self._stream)
        # plain steps then add gradients on another stream than their own, and torch warns of that
        warn = getattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch", None)
        if warn is not None:
            warn(False)

    def warm(self, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Run work on the stream of the recordings, and wait for it; returns its result."""
        torch.cuda.synchronize()
        if not self._began:
            torch.cuda.empty_cache()
            before = torch.cuda.memory_reserved()
        with torch.cuda.stream(self._stream):
            result = work()
        torch.cuda.synchronize()
        if not self._began:
            self._room = torch.cuda.memory_reserved() - before
        return result

    def record(self, work: Callable[[], torch.Tensor]) -> tuple[Callable[[], object], torch.Tensor]:
        """Returns what replays the work on the current stream, and the result that it then fills.

        Other threads may use the GPU meanwhile. Raises RuntimeError for work that cannot be
        recorded; random numbers go on as before it.
        """
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        drawn = generator.clone_state()
        if not self._began:  # what an earlier backward left might belong to another stream
            gc.collect()
        collects = gc.isenabled()
        gc.disable()  # what is collected during a recording might wait for the device
        try:
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                if not self._began:
                    torch.empty(self._room, dtype=torch.uint8, device="cuda")  # stays in the pool
                result = work()
        except BaseException:
            # torch leaves both as they are during a recording that fails
            torch.cuda.set_stream(stream)
            generator.graphsafe_set_state(drawn)
            raise
        finally:
            if collects:
                gc.enable()
        self._began = True
        return graph.replay, result

    def short_of_memory(self) -> bool:
        """Returns whether little of the GPU's memory is left for other work."""
        torch.cuda.empty_cache()
        free, whole = torch.cuda.mem_get_info()
        return free < FOR_OTHERS * whole

    def forget(self, drop: Callable[[], object]) -> None:
        """Call `drop`, which lets go of all graphs, and give their memory back."""
        torch.cuda.synchronize()
        drop()
        gc.collect()
        self._pool, self._began = torch.cuda.graph_pool_handle(), False
        torch.cuda.empty_cache()
