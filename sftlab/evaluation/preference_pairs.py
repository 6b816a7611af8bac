"""Held-out preference pairs as they are scored: both sides encoded, their questions, rewards."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from sftlab.data.chat_template import encoder_of
from sftlab.data.encoded_pairs import PROMPT, encode_pair
from sftlab.data.messages import Conversation
from sftlab.data.template_errors import refusals_of
from sftlab.data.token_sequence import labels_of
from sftlab.evaluation.answer_file import digest
from sftlab.evaluation.held_out import HeldOut, ScoredRows
from sftlab.evaluation.intervals import Score
from sftlab.evaluation.significance import Paired, compare, mean, perplexity, with_counts
from sftlab.models.likelihood import Likelihood
from sftlab.runs.run_directory import START

# sides of a pair: [pairs, 2]
CHOSEN, REJECTED = 0, 1
Estimates = dict[str, dict[str, Any]]


class Pairs(NamedTuple):
    """The pairs that are scored, in the order of the held-out set.

    `questions` [pairs] are the keys of their first questions. `sides` holds both sides of each,
    numbered 2 n (chosen) and 2 n + 1 (rejected). `prompts` are token ids by their hash, `asked`
    the key of each one's question.
    """

    numbers: list[int]
    texts: list[dict[str, Any]]
    questions: list[int]
    sides: ScoredRows
    prompts: dict[str, list[int]]
    asked: dict[str, int]
    left_out: dict[str, int]


def read_pairs(
    dataset: HeldOut,
    samples: int,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    longest_prompt: int,
) -> Pairs:
    """Returns the pairs among the first `samples` (0: all), cut as the training cut them.

    Prompts longer than `longest_prompt` tokens are not answered. Raises ValueError where no pair
    can be scored.
    """
    if "rejected" not in dataset.rows.column_names:
        raise ValueError(
            f"{dataset.facts['dataset']} holds no pairs: expected the columns prompt, chosen and "
            "rejected"
        )
    rows = dataset.rows.select(range(min(samples or len(dataset.rows), len(dataset.rows))))
    encoder = encoder_of(tokenizer, shortcut=False)
    numbers, texts, questions, sides, prompts, asked = [], [], [], [], {}, {}
    left_out = {"without_a_token": 0, "equal_after_cut": 0, "prompts_without_room": 0}
    for number, row in enumerate(rows):
        pair = Conversation.from_row(row)
        with refusals_of(f"row {number} of {dataset.facts['dataset']}"):
            (chosen,), (rejected,) = encoder([pair, pair.rejected_side()])
            text = encoder.render.text_of(pair)[0]
        one = encode_pair(chosen, rejected, max_length)
        if not one["kept"]:
            left_out["equal_after_cut" if one["equal"] else "without_a_token"] += 1
            continue
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(prompt) <= longest_prompt:
            prompts[key := digest(prompt)] = prompt
            asked[key] = row["opening"]
        else:
            left_out["prompts_without_room"] += 1
        numbers.append(number)
        questions.append(row["opening"])
        sides += [(one[name], one[PROMPT]) for name in ("chosen_ids", "rejected_ids")]
        answers = {"chosen": pair.messages[-1], "rejected": pair.rejected[0]}
        texts.append({"prompt": pair.messages[:-1]} | answers)
    if not numbers:
        raise ValueError(
            f"none of {len(rows)} pairs of {dataset.facts['dataset']} can be scored: max_length "
            f"{max_length} leaves {left_out['without_a_token']} without a token of an answer, and "
            f"makes the sides of {left_out['equal_after_cut']} equal"
        )
    return Pairs(numbers, texts, questions, _longest_first(sides), prompts, asked, left_out)


def _longest_first(sides: Sequence[tuple[list[int], int]]) -> ScoredRows:
    order = sorted(range(len(sides)), key=lambda n: -len(sides[n][0]))
    encoded = [
        {"input_ids": ids, "labels": labels_of(ids, (start, len(ids) - start))}
        for ids, start in (sides[n] for n in order)
    ]
    return ScoredRows(order, [], encoded, [], {})


def log_probs(pairs: Pairs, found: Likelihood) -> np.ndarray:
    """Returns the log-probabilities in nats and the tokens of both answers, [pairs, 2, 2]."""
    parts = np.empty_like(found.response)
    parts[pairs.sides.numbers] = found.response * (-1, 1)
    return parts.reshape(-1, 2, 2)


def rewards(tuned: np.ndarray, reference: np.ndarray, beta: float) -> np.ndarray:
    """Returns the implicit rewards of both answers, [pairs, 2]: beta times the log-ratios.

    Both arguments are `log_probs` (Rafailov et al. 2023, section 4).
    """
    return beta * (tuned[..., 0] - reference[..., 0])


def pair_scores(
    found: Mapping[str, np.ndarray], beta: float, questions: Sequence[int]
) -> tuple[Estimates, np.ndarray]:
    """Returns the scores of pairs, and the rewards [pairs, 2].

    `found` are `log_probs` by model, base first, tuned last. The p-value of a reward, and of
    its accuracy, is against one on either side by chance; others compare tuned with the start.
    """
    reference = START if START in found else "base"
    of = rewards(found["tuned"], found[reference], beta)
    margin = of[:, CHOSEN] - of[:, REJECTED]
    # a margin of 0 prefers neither side
    right = (margin > 0) + 0.5 * (margin == 0)
    against = {
        "reward_accuracy": (right, 0.5, (0.0, 1.0)),
        "reward_margin": (margin, 0.0, ()),
        "chosen_reward": (of[:, CHOSEN], 0.0, ()),
        "rejected_reward": (of[:, REJECTED], 0.0, ()),
    }
    paired = {
        name: Paired(mean, with_counts(np.full(len(values), none)), with_counts(values), *scale)
        for name, (values, none, scale) in against.items()
    }
    scores = {
        name: {key: one[key] for key in ("tuned", "p_value", "effective_rows")}
        for name, one in compare(paired, clusters=questions).items()
    }
    nats = {side: one[..., 0] / one[..., 1] for side, one in found.items()}
    likelier = {side: with_counts(one[:, 0] > one[:, 1]) for side, one in nats.items()}
    scores["chosen_likelier"] = of_models(likelier, mean, questions, 0.0, 1.0)
    return scores, of


def of_models(
    parts: Mapping[str, np.ndarray],
    score: Score,
    clusters: Sequence[Any],
    low: float = -np.inf,
    high: float = np.inf,
    logarithmic: bool = False,
) -> dict[str, Any]:
    """Returns a score of each model, and tuned minus what it started from with a p-value.

    `parts` are per-row parts [rows, k] by model (see Paired): base, start if there is one, tuned.
    """
    scale = (low, high, logarithmic)

    def compared(before: str, after: str) -> dict[str, Any]:
        pair = Paired(score, parts[before], parts[after], *scale)
        return compare({"": pair}, clusters=clusters)[""]

    before = START if START in parts else "base"
    last = compared(before, "tuned")
    found = {"base": last["base"]} if before == "base" else {}
    if before == START:
        found = {"base": compared("base", START)["base"], START: last["base"]}
    rest = ("tuned", "difference", "p_value", "effective_rows")
    return found | {name: last[name] for name in rest}


def perplexities(found: Mapping[str, Likelihood], conversations: Sequence[Any]) -> dict[str, Any]:
    """Returns the response perplexity of rows by model, drawn by conversation."""
    parts = {side: one.response for side, one in found.items()}
    return of_models(parts, perplexity, conversations, 1.0, np.inf, True)
