"""The variants of LoRA that the project supports, and everything it knows about each of them.

config/validation.py, chat/engine.py and comparison/comparability.py ask the table `VARIANTS`;
tests/test_lora_variants.py holds every entry against what peft does. docs/extending.md names the
other places that a new variant needs, among them the keys that models/trust.py lets through.

Ways to begin that change the base weights (PiSSA, OLoRA) are in config/lora_start.py.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class LoraVariant(NamedTuple):
    """One variant, switched on by the recipe field `field`, which peft's LoraConfig has as well.

    `scale` maps alpha and rank to the factor of the update B A x; None is LoRA's own alpha / r.
    `trains` names the parameters that train beside A and B. Without any, FSDP2 keeps the adapter
    whole on every process (fastpath/fsdp.py); with some, it shards the adapter, which is slower.
    `mixed_batches` says whether peft runs base and tuned rows in one batch. `float8_conflict` says
    why the variant does not work over float8 weights; None where it does. None of the variants is
    refused with 4-bit or 8-bit weights, packed rows, compiled layers or the fused loss.
    """

    name: str
    field: str
    scale: Callable[[float, int], float] | None = None
    trains: tuple[str, ...] = ()
    mixed_batches: bool = True
    float8_conflict: str | None = None


VARIANTS = (
    # Kalajdzievski 2023, arXiv 2312.03732
    LoraVariant("rsLoRA", "use_rslora", scale=lambda alpha, rank: alpha / math.sqrt(rank)),
    # Liu et al. 2024, arXiv 2402.09353
    LoraVariant(
        "DoRA",
        "use_dora",
        trains=("lora_magnitude_vector",),
        mixed_batches=False,
        float8_conflict="use_dora needs the norms of the exact weights",
    ),
    LoraVariant("LoRA with biases", "lora_bias", trains=("lora_B.bias",)),
)
# Recipe fields of variants that change the scale, and of those that train more parameters.
SCALE_FIELDS = tuple(variant.field for variant in VARIANTS if variant.scale)
PARAMETER_FIELDS = tuple(variant.field for variant in VARIANTS if variant.trains)


def lora_scale(recipe: Mapping[str, Any]) -> float:
    """Returns the factor of the LoRA update that a recipe's fields ask for; 0.0 without LoRA.

    Raises ValueError where alpha or rank is no number.
    """
    alpha, rank = recipe.get("lora_alpha", 0), recipe.get("lora_r") or 1
    for name, value in {"lora_alpha": alpha, "lora_r": rank}.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{name} is {value!r}, expected a number")
    for variant in VARIANTS:
        if variant.scale and recipe.get(variant.field):
            return variant.scale(alpha, rank)
    return alpha / rank


def variant_words(recipe: Mapping[str, Any]) -> list[str]:
    """Returns the variants that a recipe's fields ask for, as a text names them."""
    plain = recipe["lora_alpha"] / (recipe["lora_r"] or 1)
    scale = f" (its scale is {lora_scale(recipe):.4g}; alpha / rank is {plain:.4g})"
    return [v.name + (scale if v.scale else "") for v in VARIANTS if recipe.get(v.field)]


def float8_conflict(settings: object) -> str | None:
    """Returns why the variants in `settings` do not work over float8 weights; None where they do.

    `settings` has the variants' fields as attributes: a recipe's model arguments, or LoraConfig.
    """
    reasons = (v.float8_conflict for v in VARIANTS if getattr(settings, v.field))
    return next((reason for reason in reasons if reason), None)


def allows_mixed_batches(settings: object) -> bool:
    """Returns whether peft runs base and tuned rows in one batch, given those variants."""
    return all(v.mixed_batches for v in VARIANTS if getattr(settings, v.field))
