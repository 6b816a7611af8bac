"""When does an export answer as its run? What is compared, and what is said of a difference."""

import numpy as np
import pytest

from sftlab.export.agreement import Behaviour, compare

ROWS = 20


def behaviour(nats=0.0, ended=ROWS, prompts=None, ends=(2,), dtype="float32"):
    """Rows of ten tokens whose nats differ by `nats`, of which the first `ended` end."""
    summed = np.full(ROWS, 12.0) + nats
    tokens = np.full(ROWS, 10.0)
    stops = [row < ended for row in range(ROWS)]
    ids = prompts or [[row, 1] for row in range(ROWS)]
    return Behaviour(ids, np.stack([summed, tokens], axis=1), stops, list(ends), dtype)


def differs(dtype="float16", **what):
    return compare(behaviour(), behaviour(**what), dtype).differs


def test_what_is_equal_agrees():
    found = compare(behaviour(), behaviour(), "float32")
    assert (found.nats, found.other_ends, found.differs) == (0, 0, None)


def test_rows_that_differ_both_ways_do_not_cancel():
    both = np.where(np.arange(ROWS) % 2, 1.0, -1.0)
    found = compare(behaviour(), behaviour(nats=both), "float16")
    assert found.nats == pytest.approx(0.1)
    assert "responses differ by 0.1 nats a token (0.01 is allowed in float16)" in found.differs
    assert "first at prompt 0" in found.differs


def test_one_row_that_differs_is_named():
    one = np.zeros(ROWS)
    one[7] = 4.0
    assert "first at prompt 7, most at prompt 7" in differs(nats=one)


def test_rounding_is_allowed_by_the_dtype():
    assert differs("float16", nats=0.05) is None
    assert "0.0001 is allowed in float32" in differs("float32", nats=0.05)


@pytest.mark.parametrize("export", ["float32", "float16", "f32", "bf16"])
def test_a_run_in_16_bits_is_given_its_own_rounding(export):
    run = behaviour(dtype="bfloat16")
    found = compare(run, behaviour(nats=0.3, ended=ROWS - 4), export)
    assert (found.differs, found.tolerance_nats) == (None, 0.05)
    worse = compare(run, behaviour(nats=0.6), export).differs
    assert "responses differ by 0.06 nats a token (0.05 is allowed in b" in worse


def test_answers_that_end_otherwise_are_counted():
    assert differs("float16", ended=ROWS - 1) is None
    assert "2 of 20 greedy answers end otherwise, first at prompt 18" in differs(ended=ROWS - 2)
    assert "1 of 20" in differs("float32", ended=ROWS - 1)


@pytest.mark.parametrize("dtype", ["bfloat16", "bf16", "q8_0"])
def test_coarse_rounding_may_move_more_ends(dtype):
    """A real model's own weights in bfloat16: 3 of 16."""
    assert differs(dtype, ended=ROWS - 4) is None
    assert "7 of 20 greedy answers end otherwise" in differs(dtype, ended=ROWS - 7)


def test_prompts_and_end_tokens_come_first():
    other = [[row, 1] for row in range(ROWS)]
    other[4] = [4, 1, 1]
    assert differs(prompts=other, nats=9.0).startswith("prompt 4 has other token ids (3 for 2)")
    assert "answers end at the tokens [3], and in the run at [2]" in differs(ends=[3])
