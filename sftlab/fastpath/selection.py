"""Which parts of the fast path a run takes: packing, compiled layers, fused loss.

What runs is the same training.

Unset fields choose by themselves; a field that is set is obeyed, or refused where it cannot be.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from transformers import PreTrainedConfig

from sftlab.config.launch import Launch
from sftlab.config.recipe import Recipe
from sftlab.fastpath import varlen_attention
from sftlab.models.loading import model_class

UNTIMED = "not timed with 8-bit weights under FSDP; the recipe's field of that name switches it on"


@dataclass
class FastPath:
    """The parts that are on; `reasons` says of each part that chose to be off why."""

    packing: bool
    compile_layers: bool
    fused_loss: bool | None
    attn_implementation: str | None
    reasons: dict[str, str] = field(default_factory=dict)


def choose(
    recipe: Recipe,
    config: PreTrainedConfig,
    launch: Launch,
    elsewhere: Callable[[], str | None] | None = None,
) -> FastPath:
    """Decide before any weights are loaded.

    Raises ValueError for packing that was asked for and cannot be had.

    `elsewhere` says why another machine than this one has no Triton kernels.
    """
    model = model_class(config)
    attention, reasons = recipe.model.attn_implementation, {}
    why = "rows of a stream come without their lengths" if recipe.data.dataset_streaming else None
    if attention not in (None, varlen_attention.NAME):
        why = why or f"attention {attention} would need a dense mask over the packed rows"
    if elsewhere is None:
        why = why or varlen_attention.why_not(config, model)
    else:
        why = why or elsewhere() or varlen_attention.why_not_the_model(config, model)
    if (recipe.training.packing or attention == varlen_attention.NAME) and why:
        raise ValueError(
            f"packing is not possible here: {why}; leave packing and attn_implementation out of "
            "the recipe"
        )
    packing = why is None and recipe.training.packing is not False
    if why and recipe.training.packing is None:
        reasons["packing"] = why
    if attention == varlen_attention.NAME and not packing:
        raise ValueError(
            "attn_implementation varlen is for packed rows: leave packing out of the recipe"
        )
    compiled = recipe.training.compile_layers
    if compiled is None:
        compiled = (
            elsewhere or varlen_attention.no_triton
        )() is None and not recipe.training.torch_compile
        if compiled and launch.strategy == "fsdp" and recipe.model.load_in_8bit:
            compiled, reasons["compile_layers"] = False, UNTIMED
    return FastPath(
        packing,
        compiled,
        recipe.training.fused_loss,
        varlen_attention.NAME if packing else attention,
        reasons,
    )
