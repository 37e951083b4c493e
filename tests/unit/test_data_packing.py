"""Rows in micro-batches, against cases worked by hand."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from llamanb.data.packing import pack
from llamanb.data.padding import Packing


def test_a_case_by_hand():
    assert pack([2, 5, 4, 7, 1, 3, 8], 16) == [[6, 3], [1, 2, 5], [0, 4]]  # 2 × 8, 3 × 5, 2 × 2


def test_no_rows_one_row_and_rows_that_fill_it():
    assert pack([], 10) == []
    assert pack([10], 10) == [[0]]
    assert pack([10, 10, 10], 10) == [[0], [1], [2]]
    assert pack([3, 25, 3], 10) == [[1], [0, 2]], "a row that is too long stands alone"


@given(st.lists(st.integers(1, 64), max_size=60), st.integers(64, 200))
def test_every_row_is_placed_once_and_none_goes_over(lengths, limit):
    packed = pack(lengths, limit)
    assert sorted(row for rows in packed for row in rows) == list(range(len(lengths)))
    assert all(len(rows) * max(lengths[row] for row in rows) <= limit for rows in packed)
    for rows, after in itertools.pairwise(packed):
        assert min(lengths[row] for row in rows) >= max(lengths[row] for row in after)
        assert (len(rows) + 1) * lengths[rows[0]] > limit, "one more would not have fit"


def test_what_it_saves_by_hand():
    packing = Packing([2, 6, 4, 8], 10, micro_batch_size=4, effective_batch_size=4)
    assert (packing.real, packing.padded_tokens) == (20, 4 * 8)
    assert packing.packed == [[8, 6, 4, 2]]
    lines = str(packing).splitlines()
    assert lines[0] == "one pass over the 4 rows of at most 10 tokens"
    rows = {line[:24].strip(): line[24:].split() for line in lines[3:]}
    assert rows["tokens computed"] == ["32", "20"]
    assert rows["of them padding"] == ["12", "(38%)", "0", "(0%)"]
    assert "12 (38%)" in packing._repr_html_()


@given(st.lists(st.integers(1, 64), max_size=60), st.integers(1, 4), st.integers(1, 3), st.integers(0, 5))
def test_both_ways_compute_each_step_s_rows_and_packing_no_more(lengths, size, times, seed):
    packing = Packing(lengths, 64, micro_batch_size=size, effective_batch_size=size * times, seed=seed)
    for batches in (packing.padded, packing.packed):
        assert sorted(length for rows in batches for length in rows) == sorted(lengths)
    assert len(packing.packed) <= len(packing.padded)
    assert all(len(rows) * max(rows) <= size * max(lengths) for rows in packing.packed)
    assert packing.real <= packing.padded_tokens
    assert str(packing)


def test_rows_over_the_limit_are_left_out():
    packing = Packing([5, 11, 400], 10, micro_batch_size=2)
    assert (packing.lengths, packing.real) == ([5], 5)
    assert str(Packing([11], 10, micro_batch_size=2)).startswith("one pass over the 0 rows")
