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
    interpret_tests,
    interpreted,
    runs_kernels,
    starts_interpreter,
    with_triton,
)

from sftlab.fastpath import four_bit_weight
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
@pytest.mark.skipif(interpreted, reason="Triton's interpreter runs no compiled kernel")
@pytest.mark.parametrize("nested, gap", [(False, 0), (True, 0), (True, 64)])
@pytest.mark.parametrize("capability", [80, 90])
def test_compiled_it_rounds_every_product_and_writes_16_bytes_at_a_time(
    monkeypatch, nested, gap, capability
):
    """A fused multiply-add would round a scale once where bitsandbytes rounds it twice."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sftlab.fastpath import four_bit_kernel

    kernel, started = four_bit_kernel._weights, []

    def start(*args, **options):
        started.append((dict(zip(kernel.arg_names, args, strict=True)), options))

    monkeypatch.setattr(four_bit_kernel, "_weights", defaultdict(lambda: start))
    whole = torch.zeros(1)
    scales = torch.zeros(1, dtype=torch.uint8) if nested else whole
    out = torch.zeros(64, 64 + gap, dtype=torch.bfloat16)[:, :64]
    of = torch.zeros(2048, 1, dtype=torch.uint8), scales, (whole,) * 3 if nested else None, whole
    four_bit_kernel.fill_four_bit_weight(*of, 64, out)
    ((arguments, options),) = started
    types = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.uint8: "*u8"}
    constants = {p.name: arguments[p.name] for p in kernel.params if p.is_constexpr}
    of = {n: types[a.dtype] if torch.is_tensor(a) else "i32" for n, a in arguments.items()}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(of) if n not in constants}
    source = ASTSource(kernel, of | dict.fromkeys(constants, "constexpr"), constants, aligned)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert "fma" not in made.asm["ptx"]
    stores = re.findall(r"st\.global\S*", made.asm["ptx"])
    assert stores and set(stores) == {"st.global.v4.b32"}


@with_triton
@starts_interpreter
def test_the_kernel_runs_under_tritons_interpreter():
    assert "16 passed, 7 skipped" in interpret_tests(__file__)
