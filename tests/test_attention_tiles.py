"""How many tokens a tile of packed rows has, and that whatever packs rows in a run agrees on it."""

import numpy as np
import pytest
import torch
from conftest import pair_rows, read, write_jsonl
from packed_training import (
    assert_checkpoints_say,
    build,
    pack_on_a_cpu,
    reference_attention,
    stop_in_step_two,
    train,
)
from preference_runs import pair_fields
from triton_interpreter import with_triton

from sftlab.data import tiles as tables
from sftlab.data.collator import Collator
from sftlab.data.tiles import LONG_TILE, TILE, tile_for, tile_of, tiles


@pytest.mark.parametrize("tile", [TILE, LONG_TILE])
@pytest.mark.parametrize("lengths", [[64], [65], [200, 3, 128], [64, 64, 64, 64], [1, 0], [513]])
def test_tables_of_tiles_cover_every_token_once_and_are_aligned(lengths, tile):
    table = tiles(lengths, tile)
    assert tile_of(table) == tile
    assert table[0].numel() * 4 % 16 == 0, "Triton would compile the backward for both alignments"
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    for half in table:
        parts = half.flatten(0, 1).tolist()
        seen = [at for start, end, first in parts for at in range(first, min(first + TILE, end))]
        assert sorted(seen) == list(range(sum(lengths)))
        assert all(end in ends for _, end, _ in parts)
        assert (half.diff(dim=1) == torch.tensor([0, 0, TILE])).all(), "a program may take a tile"
        whole = half[: sum(-(-n // tile) for n in lengths)]
        assert (whole[:, 0, 2] < whole[:, 0, 1]).all(), "empty ones last"
    work = table[0, :, 0, 2] - table[0, :, 0, 0], table[1, :, 0, 1] - table[1, :, 0, 2]
    assert all((one.diff() <= 0).all() for one in work), "the most work first"


@pytest.mark.parametrize(
    ("lengths", "tile"),
    [
        ([2048], LONG_TILE),
        ([2047], TILE),
        ([4096, *[300] * 12], LONG_TILE),  # the work is in one row, half of the tokens are not
        ([4096, *[300] * 24], TILE),
        ([1024] * 1000, TILE),
        ([65_536] * 10, LONG_TILE),  # whose squares are beyond 32 bits
        ([], TILE),
    ],
    ids=lambda value: str(value)[:20],
)
def test_tiles_are_long_where_the_average_token_is_in_a_long_row(lengths, tile):
    assert tile_for(np.array(lengths, dtype=np.int32)) == tile


def test_batches_of_long_tiles_are_those_of_others():
    rows = [{"input_ids": list(range(n)), "labels": list(range(n))} for n in (3, 200, 65)]
    usual, long = (Collator(0, packed=True, tile=tile)(rows) for tile in (TILE, LONG_TILE))
    assert [tile_of(one.pop("tiles")) for one in (usual, long)] == [TILE, LONG_TILE]
    assert usual.keys() == long.keys()
    assert all(torch.equal(*map(torch.as_tensor, (usual[name], long[name]))) for name in usual)


@with_triton
@pytest.mark.parametrize(
    ("tile", "size", "window", "dtype", "chosen"),
    [
        (TILE, 128, 0, torch.bfloat16, (64, 32)),
        (LONG_TILE, 128, 0, torch.bfloat16, (128, 64)),
        (LONG_TILE, 128, 4096, torch.bfloat16, (128, 64)),
        (LONG_TILE, 128, 512, torch.bfloat16, (64, 32)),
        (LONG_TILE, 64, 0, torch.bfloat16, (64, 64)),
        (LONG_TILE, 192, 0, torch.bfloat16, (64, 32)),
        (LONG_TILE, 128, 0, torch.float32, (32, 32)),
    ],
)
def test_programs_own_and_read_what_was_fastest(monkeypatch, tile, size, window, dtype, chosen):
    from sftlab.fastpath import triton_kernels

    class Kernel:
        def __getitem__(self, grid):
            return lambda *given, **options: started.append((grid, given[-3:-1]))

    started = []
    monkeypatch.setattr(triton_kernels, "_forward", Kernel())
    query = torch.zeros(300, 2, size, dtype=dtype)
    table = tiles([300], tile)
    triton_kernels.attention_forward(query, query, query, table, 1.0, window)
    programs = table[0].numel() // 3 * TILE // chosen[0]
    assert started == [((programs, 2), chosen)]


# ---- in a training ----


@pytest.fixture
def seen(monkeypatch) -> set[int]:
    """The tokens of every tile that the attention gets; rows of 30 tokens are long."""
    found: set[int] = set()

    def attention(query, key, value, table, *rest):
        found.add(tile_of(table))
        return reference_attention(query, key, value, table, *rest)

    pack_on_a_cpu(monkeypatch, attention)
    monkeypatch.setattr(tables, "LONG_ROW", 30)
    return found


def test_training_its_check_and_its_evaluation_take_the_tiles_of_its_rows(
    fields, seen, monkeypatch
):
    more = {"max_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    trainer = build(fields, packing="true", **more)
    train(trainer)
    assert (trainer.what_ran()["attention_tile"], seen) == (LONG_TILE, {LONG_TILE})
    monkeypatch.setattr(tables, "LONG_ROW", 3000)
    assert build(fields, packing="true").what_ran()["attention_tile"] == TILE


def test_sides_of_pairs_are_rows_of_their_own(base, tmp_path, seen, monkeypatch):
    pairs = write_jsonl(tmp_path / "pairs.jsonl", pair_rows(60))
    trainer = build(pair_fields(base, pairs, tmp_path / "run"), packing="true")
    sides = trainer.sequence_lengths()
    assert sides.sum() == trainer.row_lengths().sum() and len(sides) == 2 * len(
        trainer.train_dataset
    )
    batch = trainer.data_collator([trainer.train_dataset[0]])
    assert trainer.fast.attention_tile == tile_of(batch["tiles"]) == LONG_TILE
    # both sides together are that long, and none is alone
    monkeypatch.setattr(tables, "LONG_ROW", int(sides.max()) + 1)
    assert tile_for(sides) == TILE != tile_for(trainer.row_lengths())


@pytest.mark.parametrize(
    "began", [pytest.param("before long tiles", marks=pytest.mark.long), "with them"]
)
def test_a_run_goes_on_with_the_tiles_that_it_began_with(
    fields, tmp_path, seen, monkeypatch, train_here, trained_here, began
):
    fields |= {"packing": "true", "save_steps": "1"}
    before = began == "before long tiles"
    tile = TILE if before else LONG_TILE
    with monkeypatch.context() as patched:
        stop_in_step_two(patched)
        assert train_here(fields).returncode
    assert_checkpoints_say(tmp_path / "run", "attention_tile", LONG_TILE, forget=before)
    seen.clear()
    trained_here(fields)
    assert (read(tmp_path / "run")["ran"]["attention_tile"], seen) == (tile, {tile})
