"""The kernel that gives 4-bit weights back, against bitsandbytes' own operations.

Without a GPU, Triton's interpreter runs it, in a process of its own, as for tests/test_kernels.py.
"""

import itertools
import re
from collections import defaultdict

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from triton_interpreter import (
    interpreted,
    runs_kernels,
    with_triton,
)

from sftlab.fastpath import four_bit_weight
from sftlab.fastpath.float8 import FORWARD
from sftlab.fastpath.four_bit_float8_weight import float8_scale, plainly
from sftlab.fastpath.four_bit_weight import table_of
from sftlab.models import four_bits

device = torch.device("cpu" if interpreted else "cuda")
# more than 256 blocks of 32, so more than one larger scale; a last block that is not whole
SHAPE = (101, 104)
STORED = [torch.uint8, torch.bfloat16, torch.float32]


@pytest.fixture(autouse=True)
def _right_on_every_cpu(monkeypatch):
    """bitsandbytes errs at widths that are no multiple of a block where a CPU has AVX512."""
    if device.type == "cpu":
        library = four_bits._dequantize_by_blocks.__wrapped__()
        yield
        library._destroy()
    else:
        yield


def given_back(weight, block, kind, nested, stored, form, dtype=None):
    """The kernel's weights and bitsandbytes', the first with room behind them."""
    from sftlab.fastpath.four_bit_kernel import fill_four_bit_weight

    packed, state = quantize_4bit(
        weight, None, None, block, nested, quant_type=kind, quant_storage=stored
    )
    state.dtype = dtype or weight.dtype
    scales = (state.state2.code, state.state2.absmax, state.offset) if nested else None
    room = torch.full((weight.numel() + 100,), 7.0, dtype=weight.dtype, device=device)
    out = room[: weight.numel()].view(weight.shape)
    fill_four_bit_weight(packed, state.absmax, scales, table_of(kind, device), block, out, form)
    assert (room[weight.numel() :] == 7).all()
    return out, dequantize_4bit(packed, state)


@with_triton
@runs_kernels
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("nested", [False, True])
def test_weights_are_bitsandbytes_own_to_the_last_bit(kind, dtype, nested):
    torch.manual_seed(0)
    weight = (torch.randn(SHAPE, device=device) * 0.02).to(dtype)
    cut = interpreted and dtype == torch.bfloat16  # instead of rounded
    for block, stored in itertools.product((32, 64, 128, 4096), STORED):
        if block != 64 and stored != torch.uint8:
            continue
        of = weight, block, kind, nested, stored
        found, right = given_back(*of, (512, 4), torch.float32 if cut else None)
        if cut:
            right = (right.view(torch.int32) & -65536).view(torch.float32).bfloat16()
        assert found.dtype == right.dtype == dtype
        assert torch.equal(found, right), (block, stored)
        assert found.unique().numel() > 16


@with_triton
@runs_kernels
def test_weights_leave_what_stands_beside_them(monkeypatch):
    """Rows with gaps between them, which hold LoRA's matrices."""
    monkeypatch.setattr(four_bit_weight, "has_kernels", lambda x: True)
    weights = [torch.randn(rows, 104, device=device, dtype=torch.float16) for rows in (101, 40)]
    tensors, right = [], []
    for weight in weights:
        packed, state = quantize_4bit(weight, blocksize=64, compress_statistics=True)
        tensors += packed, state.absmax, state.state2.code, state.state2.absmax, state.offset
        right.append(dequantize_4bit(packed, state))
    a = torch.randn(64, 104, device=device, dtype=torch.float16)
    b = torch.randn(141, 64, device=device, dtype=torch.float16)
    of = tensors, [101, 40]
    found = four_bit_weight.four_bit_beside(*of, b, 104, 64, "fp4")
    assert torch.equal(found, torch.cat([torch.cat(right), b], 1))
    assert torch.equal(four_bit_weight.four_bit_above(*of, a, 64, "fp4", b), torch.cat([*right, a]))


@with_triton
@runs_kernels
@pytest.mark.parametrize("form", [(64, 1), (256, 4), (2048, 8)], ids=str)
def test_every_form_gives_the_same(form):
    weight = torch.randn(SHAPE, device=device, dtype=torch.float16)
    found, right = given_back(weight, 64, "nf4", True, torch.uint8, form)
    assert torch.equal(found, right)


@with_triton
@runs_kernels
@pytest.mark.parametrize(
    "kind, nested",
    [("nf4", True), *([] if interpreted else [("nf4", False), ("fp4", True), ("fp4", False)])],
)
def test_weights_in_float8_are_plain_torchs_in_both_orders(kind, nested):
    """Rows and words fill no tile, 4,096 weights no last block; 32 a block are many larger scales.

    Triton's interpreter cuts float8 off: it stores float32 here, which torch rounds.
    """
    from sftlab.fastpath.four_bit_kernel import fill_four_bit_float8

    torch.manual_seed(0)
    weight = torch.randn(112, 176, device=device)
    weight[5] *= 30
    blocks, sizes = (32, 64, 4096), (1e-30, 0.02, 1e4)
    for block, size in (zip if interpreted else itertools.product)(blocks, sizes):
        packed, state = quantize_4bit(weight * size, None, None, block, nested, quant_type=kind)
        scales = (state.state2.code, state.state2.absmax, state.offset) if nested else None
        scale = float8_scale(state.absmax, scales, kind)
        of = packed, state.absmax, scales
        whole = dequantize_4bit(packed, state) / scale
        assert 224 <= whole.abs().max() <= 448 or size < 1e-9
        for transposed, form in [(False, None), (False, (64, 2)), (True, None), (True, (16, 2, 1))]:
            right = plainly(*of, block, kind, weight.shape, scale, transposed)
            dtype = torch.float32 if interpreted else FORWARD
            room = torch.full((weight.numel() + 100,), 7.0, device=device).to(dtype)
            out = room[: weight.numel()].view(right.shape)
            table = table_of(kind, device)
            fill_four_bit_float8(*of, table, block, scale, transposed, out, form)
            assert (room[weight.numel() :].float() == 7).all()
            if interpreted:
                assert torch.equal(out, whole.t() if transposed else whole)
            assert torch.equal(out.to(FORWARD).float(), right.float()), (block, size, transposed)
            assert size < 1e-9 or right.float().unique().numel() > 16


def test_the_scale_in_float8_is_the_smallest_power_of_two_without_overflow():
    """448 of 2 ** n is the largest number of float8 itself."""
    for most, expected in ((448.0, 1.0), (448.1, 2.0), (0.875, 2.0**-9), (0.88, 2.0**-8)):
        found = float8_scale(torch.tensor([0.1, -most]), None, "nf4")
        assert found.shape == (1, 1) and found.item() == expected
    assert float8_scale(torch.zeros(3), None, "nf4").item() > 0


def compiled(monkeypatch, name, capability, fill):
    """The PTX of the kernel `name` as `fill` starts it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sftlab.fastpath import four_bit_kernel

    kernel, started = getattr(four_bit_kernel, name), []

    def start(*args, **options):
        started.append((dict(zip(kernel.arg_names, args, strict=True)), options))

    monkeypatch.setattr(four_bit_kernel, name, defaultdict(lambda: start))
    fill(four_bit_kernel)
    ((arguments, options),) = started
    types = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.uint8: "*u8"}
    types[FORWARD] = "*fp8e4nv"
    constants = {p.name: arguments[p.name] for p in kernel.params if p.is_constexpr}
    of = {n: types[a.dtype] if torch.is_tensor(a) else "i32" for n, a in arguments.items()}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(of) if n not in constants}
    source = ASTSource(kernel, of | dict.fromkeys(constants, "constexpr"), constants, aligned)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options=options).asm["ptx"]


def stored(nested):
    """What both kernels read, of no meaning."""
    whole = torch.zeros(1)
    scales = torch.zeros(1, dtype=torch.uint8) if nested else whole
    return torch.zeros(2048, 1, dtype=torch.uint8), scales, (whole,) * 3 if nested else None, whole


@with_triton
@pytest.mark.skipif(interpreted, reason="Triton's interpreter runs no compiled kernel")
@pytest.mark.parametrize("nested, gap", [(False, 0), (True, 0), (True, 64)])
@pytest.mark.parametrize("capability", [80, 90])
def test_compiled_it_rounds_every_product_and_writes_16_bytes_at_a_time(
    monkeypatch, nested, gap, capability
):
    """A fused multiply-add would round a scale once where bitsandbytes rounds it twice."""
    out = torch.zeros(64, 64 + gap, dtype=torch.bfloat16)[:, :64]
    ptx = compiled(
        monkeypatch, "_weights", capability,
        lambda kernels: kernels.fill_four_bit_weight(*stored(nested), 64, out),
    )  # fmt: skip
    assert "fma" not in ptx
    stores = re.findall(r"st\.global\S*", ptx)
    assert stores and set(stores) == {"st.global.v4.b32"}


@with_triton
@pytest.mark.skipif(interpreted, reason="Triton's interpreter runs no compiled kernel")
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_compiled_it_rounds_to_float8_once_and_writes_what_lies_together(
    monkeypatch, nested, transposed
):
    out, scale = torch.zeros(64, 64).to(FORWARD), torch.zeros(1)
    ptx = compiled(
        monkeypatch, "_float8_weights", 90,
        lambda kernels: kernels.fill_four_bit_float8(*stored(nested), 64, scale, transposed, out),
    )  # fmt: skip
    assert "fma" not in ptx and "cvt.rn.satfinite.e4m3x2.f32" in ptx
    stores = re.findall(r"st\.global\S*", ptx)
    assert stores and set(stores) == {"st.global.v4.b32" if transposed else "st.global.v2.b32"}
