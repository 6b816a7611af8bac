"""The base model of a training, loaded where trl would put it."""

from transformers import PreTrainedModel

from sftlab.config.recipe import Recipe
from sftlab.fastpath import varlen_attention
from sftlab.fastpath.selection import FastPath
from sftlab.models.loading import load_model, model_init_kwargs
from sftlab.models.text_part import unnested


def base_model(recipe: Recipe, fast: FastPath) -> PreTrainedModel:
    """Returns the recipe's base model, with every tensor from its files.

    Takes `model_init_kwargs` out of the training arguments: trl reads them only with a model's
    name. Raises ValueError where the model cannot be loaded whole.
    """
    args = recipe.training
    kwargs = model_init_kwargs(recipe.model, args.trust_remote_code, args.model_init_kwargs)
    args.model_init_kwargs = None
    if fast.attn_implementation:
        kwargs["attn_implementation"] = fast.attn_implementation
    varlen_attention.register(args.max_length)
    state = args.distributed_state
    whole = state.distributed_type in ("MULTI_GPU", "DEEPSPEED") or state.device.type != "cuda"
    model = load_model(recipe.model, kwargs, None if whole else "auto")
    # without an adapter, what is saved is a text-only model
    return model if recipe.model.use_peft else unnested(model)
