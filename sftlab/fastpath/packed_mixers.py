"""Convolutions and recurrences of hybrid models that stop where a packed row begins.

transformers hands `seq_idx` and `cu_seq_lens_q` to kernels of causal_conv1d, fla and mamba_ssm,
which obey them. Where a package is missing, its own functions in torch refuse packed rows. These
take their place: the convolution is a sum of shifted products, and a recurrence runs over the rows
side by side, padded. Everything else of a layer stays packed.
"""

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from sftlab.models.mixers import is_kernel, packed_mixers

# why a recurrence cuts a compiled layer: torch.compile unrolls the loop over a row's chunks
NOT_COMPILED = "the recurrence is not compiled"


def pack_mixers(model: PreTrainedModel) -> None:
    """Let a model's convolutions and recurrences take packed rows, as the collator gives them.

    It replaces functions of the modules of transformers that define them. Padded rows still go
    through transformers' own. Recurrences and kernels of a package stay out of compiled layers.
    """
    for name in {type(mixer).__module__ for mixer in packed_mixers(model)}:
        modeling = sys.modules[name]
        for function, packed in _FUNCTIONS.items():
            own = getattr(modeling, function, None)
            if own is None or hasattr(own, "of_padded_rows"):
                continue
            kernel = is_kernel(own)
            taken = _for_packed_rows(own, packed(own, kernel))
            if kernel or packed in _RECURRENCES:
                taken = torch.compiler.disable(taken, reason=NOT_COMPILED)
            setattr(modeling, function, taken)


def _for_packed_rows(own: Callable, packed: Callable) -> Callable:
    """Returns `own` for padded rows and `packed` for packed ones."""

    @wraps(own)
    def either(*args: Any, **kwargs: Any) -> Any:
        return (own if kwargs.get("seq_idx") is None else packed)(*args, **kwargs)

    either.of_padded_rows = own
    return either


def _convolution(own: Callable, kernel: bool) -> Callable:
    return own if kernel else shifted_products


def shifted_products(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    *,
    seq_idx: torch.Tensor,
    **kwargs: Any,
) -> torch.Tensor:
    """Returns the causal convolution of each row, [1, channels, tokens].

    `weight` is [channels, taps], and `seq_idx` [1, tokens] is the number of each token's row. A tap
    that reaches back over the row's first token reads zero.
    """
    tokens, taps = hidden_states.shape[-1], weight.shape[-1]
    x, weight = hidden_states.float(), weight.float()
    out = x * weight[:, -1:]
    for back in range(1, taps):
        same_row = pad(seq_idx, (back, 0), value=-1)[:, :tokens] == seq_idx
        earlier = pad(x, (back, 0))[..., :tokens] * same_row[:, None]
        out = out + earlier * weight[:, taps - 1 - back, None]
    if bias is not None:
        out = out + bias.float()[:, None]
    if activation is not None:
        out = ACT2FN[activation](out)
    return out.to(hidden_states.dtype)


def _delta_rule(own: Callable, kernel: bool) -> Callable:
    def with_boundaries(*args: Any, cu_seq_lens_q: Any = None, **kwargs: Any) -> Any:
        if kwargs.get("cu_seqlens") is None:  # not every layer hands them on by fla's name
            kwargs["cu_seqlens"] = cu_seq_lens_q
        return own(*args, **kwargs)

    def side_by_side(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        *,
        seq_idx: torch.Tensor,
        row_places: torch.Tensor,
        cu_seqlens: torch.Tensor | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        query, key, value, g, beta = (
            _rows(one, row_places) for one in (query, key, value, g, beta)
        )
        found = own(query, key, value, g=g, beta=beta, **kwargs)[0]
        return _one_row(found, seq_idx, row_places), None

    return with_boundaries if kernel else side_by_side


def _state_space(own: Callable, kernel: bool) -> Callable:
    def side_by_side(
        x: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        *,
        seq_idx: torch.Tensor,
        row_places: torch.Tensor,
        **kwargs: Any,
    ) -> torch.Tensor:
        x, dt, B, C = (_rows(one, row_places) for one in (x, dt, B, C))
        return _one_row(own(x, dt, A, B, C, **kwargs), seq_idx, row_places)

    return own if kernel else side_by_side


def _fused_state_space(own: Callable, kernel: bool) -> Callable:
    """Returns `own`; without a kernel None, after which a layer goes on to the other functions."""
    return own if kernel else lambda *args, **kwargs: None


def _rows(packed: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Returns [rows, longest, ...] of a packed [1, tokens, ...]; what fills a row up is finite."""
    return packed[0].index_select(0, places.flatten()).unflatten(0, places.shape)


def _one_row(rows: torch.Tensor, seq_idx: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Returns [rows, longest, ...] packed again, [1, tokens, ...]."""
    row = seq_idx[0].long()
    place = torch.arange(len(row), device=row.device) - places[:, 0][row]
    return rows.flatten(0, 1).index_select(0, row * places.shape[1] + place)[None]


# what takes packed rows, by the name of the function of transformers' modeling files
_FUNCTIONS: dict[str, Callable[[Callable, bool], Callable]] = {
    "causal_conv1d_fn": _convolution,
    "torch_chunk_gated_delta_rule": _delta_rule,
    "chunk_kimi_delta_attention": _delta_rule,
    "mamba2_chunk_scan": _state_space,
    "mamba2_split_conv1d_scan_combined": _fused_state_space,
}
_RECURRENCES = (_delta_rule, _state_space)
