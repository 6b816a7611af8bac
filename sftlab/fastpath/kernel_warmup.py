"""Kernels compiled beside the reading of data and weights."""

import os
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import torch
from transformers import PreTrainedConfig

from sftlab.config.launch import COMPUTE_DTYPE, PRECISIONS
from sftlab.config.recipe import Recipe
from sftlab.data.collator import TOKENS_MULTIPLE, tiles
from sftlab.fastpath import varlen_attention
from sftlab.fastpath.fused_loss import CHUNK, FrozenHeadLoss
from sftlab.fastpath.selection import FastPath


def start_compilers(recipe: Recipe, config: PreTrainedConfig, fast: FastPath) -> Future:
    """Begin beside the reading of data and weights what would hold up the first step by seconds.

    Inductor's worker processes; and on a GPU, in a thread that ends with the future, Triton's
    kernels for this model and the libraries behind the head's matrix products.
    """
    if fast.compile_layers:
        from torch._inductor.async_compile import maybe_warm_pool

        maybe_warm_pool()
    # to fork while a thread compiles could leave the child with a lock that nobody frees
    if not fast.packing or recipe.training.dataset_num_proc:
        nothing = Future()
        nothing.set_result(None)
        return nothing
    dtype = getattr(torch, COMPUTE_DTYPE[PRECISIONS[recipe.training.mixed_precision]])
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    # a thread begins on the first GPU, whichever its process has taken
    thread = ThreadPoolExecutor(1, "rehearsal", torch.cuda.set_device, (device,))
    future = thread.submit(
        rehearse, config.get_text_config(), dtype, device, fast.fused_loss is not False
    )
    thread.shutdown(wait=False)
    return future


def rehearse(
    config: PreTrainedConfig, dtype: torch.dtype, device: torch.device, fused_loss: bool
) -> None:
    """Run the kernels of a packed step once, on tensors for which Triton compiles what the step
    will call.

    Of the fused loss's chunk only so much that, with a head of its own, it takes about the memory
    of the step's chunk.
    """
    heads, tokens = config.num_attention_heads, TOKENS_MULTIPLE
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    make = partial(torch.zeros, dtype=dtype, device=device, requires_grad=True)
    query, key, value = (make(tokens, n, size) for n in (heads, key_heads, key_heads))
    varlen_attention.varlen_attention(query, key, value, tiles([tokens]).to(device), size**-0.5)[
        0
    ].sum().backward()
    if fused_loss:
        rows = max(CHUNK // 4, CHUNK - config.hidden_size)
        hidden, head = (
            make(rows, config.hidden_size),
            make(config.vocab_size, config.hidden_size).detach(),
        )
        every = torch.arange(rows, device=device)
        FrozenHeadLoss.apply(hidden, head, every, every % config.vocab_size)[0].sum().backward()
