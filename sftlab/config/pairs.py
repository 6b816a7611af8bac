"""What follows for a recipe from its method: preference tuning reads pairs, without dropout."""

from sftlab.config.launch import Launch
from sftlab.config.lora_start import changes_base, reads_first
from sftlab.config.recipe import Recipe

SHAPE = "preference"


def resolve_method(recipe: Recipe, launch: Launch) -> None:
    """Let preference tuning read pairs, and switch dropout off.

    Raises ValueError for rows of the other method, and for what preference tuning cannot do.
    """
    data, model, shapes = recipe.data, recipe.model, [recipe.data.dataset_shape]
    shapes += [part.get("shape") for part in data.datasets or []]
    if recipe.training.method != "dpo":
        if SHAPE in shapes:
            raise ValueError(
                f"dataset_shape {SHAPE} holds pairs, which method dpo trains on: add method: dpo, "
                "or read the chosen answers alone with another dataset_shape"
            )
        return
    if other := next((one for one in shapes if one not in (None, SHAPE)), None):
        raise ValueError(
            f"dataset_shape is {other}, and method dpo trains on pairs: leave dataset_shape out"
        )
    if launch.strategy == "fsdp":
        raise ValueError("method dpo does not run under FSDP: launch with single.yaml or ddp.yaml")
    if not model.use_peft:
        raise ValueError(
            "use_peft is false, and the reference of method dpo is the model without what the "
            "adapter learns: pass --use_peft true"
        )
    if recipe.training.precompute_ref_log_probs and recipe.training.ld_alpha is not None:
        raise ValueError(
            "precompute_ref_log_probs does not go with ld_alpha, whose weights depend on both "
            "sides of a pair: leave one of them out"
        )
    if changes_base(model.init_lora_weights):
        raise ValueError(
            f"init_lora_weights {model.init_lora_weights} changes the base model, which is the "
            "reference of method dpo: leave it out"
        )
    if reads_first(model.init_lora_weights):
        why = (
            "reads rows of one answer, and pairs have two"
            if model.init_lora_weights == "eva"
            else "changes the answers at the start, and the reference of method dpo is the base"
        )
        raise ValueError(f"init_lora_weights {model.init_lora_weights} {why}: leave it out")
    if model.lora_dropout and "lora_dropout" in recipe.given:
        raise ValueError(
            f"lora_dropout is {model.lora_dropout}, and method dpo trains without dropout: leave "
            "it out or give 0"
        )
    data.dataset_shape, model.lora_dropout = SHAPE, 0.0
