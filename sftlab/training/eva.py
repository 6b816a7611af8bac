"""EVA (Paischer et al. 2024, arXiv 2410.07170): A begins with the main directions of its inputs.

peft computes them. What is decided here: which rows it reads, and when it gives up.
"""

from collections.abc import Iterator
from typing import Any

import torch
from datasets import Dataset
from peft import EvaConfig, PeftModel, initialize_lora_eva_weights
from peft.tuners.lora import LoraLayer
from torch import nn

from sftlab.data.collator import Collator, for_the_model
from sftlab.models.inner_model import inner_model
from sftlab.models.layers import decoder_of

# tokens in the loss that a batch has at least; the directions of fewer change from batch to batch
TOKENS = 256
# batches after which directions that still turn are given up
MOST_BATCHES = 2000


class EvaBatches:
    """Batches of training rows for peft, which reads them until the directions stay the same.

    They are the same for every number of processes and every micro-batch. `read` counts them.
    Raises ValueError where all rows have fewer tokens in the loss than the rank.
    """

    def __init__(self, rows: Dataset, collator: Collator, rank: int, seed: int) -> None:
        self._rows, self._collate, self._rank = rows.shuffle(seed=seed), collator, rank
        self.read = {"batches": 0, "rows": 0, "loss_tokens": 0}

    def __len__(self) -> int:
        return MOST_BATCHES

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """Yield batches, the rows again and again; raises ValueError after `MOST_BATCHES`."""
        self.read = dict.fromkeys(self.read, 0)
        wanted, batch, tokens = max(TOKENS, 2 * self._rank), [], 0
        while True:
            for row in self._rows:
                batch.append(row)
                tokens += sum(label != -100 for label in row["labels"])
                if tokens >= wanted:
                    yield self._whole(batch, tokens)
                    batch, tokens = [], 0
            if batch and not self.read["batches"]:  # all rows together are a small batch
                if tokens < self._rank:
                    raise ValueError(
                        f"init_lora_weights eva needs at least {self._rank} tokens in the loss for "
                        f"lora_r {self._rank}, and the training rows have {tokens}"
                    )
                yield self._whole(batch, tokens)
                batch, tokens = [], 0

    def _whole(self, batch: list[dict[str, Any]], tokens: int) -> dict[str, torch.Tensor]:
        if self.read["batches"] == MOST_BATCHES:
            raise ValueError(
                f"init_lora_weights eva: after {MOST_BATCHES} batches the inputs' main directions "
                "still change: give a lower lora_r, or init_lora_weights: pissa"
            )
        self.read["batches"] += 1
        self.read["rows"] += len(batch)
        self.read["loss_tokens"] += tokens
        return for_the_model(self._collate(batch))


def begin_with_inputs(model: PeftModel, batches: EvaBatches) -> dict[str, int]:
    """Set each A to the main directions of its layer's inputs, in the tokens of the loss.

    Every layer keeps the rank lora_r. Returns how much was read. Raises ValueError for a rank that
    a layer's input does not have, and where the directions do not settle.
    """
    config = model.peft_config["default"]
    _refuse_high_rank(model, config.r)
    asked = config.init_lora_weights, config.target_modules
    # rho 1 gives every layer the rank of the recipe
    config.init_lora_weights, config.eva_config = "eva", EvaConfig(rho=1.0)
    try:
        initialize_lora_eva_weights(
            model,
            batches,
            forward_fn=_forward,
            gather_distributed_inputs=False,  # every process reads the same rows
            show_progress_bar=False,
        )
    finally:
        config.init_lora_weights, config.target_modules = asked
        config.eva_config = None
    return batches.read


def _forward(model: PeftModel, inputs: dict[str, torch.Tensor]) -> None:
    """Run all adapted layers: without the head, whose logits nothing needs, if it is none."""
    plain = {name: value for name, value in inputs.items() if name != "labels"}
    inner = inner_model(model)
    adapted = isinstance(inner.get_output_embeddings(), LoraLayer)
    (inner if adapted else decoder_of(inner))(**plain, use_cache=False)


def _refuse_high_rank(model: nn.Module, rank: int) -> None:
    for name, layer in inner_model(model).named_modules():
        if isinstance(layer, LoraLayer) and layer.in_features < rank:
            raise ValueError(
                f"lora_r is {rank}, and init_lora_weights eva finds only {layer.in_features} "
                f"directions in {name}: give a lower rank"
            )
