"""The decoder layer whose fused LoRA is timed."""

from typing import NamedTuple

import torch


class LayerShape(NamedTuple):
    """A decoder layer's sizes, Llama-3.2-1B's unless said, and where it computes."""

    hidden: int = 2048
    mlp: int = 8192
    heads: int = 32
    key_heads: int = 8
    rank: int = 16
    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
