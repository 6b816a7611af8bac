"""Which parts of the fast path a run takes: packing, compiled layers, fused LoRA and loss, replays.

The training is the same with and without them. A part whose recipe field is unset is on if it works
here. A field that is set is obeyed, or refused with a ValueError.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from transformers import PreTrainedConfig

from sftlab.config.launch import Launch
from sftlab.config.preference_fields import MICRO_BATCH_LOSSES, REFUSED_OF_PAIRS
from sftlab.config.recipe import Recipe
from sftlab.data.tiles import LONG_TILE, TILE
from sftlab.fastpath import varlen_attention
from sftlab.fastpath.fused_loss import needs_whole_logits
from sftlab.fastpath.recomputed_layers import dropout_in
from sftlab.fastpath.unset_fused_lora import choose_fused_lora
from sftlab.models.layers import Layers, describe
from sftlab.models.loading import model_class
from sftlab.models.rotary import GROWING, rotary_kinds

UNTIMED = "not measured with 8-bit weights under FSDP; set compile_layers to switch it on"


@dataclass
class FastPath:
    """The parts that are on; `fused_loss` is None until the model is loaded.

    `layers` are the model's. `reasons` says, by part, why one that the recipe leaves unset is off.
    Compiled layers are off on a CPU without a reason. `float8_head` says whether the gradient of
    the fused loss comes out of a head in float8, if it may. `shared_scales` says whether float8
    weights have one scale where fused LoRA joins them. `kernels_with_lora` says whether kernels of
    a fused MLP may have LoRA's thin products in them, where they can. `experts` is how a loaded
    mixture multiplies its experts, None for other models, and `experts_lora` how it adds LoRA to
    their stacked weights, None where these have none. `mixers` is what computes layers beside
    attention: the "kernels" of a package, or "torch". `four_bit_weights` is what gives weights in 4
    bits back.
    `layers_per_unit` is how many decoder layers FSDP2 gathers at once, None without FSDP2.
    `attention_tile` is the tokens of a tile of packed rows, None until their lengths are known, and
    `largest_tile` the most it may be. Where fused LoRA is needed, it is an error if it cannot be,
    and `without_fused_lora` says what to do then.
    """

    packing: bool
    compile_layers: bool
    fused_loss: bool | None
    attn_implementation: str | None
    layers: Layers
    reasons: dict[str, str] = field(default_factory=dict)
    float8_head: bool = False
    may_have_float8_head: bool = True
    shared_scales: bool = False
    kernels_with_lora: bool = True
    experts: str | None = None
    experts_lora: str | None = None
    mixers: str | None = None
    fused_lora: bool = False
    four_bit_weights: str | None = None
    layers_per_unit: int | None = None
    attention_tile: int | None = None
    largest_tile: int = LONG_TILE
    captured_step: bool = False
    may_capture_step: bool = False
    needs_fused_lora: bool = False
    without_fused_lora: str = "leave it out of the recipe"

    def continue_with_fused_lora(self, began: bool, settings_changed: bool) -> None:
        """Fuse LoRA if the run that is continued `began` so; the recipe leaves it unset.

        It is needed then, unless the run is continued with other settings on purpose.
        """
        if self.fused_lora and not began:
            self.reasons["fused_lora"] = "the run began without it"
        elif began and not self.fused_lora and not settings_changed:
            self.reasons.pop("fused_lora", None)
        self.fused_lora = began and (self.fused_lora or not settings_changed)
        self.needs_fused_lora = began and not settings_changed
        self.without_fused_lora = "the run began with it: begin anew with --overwrite"

    def continue_with_float8_head(self, began: bool, settings_changed: bool) -> None:
        """Leave the head's gradient in 16 bits if the run that is continued `began` so."""
        self.may_have_float8_head = began or settings_changed

    def continue_with_shared_scales(self, began: bool, settings_changed: bool) -> None:
        """Give float8 weights that LoRA joins one scale if the run that is continued `began` so.

        It may have begun so without fused LoRA, where only the weights showed that it cannot be.
        """
        self.shared_scales = began and not settings_changed

    def continue_with_kernels_with_lora(self, began: bool, settings_changed: bool) -> None:
        """Leave LoRA's thin products to cuBLAS if the run that is continued `began` so."""
        self.kernels_with_lora = began or settings_changed

    def continue_with_tile(self, began: int | None, settings_changed: bool) -> None:
        """Let tiles have no more tokens than in the run that is continued, which `began` so.

        None is of a run that says nothing: tiles had 64 then.
        """
        if not settings_changed:
            self.largest_tile = began or TILE

    def continue_with_captured_steps(self, began: bool, settings_changed: bool) -> None:
        """Capture steps if the run that is continued `began` so; the recipe leaves it unset.

        Raises ValueError where they can no longer be, unless the run is continued with other
        settings on purpose.
        """
        if began and not self.may_capture_step and not settings_changed:
            raise ValueError(
                "the run began with captured steps, which are not possible here: begin anew with "
                "--overwrite"
            )
        self.captured_step, self.may_capture_step = began and self.may_capture_step, False

    def refuse_other_mixers(self, began: str | None, settings_changed: bool) -> None:
        """Raise ValueError where the run that is continued `began` with other mixers.

        Not where that was not written down, or where it goes on with other settings on purpose.
        """
        if began and began != self.mixers and not settings_changed:
            why = self.reasons.get("mixer_kernels", f"layers beside attention run in {self.mixers}")
            raise ValueError(
                f"the run began with mixers in {began}, and here {why}: begin anew with --overwrite"
            )


def choose(
    recipe: Recipe,
    config: PreTrainedConfig,
    launch: Launch,
    elsewhere: Callable[[], str | None] | None = None,
) -> FastPath:
    """Choose the parts before any weights are loaded.

    `elsewhere` plans for another machine: it returns why that one has no Triton kernels, or None.
    Raises ValueError for packing or recorded steps that the recipe asks for and that do not work
    here, for fewer bits than 16 of a mixture of experts, and for a model that is not causal.
    """
    attention, reasons = recipe.model.attn_implementation, {}
    layers = describe(config, model_class(config))
    if layers.sees_later:
        raise ValueError(
            f"{layers.unknown}, so a row gives away the tokens that the model is to predict: give "
            "a causal language model"
        )
    _refuse_whole_experts(recipe, layers)
    no_packing = _no_packing(recipe, layers, elsewhere)
    if (recipe.training.packing or attention == varlen_attention.NAME) and no_packing:
        raise ValueError(
            f"packing is not possible here: {no_packing}; leave packing and attn_implementation "
            "out of the recipe"
        )
    packing = no_packing is None and recipe.training.packing is not False
    if no_packing and recipe.training.packing is None:
        reasons["packing"] = no_packing
    if attention == varlen_attention.NAME and not packing:
        raise ValueError(
            "attn_implementation varlen is for packed rows: leave packing out of the recipe"
        )
    compiled, no_triton = recipe.training.compile_layers, None
    if compiled is not False:
        no_triton = (elsewhere or varlen_attention.no_triton)()
    if compiled is None:
        compiled = no_triton is None and not recipe.training.torch_compile
        if compiled and launch.strategy == "fsdp" and recipe.model.load_in_8bit:
            compiled, reasons["compile_layers"] = False, UNTIMED
    unpacked = None if packing else no_packing or ""
    no_capture = _no_capture(recipe, config, launch, layers, unpacked)
    if recipe.training.captured_step and no_capture:
        raise ValueError(
            f"captured_step is not possible here: {no_capture}; leave it out of the recipe"
        )
    fused_lora = bool(recipe.training.fused_lora)
    if recipe.training.fused_lora is None and compiled and no_triton is None:
        fused_lora, why = choose_fused_lora(recipe, layers, launch)
        reasons |= {"fused_lora": why} if why else {}
    return FastPath(
        packing,
        compiled,
        recipe.training.fused_loss,
        varlen_attention.NAME if packing else attention,
        layers,
        reasons,
        captured_step=bool(recipe.training.captured_step),
        may_capture_step=recipe.training.captured_step is None and compiled and no_capture is None,
        fused_lora=fused_lora,
        needs_fused_lora=bool(recipe.training.fused_lora),
    )


def _no_capture(
    recipe: Recipe,
    config: PreTrainedConfig,
    launch: Launch,
    layers: Layers,
    unpacked: str | None,
) -> str | None:
    """Returns why steps cannot be recorded; None where nothing is known against it.

    `unpacked` says why rows are not packed, and is None where they are.
    """
    training = recipe.training
    if training.method == "dpo":
        return REFUSED_OF_PAIRS["captured_step"]
    if unpacked is not None:
        return "rows are not packed" + f" ({unpacked})" * bool(unpacked)
    if launch.strategy == "fsdp":
        return "FSDP gathers the frozen weights within the step"
    if training.activation_offloading:
        return "offloaded activations make the backward wait for the host"
    if training.gradient_checkpointing and (reason := _no_recorded_recomputation(recipe, config)):
        return reason
    if training.mixed_precision == "fp16":
        return "the loss scale of fp16 changes from step to step"
    if training.fused_loss is False:
        return "the loss is not fused"
    if whole := needs_whole_logits(training) or (not recipe.model.use_peft and "the head trains"):
        return f"the loss is not fused ({whole})"
    if training.torch_compile or training.torch_empty_cache_steps:
        return "torch_compile and torch_empty_cache_steps have not been tried with it"
    if recipe.model.load_in_8bit:
        return "products of 8-bit weights look for outliers"
    if layers.mixers or layers.experts:
        return "layers beside attention depend on how many tokens a row or an expert has"
    if growing := rotary_kinds(config.get_text_config()) & GROWING:
        return f"rotary embeddings of kind {min(growing)} depend on the longest row"
    return None


def _no_recorded_recomputation(recipe: Recipe, config: PreTrainedConfig) -> str | None:
    """Returns why the recomputation of checkpointed layers cannot be recorded, or None."""
    asked = recipe.training.gradient_checkpointing_kwargs or {"use_reentrant": False}
    if asked.get("use_reentrant") is not False:
        return "reentrant checkpointing runs a backward within the backward"
    if asked.get("offload"):
        return "offloaded activations make the backward wait for the host"
    dropout = dropout_in(config)
    if recipe.model.use_peft and recipe.model.lora_dropout:
        dropout = f"lora_dropout {recipe.model.lora_dropout:g}"
    return dropout and (
        f"checkpointed layers draw the random numbers of {dropout} a second time, and no recording "
        "can go back to them"
    )


def _refuse_whole_experts(recipe: Recipe, layers: Layers) -> None:
    """Raise ValueError where the experts of a mixture would silently stay in 16 bits or more."""
    model, fp8 = recipe.model, recipe.training.mixed_precision == "fp8"
    if layers.experts and (model.load_in_4bit or model.load_in_8bit or fp8):
        asked = "fp8" if fp8 else "load_in_4bit" if model.load_in_4bit else "load_in_8bit"
        instead = "launch with single.yaml" if fp8 else f"leave {asked} out"
        raise ValueError(
            f"{asked} rounds linear layers alone, and {layers.experts:.0%} of this model's "
            f"weights are stacked experts that would stay whole: {instead}"
        )


def _no_packing(
    recipe: Recipe, layers: Layers, elsewhere: Callable[[], str | None] | None
) -> str | None:
    attention, longest = recipe.model.attn_implementation, recipe.training.max_length
    if recipe.data.dataset_streaming:
        return "rows of a stream come without their lengths"
    if recipe.training.neftune_noise_alpha:
        return "NEFTune scales its noise by the length of a row, and packed rows are one row"
    by_batch = set(MICRO_BATCH_LOSSES) & set(recipe.training.loss_type)
    if recipe.training.method == "dpo" and by_batch:
        return f"loss_type {min(by_batch)} depends on which pairs share a micro-batch"
    if attention not in (None, varlen_attention.NAME):
        return f"attention {attention} would need a dense mask over the packed rows"
    if not recipe.model.use_peft and any(one.sinks for one in layers.attention):
        return "the attention's sinks train, and the kernels have no gradient for them"
    if elsewhere is None:
        return varlen_attention.why_not(layers, longest)
    return elsewhere() or varlen_attention.why_not_the_model(layers, longest)
