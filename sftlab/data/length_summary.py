"""How long the rows of a tokenized data set are, and how full micro-batches of them are."""

from pathlib import Path
from typing import Any

import numpy as np

from sftlab.data.row_notes import unused_lines
from sftlab.data.sequence_facts import split_line
from sftlab.data.tokenized_dataset import SPLITS
from sftlab.tables import aligned


def real_token_shares(lengths: np.ndarray, micro_batch: int) -> tuple[float, float]:
    """Returns the share of real tokens in micro-batches of shuffled rows.

    The first is for rows padded to the longest, the second for packed rows.
    """
    from sftlab.data.collator import TOKENS_MULTIPLE  # it takes torch with it

    order = np.random.default_rng(0).permutation(lengths)[: 10_000 * micro_batch]
    whole = order[: len(order) - len(order) % micro_batch] if len(order) > micro_batch else order
    batches = whole.reshape(-1, min(micro_batch, max(1, len(whole))))
    real = batches.sum(1)
    packed = -(-real // TOKENS_MULTIPLE) * TOKENS_MULTIPLE
    return real.sum() / (batches.max(1) * batches.shape[1]).sum(), real.sum() / packed.sum()


def summary(
    manifest: dict[str, Any], lengths: np.ndarray, limit: int | None, micro_batch: int, folder: Path
) -> str:
    """Returns the lines that describe a finished tokenized data set.

    `lengths` are the training rows' tokens before truncation to `limit`.
    """
    facts, tokenized = manifest["facts"], manifest["tokenized"]
    table = [["", "rows", "tokens", "dropped at max_length", "cut at max_length"]]
    for name in SPLITS:
        counts = tokenized[name]
        cells = [
            f"{counts[key]:,}" if key in counts else "" for key in ("tokens", "dropped", "cut")
        ]
        table.append([name, f"{facts[name]['rows']:,}", *cells])
    left_out = f"{facts['empty_responses_dropped']:,} rows without a response"
    if facts["rows_without_an_answer"]:
        left_out += f", {facts['rows_without_an_answer']:,} without an answer to a user"
    if "bad_rows_left_out" in facts:
        left_out += f", {facts['bad_rows_left_out']:,} that are not text"
    lines = [
        f"\n{folder}: {facts['rows_read']:,} rows of {facts['dataset']} ({facts['shape']})",
        aligned(table),
        f"  left out: {left_out}",
        *(f"  {line}" for line in split_line(tokenized["train"])),
        *(f"  {line}" for line in unused_lines(facts["not_used"])),
    ]
    if marks := manifest["control_marks"]:
        lines.append(f"  warning: {marks:,} rows have texts in them that are control tokens")
    used = np.minimum(lengths, limit) if limit else lengths
    if len(used):
        padded, packed = real_token_shares(used, micro_batch)
        quantiles = np.quantile(lengths, (0.05, 0.5, 0.95, 1))
        shown = " ".join(f"{value:,.0f}" for value in quantiles)
        lines += [
            f"  tokens of a training row (5 %, median, 95 %, longest): {shown} (plot: "
            f"{folder / 'lengths.png'})",
            f"  real tokens in micro-batches of {micro_batch} rows: {padded:.1%} padded, "
            f"{packed:.1%} packed",
        ]
    return "\n".join(lines)
