"""Which rotary embeddings does a model have?"""

from transformers import PreTrainedConfig

# angles that depend on the longest row, which the host must then read
GROWING = {"dynamic", "longrope"}


def rotary_kinds(config: PreTrainedConfig) -> set[str | None]:
    """Returns the kinds of rotary embedding of a text config: layers may have different ones."""
    angles = getattr(config, "rope_parameters", None) or {}
    return {one.get("rope_type") for one in (angles, *angles.values()) if isinstance(one, dict)}
