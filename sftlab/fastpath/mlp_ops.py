"""Steps of fused LoRA that torch.compile takes as they are: it would make slower kernels of them.

Its own kernel for gradients side by side works out every gradient for every column, and one for
SwiGLU's gradient copies what the products read. On a GPU these are kernels of mlp_kernel.py; on a
CPU plain torch.
"""

from collections.abc import Sequence

import torch
from torch.nn.functional import gelu, silu


def activation(x: torch.Tensor, tanh_gelu: bool) -> torch.Tensor:
    """Returns SiLU of x, or the tanh form of GELU."""
    return gelu(x, approximate="tanh") if tanh_gelu else silu(x)


@torch.library.custom_op("sftlab::beside", mutates_args=())
def beside(parts: Sequence[torch.Tensor], columns: int) -> torch.Tensor:
    """Returns up to three `parts` [rows, ...] side by side, then zeros: [rows, columns]."""
    out = parts[0].new_empty(len(parts[0]), columns)
    if out.is_cuda:
        from sftlab.fastpath import mlp_kernel

        mlp_kernel.beside([_by_rows(part) for part in parts], out)
        return out
    used = sum(part.shape[1] for part in parts)
    torch.cat([*parts, out.new_zeros(len(out), columns - used)], 1, out=out)
    return out


@beside.register_fake
def _(parts: Sequence[torch.Tensor], columns: int) -> torch.Tensor:
    return parts[0].new_empty(parts[0].shape[0], columns)


@torch.library.custom_op("sftlab::gated_down", mutates_args=())
def gated_down(
    y: torch.Tensor, joined: torch.Tensor, tanh_gelu: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The down product of act = f(gate) up, with y [rows, 2 size] = [gate, up].

    `joined` [out + ranks, size + ranks] holds W, s B to its right and A below it. Returns the
    output [rows, out] and h = act A^T [rows, ranks].
    """
    size = y.shape[1] // 2
    out = len(joined) - joined.shape[1] + size
    both = y.new_empty(len(y), joined.shape[1])
    act, h = both[:, :size], both[:, size:]
    if y.is_cuda:
        from sftlab.fastpath import mlp_kernel

        mlp_kernel.gated(y, tanh_gelu, act)
    else:
        gate, up = _wide(y).chunk(2, 1)
        act.copy_(activation(gate, tanh_gelu) * up)
    torch.mm(act, joined[out:, :size].t(), out=h)
    return both @ joined[:out].t(), h.clone(memory_format=torch.contiguous_format)


@gated_down.register_fake
def _(y: torch.Tensor, joined: torch.Tensor, tanh_gelu: bool) -> tuple[torch.Tensor, torch.Tensor]:
    ranks = joined.shape[1] - y.shape[1] // 2
    return y.new_empty(y.shape[0], joined.shape[0] - ranks), y.new_empty(y.shape[0], ranks)


@torch.library.custom_op("sftlab::gated_backward", mutates_args=())
def gated_backward(
    gradient: torch.Tensor,
    y: torch.Tensor,
    both: torch.Tensor,
    joined: torch.Tensor,
    down: torch.Tensor,
    tanh_gelu: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of an MLP, from `gradient` [rows, out], that of its output.

    `both` [rows, in + ranks] holds its input and the h of gate and up, `joined` and `down` hold the
    matrices of gate and up, and of down. Returns the gradients of the input, of A and of s B of
    gate and up, and of A of down.
    """
    wide, out = y.shape[1], gradient.shape[1]
    size, width = wide // 2, joined.shape[1] - len(joined) + wide
    into_down = y.new_empty(len(y), len(down))
    into_h = into_down[:, out:]
    _copy(gradient, into_down[:, :out])
    torch.mm(gradient, down[:out, size:], out=into_h)
    act = into_down @ down[:, :size]  # the gradient of act; then act itself, in its place
    into_both = y.new_empty(len(y), len(joined))
    into_y = into_both[:, :wide]
    if y.is_cuda:
        from sftlab.fastpath import mlp_kernel

        mlp_kernel.gated_backward_(act, y, tanh_gelu, into_y)
    else:
        _gated_backward_(act, y, tanh_gelu, into_y)
    into_a_down = into_h.t() @ act
    del act, into_down, into_h
    into_h = torch.mm(into_y, joined[:wide, width:], out=into_both[:, wide:])
    into_b = into_y.t() @ both[:, width:]
    into_a = into_h.t() @ both[:, :width]
    return into_both @ joined[:, :width], into_a, into_b, into_a_down


@gated_backward.register_fake
def _(
    gradient: torch.Tensor,
    y: torch.Tensor,
    both: torch.Tensor,
    joined: torch.Tensor,
    down: torch.Tensor,
    tanh_gelu: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    wide = y.shape[1]
    ranks, ranks_down = joined.shape[0] - wide, down.shape[1] - wide // 2
    width = joined.shape[1] - ranks
    return (
        y.new_empty(y.shape[0], width),
        y.new_empty(ranks, width),
        y.new_empty(wide, ranks),
        y.new_empty(ranks_down, wide // 2),
    )


def _gated_backward_(
    gradient: torch.Tensor, y: torch.Tensor, tanh_gelu: bool, out: torch.Tensor
) -> None:
    """What mlp_kernel's function of this name does."""
    (gate, up), into = _wide(y).chunk(2, 1), _wide(gradient)
    passed = activation(gate, tanh_gelu)
    if tanh_gelu:
        into_gate = torch.ops.aten.gelu_backward(into * up, gate, approximate="tanh")
    else:
        into_gate = torch.ops.aten.silu_backward(into * up, gate)
    out.copy_(torch.cat([into_gate, into * passed], 1))
    gradient.copy_(passed * up)


def _copy(x: torch.Tensor, out: torch.Tensor) -> None:
    if not x.is_cuda:
        out.copy_(x)
        return
    from sftlab.fastpath import mlp_kernel

    mlp_kernel.beside([_by_rows(x)], out)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.float() if x.element_size() < 4 else x


def _by_rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(1) == 1 else x.contiguous()
