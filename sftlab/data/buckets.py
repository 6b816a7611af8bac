"""Sizes that batches are filled up to, so that only a few different ones occur.

A step that is recorded once for a size can then be replayed for every batch of that size. A size is
a function of the batch alone: a run that goes on after a kill fills its batches up as before.
"""

import math

# sizes within a factor of two: for one row, at least and at most
_OF_A_ROW, _FEWEST, _MOST = 4, 8, 32
# the most sizes of the part in the loss, for one number of tokens
MOST_LOSS_PARTS = 8


def token_bucket(tokens: int, multiple: int, rows: int) -> int:
    """Returns the smallest size that holds `tokens` of so many `rows`, a multiple of `multiple`.

    Sizes grow by a factor of 2^(1/n). The more rows there are, the less their sum varies from batch
    to batch, and the closer sizes may be: n is 4 sqrt(rows), 8 at least and 32 at most. So less
    than 9.1 % of 4 rows is filled up, 3.9 % of 20 and 2.2 % of 64, beside the multiple.
    """
    whole = -(-tokens // multiple) * multiple
    below = whole - multiple  # the largest multiple that is too small
    if below < 1:
        return multiple
    steps = min(max(round(_OF_A_ROW * math.sqrt(rows)), _FEWEST), _MOST)
    exponent = math.floor(steps * math.log2(below)) + 1
    return max(whole, math.ceil(2 ** (exponent / steps) / multiple) * multiple)


def loss_parts(head_share: float) -> int:
    """Returns into how many parts a number of tokens is cut, for `loss_bucket`: 1, 2, 4 or 8.

    `head_share` is the work of the head on a token over that of the rest of the model. Half a part
    of the tokens is filled up on average, which adds 1.2 to 2.4 % to a step that has no more than
    8 parts.
    """
    return 2 ** round(math.log2(min(max(30 * head_share, 1), MOST_LOSS_PARTS)))


def loss_bucket(in_loss: int, tokens: int, parts: int) -> int:
    """Returns the fewest parts of `tokens` that hold `in_loss` tokens, in tokens, and no zero.

    `tokens` is a multiple of `parts`.
    """
    part = tokens // parts
    return max(1, -(-in_loss // part)) * part


def most_tiles(tokens: int, sequences: int, tile: int) -> int:
    """Returns how many tiles so many sequences of so many tokens in all have at most."""
    return (tokens + (tile - 1) * sequences) // tile
