"""The ranks that vLLM can be started with for adapters."""

# what --max-lora-rank takes; an adapter's rank may be lower
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def served_rank(rank: int) -> int | None:
    """Returns the --max-lora-rank for an adapter of this rank, None where it is too high."""
    return next((one for one in VLLM_RANKS if one >= rank), None)
