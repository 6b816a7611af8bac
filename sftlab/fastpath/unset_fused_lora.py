"""Is fused LoRA on where the recipe leaves it unset? Where it was measured to be faster.

That is on a GPU with compiled layers, where LoRA without dropout makes one function of every MLP
(docs/fast_path.md has the figures).
"""

from sftlab.config.launch import COMPUTE_DTYPE, PRECISIONS, Launch
from sftlab.config.lora_variants import PARAMETER_FIELDS
from sftlab.config.recipe import Recipe
from sftlab.fastpath.float8_mlp_ops import LARGEST_SIZE
from sftlab.fastpath.lora_products import LARGEST_SHARED_RANK, padded
from sftlab.models.adapter_names import is_target
from sftlab.models.gated_mlp import NAMES
from sftlab.models.layers import Layers

SHARDED = "FSDP shards the frozen weights, and one product needs them beside LoRA's matrices"


def choose_fused_lora(recipe: Recipe, layers: Layers, launch: Launch) -> tuple[bool, str | None]:
    """Returns whether it is on, with compiled layers on a GPU, and why not.

    The reason is None where nobody expects it: for LoRA on other linears, or on weights in 8 bits.
    """
    if not _is_expected(recipe, layers):
        return False, None
    why = _why_off(recipe, layers, launch)
    return why is None, why


def _is_expected(recipe: Recipe, layers: Layers) -> bool:
    model = recipe.model
    float8 = recipe.training.mixed_precision == "fp8"
    rounded = model.load_in_8bit or (float8 and model.load_in_4bit)
    if rounded or not model.use_peft or model.lora_modules_to_save or model.lora_target_parameters:
        return False
    if any(getattr(model, name) for name in PARAMETER_FIELDS):
        return False
    return bool(layers.gated_mlps) and all(
        is_target(model, f"{mlp}.{name}") for mlp in layers.gated_mlps for name in NAMES
    )


def _why_off(recipe: Recipe, layers: Layers, launch: Launch) -> str | None:
    model, products = recipe.model, COMPUTE_DTYPE[PRECISIONS[recipe.training.mixed_precision]]
    if model.lora_dropout:
        return (
            f"with lora_dropout {model.lora_dropout:g} an MLP is no function of its own, and it "
            "saves memory alone; set fused_lora to switch it on"
        )
    if launch.strategy == "fsdp":
        return SHARDED
    if model.dtype != products or products == "float32":
        return "not measured where weights and products are not in the same 16 bits"
    if recipe.training.method == "dpo":
        return "the reference of preference tuning would be rounded in another way than the policy"
    if padded(2 * model.lora_r) > LARGEST_SHARED_RANK:
        return f"gate and up share no product at rank {model.lora_r}"
    if recipe.training.mixed_precision == "fp8" and layers.widest > LARGEST_SIZE:
        return f"a float8 linear of an MLP has more than {LARGEST_SIZE:,} inputs or outputs"
    if not layers.alike_and_gated:
        return "not measured where layers are of several kinds"
    return None
