"""Steps of fused LoRA that torch.compile takes as they are: it would make slower kernels of them.

Its own kernel for gradients side by side works out every gradient for every column, and one for
SwiGLU's gradient copies what the products read. On a GPU these are kernels of mlp_kernel.py, or of
gated_lora_kernel.py where those can run; on a CPU plain torch.
"""

from collections.abc import Sequence
from functools import cache
from types import ModuleType

import torch

from sftlab.models.gated_mlp import activation

# of gated_lora_kernel.py, which nothing imports where it cannot run; compute capability 9.x
LARGEST_RANK, HOPPER = 32, 9
_process = {"may_have_lora": True}


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
    y: torch.Tensor, wide: torch.Tensor, a: torch.Tensor, rank: int, tanh_gelu: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The down product of act = f(gate) up, with y [rows, 2 size] = [gate, up].

    `wide` [out, size + ranks] is down's W beside s B, and `a` [ranks, size] its A, of which `rank`
    rows are not 0. Returns the output [rows, out] and h = act A^T [rows, ranks].
    """
    both = _room(y, wide.shape[1])
    h = gated_beside(y, a, rank, tanh_gelu, both)
    return both @ wide.t(), h


@gated_down.register_fake
def _(
    y: torch.Tensor, wide: torch.Tensor, a: torch.Tensor, rank: int, tanh_gelu: bool
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
    rank: int,
    rank_down: int,
    tanh_gelu: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of an MLP, from `gradient` [rows, out], that of its output.

    `x` [rows, in] is its input, and `h` [rows, ranks] that of gate and up. `tall` [2 size + ranks,
    in] is W above A of gate and up, and `b` [2 size, ranks] their s B, `rank` columns of gate, then
    of up; `tall_down` and `b_down` are down's. Returns the gradients of the input, of A and of s B
    of gate and up, and of A of down. That of s B is right in each part's own `rank` columns.
    """
    out = gradient.shape[1]
    into_down = _room(y, len(tall_down))
    copy(gradient, into_down[:, :out])
    into_down[:, out:] = into_h_down = gradient @ b_down
    into_act = into_down @ tall_down
    del into_down
    into_both = _room(y, len(tall))
    into_h, into_b, into_a_down = gated_backward_beside(
        into_act, y, h, b, into_h_down, rank, rank_down, tanh_gelu, into_both
    )
    del into_act, into_h_down
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
    rank: int,
    rank_down: int,
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


def let_kernels_have_lora(may: bool) -> None:
    """Let MLPs' kernels have LoRA's thin products in them in this process, or leave these out."""
    _process["may_have_lora"] = may


def may_have_lora() -> bool:
    """Whether an MLP's kernels may have LoRA's thin products in them in this process."""
    return _process["may_have_lora"]


@cache
def module_with_lora() -> ModuleType | None:
    """Returns gated_lora_kernel.py, where Triton is one whose Gluon it was written for."""
    try:
        import triton

        if triton.__version__.split(".")[:2] not in (["3", "6"], ["3", "7"]):
            return None
        from sftlab.fastpath import gated_lora_kernel
    except (ImportError, AttributeError):
        return None
    return gated_lora_kernel


def may_be_in_kernels(rank: int) -> bool:
    """Whether LoRA of a rank may be in an MLP's kernels on a Hopper GPU."""
    return not rank % 8 and rank <= LARGEST_RANK


def kernels_with_lora(act: torch.Tensor, rank: int) -> ModuleType | None:
    """Returns gated_lora_kernel.py where it may and can run on act [rows, size] with these ranks.

    TMA begins a tile at any multiple of 16 bytes.
    """
    if not may_have_lora() or not act.is_cuda or act.element_size() != 2:
        return None
    if not may_be_in_kernels(rank) or act.shape[1] % 64 or not len(act):
        return None
    return module_with_lora() if is_hopper(act.device) else None


@cache
def is_hopper(device: torch.device) -> bool:
    """Whether it is a GPU of compute capability 9.x; asked once, as it takes longer than a step."""
    return not torch.version.hip and torch.cuda.get_device_capability(device)[0] == HOPPER


def gated_beside(
    y: torch.Tensor, a: torch.Tensor, rank: int, tanh_gelu: bool, out: torch.Tensor
) -> torch.Tensor:
    """Fill `out` [rows, size + ranks] with act and h = act A^T; returns h. See gated_down."""
    act = out[:, : a.shape[1]]
    if with_lora := kernels_with_lora(act, rank):
        h = with_lora.gated_with_lora(y, a, rank, tanh_gelu, act)
    else:
        gated(y, tanh_gelu, act)
        h = act @ a.t()
    out[:, a.shape[1] :] = h
    return h


def gated_backward_beside(
    into_act: torch.Tensor,
    y: torch.Tensor,
    h: torch.Tensor,
    b: torch.Tensor,
    into_h_down: torch.Tensor,
    rank: int,
    rank_down: int,
    tanh_gelu: bool,
    out: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Fill `out` [rows, 2 size + ranks] with the gradients of y and h. See gated_backward.

    `into_act` is overwritten. Returns the gradients of h, of s B of gate and up, and of A of down.
    """
    into_y, into_h = out[:, : y.shape[1]], out[:, y.shape[1] :]
    with_lora = kernels_with_lora(into_act, rank) and kernels_with_lora(into_act, rank_down)
    if with_lora:
        found = with_lora.gated_backward_with_lora(
            into_act, y, h, b, into_h_down, rank, rank_down, tanh_gelu, into_y, into_h
        )
        return into_h, *found
    gated_backward_(into_act, y, tanh_gelu, into_y)
    into_b, into_a_down = into_y.t() @ h, into_h_down.t() @ into_act  # act by now
    into_h[:] = found = into_y @ b
    return found, into_b, into_a_down


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
