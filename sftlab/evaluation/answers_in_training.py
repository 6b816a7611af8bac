"""Answers to a few validation rows, generated and scored at each evaluation of a training."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from sftlab.config.recipe import TrainingArguments
from sftlab.data.messages import Conversation
from sftlab.data.splits import Splits
from sftlab.evaluation.generation import Generator, Sampling, longest_prompt
from sftlab.evaluation.held_out import HeldOut, ScoredRows, select
from sftlab.evaluation.text_metrics import ROUGE_TYPES, Bleu, score_texts, tokenizer_of
from sftlab.models.inner_model import inner_model
from sftlab.models.plain_attention import plain_attention

# answers that are generated at a time
_BATCH = 32


class AnswersInTraining:
    """Generates greedy answers to validation rows with a model that is being trained.

    A call returns the scores, as eval/quality.py computes them. It leaves the model, its settings
    and the random state as they were.
    """

    def __init__(self, rows: ScoredRows, tokenizer: PreTrainedTokenizerBase) -> None:
        self.rows, self._tokenizer = rows, tokenizer
        self._references = [row["reference"] for row in rows.rows]
        self._bleu = Bleu(tokenizer_of(self._references))

    def __call__(self, model: PeftModel | PreTrainedModel) -> dict[str, float]:
        """Returns BLEU (0 to 100), ROUGE and exact match (0 to 1), mean tokens, and two shares.

        The shares are those of answers without text, and of answers that were cut.
        """
        with _as_for_answers(model):
            generator = Generator(model, self._tokenizer, Sampling())
            found = [
                answer
                for part in self.rows.batches(_BATCH)
                for answer in generator.answers(self.rows.prompts[part])
            ]
        scored = score_texts([answer.text for answer in found], self._references, self._bleu)
        counts = np.array([one["bleu_counts"] for one in scored], float)
        means = {
            name: float(np.mean([one[name] for one in scored]))
            for name in (*ROUGE_TYPES, "exact_match")
        }
        return means | {
            "bleu": float(Bleu.score(counts.sum(axis=0))),
            "answer_tokens": float(np.mean([answer.tokens for answer in found])),
            "empty_answers": float(np.mean([not answer.text for answer in found])),
            "cut_answers": float(np.mean([answer.finish == "length" for answer in found])),
        }


@contextmanager
def _as_for_answers(model: PeftModel | PreTrainedModel) -> Iterator[None]:
    """The model generates inside the context, and trains on after it as if it had not."""
    inner, was_training = inner_model(model), model.training
    settings = inner.generation_config
    devices = [model.device] if model.device.type == "cuda" else []
    eager = torch.compiler.set_stance("force_eager")
    try:
        with plain_attention(inner), torch.random.fork_rng(devices), eager:
            model.eval()
            yield
    finally:
        model.train(was_training)
        inner.generation_config = settings


def answers_in_training(
    training: TrainingArguments,
    splits: Splits,
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,
) -> AnswersInTraining:
    """Returns what answers the first validation rows, as many as the recipe asks for.

    Of a conversation the last answer is asked for. Raises ValueError for rows without text, for
    plain text, and where no row leaves room for an answer.
    """
    asked = training.answers_during_training
    if splits.tokens or splits.facts["shape"] == "text":
        what = "tokens, whose text is gone" if splits.tokens else "plain text, which asks nothing"
        raise ValueError(
            f"answers_during_training asks {asked} validation rows, and the data set holds {what}: "
            "leave it out"
        )
    rows = [_last_answer(row) for row in islice(splits.validation, asked)]
    held = HeldOut(Dataset.from_list(rows), {"dataset": "the validation split"}, None)
    longest = longest_prompt(config, Sampling())
    if longest < 1:
        raise ValueError(
            f"answers_during_training generates up to {Sampling().max_new_tokens} tokens, and the "
            f"model has {config.get_text_config().max_position_embeddings} positions: leave it out"
        )
    chosen = select(held, 0, tokenizer, training.max_length, longest, training.truncation_mode)
    return AnswersInTraining(chosen, tokenizer)


def _last_answer(row: dict) -> dict:
    turn = Conversation.from_row(row)
    turn = turn.turn(turn.answers[-1])
    return {
        "messages": json.dumps(turn.messages),
        "tools": row["tools"],
        "answers": turn.answers,
        "conversation": row["conversation"],
    }
