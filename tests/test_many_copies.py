"""Copies of many matrices with few kernels are copies one by one."""

import pytest
import torch
from triton_interpreter import interpreted, on_a_gpu, runs_kernels, with_triton

from sftlab.fastpath import many_copies

device = "cuda" if on_a_gpu else "cpu"


def test_on_a_cpu_it_is_torch():
    check()


@with_triton
@runs_kernels
def test_the_kernel_copies_each_matrix_to_its_place(monkeypatch):
    monkeypatch.setattr(many_copies, "has_kernels", lambda x: True)
    check()
    check()  # elsewhere in memory


def check() -> None:
    """Matrices of several shapes, strides and dtypes, and what lies beside them."""
    torch.manual_seed(0)
    room = torch.full((9, 70, 300), 7.0, dtype=torch.bfloat16, device=device)
    out = [room[i, 2:7, 3:193] for i in range(3)] + [room[i, :64, 100:108] for i in range(3, 6)]
    out += [room[6, :64, 100:108], *room[7, :3].split(1), room[8, :50, :].t()]
    given = [torch.randn(one.shape, device=device) for one in out]
    given[4] = torch.randn(8, 64, device=device).t()
    given[5], given[-1] = given[5].bfloat16(), given[-1].bfloat16()
    factors = [1.0, 1.0, 0.3, 2.0, 2.0, 1 / 3, 2.0, 1.0, 1.0, 1.0, 3.0]
    expected = room.clone()
    many_copies.copy_all(out, given, factors)
    for one, matrix, factor in zip(out, given, factors, strict=True):
        assert same(one, (matrix.float() * factor).bfloat16())
        one.fill_(7.0)
    assert torch.equal(room, expected), "nothing beside them changed"
    many_copies.copy_all(out[:3], given[:3])
    assert all(same(a, b.bfloat16()) for a, b in zip(out[:3], given[:3], strict=True))

    wide = torch.zeros(4, 33, 48, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
    stack = torch.randint(0, 255, (4, 33, 9), dtype=torch.uint8, device=device)
    many_copies.scatter(stack.view(wide.dtype), [one[:, 39:] for one in wide])
    assert torch.equal(wide.view(torch.uint8)[:, :, 39:], stack)
    assert not wide.view(torch.uint8)[:, :, :39].any()


@with_triton
@runs_kernels
def test_matrices_that_differ_in_one_thing_alone_share_no_kernel(monkeypatch):
    monkeypatch.setattr(many_copies, "has_kernels", lambda x: True)
    torch.manual_seed(0)
    room = torch.zeros(6, 40, 64, device=device)
    whole = torch.randn(6, 40, 64, device=device)
    pairs = [
        (room[0, :, :8], whole[0, :, :8]),
        (room[1, :20, :8], whole[1, :20, :8]),  # a shape
        (room[2].view(64, 40)[:40, :8], whole[2, :, :8]),  # strides of where it goes
        (room[3, :, :8], whole[3].view(64, 40)[:40, :8]),  # strides of where it is
        (room[4, :, :8], whole[4].half()[:, :8]),  # a dtype
        (room[5].half()[:, :8], whole[5, :, :8]),
    ]
    many_copies.copy_all(*map(list, zip(*pairs, strict=True)))
    assert not room[1, 20:].any()
    for one, matrix in pairs:
        torch.testing.assert_close(one, matrix.to(one.dtype), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("on_kernels", [False, True])
def test_torch_copies_what_the_kernel_does_not_know_and_refuses_what_does_not_fit(
    monkeypatch, on_kernels
):
    if on_kernels:
        pytest.importorskip("triton")
        monkeypatch.setattr(many_copies, "has_kernels", lambda x: True)
        monkeypatch.setattr(many_copies, "_start", None)
    out = [torch.zeros(5, 7, dtype=torch.float64), torch.zeros(5, 7), torch.zeros(3, 0)]
    out += [torch.zeros(2, 3, 4)]
    given = [torch.randn(5, 7), torch.randn(1, 7), torch.zeros(3, 0), torch.randn(2, 3, 4)]
    many_copies.copy_all(out, given, [2.0, 1.0, 1.0, 1.0])
    assert out[0].equal((given[0] * 2).double())
    assert out[1].equal(given[1].expand(5, 7))
    assert out[3].equal(given[3])
    with pytest.raises(RuntimeError, match="size"):
        many_copies.copy_all([torch.zeros(5, 7)], [torch.zeros(7, 5)])
    many_copies.copy_all([], [])


def test_so_many_tables_are_kept_and_no_more(monkeypatch):
    monkeypatch.setattr(many_copies, "_tables", {})
    monkeypatch.setattr(many_copies, "MOST_TABLES", 2)
    monkeypatch.setattr(many_copies, "_has_kernel", lambda *pair: True)
    monkeypatch.setattr(many_copies, "_start", lambda *given: None)
    matrices = [torch.zeros(2, 3) for _ in range(5)]
    for matrix in matrices:
        many_copies.copy_all([matrix], [matrix])
    kept = [addresses[1] for addresses in many_copies._tables]
    assert kept == [one.data_ptr() for one in matrices[-2:]]


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether they are equal; Triton's interpreter cuts numbers off to 16 bits."""
    return torch.allclose(one, other, rtol=2.0**-7, atol=0) if interpreted else one.equal(other)


def test_matrices_that_moved_are_found(monkeypatch):
    monkeypatch.setattr(many_copies, "_has_kernel", lambda *pair: True)
    seen = []
    monkeypatch.setattr(
        many_copies, "_start", lambda to, out, given, *rest: seen.append((to, given))
    )
    one, other = (torch.zeros(2, 3, device=device) for _ in range(2))
    for matrix in (one, other, one):
        many_copies.copy_all([matrix], [matrix])
    addresses = [[int(table) for table in pair] for pair in seen]
    assert addresses == [[m.data_ptr()] * 2 for m in (one, other, one)]
    with pytest.raises(ValueError, match="zip"):
        many_copies.copy_all([one], [one, other])
