"""Batches of a few sizes hold what they would hold otherwise, and little besides."""

from itertools import pairwise

import pytest
import torch
from packed_training import examples

from sftlab.data.buckets import loss_bucket, loss_parts, most_tiles, token_bucket
from sftlab.data.collator import Collator
from sftlab.data.tiles import LONG_TILE, TILE
from sftlab.training import step_capture


def test_sizes_hold_what_they_must_and_waste_little():
    for rows, share, count in ((1, 0.0906, 8), (4, 0.0906, 8), (20, 0.0393, 18), (64, 0.022, 32)):
        sizes = set()
        for tokens in [*range(1, 3000, 7), *range(3000, 70000, 17)]:
            size = token_bucket(tokens, 128, rows)
            assert size >= tokens and size % 128 == 0
            assert size - tokens < share * tokens + 128
            assert token_bucket(size, 128, rows) == size, "a full batch is not filled up"
            sizes.add(size)
        assert len([size for size in sizes if 16384 < size <= 32768]) == count
    assert token_bucket(500, 384, 4) == 768
    for count in (0, 1, 32, 33, 255, 256):
        size = loss_bucket(count, 256, 8)
        assert size >= max(count, 1) and size % 32 == 0 and size - max(count, 1) < 32
    assert loss_bucket(3, 256, 1) == 256
    shares = {0.001: 1, 0.02: 1, 0.07: 2, 0.13: 4, 0.27: 8, 2.0: 8}
    assert {share: loss_parts(share) for share in shares} == shares


@pytest.mark.parametrize("tile", [TILE, LONG_TILE])
def test_batches_of_a_size_have_tensors_of_the_same_shapes(tile):
    collate = Collator(0, packed=True, parts=4, tile=tile)
    rows, shapes = examples(200), {}
    for first in range(0, 200, 5):
        batch = collate(rows[first : first + 5])
        count = batch["loss_tokens"]
        key = batch["input_ids"].numel(), len(batch["targets"])
        assert key == (
            token_bucket(batch["real_tokens"], 128, 5),
            loss_bucket(count, batch["input_ids"].numel(), 4),
        )
        found = {name: batch[name].shape for name in step_capture.INPUTS}
        assert shapes.setdefault(key, found) == found
        at, inside = batch["loss_positions"], batch["in_loss"]
        assert len(at.unique()) == len(at), "gradients are written to every position once"
        assert inside.sum() == count and inside[:count].all()
        flat = batch["labels"].flatten()
        assert torch.equal(flat[at[:count] + 1], batch["targets"][:count])
        after = torch.cat([flat[1:], flat.new_tensor([-100])])
        assert (after[at[count:]] == -100).all(), "what fills up is not in the loss"
    assert len(shapes) < 20


@pytest.mark.parametrize("tile", [TILE, LONG_TILE])
def test_padding_is_in_short_rows_of_its_own(tile):
    rows = examples(44)
    batch = Collator(0, packed=True, multiple=384, parts=8, tile=tile)(rows)
    real, size = sum(len(row["input_ids"]) for row in rows), batch["input_ids"].numel()
    table = batch["tiles"].flatten(1, 2).tolist()
    for half in table:
        seen = [at for start, end, first in half for at in range(first, min(first + TILE, end))]
        assert sorted(seen) == list(range(size))
        assert all(end <= real or (start >= real and end - start <= tile) for start, end, _ in half)
    assert batch["tiles"].shape[1] >= most_tiles(size, len(rows) + 1, tile)
    starts = (batch["position_ids"][0] == 0).nonzero()[:, 0].tolist()
    assert starts == sorted({start for start, end, _ in table[0] if start < end})
    padding = [end - start for start, end in pairwise([*starts, size]) if start >= real]
    assert len(padding) > 1 and {*padding[:-1]} == {tile}
    assert (batch["labels"][0, real:] == -100).all()
