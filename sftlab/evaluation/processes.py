"""The processes of an evaluation, one a device: whole batches are dealt over them.

Each batch is what one process alone would compute, so greedy results are the same to the last bit,
whichever process computes it.
"""

import itertools
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist

Part = TypeVar("Part")
# A process waits for the others as long as their rows take.
_PATIENCE = timedelta(days=7)
# Every process deals the same batches in the same order, so a number names a deal in all of them.
_DEALS = itertools.count()


class Processes(NamedTuple):
    """The processes that accelerate started, or this one alone. Process 0 writes and prints."""

    rank: int = 0
    count: int = 1

    @property
    def is_main(self) -> bool:
        """Returns whether this process writes and prints."""
        return self.rank == 0

    @classmethod
    def joined(cls) -> "Processes":
        """Returns the processes of the environment, met, each with its GPU.

        Raises ValueError where this machine has fewer GPUs than processes.
        """
        found = cls(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
        if found.count > 1:
            local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            if 0 < gpus <= local:
                raise ValueError(
                    f"process {local + 1} of this machine has no GPU, which shows {gpus}: pass "
                    f"--num_processes {gpus}"
                )
            if gpus:
                torch.cuda.set_device(local)
            if not dist.is_initialized():
                dist.init_process_group("gloo", timeout=_PATIENCE)
        return found

    def dealt(self, batches: int) -> Iterator[int]:
        """Returns the numbers of the batches that this process computes.

        Each process takes the next batch when it is free, so that none waits for a slower one.
        """
        deal = next(_DEALS)
        taken = (self._next(deal) for _ in itertools.count())
        numbers = itertools.count() if self.count == 1 else taken
        return itertools.takewhile(lambda number: number < batches, numbers)

    def _next(self, deal: int) -> int:
        """Returns the number of the batch that no process of a deal has taken yet."""
        store = dist.distributed_c10d._get_default_store()
        return store.add(f"sftlab/deal/{deal}", 1) - 1

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.count > 1:
            dist.barrier()

    def merged(self, own: dict[int, Part]) -> list[Part]:
        """Returns the parts of all batches in their order; each process gives its own."""
        every: list[dict[int, Part]] = [own]
        if self.count > 1:
            every = [{}] * self.count
            dist.all_gather_object(every, own)
        found = {number: part for one in every for number, part in one.items()}
        return [found[number] for number in sorted(found)]


ALONE = Processes()
