"""Batches of preference pairs, as trl's DPOTrainer takes them."""

from typing import Any

import torch
from torch.nn.functional import pad
from trl.trainer.dpo_trainer import DataCollatorForPreference

from sftlab.data.collator import TOKENS_MULTIPLE, boundaries
from sftlab.data.encoded_pairs import PROMPT
from sftlab.data.tiles import TILE, tiles

# what trl's own collator gives
OF_TRL = ("input_ids", "attention_mask", "completion_mask")
# trl's names of the reference's log-probabilities where they are known, the chosen side's first
REFERENCE_OF_TRL = ("ref_chosen_logps", "ref_rejected_logps")


class PairCollator:
    """trl's collator over encoded pairs, with the counts of the batch's real tokens.

    A batch has the chosen sides first, then the rejected ones: [2 pairs, tokens], padded. `fused`
    adds `answer_positions`, the flat places of tokens whose next one is in an answer. `packed` adds
    the sides without padding, as `pack_decoder` takes them, in tiles of `tile` tokens.
    """

    def __init__(
        self,
        pad_token_id: int,
        multiple: int | None = None,
        packed: bool = False,
        fused: bool = False,
        mixers: bool = False,
        tile: int = TILE,
    ) -> None:
        self._collate = DataCollatorForPreference(pad_token_id, pad_to_multiple_of=multiple)
        self._pad, self._packed, self._fused = pad_token_id, packed, fused
        self._mixers, self._tile = mixers, tile

    def __call__(self, pairs: list[dict[str, Any]]) -> dict[str, Any]:
        """Returns one batch of encoded pairs."""
        examples = [
            {
                "prompt_ids": one["chosen_ids"][: one[PROMPT]],
                "chosen_ids": one["chosen_ids"][one[PROMPT] :],
                "rejected_ids": one["rejected_ids"][one[PROMPT] :],
                **{name: one[name] for name in REFERENCE_OF_TRL if name in one},
            }
            for one in pairs
        ]
        batch = self._collate(examples)
        if self._fused:
            following = pad(batch["completion_mask"][:, 1:], (0, 1))
            batch["answer_positions"] = following.flatten().nonzero()[:, 0]
        packed = self._sides_packed(batch) if self._packed else {}
        return (
            batch
            | packed
            | {
                "real_tokens": int(batch["attention_mask"].sum()),
                "real_rows": len(pairs),
                "loss_tokens": int(batch["completion_mask"].sum()),
            }
        )

    def _sides_packed(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns the sides concatenated; what fills them up is a sequence of its own."""
        ids, places = batch["input_ids"].flatten(), batch["attention_mask"].flatten().nonzero()
        tail, lengths = -len(places) % TOKENS_MULTIPLE, batch["attention_mask"].sum(dim=1).tolist()
        sequences = [*lengths, tail]
        return {
            "packed_ids": pad(ids[places[:, 0]], (0, tail), value=self._pad)[None],
            "packed_places": pad(places[:, 0], (0, tail), value=len(ids)),
            "position_ids": torch.cat([torch.arange(one) for one in sequences])[None],
            "tiles": tiles(sequences, self._tile),
            **(boundaries(sequences) if self._mixers else {}),
        }
