"""Base's and tuned's scores of every held-out row: likelihoods, answers and their overlaps."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from sftlab.data.chat_template import pad_id
from sftlab.evaluation.answer_file import AnswerFile
from sftlab.evaluation.base_and_tuned import answering
from sftlab.evaluation.held_out import ScoredRows
from sftlab.evaluation.processes import ALONE, Processes
from sftlab.evaluation.text_metrics import Bleu, score_texts
from sftlab.models.likelihood import Likelihood, likelihood, nats_of_the_token_read
from sftlab.runs.run_directory import SIDES


def right_padded(
    rows: ScoredRows, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> Callable[[slice], dict[str, torch.Tensor]]:
    """Returns a function that makes a batch for `likelihood` of a slice of the rows."""
    collate = DataCollatorForLanguageModeling(pad_token_id=pad_id(tokenizer))
    return lambda part: {k: v.to(device) for k, v in collate(rows.encoded[part]).items()}


def likelihoods(
    model: PeftModel,
    rows: ScoredRows,
    tokenizer: PreTrainedTokenizerBase,
    size: int,
    processes: Processes = ALONE,
    sides: Sequence[str] = SIDES,
) -> tuple[dict[str, Likelihood], dict[str, float]]:
    """Returns the models' likelihood of the references and nats of the token just read.

    Batches are right-padded, as in training, and dealt over the processes.
    """
    batch, parts = right_padded(rows, tokenizer, model.device), list(rows.batches(size))
    own: dict[str, dict[int, Any]] = {}
    for side in sides:
        own[side] = {}
        with answering(model, side):
            for number in processes.dealt(len(parts) + 1):
                if number == len(parts):  # the last one
                    own[side][number] = nats_of_the_token_read(model, batch(slice(size)))
                    continue
                part = parts[number]
                try:
                    found = likelihood(model, [batch(part)], names=rows.numbers[part])
                except ValueError as error:
                    raise ValueError(f"{side} model, {error}") from error
                own[side][number] = found
    nll, same_token = {}, {}
    for side in sides:
        *found, same_token[side] = processes.merged(own[side])
        nll[side] = Likelihood(*map(np.concatenate, zip(*found, strict=True)))
    return nll, same_token


def score_rows(
    rows: ScoredRows, nll: dict[str, Likelihood], answers: AnswerFile, bleu: Bleu
) -> list[dict[str, Any]]:
    """Returns one record per row, in the order of the held-out set."""
    references = [row["reference"] for row in rows.rows]
    scored = {}
    for side in SIDES:
        found = [answers.found[side, number] for number in rows.numbers]
        overlaps = score_texts([answer.text for answer in found], references, bleu)
        scored[side] = [
            answer._asdict()
            | {"response_nll": response.tolist(), "text_nll": text.tolist()}
            | overlap
            for answer, response, text, overlap in zip(found, *nll[side], overlaps, strict=True)
        ]
    records = [
        {
            "row": number,
            "conversation": row["conversation"],
            "prompt": row["prompt"],
            "reference": reference,
            "base": base,
            "tuned": tuned,
        }
        for number, row, reference, base, tuned in zip(
            rows.numbers, rows.rows, references, scored["base"], scored["tuned"], strict=True
        )
    ]
    return sorted(records, key=lambda record: record["row"])
