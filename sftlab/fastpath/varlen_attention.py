"""Attention over packed rows, registered with transformers as `attn_implementation: varlen`.

torch's own `varlen_attn` (FlashAttention-2) takes 1.8 times as long on rows of a few hundred
tokens: see docs/LOG.md.
"""

from importlib.util import find_spec

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedConfig

NAME = "varlen"
HEAD_SIZES = (16, 32, 64, 128)


def register() -> None:
    """Register `attn_implementation="varlen"` with transformers.

    No mask function is registered: without one, transformers makes no mask, and does not wait for
    the device to learn whether rows are packed.
    """
    AttentionInterface.register(NAME, _attention)


def why_not(config: PreTrainedConfig, model_class: type | None) -> str | None:
    """Returns why rows of this model cannot be packed on this machine; None if they can."""
    return no_triton() or why_not_the_model(config, model_class)


def why_not_the_model(config: PreTrainedConfig, model_class: type | None) -> str | None:
    """Returns why rows of this model cannot be packed on any machine; None if they can."""
    config = config.get_text_config()
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if size not in HEAD_SIZES:
        return f"the heads have size {size}, not {', '.join(map(str, HEAD_SIZES))}"
    if not getattr(model_class, "_supports_attention_backend", False):
        return f"{config.model_type} does not take another attention"
    if set(getattr(config, "layer_types", None) or ["full_attention"]) != {"full_attention"}:
        return f"{config.model_type} has layers other than full attention"
    if getattr(config, "attention_dropout", 0) or getattr(config, "attn_pdrop", 0):
        return f"{config.model_type} has dropout in its attention"
    if getattr(config, "sliding_window", None) or getattr(config, "attn_logit_softcapping", None):
        return f"{config.model_type} has a sliding window or capped scores"
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
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Returns the attention's output [1, tokens, heads, size] for query [1, heads, tokens, size].

    The signature is that of transformers' attention functions.
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
    return varlen_attention(query, key, value, tiles, scale)[0][None], None


def no_triton() -> str | None:
    """Why Triton's kernels do not run here; None where they do."""
    if not torch.cuda.is_available():
        return "a CPU has no variable-length attention"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"{torch.cuda.get_device_name()} is older than compute capability 8.0"
    return None if find_spec("triton") else "Triton is not installed"


@torch.library.custom_op("sftlab::varlen_attention", mutates_args=())
def varlen_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tiles: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention within each sequence of `tiles`.

    Returns the output, shaped like `query`, and the log-sum-exps [heads, tokens].
    """
    from sftlab.fastpath.triton_kernels import attention_forward

    return attention_forward(query, key, value, tiles, scale)


@varlen_attention.register_fake
def _(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tiles: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    lse = query.new_empty((query.shape[1], query.shape[0]), dtype=torch.float32)
    return torch.empty_like(query), lse


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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the gradients of query, key and value."""
    from sftlab.fastpath.triton_kernels import attention_backward

    return attention_backward(gradient, query, key, value, output, lse, tiles, scale)


@varlen_attention_backward.register_fake
def _(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    tiles: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _save(ctx: object, inputs: tuple, output: tuple[torch.Tensor, torch.Tensor]) -> None:
    query, key, value, tiles, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, *output, tiles)


def _backward(ctx: object, gradient: torch.Tensor, _: torch.Tensor) -> tuple:
    gradients = varlen_attention_backward(gradient.contiguous(), *ctx.saved_tensors, ctx.scale)
    return *gradients, None, None


varlen_attention.register_autograd(_backward, setup_context=_save)
