"""The Triton kernels against plain PyTorch.

Without a GPU, Triton's interpreter runs them on small shapes, in a process of its own: whether
Triton interprets is decided when it is imported. The last run on a GPU is in docs/LOG.md.
"""

import os
import re
import subprocess
from collections import defaultdict

import pytest
import torch
from triton_interpreter import (
    interpreted,
    on_a_gpu,
    runs_kernels,
    with_triton,
)

from sftlab.data.tiles import LONG_TILE, TILE, tiles
from sftlab.fastpath import fused_loss
from sftlab.fastpath.dropout_bits import is_kept
from sftlab.fastpath.float8 import BACKWARD
from sftlab.fastpath.fused_loss import FrozenHeadLoss, cross_entropy_
from sftlab.fastpath.varlen_attention import varlen_attention

device = "cpu" if interpreted else "cuda"

# Below, at and above one tile, and several tiles.
LENGTHS = [1, 63, 64, 65, 17, 130] if interpreted else [1, 63, 64, 65, 200, 513, 128, 17]
# Largest difference over the largest value of plain attention in float64; in float32 itself it is
# 1.3e-6.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
# a rounded slope has two bits after its first
NEAREST_SLOPE = 2**-3


def attention_by_hand(query, key, value, lengths, window, cap, sinks):
    """Attention of every row from its scores, in the inputs' dtype."""
    groups = query.shape[1] // key.shape[1]
    found = []
    for q, k, v in zip(*(t.split(lengths) for t in (query, key, value)), strict=True):
        q, k, v = (t.transpose(0, 1) for t in (q, k, v))
        k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
        scores = q @ k.transpose(1, 2) * q.shape[-1] ** -0.5
        scores = cap * torch.tanh(scores / cap) if cap else scores
        at = torch.arange(q.shape[1], device=q.device)
        behind = at[:, None] - at[None]
        hidden = (behind < 0) | (behind >= (window or len(at)))
        scores = scores.masked_fill(hidden, float("-inf"))
        if sinks is not None:
            of_sinks = sinks.to(scores)[:, None, None].expand(-1, len(at), 1)
            scores = torch.cat([scores, of_sinks], -1)
        found.append((scores.softmax(-1)[..., : len(at)] @ v).transpose(0, 1))
    return torch.cat(found)


def assert_attention_is_by_hand(
    lengths, dtype, heads, key_heads, size, value_size=None, window=0, cap=0.0, has_sinks=False,
    tile=TILE, tolerance=None,
):  # fmt: skip
    """Compare the kernels' output and gradients with those in float64."""
    torch.manual_seed(0)
    value_size = value_size or size
    shapes = ((heads, size), (key_heads, size), (key_heads, value_size), (heads, value_size))
    exact = [torch.randn(sum(lengths), *shape, device=device).to(dtype) for shape in shapes]
    sinks = torch.randn(heads, device=device) if has_sinks else None
    want = [t.double().requires_grad_() for t in exact[:3]]
    expected = attention_by_hand(*want, lengths, window, cap, sinks)
    expected.backward(exact[3].double())
    got = [t.clone().requires_grad_() for t in exact[:3]]
    table = tiles(lengths, tile).to(device)
    output = varlen_attention(*got, table, size**-0.5, window, cap, sinks)[0]
    output.backward(exact[3])
    for found, right in (
        (output, expected),
        *((g.grad, w.grad) for g, w in zip(got, want, strict=True)),
    ):
        apart = (found.double() - right).abs().max()
        assert apart < (tolerance or TOLERANCE[dtype]) * right.abs().max()


@with_triton
@runs_kernels
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "heads, key_heads, size",
    [(2, 1, 16), (1, 1, 64)] if interpreted else [(8, 2, 64), (4, 4, 128)],
)
def test_attention_and_its_gradients(dtype, heads, key_heads, size):
    if interpreted and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies bfloat16's bits as integers")
    assert_attention_is_by_hand(LENGTHS, dtype, heads, key_heads, size)


OTHER_HEADS = {
    "96": (2, 1, 96, 96, 0, 0.0, False),
    "MLA": (1, 1, 48, 32, 0, 0.0, False),
    "gemma2": (1, 1, 160 if interpreted else 256, 160 if interpreted else 256, 16, 5.0, False),
    "gpt_oss": (2, 1, 16, 16, 16, 0.0, True),
}


@with_triton
@runs_kernels
@pytest.mark.parametrize("case", OTHER_HEADS.values(), ids=list(OTHER_HEADS))
def test_attention_of_other_heads_and_its_gradients(case):
    lengths = [1, 65, 70] if case[2] <= 96 else [1, 35]
    assert_attention_is_by_hand(lengths, torch.float32, *case, tolerance=5e-6)


# of heads up to 64 elements, and above
LONG_HEADS = {
    "16": (1, 1, 16),
    "80": (2, 1, 80, 72),
    "96 with a cap and sinks": (1, 1, 96, 96, 0, 5.0, True),
    "80 with a window": (1, 1, 80, 80, 70, 0.0, True),
}


@with_triton
@runs_kernels
@pytest.mark.parametrize("case", LONG_HEADS.values(), ids=list(LONG_HEADS))
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_attention_over_long_tiles_and_its_gradients(monkeypatch, case, dtype):
    from sftlab.fastpath import triton_kernels

    monkeypatch.setattr(triton_kernels, "LONG_ROW", 70)  # so that the window is a long one
    if interpreted and dtype == torch.float32 and len(case) > 3:
        pytest.skip("in float32 programs own the same part of a tile, whatever the head")
    lengths = [1, 129, 300] if interpreted else [1, 127, 128, 129, 1000, 2100]
    tolerance = TOLERANCE[dtype] if dtype == torch.float16 else 5e-6
    assert_attention_is_by_hand(lengths, dtype, *case, tile=LONG_TILE, tolerance=tolerance)


@with_triton
@runs_kernels
def test_gradients_of_programs_that_read_more_than_they_own(monkeypatch):
    from sftlab.fastpath import triton_kernels

    for name in ("BY_ROWS", "BY_KEYS"):
        monkeypatch.setattr(triton_kernels, name, (16, 64, 4, 1))
    assert_attention_is_by_hand([1, 65, 130], torch.float16, 1, 1, 16)


@pytest.mark.long
@with_triton
@pytest.mark.skipif(interpreted, reason="Triton's interpreter runs no compiled kernel")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads, key_heads, size", [(32, 8, 64), (32, 32, 128)])
@pytest.mark.parametrize(
    ("capability", "tile"), [(80, TILE), (89, TILE), (90, TILE), (90, LONG_TILE)]
)
def test_attention_keeps_its_sums_in_registers(
    monkeypatch, tmp_path, dtype, heads, key_heads, size, capability, tile
):
    """Large float32 heads spill hundreds of bytes.

    Where they spilled 18 KB, a step took four times as long.
    """
    if not on_a_gpu and (capability, size) != (90, 128):
        pytest.skip("compiled on machines with a GPU; on others the largest heads for one GPU are")
    if dtype == torch.float32 and tile == LONG_TILE:
        pytest.skip("the kernels are those of the usual tile")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sftlab.fastpath import triton_kernels

    started = []
    for name in ("_forward", "_backward_query", "_backward_key"):
        kernel = getattr(triton_kernels, name)

        def start(*args, kernel=kernel, **options):
            started.append((kernel, dict(zip(kernel.arg_names, args, strict=True)), options))

        monkeypatch.setattr(triton_kernels, name, defaultdict(lambda start=start: start))
    query, key = (torch.zeros(64, n, size, dtype=dtype) for n in (heads, key_heads))
    table = tiles([64], tile)
    lse = triton_kernels.attention_forward(query, key, key, table, 1.0)[1]
    triton_kernels.attention_backward(query, query, key, key, query, lse, table, 1.0)
    types = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int32: "*i32"}
    assert len(started) == 3
    for kernel, arguments, options in started:
        constants = {p.name: arguments[p.name] for p in kernel.params if p.is_constexpr}
        if dtype == torch.bfloat16 and size == 128:
            assert max(constants["ROWS"], constants["COLUMNS"]) == tile, "the tokens owned"
        of = {
            n: types[a.dtype] if torch.is_tensor(a) else "fp32" if isinstance(a, float) else "i32"
            for n, a in arguments.items()
        }
        aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(of) if of[n][0] == "*"}
        source = ASTSource(kernel, of | dict.fromkeys(constants, "constexpr"), constants, aligned)
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        (tmp_path / "ptx").write_text(made.asm["ptx"])
        architecture = re.search(r"\.target (\w+)", made.asm["ptx"])[1]
        words = [
            triton.knobs.nvidia.ptxas.path,
            "-v",
            f"--gpu-name={architecture}",
            tmp_path / "ptx",
        ]
        said = subprocess.run(
            [*words, "-o", os.devnull], capture_output=True, text=True, check=True
        ).stderr
        spilled = 512 if dtype == torch.float32 and size == 128 else 128
        assert int(re.search(r"(\d+) bytes stack frame", said)[1]) <= spilled, (
            f"{kernel.__name__}: {said}"
        )
        room = 227 if tile == LONG_TILE else 99
        assert made.metadata.shared <= room * 1024, (
            "what GPUs of capability 8.6 and 8.9, or 9.0, have for a program"
        )


@with_triton
@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("words", [1000, 9000 if interpreted else 128256])
def test_cross_entropy_over_a_frozen_head(monkeypatch, dtype, words):
    from sftlab.fastpath.loss_kernel import softmax_cross_entropy_

    # on a CPU the loss would not take the kernel
    monkeypatch.setattr(fused_loss, "cross_entropy_", softmax_cross_entropy_)
    torch.manual_seed(0)
    rows, chosen = (30, 21) if interpreted else (300, 201)
    hidden = torch.randn(rows, 64, device=device).to(dtype)
    weight = (torch.randn(words, 64, device=device) / 4).to(dtype)
    positions = torch.randperm(rows, device=device)[:chosen]
    targets = torch.randint(0, words, (chosen,), device=device)
    scale = torch.rand(chosen, device=device)
    want = hidden.double().requires_grad_()
    logits = want[positions] @ weight.double().T
    log_probs = logits.log_softmax(-1)
    expected = -log_probs.gather(1, targets[:, None])[:, 0]
    (expected * scale).sum().backward()
    got = hidden.clone().requires_grad_()
    nats, entropies, hits = FrozenHeadLoss.apply(got, weight, positions, targets)
    (nats * scale).sum().backward()
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    assert (nats - expected).abs().max() < tolerance
    assert (entropies + (log_probs.exp() * log_probs).sum(-1)).abs().max() < tolerance
    assert (hits.bool() == (logits.argmax(-1) == targets)).float().mean() > 0.98
    assert (got.grad - want.grad).abs().max() < tolerance * want.grad.abs().max()
    cosine = torch.cosine_similarity(got.grad.flatten().double(), want.grad.flatten(), dim=0)
    assert cosine > 0.9999


def slopes_of(logits, targets, rule, cap, dtype=BACKWARD) -> tuple[torch.Tensor, ...]:
    found = [torch.empty(len(logits), device=logits.device) for _ in range(3)]
    slopes = (
        torch.empty_like(logits, dtype=dtype),
        torch.empty(len(logits), 1, device=logits.device),
    )
    rule(logits, targets, *found, cap, slopes)
    rounded = slopes[0].to(BACKWARD)  # Triton's interpreter cannot
    return rounded.float() * slopes[1], torch.stack(found)


@with_triton
@runs_kernels
@pytest.mark.parametrize("dtype, cap", [(torch.float32, 3.0), (torch.bfloat16, 0.0)], ids=str)
def test_the_kernel_rounds_slopes_as_torch_does(dtype, cap):
    from sftlab.fastpath.loss_kernel import softmax_cross_entropy_

    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(6, 9000, generator=generator).to(device, dtype)
    logits[1, 7] = 60.0  # as sure as can be, of the target and of another word
    logits[2, 7] = 60.0
    targets = torch.tensor([0, 7, 8, 8999, 8192, 8191], device=device)
    before = logits.clone()
    room = torch.float32 if interpreted else BACKWARD
    found, figures = slopes_of(logits, targets, softmax_cross_entropy_, cap, room)
    assert torch.equal(logits, before)
    exact = before.double()
    exact = cap * torch.tanh(exact / cap) if cap else exact
    plain = exact.softmax(-1)
    plain[torch.arange(6), targets] -= 1
    plain *= 1 - (exact / cap) ** 2 if cap else 1
    largest = plain.abs().amax(1, keepdim=True)
    assert ((found - plain).abs() <= NEAREST_SLOPE * plain.abs() + 1e-6 * largest + 1e-12).all()
    on_cpu, of_cpu = slopes_of(before.cpu(), targets.cpu(), cross_entropy_, cap)
    assert torch.allclose(figures.cpu(), of_cpu, atol=1e-4)
    apart = (found.cpu() - on_cpu).norm(dim=1) / on_cpu.norm(dim=1).clamp(min=1e-9)
    assert apart.max() < (0.12 if cap else 0.01), "under a cap the scales are apart"


@with_triton
@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank, layers, columns", [(8, 3, 264), (24, 1, 128)])
def test_products_under_dropout_and_their_gradients_are_plain_ones(dtype, rank, layers, columns):
    if interpreted and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies bfloat16's bits as integers")
    from sftlab.fastpath import dropout_kernel

    torch.manual_seed(0)
    bits = torch.empty(layers, 130, columns // 8, dtype=torch.uint8, device=device)
    dropout_kernel.fill_with_bits(bits, torch.tensor([2**40 + 7], device=device), 2**14)
    kept = [is_kept(one) for one in bits]
    assert 1 - torch.stack(kept).double().mean().item() == pytest.approx(0.25, abs=0.01)
    beside = torch.randn(130, columns + 128, device=device).to(dtype)
    gradient = torch.randn(130, 128, device=device).to(dtype)
    a = torch.randn(128, columns + 8, device=device).to(dtype)[:, :columns]
    x, beside[:, columns:] = beside[:, :columns].clone(), 0
    dropped = [torch.where(one, x, 0).double() for one in kept]
    dropout_kernel.project(beside[:, :columns], a, bits, rank, 2.0, beside[:, columns:])
    found = dropout_kernel.project_transposed(gradient, x, bits, rank)
    a, gradient = a.double().split(rank), gradient.double().split(rank, 1)
    exact = torch.cat([2 * one @ part.t() for one, part in zip(dropped, a, strict=False)], 1)
    into_a = torch.cat([part.t() @ one for one, part in zip(dropped, gradient, strict=False)])
    used = columns + layers * rank
    assert torch.equal(beside[:, :columns], x)
    assert not beside[:, used:].any()
    for mine, plain in ((beside[:, columns:used], exact), (found, into_a)):
        assert ((mine - plain).abs().max() / plain.abs().max()).item() < TOLERANCE[dtype]


@with_triton
@runs_kernels
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("tanh_gelu", [False, True])
@pytest.mark.parametrize("tile", [(1, 1024, 4), (4, 64, 4)], ids=str)
def test_gated_activations_and_their_gradients_are_plain_ones(dtype, tanh_gelu, tile):
    from sftlab.fastpath import mlp_kernel
    from sftlab.fastpath.mlp_ops import activation

    torch.manual_seed(0)
    rows, size = 7, 200
    wide, out = (torch.randn(rows, n, device=device).to(dtype) for n in (2 * size + 8, size + 8))
    y, gradient = 3 * wide[:, : 2 * size], torch.randn(rows, size, device=device).to(dtype)
    exact = y.double().requires_grad_()
    gate, up = exact.chunk(2, 1)
    act = activation(gate, tanh_gelu) * up
    act.backward(gradient.double())
    untouched = out[:, size:].clone(), wide[:, 2 * size :].clone()
    mlp_kernel.gated(y, tanh_gelu, out[:, :size], tile)
    mlp_kernel.gated_backward_(gradient, y, tanh_gelu, wide[:, : 2 * size], tile)
    found = ((out[:, :size], act), (gradient, act), (wide[:, : 2 * size], exact.grad))
    for mine, plain in found:
        assert (mine - plain).abs().max() < TOLERANCE[dtype] * plain.abs().max()
    assert torch.equal(out[:, size:], untouched[0])
    assert torch.equal(wide[:, 2 * size :], untouched[1])


@with_triton
@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [(64,), (64, 16), (600, 24, 40)], ids=str)
def test_gradients_side_by_side_are_what_cat_makes(dtype, sizes):
    from sftlab.fastpath import mlp_kernel

    parts = [torch.randn(9, size + 8, device=device).to(dtype)[:, :size] for size in sizes]
    out = torch.full((9, sum(sizes) + 72), float("nan"), device=device, dtype=dtype)
    mlp_kernel.beside(parts, out)
    assert torch.equal(out, torch.cat([*parts, torch.zeros_like(out[:, :72])], 1))


@with_triton
@runs_kernels
@pytest.mark.parametrize(
    "dtype", [one for one in TOLERANCE if on_a_gpu or one != torch.float16], ids=str
)
@pytest.mark.parametrize("tanh_gelu", [False, True])
def test_an_mlps_products_and_gradients_are_plain_ones(monkeypatch, dtype, tanh_gelu):
    from sftlab.fastpath import mlp_ops

    torch.manual_seed(0)
    rows, width, size, ranks = 150, 48, 72, 64
    y, down = (rows, 2 * size), ((width, size + ranks), (ranks, size))
    shapes = (rows, width), y, (rows, width), (rows, ranks), (2 * size + ranks, width)
    shapes += (2 * size, ranks), (width + ranks, size), (width, ranks)
    down, given = ([torch.randn(s, device=device).to(dtype) for s in of] for of in (down, shapes))
    exact_down, exact = ([one.double().cpu() for one in of] for of in (down, given))
    expected = mlp_ops.gated_down(exact[1], *exact_down, 8, tanh_gelu)
    expected += mlp_ops.gated_backward(*exact, 8, 8, tanh_gelu)
    monkeypatch.setattr(mlp_ops, "has_kernels", lambda x: x.dtype != torch.float64)
    found = mlp_ops.gated_down(given[1], *down, 8, tanh_gelu)
    found += mlp_ops.gated_backward(*given, 8, 8, tanh_gelu)
    for place, (mine, plain) in enumerate(zip(found, expected, strict=True)):
        assert mine.shape == plain.shape
        assert (mine.cpu() - plain).abs().max() < 3 * TOLERANCE[dtype] * plain.abs().max(), place
