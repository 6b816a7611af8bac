"""A first learning rate and rank for a recipe, from a published sweep and one of this project.

Source of the first: tinker-cookbook, `hyperparam_utils.get_lr`: the best of 1e-4, 3e-4 and 1e-3 for
LoRA on all linears with alpha 32, on Tulu 3, 780 steps of 128 rows. Of dense models, those of 1 to
4 billion parameters did best at 1e-3, those of 27 to 70 billion at 3e-4; at 8 billion one family
did best at 1e-3 and another at 3e-4. For full fine-tuning it gives a tenth.

The other is results/lora_rank_tuned, results/lora_targets_tuned and results/lora_or_full:
SmolLM2-135M-Instruct on GSM8K, 187 steps of 32 rows. With alpha 32, LoRA of ranks 1 to 64 on all
linears did best at 3e-3, full fine-tuning at 3e-4.
"""

from collections.abc import Collection
from typing import NamedTuple

TINY, SMALL, LARGE = 3.0e-3, 1.0e-3, 3.0e-4
# parameters up to which the higher rates were the best ones
MOST_OF_TINY, MOST_OF_SMALL = 3e8, 5e9
# the parameters between which no model was swept, and below which
UNSWEPT = (3e8, 1e9)
FEWEST_SWEPT = 1e8
# the grids have neighbours about three times apart
SPAN = 3
FULL = 10
SWEEP_ALPHA = 32
# response perplexity of each rank at its own best rate, in results/lora_rank_tuned
BY_RANK = {1: 1.931, 4: 1.887, 16: 1.873, 64: 1.868}
FIRST_RANK = 16
# the same of targets with as many parameters as all linears at rank 16, in
# results/lora_targets_tuned
BY_TARGETS = {"all linears": 1.873, "MLP": 1.887, "attention": 1.904, "q and v": 1.933}
ALL_LINEARS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


class FirstRate(NamedTuple):
    """A learning rate to try first, and the range to look for a better one in."""

    rate: float
    low: float
    high: float


def first_rate(parameters: int, lora: bool) -> FirstRate:
    """Returns the rate for a model of so many parameters."""
    rate = SMALL if parameters <= MOST_OF_SMALL else LARGE
    rate = TINY if parameters <= MOST_OF_TINY else rate
    rate = rate if lora else rate / FULL
    return FirstRate(rate, rate / SPAN, rate * SPAN)


def rate_lines(
    given: float,
    parameters: int,
    lora: bool,
    alpha: float | None,
    stabilised: bool = False,
    loraplus: float | None = None,
) -> list[str]:
    """Returns what the sweeps say of a recipe's rate, a line each."""
    first = first_rate(parameters, lora)
    tiny = parameters <= MOST_OF_TINY
    sweep = "a sweep of SmolLM2-135M (docs/studies.md)" if tiny else "a published sweep"
    best = "the best of LoRA" if lora else "the best of full fine-tuning"
    if not lora and not tiny:
        best = "a tenth of the best of LoRA"
    where = "within" if first.low <= given <= first.high else "outside"
    lines = [
        f"learning rate {given:g}: {where} {first.low:.2g} to {first.high:.2g}, a third to three "
        f"times {first.rate:g}, {best} in {sweep}"
    ]
    if UNSWEPT[0] < parameters < UNSWEPT[1]:
        lines.append("  its smallest model has 1 billion parameters, so here the range is a guess")
    if parameters < FEWEST_SWEPT:
        lines.append("  that is far larger than this model, so here the range is a guess")
    if lora and loraplus is not None and loraplus > 1:
        lines.append(f"  LoRA+ moves B matrices at {loraplus:g} times the rate: try a lower one")
    if lora and alpha != SWEEP_ALPHA:
        lines.append(
            f"  it had lora_alpha {SWEEP_ALPHA}, this recipe has {alpha:g}: a higher alpha wants a "
            "lower rate"
        )
    if lora and stabilised:
        lines.append(
            "  rank-stabilised scaling divides alpha by the root of the rank: a larger scale, "
            "which wants a lower rate"
        )
    return lines


def rank_line(rank: int) -> str:
    """Returns what the sweep says of a recipe's rank."""
    tried = ", ".join(f"r{one} {score:.3f}" for one, score in BY_RANK.items())
    said = "where to begin" if rank == FIRST_RANK else f"{FIRST_RANK} is where to begin"
    return f"rank {rank}: {said}; response perplexity by rank in a sweep of SmolLM2-135M: {tried}"


def targets_line(targets: str | Collection[str] | None) -> str:
    """Returns what the sweep says of a recipe's targets, a list of names or one word or pattern."""
    names = set() if isinstance(targets, str) else set(targets or ())
    everything = targets == "all-linear" or names >= ALL_LINEARS
    tried = ", ".join(f"{name} {score:.3f}" for name, score in BY_TARGETS.items())
    said = "LoRA on all linears: where to begin" if everything else "LoRA on all linears is better"
    return f"{said}; response perplexity by targets of one size in a sweep of SmolLM2-135M: {tried}"
