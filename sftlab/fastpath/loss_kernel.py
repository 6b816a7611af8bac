"""A Triton kernel: softmax cross-entropy over rows of logits, with its gradient."""

import torch
import triton
import triton.language as tl


def softmax_cross_entropy_(
    logits: torch.Tensor,
    targets: torch.Tensor,
    losses: torch.Tensor,
    entropies: torch.Tensor,
    hits: torch.Tensor,
    cap: float = 0.0,
) -> None:
    """Overwrite `logits` [rows, words] with d loss / d logits.

    Fills [rows] each: the losses in nats, the entropies, and hits (1.0 where the target is on top).
    A `cap` bounds the logits by cap * tanh(logits / cap) first; 0.0 is none.
    """
    rows, words = logits.shape
    _cross_entropy[(rows,)](
        logits, targets, losses, entropies, hits, words, logits.stride(0), cap, cap > 0, 8192,
        num_warps=16,
    )  # fmt: skip


@triton.jit
def _tanh(x):
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def _cross_entropy(
    logits, targets, losses, entropies, hits, words, stride, cap,
    CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
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
    for start in range(0, words, BLOCK):
        inside = start + block < words
        x = tl.load(logits + start + block, mask=inside, other=0.0).to(tl.float32)
        if CAPPED:
            bent = _tanh(x / cap)
            x = cap * bent
        gradient = tl.exp(x - log_sum) - tl.where(start + block == target, 1.0, 0.0)
        if CAPPED:
            gradient *= 1.0 - bent * bent
        tl.store(logits + start + block, gradient.to(logits.dtype.element_ty), mask=inside)
