"""Transformers' own attention for a while, in a model whose attention is of packed rows."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

# transformers' name of the project's attention over packed rows
PACKED = "varlen"


@contextmanager
def plain_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let padded rows go through a model whose attention is of packed ones.

    Any other attention stays. Models with capped scores or sinks have no sdpa: theirs is eager.
    """
    packs = model.config._attn_implementation == PACKED
    if packs:
        model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    try:
        yield
    finally:
        if packs:
            model.set_attn_implementation(PACKED)
