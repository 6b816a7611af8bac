"""What a run says and refuses about its rows before it loads a model."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple

import pyarrow.compute as pc
from datasets import Dataset, IterableDataset
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from sftlab.config.recipe import TrainingArguments
from sftlab.data.batch_encoder import marks_pattern
from sftlab.data.column_names import as_words
from sftlab.data.loss_check import ROWS_LOOKED_AT, look_at_loss, refuse_unrendered
from sftlab.data.messages import Conversation
from sftlab.data.model_limits import refuse_long_stream, refuse_unknown_tokens
from sftlab.data.row_notes import TURNS, unused_lines, unwritten
from sftlab.data.source_facts import dropped_words
from sftlab.data.splits import Splits
from sftlab.data.template_errors import (
    TEMPLATE_ERRORS,
    is_of_template,
    rendering_limit,
)
from sftlab.data.tokenized_dataset import SPLITS
from sftlab.exit_messages import first_line

_ROWS_AT_ONCE = 10_000


class Looked(NamedTuple):
    """Facts for run.json (`loss`), and lines to print; warnings come first."""

    facts: dict[str, Any]
    lines: list[str]


def look_at_rows(
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,
    splits: Splits,
    training: TrainingArguments,
    template: Mapping[str, Any],
) -> Looked:
    """Look at what will be in the loss, and at what of the rows will not be used.

    `template` are `template_facts`. Raises ValueError where training would not be sound: other
    text than answers in the loss, a row that the template refuses, tokens unknown to the model.
    """
    refuse_unknown_tokens(tokenizer, config)
    if isinstance(splits.train, IterableDataset):
        refuse_long_stream(config, training.max_length)
    with_ = splits.facts.get("rows_with", {})
    warnings, remarks = unwritten(with_, template["writes"])
    if training.completion_only_loss is not False:
        ends = config.get_text_config().eos_token_id
        rows = splits.test if splits.tokens else splits.train
        first = [Conversation.from_row(row) for row in islice(rows, ROWS_LOOKED_AT)]
        warnings += look_at_loss(tokenizer, first, with_, ends)
    refuse_unrendered(tokenizer, splits.test, "test")
    marks = (splits.tokens or {}).get("control_marks")
    if marks is None:
        marks = sum(rows_with_marks(tokenizer, rows) for rows in splits[:3] if _is_text(rows))
    if marks:
        warnings.append(
            f"{marks:,} rows have texts in them that the tokenizer reads as control tokens"
        )
    facts = {"warnings": warnings, "rows_with_control_marks": marks}
    said = [f"warning: {one}" for one in warnings]
    unused = unused_lines(splits.facts.get("not_used", {}), template["writes"])
    return Looked(facts, [*said, *unused, *remarks, *data_lines(splits.facts)])


def _is_text(rows: Dataset | IterableDataset) -> bool:
    return isinstance(rows, Dataset) and "messages" in rows.column_names


def rows_with_marks(tokenizer: PreTrainedTokenizerBase, rows: Dataset) -> int:
    """Returns how many rows hold the text of a special token in a message."""
    special = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
    if not special:
        return 0
    messages = rows.with_format("arrow")
    marked = (
        pc.match_substring_regex(batch["messages"], marks_pattern(special))
        for batch in messages.iter(_ROWS_AT_ONCE)
    )
    return sum(pc.sum(one).as_py() or 0 for one in marked)


def data_lines(facts: Mapping[str, Any]) -> list[str]:
    """Returns the lines that say what became of the rows of the file."""
    if facts.get("streaming"):
        lines = [f"rows: streamed from {facts['dataset']} ({facts['shape']})"]
        return [*lines, *_known_lines(facts), *column_lines(facts), *_stream_lines(facts)]
    sizes = ", ".join(f"{name} {facts[name]['rows']:,}" for name in SPLITS)
    if TURNS in facts.get("rows_with", {}) and facts["test"]["rows"]:
        sizes += " (a row an answer)"
    read, there = facts["rows_read"], facts.get("rows_there", facts["rows_read"])
    seen = f"{read:,} read" if read == there else f"{read:,} of {there:,} read"
    lines = [f"rows of {facts['dataset']} ({facts['shape']}): {seen}; {sizes}"]
    if dropped := dropped_words(facts):
        row = facts.get("first_without_an_answer")
        which = f" (the first is row {row})" if row is not None else ""
        lines.append(f"rows dropped: {dropped}{which}")
    sources = facts.get("sources", [])
    return [*lines, *_known_lines(facts), *column_lines(facts), *source_lines(sources)]


def _known_lines(facts: Mapping[str, Any]) -> list[str]:
    """Returns a line for each split of an own file that has rows of another split."""
    return [
        f"warning: {known['rows']:,} {split} rows ask what rows of another split ask (the "
        f"first is row {known['first']}): they are left out of {split}"
        for split, known in facts.get("left_out_as_known", {}).items()
    ]


def _stream_lines(facts: Mapping[str, Any]) -> list[str]:
    """Returns a line for each of several streams."""
    return [
        f"  {one['dataset']} ({one['shape']}{_weight(one)})" for one in facts.get("sources", [])
    ]


def column_lines(facts: Mapping[str, Any]) -> list[str]:
    """Returns the line that says which columns stand under other names, if any."""
    named = facts.get("sources", [facts])
    return [
        f"columns of {one['dataset']} are read as {as_words(one['columns'])}"
        for one in named
        if one.get("columns")
    ]


def source_lines(sources: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns a line for each of several data sets: its format, its weight, and its rows."""
    lines = []
    for one in sources:
        sizes = {name: f"{name} {one[name]:,}" for name in SPLITS if one[name]}
        there = one["train_there"]
        if one["train"] != there:
            link = "of" if one["train"] < there else "by repeating"
            sizes["train"] += f" {link} {there:,}"
        rows = ", ".join(sizes.values()) or "no row"
        lines.append(f"  {one['dataset']} ({one['shape']}{_weight(one)}): {rows}")
    return lines


def _weight(source: Mapping[str, Any]) -> str:
    return f", weight {source['weight']:g}" if source["weight"] else ""


@contextmanager
def template_refusals(tokenizer: PreTrainedTokenizerBase, splits: Splits) -> Iterator[None]:
    """Turn a template's refusal within into a ValueError with the number of the row.

    A template that never ends over a row is stopped.
    """
    try:
        with rendering_limit("a row"):
            yield
    except TEMPLATE_ERRORS as error:
        if not is_of_template(error):
            raise
        for name, rows in zip(SPLITS, splits[:3], strict=True):
            if "messages" in (rows.column_names or ()):
                refuse_unrendered(tokenizer, rows, "training" if name == "train" else name)
        raise ValueError(f"the chat template refuses a row: {first_line(error)}") from error
