"""Attention over packed rows, registered with transformers as `attn_implementation: varlen`.

torch's own `varlen_attn` (FlashAttention-2) takes 1.8 times as long on rows of a few hundred
tokens: see docs/LOG.md.
"""

from functools import partial
from importlib.util import find_spec

import torch
from torch import nn
from transformers import AttentionInterface

from sftlab.models.layers import Layers
from sftlab.models.plain_attention import PACKED

NAME = PACKED
LARGEST_HEAD = 256


def register(longest: int | None = None) -> None:
    """Register `attn_implementation="varlen"` with transformers.

    Rows have at most `longest` tokens: a window that is no shorter is left out. No mask function is
    registered: without one, transformers makes no mask, and does not wait for the device to learn
    whether rows are packed.
    """
    AttentionInterface.register(NAME, partial(_attention, longest=longest))


def why_not(layers: Layers, longest: int | None) -> str | None:
    """Returns why rows of a model cannot be packed on this machine; None if they can."""
    return no_triton() or why_not_the_model(layers, longest)


def why_not_the_model(layers: Layers, longest: int | None) -> str | None:
    """Returns why rows of a model cannot be packed on any machine; None if they can.

    Rows have at most `longest` tokens; None has no limit.
    """
    if layers.unknown:
        return layers.unknown
    others, convolutions = layers.without_packed_form
    if others or convolutions:
        return (
            f"{others} of {layers.count} layers have neither attention nor another packed form, "
            f"and {convolutions} convolutions would mix packed rows"
        )
    for one in layers.distinct:
        if max(one.size, one.value_size) > LARGEST_HEAD:
            return f"heads have {max(one.size, one.value_size)} elements, more than {LARGEST_HEAD}"
        if one.dropout:
            return "the attention has dropout"
        if chunk := one.for_rows(longest).chunk:
            return f"attention in chunks of {chunk} tokens needs a max_length of at most {chunk}"
    return None


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    tiles: torch.Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    longest: int | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Returns the attention's output [1, tokens, heads, value size].

    It takes query and key [1, heads, tokens, size], and value [1, heads, tokens, value size]. The
    signature is that of transformers' attention functions.
    """
    if tiles is None or dropout:
        raise ValueError(
            "varlen attention needs packed rows and knows no dropout: use attn_implementation sdpa"
        )
    # of float32 weights under autocast the rotation makes queries and keys float32; sdpa rounds
    # them as well
    query, key, value = (
        t[0].transpose(0, 1).to(value.dtype).contiguous() for t in (query, key, value)
    )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    window = sliding_window or 0
    if longest is not None and window >= longest:
        window = 0
    sinks = None if s_aux is None else s_aux.float().contiguous()
    found = varlen_attention(query, key, value, tiles, scale, window, softcap or 0.0, sinks)
    return found[0][None], None


def no_triton() -> str | None:
    """Why Triton's kernels do not run here; None where they do."""
    if not torch.cuda.is_available():
        return "a CPU has no variable-length attention"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"{torch.cuda.get_device_name()} is older than compute capability 8.0"
    return None if find_spec("triton") else "Triton is not installed"


@torch.library.custom_op("sftlab::varlen_attention", mutates_args=())
def varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    tiles: torch.Tensor,
    scale: float,
    window: int = 0,
    cap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention within each sequence of `tiles`.

    `window`, `cap` and `sinks` are those of `attention_forward`. Returns the output [tokens, heads,
    value size], and the log-sum-exps [heads, tokens].
    """
    from sftlab.fastpath.triton_kernels import attention_forward

    return attention_forward(query, key, value, tiles, scale, window, cap, sinks)


@varlen_attention.register_fake
def _(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: object
) -> tuple[torch.Tensor, torch.Tensor]:
    lse = query.new_empty((query.shape[1], query.shape[0]), dtype=torch.float32)
    return query.new_empty(*query.shape[:2], value.shape[-1]), lse


@torch.library.custom_op("sftlab::varlen_attention_backward", mutates_args=())
def varlen_attention_backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    tiles: torch.Tensor,
    scale: float,
    window: int,
    cap: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the gradients of query, key and value."""
    from sftlab.fastpath.triton_kernels import attention_backward

    return attention_backward(gradient, query, key, value, output, lse, tiles, scale, window, cap)


@varlen_attention_backward.register_fake
def _(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *rest: object,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _save(ctx: object, inputs: tuple, output: tuple[torch.Tensor, torch.Tensor]) -> None:
    query, key, value, tiles, *ctx.numbers, _ = inputs
    ctx.save_for_backward(query, key, value, *output, tiles)


def _backward(ctx: object, gradient: torch.Tensor, _: torch.Tensor) -> tuple:
    gradients = varlen_attention_backward(gradient.contiguous(), *ctx.saved_tensors, *ctx.numbers)
    return *gradients, None, None, None, None, None


varlen_attention.register_autograd(_backward, setup_context=_save)
