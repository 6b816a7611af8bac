"""An MLP's kernels with LoRA's thin products in them, on a Hopper GPU; the same steps elsewhere."""

from functools import partial

import pytest
import torch
from torch.nn.functional import pad
from triton_interpreter import interpreted, on_a_gpu, runs_kernels, with_triton

from sftlab.fastpath.float8 import BACKWARD, FORWARD, over
from sftlab.fastpath.float8_lora import columns_beside
from sftlab.fastpath.float8_lora_ops import gated_backward_in_float8, stand_twice
from sftlab.models.gated_mlp import activation

device = "cuda" if on_a_gpu and not interpreted else "cpu"
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


@with_triton
@runs_kernels
@pytest.mark.parametrize("rank, padded", [(8, 16), (32, 32)])
def test_parts_of_gradients_are_added_up_each_in_its_place(rank, padded):
    from sftlab.fastpath.parts_kernel import add_up, add_up_all

    torch.manual_seed(0)
    rows, size, ranks, groups, splits = 21, 19, 64, 9, 3
    filled = partial(torch.full, fill_value=float("nan"), device=device)
    part_rows = torch.randn(groups, rows, 2 * padded, device=device)
    of_b, of_a = (torch.randn(splits, n, padded, device=device) for n in (2 * size, size))
    into_h, into_b = filled((rows, ranks + 8))[:, 8:], filled((2 * size, ranks))
    into_a, h = filled((ranks, size)), filled((rows, ranks))
    parts = torch.cat([of_b.flatten(), of_a.flatten()])
    add_up_all(part_rows, parts, splits, (rank, rank), into_h, into_b, into_a)
    add_up(part_rows[:, :, :padded].contiguous(), rank, h)
    whole = part_rows.sum(0)
    gate_and_up = torch.cat([whole[:, :rank], whole[:, padded : padded + rank]], 1)
    gate, up = (of_b.sum(0)[:, :rank]).split(size)
    expected = (
        (into_h, pad(gate_and_up, (0, ranks - 2 * rank))),
        (h, pad(whole[:, :rank], (0, ranks - rank))),
        (into_b[:size], pad(gate, (0, ranks - rank))),
        (into_b[size:], pad(up, (rank, ranks - 2 * rank))),
        (into_a.t(), pad(of_a.sum(0)[:, :rank], (0, ranks - rank))),
    )
    for mine, plain in expected:
        assert (mine - plain).abs().max() < 1e-5


def compare_thin_products(
    dtype: torch.dtype, tanh_gelu: bool, ranks: tuple[int, int], rows: int, size: int
) -> None:
    """Hold an MLP's steps to those in float64, and twice to the same bits."""
    from sftlab.fastpath import mlp_ops

    torch.manual_seed(0)
    (rank, rank_down), width, columns = ranks, 48, 64
    shapes = (rows, width), (rows, 2 * size), (rows, width), (rows, columns)
    shapes += (2 * size + columns, width), (2 * size, columns), (width + columns, size)
    given = [torch.randn(shape, device=device) for shape in (*shapes, (width, columns))]
    b, tall_down, b_down = given[5:]
    given[0] *= rows**-0.5  # gradients of A would be too large for float16
    used = torch.arange(columns, device=device) // rank
    b[:size] *= used == 0
    b[size:] *= used == 1
    tall_down[width + rank_down :] = 0
    b_down[:, rank_down:] = 0
    given = [one.to(dtype) for one in given]
    down = torch.randn(width, size + columns, device=device).to(dtype), given[6][width:]
    exact_down, exact = ([one.double().cpu() for one in of] for of in (down, given))
    expected = mlp_ops.gated_down(exact[1], *exact_down, rank_down, tanh_gelu)
    expected += mlp_ops.gated_backward(*exact, rank, rank_down, tanh_gelu)
    found, again = (
        mlp_ops.gated_down(given[1], *down, rank_down, tanh_gelu)
        + mlp_ops.gated_backward(*given, rank, rank_down, tanh_gelu)
        for _ in range(2)
    )
    own = torch.cat([(used == i).cpu().expand(size, -1) for i in range(2)])
    for place, (mine, plain) in enumerate(zip(found, expected, strict=True)):
        assert mine.shape == plain.shape
        mine = mine.cpu().double()
        if place == 4:  # of s B each part's own columns are right
            mine, plain = mine * own, plain * own
        assert (mine - plain).abs().max() < 3 * TOLERANCE[dtype] * plain.abs().max(), place
    assert all(torch.equal(*pair) for pair in zip(found, again, strict=True))


on_hopper = pytest.mark.skipif(
    not on_a_gpu or torch.cuda.get_device_capability()[0] != 9,
    reason="these kernels are for GPUs of compute capability 9",
)


@on_hopper
@pytest.mark.parametrize("ranks", [(16, 16), (32, 32)])
@pytest.mark.parametrize("splits", [1, 5, 16])
def test_a_program_that_does_many_tiles_or_none_forms_plain_thin_products(
    monkeypatch, splits, ranks
):
    from sftlab.fastpath import gated_lora_kernel

    monkeypatch.setattr(gated_lora_kernel, "_splits", lambda *_: splits)
    compare_thin_products(torch.bfloat16, False, ranks, 1501, 1088)


@on_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tanh_gelu", [False, True])
@pytest.mark.parametrize("ranks", [(8, 8), (16, 16), (32, 32), (24, 8)])
@pytest.mark.parametrize("rows, size", [(1501, 1088), (333, 2112), (1, 64)])
def test_thin_products_of_an_mlp_on_hopper_are_plain_ones(dtype, tanh_gelu, ranks, rows, size):
    from sftlab.fastpath import mlp_ops

    y = torch.empty(rows, 2 * size, dtype=dtype, device=device)
    assert all(mlp_ops.kernels_with_lora(y, rank) is not None for rank in ranks)
    compare_thin_products(dtype, tanh_gelu, ranks, rows, size)


def compare_float8_gradients(tanh_gelu: bool, ranks: tuple[int, int], rows: int, size: int) -> None:
    """Hold the step in float8 to float64, and twice to the same bits; down changes nothing."""
    torch.manual_seed(0)
    (rank, rank_down), columns, to_down = ranks, columns_beside(2 * ranks[0]), 64
    shapes = (rows, size), (rows, size), (rows, size), (rows, columns), (2 * size, columns)
    gradient, gate, up, h, b, b_down = (
        torch.randn(shape).bfloat16() for shape in (*shapes, (size, to_down))
    )
    gradient = gradient.clamp(-3.5, 3.5).to(BACKWARD).bfloat16()
    gradient[:, 0] = 3.5  # so each row's scale is a power of two: nothing is rounded twice
    gradient[rows // 2] *= 2.0**-10
    used = torch.arange(columns) // rank
    if stand_twice(2 * rank, columns):
        b[:, 2 * rank : 4 * rank] = b[:, : 2 * rank]
    b[:size] *= (used == 0) | (used == 2)
    b[size:] *= (used == 1) | (used == 3)
    b_down[:, rank_down:] = 0
    one, down = torch.ones(1, size), torch.eye(size, size + to_down).to(FORWARD)
    given = gradient, gate, up, h, b, one[0, :1] * 2, down, b_down, one, one[0, :1] * 2.0**-20
    given = [each.to(device) for each in (*given, torch.full((rows, 1), 2.0**14))]
    found, again = (gated_backward_in_float8(*given, rank, rank_down, tanh_gelu) for _ in range(2))
    assert all(
        torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8))
        for a, b in zip(found, again, strict=True)
    )
    gate8, up8, scale, into_h, into_b, into_a_down = (one.cpu() for one in found)

    gate, up = (each.double().requires_grad_() for each in (gate, up))
    act = activation(gate, tanh_gelu) * up
    into_gate, into_up = torch.autograd.grad(act, (gate, up), gradient.double())
    for mine, exact in ((gate8, into_gate), (up8[:, :size], into_up)):
        expected = over(exact, scale, BACKWARD)
        assert (mine.float() == expected.float()).double().mean() > 0.97, "but for borders"
        assert torch.isclose(mine.double(), expected.double(), rtol=0.26, atol=1e-4).all()
    both = torch.cat([into_gate, into_up], 1)
    expected_h = both @ b.double()
    of_h = up8[:, size:].double() * scale
    assert ((of_h - 2 * expected_h).abs() < 0.3 * expected_h.abs().amax(1, True) + 1e-6).all()
    own = torch.cat([(used == i).expand(size, -1) for i in range(2)])
    into_h_down = gradient.double() @ b_down.double()
    for mine, exact in (
        (into_h, expected_h),
        (into_b * own, both.t() @ h.double() * own),
        (into_a_down, into_h_down.t() @ act.detach()),
    ):
        away = (mine.double() - exact).abs().max()
        assert away < 3 * TOLERANCE[torch.bfloat16] * exact.abs().max()


@on_hopper
@pytest.mark.parametrize("tanh_gelu", [False, True])
@pytest.mark.parametrize("ranks", [(8, 8), (16, 16), (32, 32), (24, 8)])
@pytest.mark.parametrize("rows, size", [(1501, 1088), (333, 2112), (1, 64)])
def test_gradients_in_float8_on_hopper_are_plain_ones(tanh_gelu, ranks, rows, size):
    compare_float8_gradients(tanh_gelu, ranks, rows, size)


@pytest.mark.parametrize("ranks", [(8, 8), (24, 8), (48, 16)])
def test_gradients_in_float8_elsewhere_are_plain_ones(ranks):
    compare_float8_gradients(True, ranks, 33, 64)


@pytest.mark.parametrize("ranks", [(8, 8), (24, 8)])
def test_thin_products_of_an_mlp_elsewhere_are_plain_ones(ranks):
    compare_thin_products(torch.float32, True, ranks, 33, 64)
