"""What `max_length` leaves of the rows."""

from collections.abc import Mapping, Sequence
from typing import Any

from trl import SFTConfig

from sftlab.data.samplers import refuse_few_rows
from sftlab.data.sequence_facts import split_line
from sftlab.data.splits import Splits
from sftlab.training.verification import global_batch

# share of the tokens in the loss that may be cut without a warning
CUT_SHARE = 0.05


def length_facts(
    train: Mapping[str, Any], args: SFTConfig, sources: Sequence[str]
) -> dict[str, Any]:
    """Returns the sequences and tokens of one epoch, and what `max_length` did to the rows.

    `train` is what `encode_rows` counted.
    `cut` sequences lost their end, under `keep_end` their beginning. `dropped` ones had no token in
    the loss left. `conversations_split` are a sequence for each answer. `sources` are the names of
    several data sets.
    """
    facts = dict(train)
    if "sources" in facts:
        pairs = zip(sources, facts["sources"], strict=False)
        facts["sources"] = [{"dataset": name, **counts} for name, counts in pairs]
    sequences = facts.pop("kept")
    left_over = sequences % global_batch(args)
    return {"sequences": sequences, **facts, "left_over_an_epoch": left_over}


def length_lines(lengths: dict[str, Any], args: SFTConfig) -> list[str]:
    """Returns the lines that say what `max_length` and the chat template do to the rows."""
    cut = "beginning" if args.truncation_mode == "keep_end" else "end"
    lines = [
        f"training rows: {lengths['sequences']:,} of {lengths['tokens']:,} tokens, the longest "
        f"{lengths['longest']:,}; max_length {args.max_length} cuts the {cut} of "
        f"{lengths['cut']:,} and drops {lengths['dropped']:,}"
    ]
    lines += [
        f"  {one['dataset']}: {one['kept']:,} sequences of {one['tokens']:,} tokens"
        for one in lengths.get("sources", [])
    ]
    lines += split_line(lengths)
    lost = lengths["loss_tokens_cut"]
    share = lost / max(1, lost + lengths["loss_tokens"])
    if share > CUT_SHARE:
        lines.append(
            f"warning: max_length {args.max_length} leaves out {share:.0%} of the tokens in the "
            f"loss ({lost:,}): --max_length {lengths['longest_before_cut']} would keep them all"
        )
    return lines


def refuse_lost_rows(
    facts: Mapping[str, Mapping[str, int] | None], args: SFTConfig, splits: Splits
) -> None:
    """Raise ValueError if `max_length` leaves too few training rows, or no validation row.

    `facts` are what `encode_rows` counted of train and validation; None of a stream.
    """
    lost = f"have no response token within max_length {args.max_length}"
    if train := facts["train"]:
        kept, gone = train["kept"], train["dropped"]
        dropped = f" ({gone} of {kept + gone} {lost})" if gone else ""
        refuse_few_rows(kept, global_batch(args), dropped)
    validation = facts["validation"]
    if validation and validation["dropped"] and not validation["kept"]:
        raise ValueError(
            f"all {len(splits.validation)} validation rows {lost}: raise it, or leave validation "
            "out (split_fractions)"
        )
