"""Compiles kernels while data and weights are read, so that the first step does not wait."""

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import product

import torch
from transformers import PreTrainedConfig

from sftlab.config.launch import COMPUTE_DTYPE, PRECISIONS
from sftlab.config.recipe import Recipe
from sftlab.data.collator import TOKENS_MULTIPLE
from sftlab.data.tiles import LONG_ROW, TILE, tiles
from sftlab.fastpath import float8_lora_ops, mlp_ops, varlen_attention
from sftlab.fastpath.float8 import FORWARD
from sftlab.fastpath.float8_lora import columns_beside
from sftlab.fastpath.float8_mlp_ops import LARGEST_SIZE
from sftlab.fastpath.fused_loss import CHUNK, FrozenHeadLoss, in_float8
from sftlab.fastpath.lora_products import padded
from sftlab.fastpath.selection import FastPath
from sftlab.models.layers import Attention


def start_compilers(recipe: Recipe, config: PreTrainedConfig, fast: FastPath) -> Future:
    """Start Inductor's worker processes and, on a GPU, a thread that runs the step's kernels.

    Returns a future that ends with the thread. By then Triton has compiled its kernels for this
    model, and the libraries of the head's matrix products are loaded.
    """
    mlp_ops.let_kernels_have_lora(fast.kernels_with_lora)
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
    thread = ThreadPoolExecutor(1, "rehearsal")
    longest = recipe.training.max_length
    kinds = tuple(dict.fromkeys(one.for_rows(longest) for one in fast.layers.attention))
    # rows are not read yet: where some may be long, tiles of either size are possible
    some_long = longest is None or longest >= LONG_ROW
    sizes = sorted({TILE, fast.largest_tile if some_long else TILE})
    fused_loss = fast.fused_loss is not False
    float8 = recipe.training.mixed_precision == "fp8"
    float8_head = float8 and recipe.training.method == "sft"

    def rehearse_here() -> None:
        torch.cuda.set_device(device)  # a new thread begins on the first GPU
        rehearse(config.get_text_config(), kinds, sizes, dtype, device, fused_loss, float8_head)
        if fast.fused_lora and not recipe.model.lora_dropout:
            mlp = rehearse_float8_mlp if float8 else rehearse_mlp
            mlp(config.get_text_config(), recipe.model.lora_r, dtype, device)

    future = thread.submit(rehearse_here)
    thread.shutdown(wait=False)
    return future


def rehearse(
    config: PreTrainedConfig,
    kinds: Sequence[Attention],
    sizes: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    fused_loss: bool,
    float8_head: bool,
) -> None:
    """Run the kernels of a packed step once, in the form in which the step will call them.

    `kinds` are the different attentions of the layers, and `sizes` the tokens that a tile may have.
    The fused loss runs on less than a chunk: with the stand-in for the head, it takes about the
    memory of the step's own chunk.
    """
    make = partial(torch.zeros, dtype=dtype, device=device, requires_grad=True)
    tokens = TOKENS_MULTIPLE
    tables = [tiles([tokens], size).to(device) for size in sizes]
    for one, table in product(kinds, tables):
        query = make(tokens, one.heads, one.size)
        key, value = (make(tokens, one.key_heads, size) for size in (one.size, one.value_size))
        sinks = torch.zeros(one.heads, device=device) if one.sinks else None
        varlen_attention.varlen_attention(
            query, key, value, table, one.scale, one.window, one.cap, sinks
        )[0].sum().backward()
    if fused_loss:
        rows = max(CHUNK // 4, CHUNK - config.hidden_size)
        hidden, head = (
            make(rows, config.hidden_size),
            make(config.vocab_size, config.hidden_size).detach(),
        )
        every = torch.arange(rows, device=device)
        loss = partial(FrozenHeadLoss.apply, hidden, head, every, every % config.vocab_size)
        loss()[0].sum().backward()
        if float8_head and (rounded := in_float8(head)):
            loss(None, 1.0, 0.0, None, rounded)[0].sum().backward()


def rehearse_mlp(
    config: PreTrainedConfig, rank: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Run the kernels of fused LoRA once on matrices that stand in memory as those of a step.

    They are those of an MLP whose gate, up and down have LoRA, and of gradients side by side.
    """
    hidden, size, tanh_gelu = _mlp_of(config)
    if size is None:
        return
    zeros = partial(torch.zeros, dtype=dtype, device=device)
    make = partial(zeros, TOKENS_MULTIPLE)
    y, act, gradient = make(2 * size), make(size), make(hidden)
    ranks, ranks_down = padded(2 * rank), padded(rank)
    mlp_ops.gated_beside(y, zeros(ranks_down, size), rank, tanh_gelu, make(size + ranks_down))
    mlp_ops.gated_backward_beside(
        act, y, make(ranks), zeros(2 * size, ranks), make(ranks_down), rank, rank, tanh_gelu,
        make(2 * size + ranks),
    )  # fmt: skip
    mlp_ops.copy(gradient, make(hidden + padded(rank))[:, :hidden])


def rehearse_float8_mlp(
    config: PreTrainedConfig, rank: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Run the kernels of fused LoRA over float8 weights once, as rehearse_mlp does its own."""
    hidden, size, tanh_gelu = _mlp_of(config)
    if size is None or max(hidden, size) > LARGEST_SIZE:
        return
    make = partial(torch.zeros, TOKENS_MULTIPLE, dtype=dtype, device=device)
    rounded = partial(torch.zeros, dtype=FORWARD, device=device)
    of_h, of_into_h, room = make(3)[0].float().split(1)
    scale = torch.ones(1, max(hidden, size), device=device)
    ranks, ranks_down = columns_beside(2 * rank), columns_beside(rank)
    gate, up, h, x = make(size), make(size), make(ranks), make(hidden)
    float8_lora_ops.join_in_float8([x], h, of_h, False)
    float8_lora_ops.gated_down_in_float8(
        gate, up, rounded(hidden, size + ranks_down), x.new_zeros(ranks_down, size), scale, of_h,
        room, tanh_gelu,
    )  # fmt: skip
    float8_lora_ops.gated_backward_in_float8(
        x, gate, up, h, x.new_zeros(2 * size, ranks), of_into_h,
        rounded(size, hidden + ranks_down), x.new_zeros(hidden, ranks_down), scale, of_into_h,
        scale.new_zeros(TOKENS_MULTIPLE, 1), rank, rank, tanh_gelu,
    )  # fmt: skip


def _mlp_of(config: PreTrainedConfig) -> tuple[int, int | None, bool]:
    """Returns an MLP's inputs, its width if all have one, and whether it has GELU's tanh form."""
    size = getattr(config, "intermediate_size", None)
    name = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", "")
    return config.hidden_size, size if isinstance(size, int) else None, "tanh" in str(name)
