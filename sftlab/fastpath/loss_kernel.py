"""A Triton kernel: softmax cross-entropy over rows of logits, with its gradient."""

import torch
import triton
import triton.language as tl

from sftlab.fastpath.float8 import BACKWARD
from sftlab.fastpath.float8_mlp_kernel import larger_or_nan


def softmax_cross_entropy_(
    logits: torch.Tensor,
    targets: torch.Tensor,
    losses: torch.Tensor,
    entropies: torch.Tensor,
    hits: torch.Tensor,
    cap: float = 0.0,
    slopes: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Overwrite `logits` [rows, words] with d loss / d logits.

    Fills [rows] each: the losses in nats, the entropies, and hits (1.0 where the target is on top).
    A `cap` bounds the logits by cap * tanh(logits / cap) first; 0.0 is none. Where `slopes` are
    given, d loss / d logits goes there in float8 [rows, words], contiguous, with a scale for each
    row [rows, 1], and `logits` stay.
    """
    rows, words = logits.shape
    rounded, scales = slopes or (logits, None)
    _cross_entropy[(rows,)](
        logits, targets, losses, entropies, hits, rounded, scales, words, logits.stride(0),
        rounded.stride(0), cap, torch.finfo(BACKWARD).max, cap > 0, slopes is not None, 8192,
        num_warps=16,
    )  # fmt: skip


@triton.jit
def _tanh(x):
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def _cross_entropy(
    logits, targets, losses, entropies, hits, slopes, scales, words, stride, slopes_stride, cap,
    largest, CAPPED: tl.constexpr, ROUNDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    slopes += row * slopes_stride
    target = tl.load(targets + row)
    block = tl.arange(0, BLOCK)
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    weighted = tl.zeros((), tl.float32)
    for start in range(0, words, BLOCK):
        inside = start + block < words
        x = tl.load(logits + start + block, mask=inside, other=float("-inf")).to(tl.float32)
        if CAPPED:
            x = tl.where(inside, cap * _tanh(x / cap), float("-inf"))
        higher = tl.maximum(top, tl.max(x, 0))
        weights = tl.exp(x - higher)
        shrink = tl.exp(top - higher)
        total = total * shrink + tl.sum(weights, 0)
        weighted = weighted * shrink + tl.sum(tl.where(inside, weights * x, 0.0), 0)
        top = higher
    log_sum = top + tl.log(total)
    aimed = tl.load(logits + target).to(tl.float32)
    if CAPPED:
        aimed = cap * _tanh(aimed / cap)
    tl.store(losses + row, log_sum - aimed)
    tl.store(entropies + row, log_sum - weighted / total)
    tl.store(hits + row, (aimed >= top).to(tl.float32))
    if ROUNDED:
        # the target's slope is the largest: those of all others have its sum
        scale = larger_or_nan(1.0 - tl.exp(aimed - log_sum), 1e-12) / largest
        tl.store(scales + row, scale)
    for start in range(0, words, BLOCK):
        inside = start + block < words
        x = tl.load(logits + start + block, mask=inside, other=0.0).to(tl.float32)
        if CAPPED:
            bent = _tanh(x / cap)
            x = cap * bent
        gradient = tl.exp(x - log_sum) - tl.where(start + block == target, 1.0, 0.0)
        if CAPPED:
            gradient *= 1.0 - bent * bent
        if ROUNDED:
            gradient = tl.minimum(tl.maximum(gradient / scale, -largest), largest)
        tl.store(slopes + start + block, gradient.to(slopes.dtype.element_ty), mask=inside)
