"""What packing would save, against cases worked by hand and a plain first-fit."""

from hypothesis import given
from hypothesis import strategies as st

from llamanb.data.packing import Packing, pack


def first_fit_decreasing(lengths: list[int], limit: int) -> list[list[int]]:
    bins: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        for rows in bins:
            if sum(lengths[i] for i in rows) + lengths[row] <= limit:
                rows.append(row)
                break
        else:
            bins.append([row])
    return bins


def test_a_case_by_hand():
    assert pack([2, 5, 4, 7, 1, 3, 8], 10) == [[6, 0], [3, 5], [1, 2, 4]]  # 8+2, 7+3, 5+4+1


def test_no_rows_one_row_and_rows_that_fill_it():
    assert pack([], 10) == []
    assert pack([10], 10) == [[0]]
    assert pack([10, 10, 10], 10) == [[0], [1], [2]]


@given(st.lists(st.integers(1, 64), max_size=60), st.integers(64, 200))
def test_every_row_is_placed_once_and_none_goes_over(lengths, limit):
    sequences = pack(lengths, limit)
    assert sorted(row for rows in sequences for row in rows) == list(range(len(lengths)))
    assert all(0 < sum(lengths[row] for row in rows) <= limit for rows in sequences)
    assert sequences == first_fit_decreasing(lengths, limit)


def test_what_it_saves_by_hand():
    packing = Packing([2, 6, 4, 8], 10, micro_batch_size=4, effective_batch_size=2)
    assert (packing.real, packing.padded, packing.packed) == (20, 4 * 8, 2 * 10)  # 8+2, 6+4
    lines = str(packing).splitlines()
    assert lines[0] == "one pass over the 4 rows of at most 10 tokens"
    rows = {line[:24].strip(): line[24:].split() for line in lines[3:]}
    assert rows["tokens computed"] == ["32", "20"]
    assert rows["padding"] == ["12", "(38%)", "0", "(0%)"]
    assert " ".join(rows["tokens of 2 rows, a step"]) == "16 computed, 10 real 10 computed, 10 real"
    assert "12 (38%)" in packing._repr_html_()


def test_rows_alone_in_a_micro_batch_need_no_padding_and_packing_them_can_cost():
    packing = Packing([6, 6, 6], 10, micro_batch_size=1)
    assert (packing.padded, packing.packed) == (18, 30)


@given(st.lists(st.integers(1, 64), max_size=60), st.integers(1, 9), st.integers(0, 5))
def test_micro_batches_hold_every_row_and_what_is_computed_is_never_less_than_what_is_real(lengths, size, seed):
    packing = Packing(lengths, 64, micro_batch_size=size, seed=seed)
    assert sorted(length for rows in packing.micro_batches for length in rows) == sorted(lengths)
    assert all(len(rows) == size for rows in packing.micro_batches[:-1])
    assert packing.real <= min(packing.padded, packing.packed)
    assert str(packing)


def test_rows_over_the_limit_are_left_out():
    packing = Packing([5, 11, 400], 10, micro_batch_size=2)
    assert (packing.lengths, packing.real) == ([5], 5)
    assert str(Packing([11], 10, micro_batch_size=2)).startswith("one pass over the 0 rows")
