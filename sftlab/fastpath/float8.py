"""float8 for frozen linears: weights are rounded once, inputs and gradients at every step.

torchao's Float8Linear is made for weights that train. It rounds them at every forward, and again
for the gradient of the input. Here a weight has one scale. An input and a gradient have one for
each token: torch.compile rounds them in the kernel that makes them, which would have to end first
if a scale needed all tokens. The format is e4m3 in the forward and e5m2 for gradients
(Micikevicius et al. 2022, arXiv 2209.05433).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from accelerate.utils import AORecipeKwargs
from torch import nn

FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2


class FrozenFloat8Linear(nn.Linear):
    """y = x W^T in float8 with a bfloat16 output.

    The forward and the backward product read W in different orders, so it is stored twice. Both
    copies share one bfloat16 parameter of W's shape, one after the other: FSDP2 can shard and
    gather it, and gloo can send it.
    """

    # whether inputs are rounded: see inputs_in_16_bits
    rounds_inputs = True
    # W and W^T where others hold them: see float8_lora.py
    held: tuple[torch.Tensor, torch.Tensor] | None = None

    def __init__(
        self,
        linear: nn.Linear,
        device: torch.device | None = None,
        scale: torch.Tensor | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.data.to(device)
        scale = scale_of(weight.abs().amax(), FORWARD) if scale is None else scale.to(device)
        rounded = over(weight, scale, FORWARD)
        # a product by rows takes a scale for each of its columns, of either copy
        self.scale = scale.repeat(1, max(self.in_features, self.out_features))
        both = torch.cat([one.view(torch.uint8).flatten() for one in (rounded, transpose(rounded))])
        stored = both.view(torch.bfloat16).view(linear.weight.shape).to(linear.weight.device)
        self.weight = nn.Parameter(stored, requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns x W^T: [..., in] to [..., out], in bfloat16."""
        if not self.rounds_inputs:
            weight, _, scale = self.stored()
            whole = weight.to(torch.bfloat16) * scale[0, 0].to(torch.bfloat16)
            bias = None if self.bias is None else self.bias.to(torch.bfloat16)
            return nn.functional.linear(x.to(torch.bfloat16), whole, bias)
        y = _Float8Product.apply(x.reshape(-1, self.in_features), *self.stored())
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def stored(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns W [out, in] and W^T [in, out] in float8, and their scale for every column."""
        if self.held:
            return *self.held, self.scale
        weight, weight_t = self.weight.view(-1).view(FORWARD).view(2, -1)
        return (
            weight.view(self.out_features, -1),
            weight_t.view(self.in_features, -1),
            self.scale,
        )


@contextmanager
def inputs_in_16_bits() -> Iterator[None]:
    """Inside, frozen float8 linears multiply in bfloat16; in code that is not compiled alone."""
    FrozenFloat8Linear.rounds_inputs = False
    try:
        yield
    finally:
        FrozenFloat8Linear.rounds_inputs = True


class _Float8Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: object,
        x: torch.Tensor,
        weight: torch.Tensor,
        weight_t: torch.Tensor,
        scale: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(weight_t, scale)
        ctx.dtype = x.dtype
        return float8_product(*to_float8(x, FORWARD, by_row=True), weight, scale)

    @staticmethod
    def backward(ctx: object, gradient: torch.Tensor) -> tuple:
        weight_t, scale = ctx.saved_tensors
        into_x = float8_product(*to_float8(gradient, BACKWARD, by_row=True), weight_t, scale)
        return into_x.to(ctx.dtype), None, None, None


def float8_product(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    rough_sums: bool = True,
) -> torch.Tensor:
    """Returns x W^T in bfloat16 of x [rows, in] and W [out, in] in float8, [rows, out].

    x has a scale for each row, [rows, 1], and W one for each of its rows or more, [1, ...]. With
    `rough_sums` Hopper's units for float8 add up alone, with some 14 bits: enough for some thousand
    products.
    """
    # no cast after this: in a forward compiled by torch 2.11, one that changes nothing loses the
    # gradient
    return torch._scaled_mm(
        x,
        weight.t(),
        x_scale,
        scale[:, : len(weight)],
        out_dtype=torch.bfloat16,
        use_fast_accum=rough_sums,
    )


def to_float8(
    tensor: torch.Tensor, dtype: torch.dtype, by_row: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns `tensor` in float8, and the float32 scale that it must be multiplied with.

    The scale maps the largest absolute value, of the tensor or `by_row` of each row ([rows, 1]), to
    the largest one of `dtype`.
    """
    most = tensor.abs().amax(dim=-1, keepdim=True) if by_row else tensor.abs().amax()
    scale = scale_of(most, dtype)
    return over(tensor, scale, dtype), scale


def scale_of(most: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns the scale under which `most`, a largest absolute value, is the largest number."""
    return most.float().clamp(min=1e-12) / torch.finfo(dtype).max


def over(tensor: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns `tensor` over `scale` in float8, cut off at the largest number."""
    largest = torch.finfo(dtype).max
    return (tensor.float() / scale).clamp(-largest, largest).to(dtype)


def transpose(rounded: torch.Tensor) -> torch.Tensor:
    """Returns a float8 matrix transposed and contiguous: not all of torch's operations know it."""
    return rounded.view(torch.uint8).t().contiguous().view(rounded.dtype)


def multiplies_in_float8(linear: nn.Module | None) -> bool:
    """Whether it is one of these linears, or that of four_bit_float8.py."""
    return hasattr(linear, "rounds_inputs")


def freeze_in_float8(
    model: nn.Module,
    device: torch.device | None = None,
    together: Sequence[Sequence[str]] = (),
) -> int:
    """Replace the frozen linears of the decoder by float8 ones; `device` does the rounding.

    Linears of one module whose names are in one tuple of `together` get the same scale. Returns the
    number of replaced linears. Raises ValueError if there is none whose sizes are
    multiples of 16, as float8 products need.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    left = {head, *_read_by_mixers(model)}
    names = [
        name
        for name, module in model.named_modules()
        if module not in left and is_base_linear(module, name)
    ]
    if not names:
        raise ValueError(
            "fp8: the model has no frozen linear whose sizes are multiples of 16: launch with "
            "single.yaml"
        )
    scales = dict(_shared_scales(model, names, together))
    for name in names:
        parent, _, child = name.rpartition(".")
        rounded = FrozenFloat8Linear(model.get_submodule(name), device, scales.get(name))
        setattr(model.get_submodule(parent), child, rounded)
    return len(names)


def _shared_scales(
    model: nn.Module, names: Sequence[str], together: Sequence[Sequence[str]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the name of each linear that shares a scale, and that scale."""
    sharing: dict[tuple, list[str]] = {}
    for name in names:
        *path, child = name.removesuffix(".base_layer").split(".")
        for i, group in enumerate(together):
            if child in group:
                sharing.setdefault((i, *path), []).append(name)
    for group in sharing.values():
        most = torch.stack([model.get_submodule(name).weight.data.abs().amax() for name in group])
        for name in group:
            yield name, scale_of(most.amax(), FORWARD)


def _read_by_mixers(model: nn.Module) -> Iterator[nn.Module]:
    """Yields the linears of Mamba's mixers that may not be called.

    The mixer, or a kernel that it calls, reads their weights itself; in_proj alone is called.
    """
    for mixer in model.modules():
        if {"A_log", "D"} <= set(mixer._parameters):
            for name, child in mixer.named_children():
                if name != "in_proj":
                    yield from child.modules()


def convert_nothing() -> AORecipeKwargs:
    """Returns a recipe for accelerate's fp8 that leaves every linear as it is.

    accelerate would let torchao convert all linears, the LoRA matrices too.
    """
    return AORecipeKwargs(
        enable_fsdp_float8_all_gather=False, module_filter_func=lambda module, name: False
    )


def is_base_linear(module: nn.Module, name: str) -> bool:
    """Returns whether fp8 replaces this module.

    It does if it is a frozen linear of the decoder that is not quantized, with sizes that are
    multiples of 16.
    """
    if not isinstance(module, nn.Linear) or "lora_" in name or "lm_head" in name:
        return False
    frozen = not module.weight.requires_grad and module.weight.is_floating_point()
    return frozen and module.in_features % 16 == 0 and module.out_features % 16 == 0
