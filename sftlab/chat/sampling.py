"""How a reply's tokens are drawn: the settings, and the draw itself."""

import math
from dataclasses import dataclass

import torch
from transformers import LogitsProcessor

_DIGITS = 10**40


@dataclass(frozen=True)
class Settings:
    """How a reply is generated: greedy at temperature 0, else sampled with `seed`.

    Raises ValueError for a bad field.
    """

    temperature: float = 0.7
    top_p: float = 0.9
    top_k: int = 50
    max_new_tokens: int = 256
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        rules = {
            "temperature": (
                float,
                lambda x: x == 0 or 0.01 <= x <= 10,
                "0 (greedy) or from 0.01 to 10",
            ),
            "top_p": (float, lambda x: 0 < x <= 1, "above 0 and at most 1"),
            "top_k": (int, lambda x: 0 <= x < 2**31, "a whole number, 0 (off) or more"),
            "max_new_tokens": (int, lambda x: 1 <= x < 2**31, "a whole number of at least 1"),
            "repetition_penalty": (float, lambda x: 0.1 <= x <= 10, "from 0.1 to 10 (1 is off)"),
            "seed": (int, lambda x: 0 <= x < 2**63, "a whole number from 0 to 2^63 - 1"),
        }
        for name, (kind, allowed, expected) in rules.items():
            value = getattr(self, name)
            endless = isinstance(value, float) and not math.isfinite(value)
            if type(value) not in (int, kind) or endless or not allowed(value):
                got = (
                    "a number of many digits"
                    if isinstance(value, int) and value > _DIGITS
                    else value
                )
                raise ValueError(f"{name} must be {expected}, got {str(got)[:60]}")


class Draw(LogitsProcessor):
    """Samples a token by the settings and leaves only it (Gumbel-max).

    Every row has the same noise, whether it is alone in the batch or not. The candidates are those
    that transformers' temperature, top-k and top-p processors would keep. Top-p looks only among
    the top-k, because sorting a vocabulary of 128,256 tokens takes 19 ms on a CPU.
    """

    def __init__(self, settings: Settings, rows: int, device: torch.device) -> None:
        self.settings = settings
        self.nan = torch.zeros(rows, dtype=torch.bool, device=device)
        self.noise = torch.Generator(device).manual_seed(settings.seed)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.nan |= scores.amax(dim=-1).isnan()
        if self.settings.temperature == 0:
            return scores
        uniform = torch.rand(
            scores.shape[-1], dtype=torch.float64, generator=self.noise, device=scores.device
        )
        logits, tokens = self.kept(scores)
        gumbel = -(-(uniform if tokens is None else uniform[tokens]).log()).log()
        drawn = (logits + gumbel).argmax(dim=-1, keepdim=True)
        chosen = drawn if tokens is None else tokens.gather(-1, drawn)
        return torch.full_like(scores, -math.inf).scatter_(-1, chosen, 0.0)

    def kept(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the candidates' logits [rows, kept], and their tokens (None: all, in order).

        Candidates that top-p leaves out have -inf.
        """
        settings, tokens = self.settings, None
        if settings.top_k:
            scores, tokens = scores.topk(min(settings.top_k, scores.shape[-1]))
        elif settings.top_p < 1:
            scores, tokens = scores.sort(descending=True)
        scores = scores / settings.temperature
        if settings.top_p < 1:
            probabilities = scores.softmax(dim=-1)
            before = probabilities.cumsum(dim=-1) - probabilities
            before[:, 0] = 0
            scores = scores.masked_fill(before >= settings.top_p, -math.inf)
        return scores, tokens
