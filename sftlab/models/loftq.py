"""LoftQ (Li et al. 2023, arXiv 2310.08659): LoRA begins with what 4-bit rounding took away.

The base model stays as 4-bit loading makes it, so the adapter belongs to that model as any QLoRA
adapter does. peft's own functions need a GPU, and leave out that an update is scaled.
"""

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from transformers import PreTrainedModel

from sftlab.models.inner_model import inner_model


@torch.no_grad()
def begin_with_rounding_error(model: PeftModel, exact: PreTrainedModel) -> dict[str, float]:
    """Set A and B so that s B A is the best rank-r part of each weight's rounding error.

    `exact` is the base model as its files have it. Returns the rounding error of the adapted
    weights as a share of their norms, and what the adapter leaves of it. Raises ValueError where no
    adapted weight is rounded.
    """
    whole, error, left = 0.0, 0.0, 0.0
    for name, layer in inner_model(model).named_modules():
        if not isinstance(layer, LoraLayer) or not hasattr(layer.get_base_layer(), "quant_state"):
            continue
        rounded = dequantize_module_weight(layer.get_base_layer()).float()
        weight = exact.get_submodule(name).weight.to(rounded)
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        left_vectors, values, right_vectors = torch.linalg.svd(
            weight - rounded, full_matrices=False
        )
        kept = values[: len(a)].sqrt()
        if len(kept) < len(a):
            raise ValueError(
                f"lora_r is {len(a)}, and init_lora_weights loftq finds only {len(kept)} "
                f"directions in {name}: give a lower rank"
            )
        a.copy_(kept[:, None] * right_vectors[: len(a)])
        b.copy_(left_vectors[:, : len(a)] * kept / layer.scaling["default"])
        update = layer.scaling["default"] * b.float() @ a.float()
        whole += float(weight.square().sum())
        error += float((weight - rounded).square().sum())
        left += float((weight - rounded - update).square().sum())
    if not whole:
        raise ValueError(
            "init_lora_weights loftq finds no adapted weight in 4 bits: leave it out, or adapt "
            "linear layers inside the model"
        )
    return {
        "rounding_error": round((error / whole) ** 0.5, 6),
        "rounding_error_left": round((left / whole) ** 0.5, 6),
    }
