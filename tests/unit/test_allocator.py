"""torch's allocator replayed: its rules one by one, and what it reserved in recorded trainings."""

import itertools
import random

import pytest

from llamanb.allocator import LARGE_OWN, LARGE_PAGE, MIB, ROUND, SMALL, SMALL_PAGE, Allocator
from tests import traces


@pytest.mark.parametrize("case", traces.names())
def test_it_reserves_what_torch_reserved(case):
    trace = traces.read(case)
    replayed = trace.replay()
    assert replayed.peak_allocated == trace.allocated
    if trace.expandable:
        assert replayed.peak_reserved == trace.reserved
    else:
        assert replayed.peak_reserved == pytest.approx(trace.reserved, rel=0.015)


def test_recordings_with_and_without_expandable_segments_are_here():
    assert {traces.read(case).expandable for case in traces.names()} == {True, False}


@pytest.mark.parametrize(("asked", "given"), [(0, 512), (1, 512), (512, 512), (513, 1024), (2**22 + 1, 2**22 + 512)])
def test_sizes_are_rounded_up(asked, given):
    allocator = Allocator()
    assert allocator.take(asked).size == given
    assert allocator.allocated == given


@pytest.mark.parametrize("expandable", [True, False])
@pytest.mark.parametrize(("size", "page"), [(1, SMALL_PAGE), (SMALL, SMALL_PAGE), (SMALL + 1, LARGE_PAGE)])
def test_two_pools_ask_for_pages_of_their_own_size(size, page, expandable):
    allocator = Allocator(expandable=expandable)
    allocator.take(size)
    assert allocator.reserved == page


def test_a_large_allocation_does_not_take_room_from_the_small_pool():
    allocator = Allocator()
    allocator.give(allocator.take(SMALL))
    allocator.take(SMALL + 1)
    assert allocator.reserved == SMALL_PAGE + LARGE_PAGE


def test_a_block_is_split_and_its_rest_given_to_the_next():
    allocator = Allocator()
    first, second = allocator.take(12 * MIB), allocator.take(8 * MIB)
    assert allocator.reserved == LARGE_PAGE
    assert second.start == first.start + first.size


def test_the_smallest_block_that_is_enough_is_taken():
    allocator = Allocator()
    sizes = (6, 2, 4, 2, 5, 1.5)
    blocks = [allocator.take(int(size * MIB)) for size in sizes]
    for i in (0, 2, 4):
        allocator.give(blocks[i])
    assert allocator.take(4 * MIB).start == blocks[2].start
    assert allocator.take(int(4.5 * MIB)).start == blocks[4].start
    assert allocator.take(6 * MIB).start == blocks[0].start


def test_of_equal_blocks_the_lowest_is_taken():
    allocator = Allocator()
    blocks = [allocator.take(2 * MIB) for _ in range(5)]
    for i in (3, 1):
        allocator.give(blocks[i])
    assert allocator.take(2 * MIB).start == blocks[1].start


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (0, 2, 1)])
def test_freed_neighbours_merge(order):
    allocator = Allocator()
    blocks = [allocator.take(6 * MIB) for _ in range(3)]
    for i in order:
        allocator.give(blocks[i])
    assert allocator.take(18 * MIB).start == 0
    assert allocator.reserved == LARGE_PAGE


def test_used_blocks_keep_their_neighbours_apart():
    allocator = Allocator()
    blocks = [allocator.take(6 * MIB) for _ in range(3)]
    allocator.give(blocks[0])
    allocator.give(blocks[2])
    allocator.take(12 * MIB)
    assert allocator.reserved == 2 * LARGE_PAGE


def test_an_expandable_segment_grows_by_what_the_free_end_lacks():
    allocator = Allocator()
    allocator.take(12 * MIB)
    grown = allocator.take(20 * MIB)  # 8 MiB of it are there already
    assert (grown.start, allocator.reserved) == (12 * MIB, 2 * LARGE_PAGE)


def test_other_segments_cannot_grow():
    allocator = Allocator(expandable=False)
    allocator.take(LARGE_OWN - MIB)
    allocator.take(20 * MIB)
    assert allocator.reserved == LARGE_PAGE + 20 * MIB


@pytest.mark.parametrize(("size", "segment"), [(LARGE_OWN, LARGE_OWN), (LARGE_OWN + 1, LARGE_OWN + SMALL_PAGE)])
def test_large_allocations_get_a_segment_of_their_own(size, segment):
    allocator = Allocator(expandable=False)
    allocator.take(size)
    assert allocator.reserved == segment


def test_a_rest_of_a_megabyte_or_less_is_not_split_off_without_expandable_segments():
    whole, split = Allocator(expandable=False), Allocator(expandable=False)
    assert whole.take(LARGE_OWN + SMALL_PAGE - SMALL).size == LARGE_OWN + SMALL_PAGE
    assert split.take(LARGE_OWN + SMALL_PAGE - SMALL - ROUND).size == LARGE_OWN + SMALL_PAGE - SMALL - ROUND


def test_segments_never_merge():
    allocator = Allocator(expandable=False)
    for block in [allocator.take(10 * MIB) for _ in range(2)]:
        allocator.give(block)
    allocator.take(20 * MIB)
    assert allocator.reserved == 40 * MIB


def test_emptying_gives_back_whole_pages_of_an_expandable_segment():
    allocator = Allocator()
    blocks = [allocator.take(15 * MIB) for _ in range(4)]  # three pages; the middle two blocks hold all of the second
    for block in blocks[1:3]:
        allocator.give(block)
    allocator.empty_cache()
    assert allocator.reserved == 2 * LARGE_PAGE
    assert allocator.take(5 * MIB).start == 40 * MIB  # and not the end of the first page, which could grow
    assert allocator.take(25 * MIB).start == 15 * MIB  # grown: the second page is mapped again
    assert allocator.reserved == 3 * LARGE_PAGE


def test_emptying_gives_back_segments_that_nothing_uses():
    allocator = Allocator(expandable=False)
    one, two = allocator.take(4 * MIB), allocator.take(30 * MIB)
    allocator.take(4 * MIB)  # beside the first
    allocator.give(one)
    allocator.give(two)
    allocator.empty_cache()
    assert allocator.reserved == LARGE_PAGE


def test_peaks_stay():
    allocator = Allocator()
    allocator.give(allocator.take(50 * MIB))
    allocator.empty_cache()
    assert (allocator.allocated, allocator.reserved) == (0, 0)
    assert (allocator.peak_allocated, allocator.peak_reserved) == (50 * MIB, 60 * MIB)


@pytest.mark.parametrize("expandable", [True, False])
@pytest.mark.parametrize("seed", range(8))
def test_whatever_the_order_nothing_is_lost_and_nothing_overlaps(seed, expandable):
    chance = random.Random(seed)
    allocator, blocks = Allocator(expandable=expandable), []
    for _ in range(1500):
        if blocks and chance.random() < 0.5:
            allocator.give(blocks.pop(chance.randrange(len(blocks))))
        elif chance.random() < 0.01:
            allocator.empty_cache()
        else:
            blocks.append(allocator.take(int(2 ** chance.uniform(0, 26))))
        assert allocator.allocated == sum(block.size for block in blocks) <= allocator.reserved
        assert allocator.reserved <= allocator.peak_reserved
    for pool in (True, False):
        ranges = sorted((block.start, block.start + block.size) for block in blocks if (block.size <= SMALL) == pool)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ranges))
    for block in blocks:
        allocator.give(block)
    allocator.empty_cache()
    assert (allocator.allocated, allocator.reserved) == (0, 0)
