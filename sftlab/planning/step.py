"""What is a training step made of, as far as its memory and time depend on it?"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import PreTrainedConfig

from sftlab.config.launch import COMPUTE_DTYPE
from sftlab.models.layers import Layers
from sftlab.models.mixture import COUNTS
from sftlab.planning.measured_layers import Measured
from sftlab.planning.weight_memory import FUSED, Weights


class Shape(NamedTuple):
    """Sizes of a decoder: widths, layers, query heads, key heads, size of a head, vocabulary.

    `norm_elements` and `norm_vectors` of a token are normalised beside a Llama layer's two norms.
    Of a mixture, `mlp` is the width of all experts that a token visits, `taken` is how many these
    are, and `experts` how many a layer has. `norms_first`: attention and MLP read what norms make.
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
    norms_first: bool = True

    @classmethod
    def of(cls, config: PreTrainedConfig, layers: Layers) -> "Shape | None":
        """Returns a model's shape; None where its layers are neither Llama's nor of experts alone.

        Raises ValueError for a mixture whose experts are not known.
        """
        config = config.get_text_config()
        mixture = layers.mixture
        if mixture is None and any(getattr(config, name, None) for name in COUNTS):
            raise ValueError(
                f"{config.model_type} is a mixture whose experts are not stacked or not counted: "
                "no plan is made for it"
            )
        heads_of = {(a.heads, a.key_heads, a.size, a.value_size) for a in layers.attention}
        several = len(heads_of) > 1 or any(size != of_value for _, _, size, of_value in heads_of)
        if several or (heads_of and layers.hybrid):
            return None
        if mixture is not None and (mixture.other or not layers.attention):
            return None
        names = (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "vocab_size",
        )
        if any(not isinstance(getattr(config, name, None), int) for name in names):
            return None
        hidden, mlp, count, heads, vocabulary = (getattr(config, name) for name in names)
        experts = taken = 0
        if mixture is not None:
            experts, taken, mlp = mixture.experts, mixture.taken, mixture.taken * mixture.width
        if heads_of:
            heads, key_heads, size, _ = heads_of.pop()
            sizes = (hidden, mlp, count, heads, key_heads, size, vocabulary)
            return cls(*sizes, *layers.norms, experts, taken, layers.norms_first)
        key_heads = getattr(config, "num_key_value_heads", None) or heads
        size = getattr(config, "head_dim", None) or hidden // heads
        return cls(hidden, mlp, count, heads, key_heads, size, vocabulary)

    @classmethod
    def of_measured(cls, config: PreTrainedConfig, layers: Layers) -> "Shape":
        """Returns the sizes of a model whose layers are measured: they have no width in common."""
        config, mixture = config.get_text_config(), layers.mixture
        # the products of a token's scores, as if all layers had heads of one element
        widths = sum(a.heads * (a.size + a.value_size) // 2 for a in layers.attention)
        if not layers.attention:
            widths = config.hidden_size * layers.count
        sizes = (config.hidden_size, 0, layers.count, widths // layers.count, 0, 1)
        experts = (mixture.experts, mixture.taken) if mixture else (0, 0)
        return cls(*sizes, config.vocab_size, 0, 0, *experts)


@dataclass(frozen=True)
class Step:
    """What memory and time of a micro-batch depend on.

    `optimizer_copies`: torch's AdamW, unless fused, takes the roots of all second moments at once.
    `updates_by_tensor`: the host starts an update for every tensor, as in bitsandbytes.
    `whole_logits`: the number of float32 copies of all logits, 0 for a loss in chunks.
    `reference`: preference tuning's frozen model runs forward too, with an adapter of its own where
    `reference_adapter` is set. `reference_once`: it runs before the first step alone. `measured` is
    what layers take that are not worked out. `layers_per_unit`: FSDP2 gathers so many at once.
    `float8_mlp`: gate, up and down over float8 weights are one function. `float8_head`: gradients
    come out of a head in float8. `keeps_inputs`: norms' outputs are kept, and under fused LoRA a
    copy of each input, as it was when the tables in results/ were measured. `captured`:
    micro-batches are captured as CUDA graphs, or with `may_capture` where that helps in so many
    `steps`, None for any number.
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
    layers_per_unit: int = 1
    accumulation: int = 1
    optimizer_copies: bool = False
    updates_by_tensor: bool = False
    whole_logits: float = 0.0
    reference: bool = False
    reference_adapter: bool = False
    reference_once: bool = False
    fused_lora: bool = False
    float8_mlp: bool = False
    float8_head: bool = False
    keeps_inputs: bool = False
    captured: bool = False
    may_capture: bool = False
    steps: int | None = None
    measured: Measured | None = None

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

    @property
    def recomputes_norms(self) -> bool:
        """Whether norms are computed again in the backward, and their outputs are not kept."""
        kept = self.checkpointing or self.keeps_inputs
        return self.compiled and not kept and self.weight_bytes == self.compute_bytes


def widths(step: Step) -> dict[str, tuple[int, int]]:
    """Returns the widths of input and output of each linear of a layer."""
    s = step.shape
    query, key = s.heads * s.head_size, s.key_heads * s.head_size
    return {
        "q_proj": (s.hidden, query),
        "k_proj": (s.hidden, key),
        "v_proj": (s.hidden, key),
        "o_proj": (query, s.hidden),
        "gate_proj": (s.hidden, s.mlp),
        "up_proj": (s.hidden, s.mlp),
        "down_proj": (s.mlp, s.hidden),
    }
