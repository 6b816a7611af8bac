"""Are packed rows computed as each row alone is?

Attention, short convolutions or recurrent layers that ignore where a row begins let one row see
another. The loss stays plausible. Before the first step, two rows of the first micro-batch go
through the model each alone, padded, under transformers' own attention, and then packed.

A mixture's routers then choose as they did for the row alone: a rounding may send a token to other
experts, and such a token is another from there on. In fp8 linears do not round their inputs: they
take one token at a time anyway, and in a deep model their rounding hides what the others do.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from sftlab.data.collator import Collator
from sftlab.data.tiles import tile_of
from sftlab.fastpath.float8 import inputs_in_16_bits
from sftlab.models.layers import decoder_of
from sftlab.models.plain_attention import plain_attention

# Largest difference of a row's last hidden states, relative to their norm.
TOLERANCE = {"fp32": 0.01, "fp16": 0.1, "bf16": 0.15, "fp8": 0.15}
# A row's first tokens show whether it sees the row before it.
TOKENS = 512
# classes of modules that choose a token's experts
_ROUTERS = re.compile("Router|Gating")
Choices = dict[nn.Module, list[Any]]


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
    mixers, tile = "seq_idx" in inputs, tile_of(inputs["tiles"])
    collate = Collator(pad_token_id, packed=True, mixers=mixers, tile=tile)
    alone, choices = [], defaultdict(list)
    with inputs_in_16_bits(), plain_attention(base), _noted(base, choices):
        for row in rows:
            batch = Collator(pad_token_id, packed=False)([row])
            alone.append(_hidden_states(base, forward, batch)[0])
    with inputs_in_16_bits(), _repeated(base, choices):
        packed = _hidden_states(base, forward, collate(rows))[0]
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


@contextmanager
def _noted(base: PreTrainedModel, choices: Choices) -> Iterator[None]:
    """Note what every router returns, a forward after another."""
    hooks = [
        router.register_forward_hook(lambda one, _, output: choices[one].append(output))
        for router in base.modules()
        if _ROUTERS.search(type(router).__name__)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _repeated(base: PreTrainedModel, choices: Choices) -> Iterator[None]:
    """Let every router return, for the first tokens, what it returned for rows alone in turn."""

    def repeat(router: nn.Module, _: Any, output: Any) -> Any:
        return _with_first(output, choices[router])

    hooks = [router.register_forward_hook(repeat) for router in choices]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _with_first(output: Any, rows: list[Any]) -> Any:
    """Returns a router's output, its first tokens replaced by those of `rows`, in turn.

    Tensors are [..., size], their tokens on one axis or several.
    """
    if isinstance(output, tuple):
        return tuple(_with_first(*one) for one in zip(output, zip(*rows, strict=True), strict=True))
    if not isinstance(output, torch.Tensor) or output.ndim < 2:
        return output
    flat = output.reshape(-1, output.shape[-1])
    first = torch.cat([row.reshape(-1, row.shape[-1]) for row in rows])
    return torch.cat([first, flat[len(first) :]]).reshape(output.shape)


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
