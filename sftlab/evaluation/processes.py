"""The processes of an evaluation, one a device: whole batches are dealt over them.

Each batch is what one process alone would compute, so greedy results are the same to the last bit.
"""

import os
from datetime import timedelta
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist

Part = TypeVar("Part")
# A process waits for the others as long as their rows take.
_PATIENCE = timedelta(days=7)


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

    def has(self, batch: int) -> bool:
        """Returns whether a batch, by its number, is this process's."""
        return batch % self.count == self.rank

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
