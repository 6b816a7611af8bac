"""Rows laid end to end instead of padded, none seeing another.

An optimizer step has the same rows either way.

The rows of a global batch are dealt to processes and micro-batches so that each has as many rows
and nearly as many tokens as any other: processes then wait for nobody. Everything is worked out on
the CPU, beside the training.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

# Queries (and keys) that one program of the attention kernels works on.
TILE = 64
# Packed batches are filled up to a multiple of this, so that matrix products keep aligned shapes.
TOKENS_MULTIPLE = 128
# What the collator adds for the loss and the meter; the model does not know it.
_EXTRAS = ("loss_positions", "targets", "loss_rows", "real_tokens", "real_rows")


class Collator:
    """trl's collator, and what the loss and the attention need beside it, worked out on the CPU.

    Adds `loss_positions` and `targets` (the flat index of every token whose next one is in the
    loss, and that next one), `loss_rows` (the row of each), and the ints `real_tokens` and
    `real_rows`. With `packed`, rows lie end to end in one [1, tokens] and `tiles` tells the
    attention where they begin. Tokens are filled up to a `multiple`.
    """

    def __init__(self, pad_token_id: int, packed: bool, multiple: int | None = None) -> None:
        self._collate = DataCollatorForLanguageModeling(
            pad_token_id=pad_token_id,
            padding_free=packed,
            pad_to_multiple_of=None if packed else multiple,
        )
        self._packed, self._pad, self._multiple = (
            packed,
            pad_token_id,
            math.lcm(TOKENS_MULTIPLE, multiple or 1),
        )

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Rows of `input_ids` and `labels` to one batch."""
        # torch takes five times as long over a list as numpy does
        examples = [
            {k: np.asarray(e[k]) for k in ("input_ids", "labels") if k in e} for e in examples
        ]
        batch = self._collate(examples)
        lengths = torch.tensor([len(e["input_ids"]) for e in examples])
        following = batch["labels"][:, 1:]
        in_loss = following != -100
        rows, columns = in_loss.nonzero(as_tuple=True)
        positions = rows * batch["labels"].shape[1] + columns
        if self._packed:
            rows = torch.repeat_interleave(lengths)[positions]
            batch = self._filled_up(batch, lengths)
        return batch | {
            "loss_positions": positions,
            "targets": following[in_loss],
            "loss_rows": rows,
            "real_tokens": int(lengths.sum()),
            "real_rows": len(examples),
        }

    def _filled_up(self, batch: dict[str, Any], lengths: torch.Tensor) -> dict[str, torch.Tensor]:
        # The tail is a sequence of its own, so that nothing in it is undefined.
        tail = -batch["input_ids"].shape[1] % self._multiple
        return {
            "input_ids": pad(batch["input_ids"], (0, tail), value=self._pad),
            "labels": pad(batch["labels"], (0, tail), value=-100),
            "position_ids": torch.cat([batch["position_ids"], torch.arange(tail)[None]], dim=1),
            "tiles": tiles([*lengths.tolist(), tail]),
        }


def for_the_model(batch: dict[str, Any]) -> dict[str, Any]:
    """What the model itself takes of a batch."""
    return {name: value for name, value in batch.items() if name not in _EXTRAS}


def tiles(lengths: Sequence[int]) -> torch.Tensor:
    """Pieces of at most `TILE` tokens, [2, pieces, 3] int32: the sequence's start and end, and the
    piece's first token.

    The first table is for programs that read what comes before the piece, the second for those that
    read what comes after it: most work first. Empty pieces at the end keep the second table aligned
    to 16 bytes, as the first one is: Triton compiles a kernel anew for a table that is not.
    """
    pieces, start = [], 0
    for length in lengths:
        pieces += [(start, start + length, first) for first in range(start, start + length, TILE)]
        start += length
    pieces += [(start, start, start)] * (-len(pieces) % 4)
    before = sorted(pieces, key=lambda piece: piece[0] - piece[2])
    after = sorted(pieces, key=lambda piece: piece[2] - piece[1])
    return torch.tensor([before, after], dtype=torch.int32)
