"""lm-eval's samples of two models, paired by document and compared."""

import math
from typing import Any

import numpy as np
from lm_eval.api.metrics import mean as mean_over_documents
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs

from sftlab.evaluation.harness_tasks import LoadedTasks
from sftlab.evaluation.significance import Paired, compare, compare_rates, mean, with_counts
from sftlab.runs.run_directory import SIDES

# one document under one filter, with both models' answers and scores
Record = dict[str, Any]


def pair(task: str, base: list[dict[str, Any]], tuned: list[dict[str, Any]]) -> list[Record]:
    """Join lm-eval's samples of both models to one record per document and filter.

    Raises ValueError where the two models were not asked the same.
    """
    first, second = (
        {(sample["doc_id"], sample["filter"]): sample for sample in side} for side in (base, tuned)
    )
    same = ("doc_hash", "prompt_hash", "target_hash", "metrics")
    alike = len(base) == len(tuned) == len(first) and first.keys() == second.keys()
    if not alike or any(first[key][name] != second[key][name] for key in first for name in same):
        raise ValueError(
            f"{task}: base and tuned were not asked the same documents with the same prompts"
        )
    about = [
        {name: one[name] for name in ("doc_id", "filter", *same[:2], "target")}
        for one in first.values()
    ]
    answers = [{"base": _scored(one), "tuned": _scored(second[key])} for key, one in first.items()]
    return [{"task": task} | one | both for one, both in zip(about, answers, strict=True)]


def _scored(sample: dict[str, Any]) -> dict[str, Any]:
    """Returns one model's answer to a document and its scores.

    The answer is the generated text and what the filter took from it, or the log-likelihood of
    each choice in nats.
    """
    responses = [response[0] for response in sample["resps"]]
    scores = {"scores": {name: sample[name] for name in sample["metrics"]}}
    if isinstance(responses[0], str):
        return {"answer": responses[0], "filtered": sample["filtered_resps"][0]} | scores
    return {"log_likelihoods": [log_likelihood for log_likelihood, _ in responses]} | scores


def means_of(loaded: LoadedTasks) -> set[str]:
    """Returns the metrics that lm-eval aggregates as the mean over documents."""
    kinds = [kind for task in loaded["tasks"].values() for kind in task.aggregation().items()]
    return {metric for metric, how in kinds if how is mean_over_documents}


def compare_items(
    name: str, records: list[Record], figures: dict[str, Any], means: set[str]
) -> dict[str, Any]:
    """Compare both models on lm-eval's figures (such as 'acc,none') whose metric is in `means`.

    Raises ValueError where one of lm-eval's figures is not the mean of its records.
    """
    values = {}
    for key in (key for key in figures["base"][name] if key.split(",")[0] in means):
        metric, chosen = key.split(",")
        rows = [
            [one[side]["scores"][metric] for one in records if one["filter"] == chosen]
            for side in SIDES
        ]
        values[key] = np.array(rows, dtype=float)
        given = [figures[side][name][key] for side in SIDES]
        if not np.allclose(values[key].mean(axis=1), given, rtol=1e-9, atol=1e-12):
            hint = (
                "all choices of a document have probability 0"
                if np.isnan(given).any()
                else "lm-eval aggregates them in another way"
            )
            raise ValueError(f"{name}, {key}: {given} are not the means of the documents: {hint}")
    compared = compare(
        {key: Paired(mean, *map(with_counts, rows), *_scale(rows)) for key, rows in values.items()}
    )
    for key, rows in values.items():
        rates = np.isin(rows, (0, 1)).all()
        compared[key]["statistics"] = (
            "Wilson, Newcombe, exact McNemar" if rates else "bootstrap-t, exchange"
        )
        compared[key] |= compare_rates(*rows) if rates else {}
    return compared


def _scale(rows: np.ndarray) -> tuple[float, float]:
    """Returns from where to where a metric goes: shares of 1 are known by their values."""
    return (0.0, 1.0) if rows.min() >= 0 and rows.max() <= 1 else (-math.inf, math.inf)


def count_cut_prompts(lm: HFLM, samples: list[dict[str, Any]]) -> int:
    """Returns how many documents exceed the model's window.

    lm-eval drops the beginning of their prompts.
    """
    cut = set()
    for sample in samples:
        text, rest = max(sample["arguments"], key=lambda request: len(request[1]))
        if isinstance(rest, dict):  # settings of a generation; otherwise a choice's text
            whole, generated = text, normalize_gen_kwargs(rest, lm.max_gen_toks)["max_gen_toks"]
        else:
            whole, generated = text + rest, -1
        if len(lm.tok_encode(whole)) > lm.max_length - generated:
            cut.add(sample["doc_id"])
    return len(cut)
