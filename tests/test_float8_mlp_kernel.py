"""The kernels that round an MLP's activation and gradients to float8 compute what torch does.

Without a GPU, Triton's interpreter runs them, in a process of its own, as for
tests/test_kernels.py. It rounds float8 otherwise than GPUs do, so the kernels store float32 there.
"""

import pytest
import torch
from triton_interpreter import (
    interpreted,
    on_a_gpu,
    runs_kernels,
)

from sftlab.fastpath.float8 import BACKWARD, FORWARD, over, scale_of
from sftlab.models.gated_mlp import activation


def room(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full(shape, torch.nan, device="cuda" if on_a_gpu else "cpu").to(dtype)


def check_rounded(rounded, scale, exact, dtype, most=None):
    """Compare with plain float8: all but those on the border of two numbers are the same.

    `most` is what the scale leaves room for, the largest number of a row unless given.
    """
    most = exact.abs().amax(1, keepdim=True) if most is None else most
    expected_scale = scale_of(most, dtype)
    expected = over(exact, expected_scale, dtype)
    torch.testing.assert_close(scale, expected_scale, rtol=1e-5 if interpreted else 1e-4, atol=0)
    if interpreted:
        largest = torch.finfo(dtype).max
        assert rounded.abs().max() <= largest
        torch.testing.assert_close(rounded * scale, exact, rtol=1e-5, atol=1e-5)
        rounded = rounded.to(dtype)
    assert (rounded.float() == expected.float()).float().mean() > 0.999


@runs_kernels
@pytest.mark.parametrize("tanh_gelu", [False, True])
@pytest.mark.parametrize("size", [96] if interpreted else [96, 1024, 8192, 11008, 16384])
@pytest.mark.parametrize("keep", [False, True])
def test_kernels_are_plain_torch(tanh_gelu, size, keep):
    from sftlab.fastpath import float8_mlp_kernel

    torch.manual_seed(0)
    dtype = torch.float32 if interpreted else torch.bfloat16
    gate, up, into = (room(5, size, dtype=dtype).normal_(std=2) for _ in range(3))
    gate[1] *= 1e-3
    into[2] = 0
    for tensor in (gate, up):
        tensor[3] = 0
    exact = [tensor.double().requires_grad_() for tensor in (gate, up)]
    act = activation(exact[0], tanh_gelu) * exact[1]
    gradients = torch.autograd.grad(act, exact, into.double(), retain_graph=True)
    gradients, of_one = [one.float() for one in gradients], act.sum()
    act = act.detach().float()
    closeness = (
        {"rtol": 1e-2, "atol": 1e-3} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    )

    wide = room(5, size + 16, dtype=dtype if interpreted else FORWARD)
    rounded, scale = wide[:, :size], room(5, 1, dtype=dtype)
    scale, kept, steepest = scale.float(), room(5, size, dtype=dtype), room(5, 1, dtype=dtype)
    more = room(1, dtype=torch.float32).fill_(8) if keep else None
    float8_mlp_kernel.gated_to_float8(
        gate, up, tanh_gelu, rounded, scale, kept if keep else None, torch.finfo(FORWARD).max, more,
        steepest if keep else None,
    )  # fmt: skip
    most = 8 * act.abs().amax(1, keepdim=True).clamp(min=1e-12) if keep else None
    check_rounded(rounded, scale, act, FORWARD, most)
    assert wide[:, size:].isnan().all()
    assert kept.isnan().all() or keep
    if keep:
        torch.testing.assert_close(kept.float(), act, **closeness)
        slopes = torch.cat([one.abs() for one in torch.autograd.grad(of_one, exact)], 1)
        torch.testing.assert_close(steepest.float(), slopes.amax(1, True).float(), **closeness)

    wide = [room(5, size + more, dtype=dtype if interpreted else BACKWARD) for more in (0, 16)]
    pair = [one[:, :size] for one in wide]
    scales = [room(5, 1, dtype=torch.float32) for _ in range(2)]
    whole = [room(5, size, dtype=dtype) for _ in range(2)]
    changed, most = into.clone(), None
    if keep:  # a scale is given
        most = 8 * torch.cat(gradients, 1).abs().amax(1, keepdim=True).clamp(min=1e-12)
        scales = [scale_of(most, BACKWARD)] * 2
    float8_mlp_kernel.gated_backward_to_float8_(
        changed, gate, up, tanh_gelu, pair, None if keep else scales, whole if keep else None, keep,
        torch.finfo(BACKWARD).max, scales[0] if keep else None,
    )  # fmt: skip
    for place, gradient in enumerate(gradients):
        check_rounded(pair[place], scales[place], gradient, BACKWARD, most)
        if keep:
            torch.testing.assert_close(whole[place].float(), gradient, **closeness)
    assert wide[1][:, size:].isnan().all()
    expected = act if keep else into.float()
    torch.testing.assert_close(changed.float(), expected, **closeness)


@runs_kernels
def test_kernels_keep_nan():
    from sftlab.fastpath import float8_mlp_kernel

    dtype = torch.float32 if interpreted else torch.bfloat16
    gate, up, into = (room(4, 96, dtype=dtype).normal_() for _ in range(3))
    gate[1, 7], up[2], into[3, 90] = torch.nan, torch.nan, torch.nan
    rounded, scale = room(4, 96, dtype=dtype if interpreted else FORWARD), room(4, 1, dtype=dtype)
    scale = scale.float()
    float8_mlp_kernel.gated_to_float8(gate, up, False, rounded, scale, None, 448.0)
    assert scale.isnan()[:, 0].tolist() == [False, True, True, False]
    pair = [room(4, 96, dtype=dtype if interpreted else BACKWARD) for _ in range(2)]
    scales = [torch.zeros_like(scale) for _ in range(2)]
    float8_mlp_kernel.gated_backward_to_float8_(
        into, gate, up, False, pair, scales, None, False, torch.finfo(BACKWARD).max
    )
    # the gradient of up is that of the activation times f(gate)
    assert scales[0].isnan()[:, 0].tolist() == [False, True, True, True]
    assert scales[1].isnan()[:, 0].tolist() == [False, True, False, True]


@runs_kernels
@pytest.mark.parametrize("sizes", [(96,), (64, 24, 40)] + [(2048, 512, 512)] * on_a_gpu)
@pytest.mark.parametrize("large", [1e-3, 30.0])
def test_rows_beside_what_lora_made_of_them_are_plain_torch(sizes, large):
    from sftlab.fastpath import float8_join_kernel

    torch.manual_seed(0)
    dtype = torch.float32 if interpreted else torch.bfloat16
    both = room(40, sum(sizes) + 8, dtype=dtype).normal_()
    parts, h = both[:, : sum(sizes)].split(sizes, 1), room(40, 24, dtype=dtype).normal_()
    h[3], both[5, 7], h[6, 2] = 0, torch.nan, torch.nan
    factor = room(1, dtype=torch.float32).fill_(large)
    exact = torch.cat([*parts, factor * h], 1).float()
    out = room(40, sum(sizes) + 24, dtype=dtype if interpreted else FORWARD)
    scale, norm = (room(40, 1, dtype=torch.float32) for _ in range(2))
    float8_join_kernel.join_in_float8(parts, h, factor, out, scale, torch.finfo(FORWARD).max, norm)
    sound = [row for row in range(40) if row not in (5, 6)]
    check_rounded(out[sound], scale[sound], exact[sound], FORWARD)
    assert scale[[5, 6]].isnan().all()
    torch.testing.assert_close(norm, exact.norm(dim=1, keepdim=True), equal_nan=True)

    # as if the rows had been rounded before h was known
    before, room_for_h = out.clone(), out[:, sum(sizes) :]
    room_for_h.copy_(room(40, 24, dtype=dtype))
    float8_join_kernel.fill_ranks(h, factor, scale, room_for_h, torch.finfo(FORWARD).max)
    apart = 1e-5 if interpreted else 0.15  # one number of float8
    torch.testing.assert_close(out[sound].float(), before[sound].float(), rtol=apart, atol=1e-5)
    float8_join_kernel.fill_ranks(h, factor, scale / 1e6, room_for_h, 448.0)
    assert room_for_h[0].float().abs().max() == 448
