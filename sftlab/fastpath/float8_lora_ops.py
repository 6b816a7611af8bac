"""Steps of fused LoRA in float8 that torch.compile takes as they are: see mlp_ops.py.

On a GPU these are kernels of float8_join_kernel.py; on a CPU plain torch.
"""

from collections.abc import Sequence

import torch

from sftlab.fastpath.float8 import BACKWARD, FORWARD, over, scale_of
from sftlab.fastpath.float8_mlp_ops import rounded_room, side_by_side
from sftlab.fastpath.mlp_ops import by_rows, has_kernels


@torch.library.custom_op("sftlab::join_in_float8", mutates_args=())
def join_in_float8(
    parts: Sequence[torch.Tensor], h: torch.Tensor, factor: torch.Tensor, backward: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns up to three `parts` [rows, ...] side by side and then `factor` h, in float8.

    h is [rows, ranks], `factor` [1]. A row has one scale, the second tensor, [rows, 1]. The format
    is that of gradients in a `backward`.
    """
    dtype = BACKWARD if backward else FORWARD
    largest = torch.finfo(dtype).max
    if has_kernels(h):
        from sftlab.fastpath import float8_join_kernel

        out, scale = _joined_room(parts, h, dtype)
        by_row = [by_rows(part) for part in parts]
        float8_join_kernel.join_in_float8(by_row, by_rows(h), factor, out, scale, largest)
        return out, scale
    x, y = torch.cat(list(parts), 1).float(), h.float() * factor
    scale = scale_of(torch.cat([x, y], 1).abs().amax(1, keepdim=True), dtype)
    return side_by_side(over(x, scale, dtype), over(y, scale, dtype)), scale


join_in_float8.register_fake(
    lambda parts, h, factor, backward: _joined_room(parts, h, BACKWARD if backward else FORWARD)
)


@torch.library.custom_op("sftlab::fill_ranks", mutates_args=("out",))
def fill_ranks_(
    h: torch.Tensor, factor: torch.Tensor, scale: torch.Tensor, out: torch.Tensor
) -> None:
    """Fill the last columns of `out` [rows, ... + ranks] with `factor` h over each row's scale.

    h is [rows, ranks], `factor` [1], `scale` [rows, 1]. What is beyond the largest number becomes
    that.
    """
    room = out[:, out.shape[1] - h.shape[1] :]
    if not has_kernels(h):
        found = over(h.float() * factor, scale, out.dtype)
        room.view(torch.uint8).copy_(found.view(torch.uint8))
        return
    from sftlab.fastpath import float8_join_kernel

    largest = torch.finfo(out.dtype).max
    float8_join_kernel.fill_ranks(by_rows(h), factor, scale, room, largest)


fill_ranks_.register_fake(lambda h, factor, scale, out: None)


def _joined_room(
    parts: Sequence[torch.Tensor], h: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    columns = sum(part.shape[1] for part in parts) + h.shape[1]
    return rounded_room(h, columns, dtype)
