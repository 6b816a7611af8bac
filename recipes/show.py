"""What is trained? Print rows of a recipe as the model gets them. No weights are loaded.

python recipes/show.py --config recipes/demo/attn_r16.yaml [--rows 3] [--look 1000] [--tokens]
    [--any_field value]
python recipes/show.py --config recipes/demo-dpo/attn_r16.yaml

Of preference pairs, both sides are printed, each with its answer in the loss.

The part in the loss is green, or stands in [[ ]] where there is no colour. `--tokens` prints a
line a token. `--look` says how many training rows are encoded for the lengths and the checks.
"""

import sftlab.startup.filter_warnings  # noqa: I001  (before the libraries that it quiets)
import sftlab.startup.preload  # noqa: F401

import argparse
import os
import sys
from itertools import islice

from transformers import PreTrainedTokenizerBase

from sftlab.config.launch import Launch
from sftlab.config.parser import parse_recipe
from sftlab.config.recipe import Recipe
from sftlab.data.before_training import look_at_rows
from sftlab.data.chat_template import set_template
from sftlab.data.loss_check import end_tokens_of
from sftlab.data.row_checks import check_lines, check_rows, end_of_loss
from sftlab.data.row_notes import fields_of
from sftlab.data.row_pictures import (
    COLOUR,
    PLAIN,
    histogram,
    marked_text,
    template_frame,
    token_table,
)
from sftlab.data.shown_rows import ShownPair, ShownRow, shown_pairs, shown_rows
from sftlab.data.splits import load_splits
from sftlab.data.template_facts import template_facts
from sftlab.exit_messages import mistakes_in_one_line
from sftlab.models.loading import load_config, load_tokenizer
from sftlab.script_options import Options

# where rows are shown, a run directory is not needed
NOWHERE = "--output_dir=runs/show"
MOST_ROWS = 1_000_000_000


def main(argv: list[str]) -> None:
    """Read tokenizer and data, check the rows, and print some of them."""
    options, fields = parsed(argv)
    if not any(word.startswith("--output_dir") for word in fields):
        fields.append(NOWHERE)
    recipe = parse_recipe(fields, Launch.from_environment())
    model, training = recipe.model, recipe.training
    tokenizer = load_tokenizer(model.model_name_or_path, model.model_revision, training)
    config = load_config(
        model.model_name_or_path, model.model_revision, training, with_weights=False
    )
    template = set_template(tokenizer, training.chat_template_path)
    splits = load_splits(recipe.data, training.dataset_num_proc)
    facts = template_facts(tokenizer, template, fields_of(splits.facts["rows_with"]))
    looked = look_at_rows(tokenizer, config, splits, training, facts)
    pairs = training.method == "dpo"
    shown = (shown_pairs if pairs else shown_rows)(splits, tokenizer, training)
    rows = list(islice(shown, max(options.look, options.rows)))

    if splits.facts["shape"] == "text":
        print(
            "plain text: no chat template; every token is in the loss, with an end token behind it"
        )
    else:
        print(f"chat template: {template}; it adds to a question and its answer:")
        print(template_frame(tokenizer))
    ends = end_tokens_of(tokenizer, config.get_text_config().eos_token_id)
    for number, row in enumerate(rows[: options.rows]):
        if pairs:
            print_pair(number, row, tokenizer, ends, options.tokens)
        else:
            print_row(f"training row {number}", row, tokenizer, ends, options.tokens)
    sides = sides_of(rows) if pairs else {"training rows": rows}
    print_lengths([row for side in sides.values() for row in side], recipe)
    print()
    for line in [*(f"note: {one}" for one in recipe.notes), *looked.lines]:
        print(line)
    if left_out := sum(bool(row.left_out) for row in rows) if pairs else 0:
        print(f"warning: {left_out:,} of the first {len(rows):,} training pairs are left out")
    for name, side in sides.items():
        kept, limit = ((row.ids, row.labels) for row in side), training.max_length
        for line in check_lines(check_rows(kept, ends, tokenizer.bos_token_id, limit), limit, name):
            print(line)
    script = "dpo.py" if pairs else "sft.py"
    print(f"\nNext: train it with recipes/{script} and the same options")


def sides_of(pairs: list[ShownPair]) -> dict[str, list[ShownRow]]:
    """Returns the sides of the pairs that are trained on, by what they are."""
    kept = [pair for pair in pairs if not pair.left_out]
    return {
        "chosen sides": [pair.chosen for pair in kept],
        "rejected sides": [pair.rejected for pair in kept],
    }


def parsed(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Returns this script's options and the fields of the recipe."""
    parser = Options(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=3, help="rows that are printed (default: 3)")
    parser.add_argument(
        "--look", type=int, default=1000, help="training rows that are checked (default: 1000)"
    )
    parser.add_argument("--tokens", action="store_true", help="print a line a token")
    options, fields = parser.parse_known_args(argv)
    if not (0 <= options.rows <= MOST_ROWS and 1 <= options.look <= MOST_ROWS):
        raise ValueError(f"--rows must be from 0 to {MOST_ROWS:,}, and --look from 1 on")
    return options, fields


def print_pair(
    number: int, pair: ShownPair, tokenizer: PreTrainedTokenizerBase, ends: set[int], tokens: bool
) -> None:
    """Print both sides of a pair, and why it is left out, if it is."""
    for side in ("chosen", "rejected"):
        name = f"training pair {number}, {side}"
        print_row(name, getattr(pair, side), tokenizer, ends, tokens)
    if pair.left_out:
        print(f"this pair is left out: {pair.left_out}")


def print_row(
    name: str, row: ShownRow, tokenizer: PreTrainedTokenizerBase, ends: set[int], tokens: bool
) -> None:
    """Print one row: its size, what was cut, how it ends, and its text or its tokens."""
    in_loss = [label for label in row.labels if label != -100]
    last = end_of_loss(row.labels, ends)
    end = f"ends with {tokenizer.decode(last)!r}" if last else "NO END TOKEN in the loss"
    if len(in_loss) == len(row.ids) and not last:
        end = "a piece of a longer text"
    cut = f", cut from {row.whole:,}" if row.whole > len(row.ids) else ""
    size = f"{len(row.ids):,} tokens{cut}, {len(in_loss):,} in the loss"
    print(f"\n--- {name}: {size}, {end}")
    if tokens:
        print(token_table(tokenizer, row.ids, row.labels))
    else:
        colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        print(marked_text(tokenizer, row.ids, row.labels, COLOUR if colour else PLAIN))


def print_lengths(rows: list[ShownRow], recipe: Recipe) -> None:
    """Print how long the rows, or the sides of pairs, are before they are cut."""
    if not rows:
        return
    limit, what = recipe.training.max_length, "training rows"
    if recipe.training.method == "dpo":
        what = "sides of training pairs"
    cut = sum(row.whole > len(row.ids) for row in rows)
    print(f"\ntokens of the first {len(rows):,} {what} before max_length {limit} cuts {cut:,}:")
    print(histogram([row.whole for row in rows], limit))


if __name__ == "__main__":
    with mistakes_in_one_line():
        main(sys.argv[1:])
