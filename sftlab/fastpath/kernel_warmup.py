"""Compiles kernels while data and weights are read, so that the first step does not wait."""

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
    """Start Inductor's worker processes and, on a GPU, a thread that runs the step's kernels.

    Returns a future that ends with the thread. By then Triton has compiled its kernels for this
    model, and the libraries of the head's matrix products are loaded.
    """
    if fast.compile_layers:
        from torch._inductor.async_compile import maybe_warm_pool

        maybe_warm_pool()
    # a process forked while the thread compiles could inherit a lock that nobody frees
    if not fast.packing or recipe.training.dataset_num_proc:
        done = Future()
        done.set_result(None)
        return done
    dtype = getattr(torch, COMPUTE_DTYPE[PRECISIONS[recipe.training.mixed_precision]])
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    # a new thread begins on the first GPU, also if its process uses another one
    thread = ThreadPoolExecutor(1, "rehearsal", torch.cuda.set_device, (device,))
    future = thread.submit(
        rehearse, config.get_text_config(), dtype, device, fast.fused_loss is not False
    )
    thread.shutdown(wait=False)
    return future


def rehearse(
    config: PreTrainedConfig, dtype: torch.dtype, device: torch.device, fused_loss: bool
) -> None:
    """Run the kernels of a packed step once, in the form in which the step will call them.

    The fused loss runs on less than a chunk: with the stand-in for the head, it takes about the
    memory of the step's own chunk.
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
