"""What is a training step made of, as far as its memory and time depend on it?"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import PreTrainedConfig

from sftlab.config.launch import COMPUTE_DTYPE, PRECISIONS, Launch
from sftlab.config.recipe import ModelArguments, Recipe
from sftlab.config.validation import is_bitsandbytes
from sftlab.fastpath.selection import FastPath
from sftlab.models.layers import Layers
from sftlab.models.mixture import COUNTS
from sftlab.planning.weight_memory import FUSED, LINEARS, Weights, count_weights


class Shape(NamedTuple):
    """Sizes of a decoder: widths, layers, query heads, key heads, size of a head, vocabulary.

    `norm_elements` and `norm_vectors` of a token are normalised beside a Llama layer's two norms.
    Of a mixture, `mlp` is the width of all experts that a token visits, `taken` is how many these
    are, and `experts` how many a layer has.
    """

    hidden: int
    mlp: int
    layers: int
    heads: int
    key_heads: int
    head_size: int
    vocabulary: int
    norm_elements: int = 0
    norm_vectors: int = 0
    experts: int = 0
    taken: int = 0

    @classmethod
    def of(cls, config: PreTrainedConfig, layers: Layers) -> "Shape":
        """Returns a model's shape; ValueError for one that is not a dense decoder."""
        config = config.get_text_config()
        heads_of = {(a.heads, a.key_heads, a.size, a.value_size) for a in layers.attention}
        if len(heads_of) > 1 or any(size != of_value for _, _, size, of_value in heads_of):
            raise ValueError(
                f"{config.model_type} has heads of several sizes: no plan is made for it"
            )
        if heads_of and layers.hybrid:
            raise ValueError(
                f"{config.model_type} has layers without attention: no plan is made for it"
            )
        names = (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "vocab_size",
        )
        if any(not isinstance(getattr(config, name, None), int) for name in names):
            raise ValueError(
                f"{config.model_type} has no single width of its MLP or heads: no plan is made for "
                "it"
            )
        hidden, mlp, count, heads, vocabulary = (getattr(config, name) for name in names)
        experts, taken, mlp = _experts(config, layers, mlp)
        if heads_of:
            heads, key_heads, size, _ = heads_of.pop()
            sizes = (hidden, mlp, count, heads, key_heads, size, vocabulary)
            return cls(*sizes, *layers.norms, experts, taken)
        key_heads = getattr(config, "num_key_value_heads", None) or heads
        size = getattr(config, "head_dim", None) or hidden // heads
        return cls(hidden, mlp, count, heads, key_heads, size, vocabulary)


def _experts(config: PreTrainedConfig, layers: Layers, mlp: int) -> tuple[int, int, int]:
    """Returns a layer's experts, those that a token visits, and the width of these together.

    (0, 0, mlp) is a dense layer. Raises ValueError for a mixture that no plan is made for.
    """
    mixture = layers.mixture
    if mixture is None:
        if any(getattr(config, name, None) for name in COUNTS):
            raise ValueError(
                f"{config.model_type} is a mixture whose experts are not stacked or not counted: "
                "no plan is made for it"
            )
        return 0, 0, mlp
    if not layers.attention:
        raise ValueError(f"{layers.unknown}: no plan is made for this mixture of experts")
    if mixture.other:
        raise ValueError(
            f"{config.model_type} is a mixture of experts with {mixture.other}: no plan is made "
            "for it"
        )
    return mixture.experts, mixture.taken, mixture.taken * mixture.width


@dataclass(frozen=True)
class Step:
    """What memory and time of a micro-batch depend on.

    `optimizer_copies`: torch's AdamW, unless fused, takes the roots of all second moments at once.
    `optimizer_waits`: bitsandbytes' optimizers wait for the GPU after every trained tensor.
    `whole_logits`: the number of float32 copies of all logits, 0 for a loss in chunks.
    `reference`: preference tuning's frozen model runs forward too, with an adapter of its own where
    `reference_adapter` is set.
    """

    shape: Shape
    weights: Weights
    precision: str
    targets: frozenset[str]
    rank: int
    tokens: int
    row_length: float
    strategy: str = "single"
    processes: int = 1
    quantized: bool = False
    weight_bytes: int = 2
    checkpointing: bool = False
    compiled: bool = True
    packed: bool = True
    dropout: bool = False
    reshard: bool = True
    accumulation: int = 1
    optimizer_copies: bool = False
    optimizer_waits: bool = False
    whole_logits: float = 0.0
    reference: bool = False
    reference_adapter: bool = False
    fused_lora: bool = False

    @property
    def fused(self) -> frozenset[str]:
        """Trained linears that are several of `targets` in one."""
        return frozenset(one for one in self.weights.fused if self.targets >= set(FUSED[one]))

    @property
    def compute_bytes(self) -> int:
        """Bytes of an activation's element."""
        return torch.finfo(getattr(torch, COMPUTE_DTYPE[self.precision])).bits // 8

    @property
    def casts(self) -> bool:
        """Whether LoRA's inputs are copies: peft casts them to float32 and autocast back."""
        return self.compute_bytes == 2 and not self.quantized


def step_of(
    recipe: Recipe,
    config: PreTrainedConfig,
    launch: Launch,
    fast: FastPath,
    tokens: int,
    row_length: float,
) -> Step:
    """Returns the step of a recipe under a launch config.

    A micro-batch has `tokens` in rows of `row_length` tokens. Raises ValueError for a recipe that
    no plan is made for.
    """
    model, training = recipe.model, recipe.training
    pairs = training.method == "dpo"  # its log-probabilities come in chunks
    if training.fused_loss is False and not pairs:
        raise ValueError(
            "fused_loss: false keeps whole logits, and plans are made for the fused loss alone: "
            "leave fused_loss out"
        )
    targets, shape = _targets(model), Shape.of(config, fast.layers)
    if shape.experts:
        targets = _targets_of_mixture(recipe, targets)
    return Step(
        shape=shape,
        weights=count_weights(recipe, config),
        precision=PRECISIONS[training.mixed_precision],
        targets=targets,
        rank=model.lora_r if model.use_peft else 0,
        tokens=tokens,
        row_length=row_length,
        strategy=launch.strategy,
        processes=launch.world_size,
        quantized=bool(model.load_in_4bit),
        weight_bytes=torch.finfo(getattr(torch, model.dtype)).bits // 8,
        checkpointing=bool(training.gradient_checkpointing),
        compiled=fast.compile_layers,
        packed=fast.packing,
        dropout=model.lora_dropout > 0 and model.use_peft,
        reshard=launch.settings.get("FSDP_RESHARD_AFTER_FORWARD", "true") == "true",
        accumulation=training.gradient_accumulation_steps,
        optimizer_copies=training.optim == "adamw_torch",
        optimizer_waits=is_bitsandbytes(training.optim),
        reference=pairs,
        reference_adapter=pairs and bool(model.adapter_name_or_path),
        fused_lora=fast.fused_lora,
    )


def _targets(model: ModelArguments) -> frozenset[str]:
    """Returns the linears that train, with LoRA or whole, under Llama's names."""
    names = model.lora_target_modules or []
    if names == "all-linear" or not model.use_peft:
        names = LINEARS
    names = [names] if isinstance(names, str) else names
    ends = (name.rpartition(".")[2] for name in names)
    targets = frozenset(one for end in ends for one in FUSED.get(end, (end,)))
    if unknown := sorted(targets - set(LINEARS)):
        raise ValueError(f"LoRA on {', '.join(unknown)}: plans are made for {', '.join(LINEARS)}")
    return targets


def _targets_of_mixture(recipe: Recipe, targets: frozenset[str]) -> frozenset[str]:
    """Returns the linears of attention that train; ValueError where no plan is made.

    Plans know the grouped product of experts alone, which takes bfloat16.
    """
    if not recipe.model.use_peft:
        raise ValueError("no plan is made for full fine-tuning of a mixture of experts")
    precision = PRECISIONS[recipe.training.mixed_precision]
    if recipe.model.dtype != "bfloat16" or precision != "bf16":
        raise ValueError(
            "plans of mixtures of experts are made for bf16 alone: pass --dtype bfloat16 "
            "--mixed_precision bf16"
        )
    return targets & {"q_proj", "k_proj", "v_proj", "o_proj"}
