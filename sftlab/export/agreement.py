"""Does an exported model answer as the run that it was made from?

The same held-out prompts go to both. Token ids must be equal. Nats a response token must agree
within the tolerance of the export's dtype or the run's, the larger, and greedy answers must end
alike.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from sftlab.data.chat_template import pad_id
from sftlab.evaluation.generation import Sampling, left_padded, longest_prompt
from sftlab.evaluation.held_out import HeldOut, ScoredRows, select
from sftlab.evaluation.row_scores import right_padded
from sftlab.models.inner_model import inner_model
from sftlab.models.likelihood import likelihood

# prompts that are compared, and the longest greedy answer to each
PROMPTS = 64
MAX_NEW_TOKENS = 64
# Largest mean difference in nats a response token, by the dtype of the weights. They are chosen:
# docs/use.md has what a real model differs by, which is a tenth or less of each.
TOLERANCE = {"float32": 1e-4, "float16": 0.01, "bfloat16": 0.05}
TOLERANCE |= {"f32": 1e-4, "f16": 0.01, "bf16": 0.05, "q8_0": 0.05}
# Share of answers that may end otherwise: rounding moves near ties of two tokens, and a long answer
# goes on from there. SmolLM2's on GSM8K do so in 3 of 16 in bfloat16.
OTHER_ENDS = {"float32": 0.0, "float16": 0.05, "bfloat16": 0.3}
OTHER_ENDS |= {"f32": 0.0, "f16": 0.05, "bf16": 0.3, "q8_0": 0.3}


class Behaviour(NamedTuple):
    """What a model makes of held-out rows.

    `prompts` are token ids, `nats` [rows, 2] the summed nats and the tokens of the responses,
    `ended` whether a greedy answer ended by itself within MAX_NEW_TOKENS tokens, and `ends` the
    token ids that end one. `dtype` is that of the weights, float32 where it is not known.
    """

    prompts: list[list[int]]
    nats: np.ndarray
    ended: list[bool]
    ends: list[int]
    dtype: str = "float32"


class Agreement(NamedTuple):
    """How far an export is from its run. `differs` says in a sentence what disagrees, if anything.

    `nats` is the mean of the prompts' differences a response token, whatever their signs,
    `tolerance_nats` what it may be, and `other_ends` the number of answers that end otherwise.
    """

    prompts: int
    nats: float
    tolerance_nats: float
    other_ends: int
    differs: str | None

    def facts(self, dtype: str) -> dict[str, Any]:
        """Returns what verified.json holds of an export of this dtype."""
        return self._asdict() | {"dtype": dtype}


def observe(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    dataset: HeldOut,
    count: int,
    ends: Sequence[int],
    max_length: int | None,
    batch_size: int = 16,
) -> Behaviour:
    """Returns what a model with a fused head makes of the first `count` held-out rows.

    `ends` are the token ids that end an answer. Raises ValueError where no row can be scored.
    """
    rows = compared_rows(model.config, tokenizer, dataset, count, max_length)
    parts = list(rows.batches(batch_size))
    batches = map(right_padded(rows, tokenizer, model.device), parts)
    nats = likelihood(model, batches, names=rows.numbers).response
    pad = pad_id(tokenizer)
    ended = [one for part in parts for one in _ended(model, rows.prompts[part], pad, list(ends))]
    dtype = str(inner_model(model).dtype).removeprefix("torch.")
    return Behaviour(rows.prompts, nats, ended, sorted(ends), dtype)


def compared_rows(
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    dataset: HeldOut,
    count: int,
    max_length: int | None,
) -> ScoredRows:
    """Returns those of the first `count` held-out rows that can be scored and answered.

    Raises ValueError where there is none.
    """
    longest = longest_prompt(config, Sampling(MAX_NEW_TOKENS))
    return select(dataset, count, tokenizer, max_length, longest)


@torch.no_grad()
def _ended(model: Any, prompts: list[list[int]], pad: int, ends: list[int]) -> list[bool]:
    """Returns for each prompt whether its greedy answer ends by itself."""
    ids, mask = left_padded(prompts, pad, model.device)
    config = GenerationConfig(
        max_new_tokens=MAX_NEW_TOKENS, do_sample=False, eos_token_id=ends, pad_token_id=pad
    )
    generated = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    new = generated[:, ids.shape[1] :].cpu()
    return torch.isin(new, torch.tensor(ends)).any(dim=1).tolist()


def compare(run: Behaviour, export: Behaviour, dtype: str) -> Agreement:
    """Returns how far an export of this dtype is from its run.

    A run in 16 bits computes in them, so what is exported in 32 answers with other roundings.
    """
    rows = len(run.prompts)
    dtype = max(dtype, run.dtype, key=TOLERANCE.__getitem__)
    apart, tokens = np.abs(export.nats[:, 0] - run.nats[:, 0]), run.nats[:, 1]
    mean, difference = float(apart.sum() / tokens.sum()), apart / tokens
    other = [i for i, (a, b) in enumerate(zip(run.ended, export.ended, strict=True)) if a != b]
    found = None
    for number, (one, two) in enumerate(zip(run.prompts, export.prompts, strict=True)):
        if one != two:
            found = (
                f"prompt {number} has other token ids ({len(two)} for {len(one)}): the template or "
                "the tokenizer is not the run's"
            )
            break
    if found is None and run.ends != export.ends:
        felt = f"first felt at prompt {other[0]}" if other else "felt at none of the prompts yet"
        found = f"answers end at the tokens {export.ends}, and in the run at {run.ends}, {felt}"
    if found is None and not mean <= TOLERANCE[dtype]:
        most = int(difference.argmax())
        first = int((~(difference <= TOLERANCE[dtype])).argmax())
        found = (
            f"responses differ by {mean:.3g} nats a token ({TOLERANCE[dtype]:g} is allowed in "
            f"{dtype}), first at prompt {first}, most at prompt {most}: the weights are not the "
            "run's"
        )
    if found is None and len(other) > OTHER_ENDS[dtype] * rows:
        ends = "ends" if run.ended[other[0]] else "does not end"
        found = (
            f"{len(other)} of {rows} greedy answers end otherwise, first at prompt {other[0]}, "
            f"which {ends} in the run"
        )
    return Agreement(rows, mean, TOLERANCE[dtype], len(other), found)
