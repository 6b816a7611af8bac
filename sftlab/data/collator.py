"""Batches of rows, padded or packed.

Packed rows are concatenated without padding, and no row attends to another. What loss and attention
need besides is computed on the CPU, in parallel with the training.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from sftlab.data.buckets import loss_bucket, most_tiles, token_bucket
from sftlab.data.tiles import TILE, tiles

# Packed batches are padded to a multiple of this many tokens, so that matrix shapes are aligned.
TOKENS_MULTIPLE = 128
# what the collator adds for the loss and the meter; the model does not take it
_EXTRAS = (
    *("loss_positions", "targets", "loss_rows", "loss_tokens", "in_loss"),
    *("real_tokens", "real_rows", "by_source"),
)


class Collator:
    """trl's collator, with what loss and attention need besides.

    It adds `loss_positions`, the flat index of every token whose next token is in the loss. The
    next tokens are `targets`, and their rows `loss_rows`. `real_tokens`, `real_rows` and
    `loss_tokens` are ints.
    Of a stream, `by_source` has the data set's number and the tokens of each row.
    With `packed`, rows are concatenated to [1, tokens], and `tiles`, of `tile` tokens, tells the
    attention where they begin; with `mixers`, `boundaries` tells it to the other layers. The
    number of tokens is padded to a `multiple`. With `parts`, all tensors but `loss_rows` have one
    of a few sizes (sftlab/data/buckets.py): `loss_positions` and `targets` go on behind the tokens
    in the loss, at positions that are not in it, and `in_loss` [n] is false there.
    """

    def __init__(
        self,
        pad_token_id: int,
        packed: bool,
        multiple: int | None = None,
        mixers: bool = False,
        parts: int = 0,
        tile: int = TILE,
    ) -> None:
        self._parts, self._tile = parts, tile
        self._collate = DataCollatorForLanguageModeling(
            pad_token_id=pad_token_id,
            padding_free=packed,
            pad_to_multiple_of=None if packed else multiple,
        )
        self._packed, self._mixers, self._pad, self._multiple = (
            packed,
            mixers,
            pad_token_id,
            math.lcm(TOKENS_MULTIPLE, multiple or 1),
        )

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Returns one batch of rows with `input_ids` and `labels`."""
        sources = [(int(e["source"]), len(e["input_ids"])) for e in examples if "source" in e]
        # numpy converts a list five times as fast as torch does
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
        scored = {"loss_positions": positions, "targets": following[in_loss]}
        if self._parts:
            scored = _scored_in_bucket(scored, batch["input_ids"].numel(), self._parts)
        return batch | {
            **scored,
            "loss_rows": rows,
            "loss_tokens": len(positions),
            "real_tokens": int(lengths.sum()),
            "real_rows": len(examples),
            **({"by_source": sources} if sources else {}),
        }

    def _filled_up(self, batch: dict[str, Any], lengths: torch.Tensor) -> dict[str, torch.Tensor]:
        # the padding is a sequence of its own, so that its attention is defined
        tokens = batch["input_ids"].shape[1]
        if self._parts:  # or several short ones, whose attention costs least
            tail = token_bucket(tokens, self._multiple, len(lengths)) - tokens
            padding = [self._tile] * (tail // self._tile) + [tail % self._tile]
            count = most_tiles(tokens + tail, len(lengths) + 1, self._tile)
        else:
            tail = -tokens % self._multiple
            padding, count = [tail], 0
        sequences = [*lengths.tolist(), *padding]
        places = torch.cat([torch.arange(one) for one in padding])[None]
        return {
            "input_ids": pad(batch["input_ids"], (0, tail), value=self._pad),
            "labels": pad(batch["labels"], (0, tail), value=-100),
            "position_ids": torch.cat([batch["position_ids"], places], dim=1),
            "tiles": tiles(sequences, self._tile, count),
            **(boundaries(sequences) if self._mixers else {}),
        }


def for_the_model(batch: dict[str, Any]) -> dict[str, Any]:
    """Returns the part of a batch that the model itself takes."""
    return {name: value for name, value in batch.items() if name not in _EXTRAS}


def boundaries(lengths: Sequence[int]) -> dict[str, torch.Tensor]:
    """Returns where sequences of these lengths begin, for layers that are no attention.

    Sequences are counted without empty ones. `cu_seq_lens_q` [sequences + 1] has their starts and
    the end, `seq_idx` [1, tokens] the sequence of each token, both int32 as kernels want them.
    `row_places` [sequences, longest] has the place of each token of a sequence; the last one's is
    repeated.
    """
    sizes = torch.tensor([length for length in lengths if length])
    ends = sizes.cumsum(0)
    places = torch.arange(int(sizes.max()))[None].minimum(sizes[:, None] - 1)
    return {
        "cu_seq_lens_q": pad(ends, (1, 0)).int(),
        "seq_idx": torch.repeat_interleave(sizes)[None].int(),
        "row_places": places + (ends - sizes)[:, None],
    }


def _scored_in_bucket(
    scored: dict[str, torch.Tensor], tokens: int, parts: int
) -> dict[str, torch.Tensor]:
    """Returns positions and targets with others behind them, and which are in the loss.

    Positions stay different from one another: gradients are written to them in any order.
    """
    positions, count = scored["loss_positions"], len(scored["loss_positions"])
    size = loss_bucket(count, tokens, parts)
    others = torch.ones(tokens, dtype=torch.bool).index_fill(0, positions, False)
    return {
        "loss_positions": torch.cat([positions, others.nonzero()[: size - count, 0]]),
        "targets": pad(scored["targets"], (0, size - count)),
        "in_loss": torch.arange(size) < count,
    }
