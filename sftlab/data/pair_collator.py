"""Batches of preference pairs, as trl's DPOTrainer takes them."""

from typing import Any

from trl.trainer.dpo_trainer import DataCollatorForPreference

from sftlab.data.encoded_pairs import PROMPT


class PairCollator:
    """trl's collator over encoded pairs, with the counts of the batch's real tokens.

    A batch has the chosen sides first, then the rejected ones: [2 pairs, tokens], padded.
    """

    def __init__(self, pad_token_id: int, multiple: int | None = None) -> None:
        self._collate = DataCollatorForPreference(pad_token_id, pad_to_multiple_of=multiple)

    def __call__(self, pairs: list[dict[str, Any]]) -> dict[str, Any]:
        """Returns one batch of encoded pairs."""
        examples = [
            {
                "prompt_ids": one["chosen_ids"][: one[PROMPT]],
                "chosen_ids": one["chosen_ids"][one[PROMPT] :],
                "rejected_ids": one["rejected_ids"][one[PROMPT] :],
            }
            for one in pairs
        ]
        batch = self._collate(examples)
        return batch | {
            "real_tokens": int(batch["attention_mask"].sum()),
            "real_rows": len(pairs),
            "loss_tokens": int(batch["completion_mask"].sum()),
        }
