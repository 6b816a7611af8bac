"""Every epoch has an order of its own, also where a run resumes within it."""

from functools import partial

import pytest
from accelerate.data_loader import SeedableRandomSampler, prepare_data_loader, skip_first_batches
from torch.utils.data import DataLoader, RandomSampler
from transformers import Trainer

from sftlab.data.samplers import BalancedSampler, whole_batches
from sftlab.training.upstream_fixes import UpstreamFixes

ROWS, GLOBAL_BATCH, LENGTHS = range(60), 6, [5 + row % 7 for row in range(60)]


def dealt(monkeypatch, packing: bool, processes: int, rank: int, epoch: int, skipped: int) -> list:
    """The micro-batches of a rank in an epoch of which the first are skipped."""
    found = []

    def run_epoch(self, model, epoch, train_dataloader, *more):
        # the order of things in transformers' function of this name
        loader = skip_first_batches(train_dataloader, skipped) if skipped else train_dataloader
        loader.set_epoch(epoch)
        found.extend(batch.tolist() for batch in loader)

    monkeypatch.setattr(Trainer, "_run_epoch", run_epoch)
    size = GLOBAL_BATCH // processes
    plain = RandomSampler(ROWS)
    seedable = partial(SeedableRandomSampler, data_seed=1)
    order = whole_batches(plain, GLOBAL_BATCH, *[seedable] * packing)
    if packing:
        order = BalancedSampler(order, LENGTHS, size, processes)
    loader = prepare_data_loader(
        DataLoader(ROWS, batch_size=size, sampler=order),
        num_processes=processes,
        process_index=rank,
        put_on_device=False,
        use_seedable_sampler=True,
        data_seed=1,
    )
    UpstreamFixes._run_epoch(object.__new__(UpstreamFixes), None, epoch, loader)
    return found


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_the_rest_of_an_epoch_is_that_of_the_undisturbed_one(monkeypatch, packing, processes):
    for rank in range(processes):
        deal = partial(dealt, monkeypatch, packing, processes, rank)
        first, second = deal(0, 0), deal(1, 0)
        assert len(first) == len(second) == len(ROWS) // GLOBAL_BATCH
        assert first != second
        assert deal(0, 4) == first[4:]
        assert deal(1, 4) == second[4:]
