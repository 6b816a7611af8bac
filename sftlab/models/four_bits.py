"""4-bit weights on a CPU: the same numbers on every CPU, and gradients after an evaluation.

bitsandbytes 0.50 errs twice where a CPU has AVX512. Delete each mend when tests/test_four_bits.py
passes without it on such a CPU.
"""

import functools
import math
import warnings

import torch


def mend(model: torch.nn.Module) -> None:
    """Mend what bitsandbytes does with a model's 4-bit weights on a CPU.

    nn/modules.py, `Linear4bit.forward` packs the weights anew at the first evaluation, where the
    CPU has AVX512-BF16. From then on no gradient passes the layer, so a training that validates
    would go on without gradients; and matrices narrower than a block are an error.
    """
    layers = [one for one in model.modules() if hasattr(one, "support_avx512bf16_for_cpu")]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
    if any(layer.weight.is_cpu for layer in layers):
        _dequantize_by_blocks()


@functools.cache
def _dequantize_by_blocks() -> torch.library.Library:
    """Replace the operator that gives 4-bit weights back, on CPUs.

    backends/cpu/ops.py, `dequantize_4bit`: with AVX512 it takes the wrong scales where the inputs
    of a layer are no multiple of the block. The weights are then off by 20 to 25 % of their norm
    instead of 9 %. So it is asked for rows of one block each.
    """
    original = torch.library.get_kernel("bitsandbytes::dequantize_4bit", "CPU")

    def dequantize(
        keys: torch.DispatchKeySet,
        packed: torch.Tensor,
        scales: torch.Tensor,
        block: int,
        kind: str,
        shape: list[int],
        dtype: torch.dtype,
    ) -> torch.Tensor:
        def given(packed: torch.Tensor, scales: torch.Tensor, shape: list[int]) -> torch.Tensor:
            return original.call_boxed(keys, packed, scales, block, kind, shape, dtype)

        if shape[-1] % block == 0:
            return given(packed, scales, shape)
        blocks, rest = divmod(math.prod(shape), block)
        two_a_byte = packed.view(torch.uint8).flatten()
        cut = blocks * block // 2
        weights = given(two_a_byte[:cut], scales[:blocks], [blocks, block]).flatten()
        if rest:
            last = given(two_a_byte[cut:], scales[blocks:], [1, rest])
            weights = torch.cat([weights, last.flatten()])
        return weights.reshape(shape)

    library = torch.library.Library("bitsandbytes", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")
        library.impl("dequantize_4bit", dequantize, "CPU", with_keyset=True, allow_override=True)
    return library
