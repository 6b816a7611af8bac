"""Steps of fused LoRA that torch.compile takes as they are: it would make slower kernels of them.

Its own kernel for gradients side by side works out every gradient for every column, and one for
SwiGLU's gradient copies what the products read. On a GPU these are kernels of mlp_kernel.py; on a
CPU plain torch.
"""

from collections.abc import Sequence

import torch

from sftlab.models.gated_mlp import activation


@torch.library.custom_op("sftlab::beside", mutates_args=())
def beside(parts: Sequence[torch.Tensor], columns: int) -> torch.Tensor:
    """Returns up to three `parts` [rows, ...] side by side, then zeros: [rows, columns]."""
    out = parts[0].new_empty(len(parts[0]), columns)
    if has_kernels(out):
        from sftlab.fastpath import mlp_kernel

        mlp_kernel.beside([by_rows(part) for part in parts], out)
        return out
    used = sum(part.shape[1] for part in parts)
    torch.cat([*parts, out.new_zeros(len(out), columns - used)], 1, out=out)
    return out


@beside.register_fake
def _(parts: Sequence[torch.Tensor], columns: int) -> torch.Tensor:
    return parts[0].new_empty(parts[0].shape[0], columns)


@torch.library.custom_op("sftlab::gated_down", mutates_args=())
def gated_down(
    y: torch.Tensor, wide: torch.Tensor, a: torch.Tensor, tanh_gelu: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The down product of act = f(gate) up, with y [rows, 2 size] = [gate, up].

    `wide` [out, size + ranks] is down's W beside s B, and `a` [ranks, size] its A. Returns the
    output [rows, out] and h = act A^T [rows, ranks].
    """
    size = a.shape[1]
    both = _room(y, wide.shape[1])
    act = both[:, :size]
    gated(y, tanh_gelu, act)
    both[:, size:] = h = act @ a.t()
    return both @ wide.t(), h


@gated_down.register_fake
def _(
    y: torch.Tensor, wide: torch.Tensor, a: torch.Tensor, tanh_gelu: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    return y.new_empty(y.shape[0], wide.shape[0]), y.new_empty(y.shape[0], a.shape[0])


@torch.library.custom_op("sftlab::gated_backward", mutates_args=())
def gated_backward(
    gradient: torch.Tensor,
    y: torch.Tensor,
    x: torch.Tensor,
    h: torch.Tensor,
    tall: torch.Tensor,
    b: torch.Tensor,
    tall_down: torch.Tensor,
    b_down: torch.Tensor,
    tanh_gelu: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of an MLP, from `gradient` [rows, out], that of its output.

    `x` [rows, in] is its input, and `h` [rows, ranks] that of gate and up. `tall` [2 size + ranks,
    in] is W above A of gate and up, and `b` [2 size, ranks] their s B; `tall_down` and `b_down` are
    down's. Returns the gradients of the input, of A and of s B of gate and up, and of A of down.
    """
    wide, out = y.shape[1], gradient.shape[1]
    into_down = _room(y, len(tall_down))
    copy(gradient, into_down[:, :out])
    into_down[:, out:] = into_h = gradient @ b_down
    act = into_down @ tall_down  # the gradient of act; then act itself, in its place
    into_both = _room(y, len(tall))
    into_y = into_both[:, :wide]
    gated_backward_(act, y, tanh_gelu, into_y)
    into_b, into_a_down = into_y.t() @ h, into_h.t() @ act
    del act, into_down, into_h
    into_both[:, wide:] = into_h = into_y @ b
    return into_both @ tall, into_h.t() @ x, into_b, into_a_down


@gated_backward.register_fake
def _(
    gradient: torch.Tensor,
    y: torch.Tensor,
    x: torch.Tensor,
    h: torch.Tensor,
    tall: torch.Tensor,
    b: torch.Tensor,
    tall_down: torch.Tensor,
    b_down: torch.Tensor,
    tanh_gelu: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    (width, ranks), ranks_down = (tall.shape[1], b.shape[1]), b_down.shape[1]
    return (
        y.new_empty(y.shape[0], width),
        y.new_empty(ranks, width),
        y.new_empty(y.shape[1], ranks),
        y.new_empty(ranks_down, tall_down.shape[1]),
    )


def has_kernels(x: torch.Tensor) -> bool:
    """Whether x is where Triton's kernels run."""
    return x.is_cuda


def gated(y: torch.Tensor, tanh_gelu: bool, out: torch.Tensor) -> None:
    """Fill `out` with act: see mlp_kernel.py."""
    if has_kernels(y):
        from sftlab.fastpath import mlp_kernel

        mlp_kernel.gated(y, tanh_gelu, out)
        return
    gate, up = _wide(y).chunk(2, 1)
    out.copy_(activation(gate, tanh_gelu) * up)


def gated_backward_(
    gradient: torch.Tensor, y: torch.Tensor, tanh_gelu: bool, out: torch.Tensor
) -> None:
    """Fill `out` with the gradient of y, and `gradient` with act: see mlp_kernel.py."""
    if has_kernels(y):
        from sftlab.fastpath import mlp_kernel

        mlp_kernel.gated_backward_(gradient, y, tanh_gelu, out)
        return
    (gate, up), into = _wide(y).chunk(2, 1), _wide(gradient)
    passed = activation(gate, tanh_gelu)
    if tanh_gelu:
        into_gate = torch.ops.aten.gelu_backward(into * up, gate, approximate="tanh")
    else:
        into_gate = torch.ops.aten.silu_backward(into * up, gate)
    out.copy_(torch.cat([into_gate, into * passed], 1))
    gradient.copy_(passed * up)


def _room(y: torch.Tensor, columns: int) -> torch.Tensor:
    """Returns a matrix with as many rows as y, to fill.

    It is 0 on a CPU: in 16 bits oneDNN reads columns behind those of a product, and adds 0 of them.
    """
    shape = len(y), columns
    return y.new_empty(shape) if y.is_cuda else y.new_zeros(shape)


def copy(x: torch.Tensor, out: torch.Tensor) -> None:
    """Fill `out` with x: see `beside` in mlp_kernel.py."""
    if not has_kernels(x):
        out.copy_(x)
        return
    from sftlab.fastpath import mlp_kernel

    mlp_kernel.beside([by_rows(x)], out)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.float() if x.element_size() < 4 else x


def by_rows(x: torch.Tensor) -> torch.Tensor:
    """Returns x with each row's columns one after the other."""
    return x if x.stride(1) == 1 else x.contiguous()
