"""Are packed rows computed as each row alone is?

Attention, short convolutions or recurrent layers that ignore where a row begins let one row see
another. The loss stays plausible. Before the first step, two rows of the first micro-batch go
through the model packed, and then each alone, padded, under transformers' own attention.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from sftlab.data.collator import Collator
from sftlab.models.layers import decoder_of
from sftlab.models.plain_attention import plain_attention

# Largest difference of a row's last hidden states, relative to their norm.
TOLERANCE = {"fp32": 0.01, "fp16": 0.1, "bf16": 0.15, "fp8": 0.3}
# A row's first tokens show whether it sees the row before it.
TOKENS = 512


def verify_packing(
    base: PreTrainedModel,
    forward: Callable[[dict[str, Any]], object],
    inputs: Mapping[str, Any],
    pad_token_id: int,
    precision: str,
) -> None:
    """Raise RuntimeError where a packed row's hidden states differ from those of the row alone.

    `inputs` is a packed batch, `forward` runs the wrapped model on another. Every rank calls it.
    """
    rows = _first_rows(inputs)
    collate = Collator(pad_token_id, packed=True, mixers="seq_idx" in inputs)
    packed = _hidden_states(base, forward, collate(rows))[0]
    alone = []
    with plain_attention(base):
        for row in rows:
            batch = Collator(pad_token_id, packed=False)([row])
            alone.append(_hidden_states(base, forward, batch)[0])
    start = 0
    for number, (row, expected) in enumerate(zip(rows, alone, strict=True)):
        found, start = packed[start : start + len(row["input_ids"])], start + len(row["input_ids"])
        apart = float((found - expected).norm() / expected.norm())
        if not apart <= TOLERANCE[precision]:
            raise RuntimeError(
                f"this model computes other values once rows are packed: row {number}'s hidden "
                f"states differ by {apart:.1%} (expected at most {TOLERANCE[precision]:.0%} in "
                f"{precision}): pass --packing false"
            )


def _first_rows(inputs: Mapping[str, Any]) -> list[dict[str, list[int]]]:
    starts = (inputs["position_ids"][0] == 0).nonzero()[:, 0].tolist()
    ends = [*starts[1:], inputs["input_ids"].shape[1]]
    # what comes after the real rows fills the batch up
    spans = list(zip(starts, ends, strict=True))[: min(2, inputs["real_rows"])]
    return [
        {
            name: inputs[name][0, start : min(end, start + TOKENS)].tolist()
            for name in ("input_ids", "labels")
        }
        for start, end in spans
    ]


def _hidden_states(
    base: PreTrainedModel, forward: Callable[[dict[str, Any]], object], batch: dict[str, Any]
) -> torch.Tensor:
    """Returns the last hidden states, [rows, tokens, size] in float32."""
    found: list[torch.Tensor] = []

    def note(module: nn.Module, given: Any, output: Any) -> None:
        found.append(output.last_hidden_state.detach().float())

    hook = decoder_of(base).register_forward_hook(note)
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            forward(batch)
    finally:
        hook.remove()
    return found[-1]
