"""A first learning rate for a recipe, from a published sweep.

Source: tinker-cookbook, `hyperparam_utils.get_lr`: the best of 1e-4, 3e-4 and 1e-3 for LoRA on all
linears with alpha 32, on Tulu 3, 780 steps of 128 rows. Of dense models, those of 1 to 4 billion
parameters did best at 1e-3, those of 27 to 70 billion at 3e-4; at 8 billion one family did best at
1e-3 and another at 3e-4. For full fine-tuning it gives a tenth.
"""

from typing import NamedTuple

SMALL, LARGE = 1.0e-3, 3.0e-4
# parameters up to which the higher rate was the best one
MOST_OF_SMALL = 5e9
# the fewest parameters in the sweep
LEAST_SWEPT = 1e9
# a grid of three values has neighbours three times apart
SPAN = 3
FULL = 10
SWEEP_ALPHA = 32


class FirstRate(NamedTuple):
    """A learning rate to try first, and the range to look for a better one in."""

    rate: float
    low: float
    high: float


def first_rate(parameters: int, lora: bool) -> FirstRate:
    """Returns the rate for a model of so many parameters."""
    rate = SMALL if parameters <= MOST_OF_SMALL else LARGE
    rate = rate if lora else rate / FULL
    return FirstRate(rate, rate / SPAN, rate * SPAN)


def rate_lines(given: float, parameters: int, lora: bool, alpha: float | None) -> list[str]:
    """Returns what the sweep says of a recipe's rate, a line each."""
    first = first_rate(parameters, lora)
    how = "LoRA" if lora else "full fine-tuning"
    where = "within" if first.low <= given <= first.high else "outside"
    lines = [
        f"learning rate {given:g}: {where} {first.low:.2g} to {first.high:.2g}, where a published "
        f"sweep looks first for {how} ({first.rate:g})"
    ]
    if parameters < LEAST_SWEPT:
        lines.append("  its smallest model has 1 billion parameters, so here the range is a guess")
    if lora and alpha != SWEEP_ALPHA:
        lines.append(
            f"  it had lora_alpha {SWEEP_ALPHA}, this recipe has {alpha:g}: a higher alpha wants a "
            "lower rate"
        )
    return lines
