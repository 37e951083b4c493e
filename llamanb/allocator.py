"""torch's caching allocator for one GPU, replayed without a GPU: how much it reserves for given allocations.

What a process takes from a card is not what its tensors add up to. The allocator rounds sizes, keeps what is freed, and
leaves gaps that no later tensor fits. How large the gaps become depends on order and sizes, so a flat percentage is
always wrong for somebody; the replay follows the rules of c10/cuda/CUDACachingAllocator.cpp (torch 2.11) instead. Fed
with the allocations that torch recorded in real trainings, it reserves what torch did (tests/unit/test_allocator.py).
"""

from __future__ import annotations

from bisect import bisect_left, insort

MIB = 2**20
ROUND = 512
"""Sizes are multiples of this many bytes (kMinBlockSize)."""
SMALL = MIB
"""Allocations up to this size come from their own pool (kSmallSize)."""
SMALL_PAGE, LARGE_PAGE = 2 * MIB, 20 * MIB
"""What is asked of the driver at a time, by pool (kSmallBuffer, kLargeBuffer)."""
LARGE_OWN = 10 * MIB
"""Without expandable segments, allocations from this size get a segment of their own, in multiples of SMALL_PAGE."""
USED, FREE, UNMAPPED = range(3)


class _Block:
    __slots__ = ("next", "prev", "size", "start", "state")

    def __init__(self, start: int, size: int, state: int, prev: _Block | None, following: _Block | None):
        self.start, self.size, self.state, self.prev, self.next = start, size, state, prev, following

    def split(self, size: int) -> _Block:
        """Cuts all but the first `size` bytes off into a block of their own, of the same state."""
        rest = _Block(self.start + size, self.size - size, self.state, self, self.next)
        if rest.next:
            rest.next.prev = rest
        self.next, self.size = rest, size
        return rest

    def absorb_next(self) -> None:
        self.size += self.next.size
        self.next = self.next.next
        if self.next:
            self.next.prev = self


class _Pool:
    """Blocks of one size class. Expandable: one range of addresses, mapped page by page. Otherwise segments."""

    def __init__(self, page: int, expandable: bool):
        self.page, self.expandable = page, expandable
        self.free: list[tuple[int, int, _Block]] = []  # by size, then address: torch takes the first that is enough
        self.unmapped = [_Block(0, 2**60, UNMAPPED, None, None)] if expandable else []  # by address
        self.top = 0

    def take(self, size: int) -> tuple[_Block, int]:
        """A used block of `size` bytes, and by how much the pool grew for it."""
        grown = 0
        i = bisect_left(self.free, (size,))
        if i < len(self.free):
            if self.expandable:  # a block that could still grow counts as what it could become
                while i + 1 < len(self.free) and _reach(self.free[i + 1][2]) < _reach(self.free[i][2]):
                    i += 1
            block = self.free.pop(i)[2]
        else:
            block, grown = self._grow(size) if self.expandable else self._segment(size)
        block.state = USED
        rest = block.size - size
        if rest >= ROUND if self.expandable or self.page == SMALL_PAGE else rest > SMALL:
            remainder = block.split(size)
            remainder.state = FREE
            insort(self.free, (rest, remainder.start, remainder))
        return block, grown

    def give(self, block: _Block) -> None:
        block.state = FREE
        before, after = block.prev, block.next
        if after and after.state == FREE:
            self._forget(after)
            block.absorb_next()
        if before and before.state == FREE:
            self._forget(before)
            before.absorb_next()
            block = before
        insort(self.free, (block.size, block.start, block))

    def _forget(self, block: _Block) -> None:
        del self.free[bisect_left(self.free, (block.size, block.start))]

    def _grow(self, size: int) -> tuple[_Block, int]:
        """Maps pages at the lowest address where `size` bytes fit between used blocks."""
        for start in self.unmapped:
            block = start.prev if start.prev and start.prev.state == FREE else start
            room, at = 0, block
            while room < size and at and at.state != USED:
                room, at = room + at.size, at.next
            if room >= size:
                break
        grown = 0
        if block.state == FREE:
            self._forget(block)
        else:
            block, grown = self._map(block, size)
        while block.size < size:
            after = block.next
            if after.state == FREE:
                self._forget(after)
            else:
                _, more = self._map(after, size - block.size)
                grown += more
            block.absorb_next()
        return block, grown

    def _map(self, block: _Block, size: int) -> tuple[_Block, int]:
        """Turns the first pages of an unmapped block, enough for `size` bytes of it, into a free one."""
        pages = min(-(-size // self.page) * self.page, block.size)
        self.unmapped.remove(block)
        if pages < block.size:
            rest = block.split(pages)
            insort(self.unmapped, rest, key=_start)
        block.state = FREE
        return block, pages

    def _segment(self, size: int) -> tuple[_Block, int]:
        own = self.page if size < LARGE_OWN else -(-size // SMALL_PAGE) * SMALL_PAGE
        block = _Block(self.top, own, FREE, None, None)
        self.top += own + self.page  # a gap, so that segments never merge
        return block, own

    def release(self) -> int:
        """Gives back every whole page, or segment, that nothing uses; returns how many bytes."""
        given = 0
        for _, _, block in list(self.free):
            if not self.expandable:
                if block.prev is None and block.next is None:
                    self._forget(block)
                    given += block.size
                continue
            first = -(-block.start // self.page) * self.page
            end = (block.start + block.size) // self.page * self.page
            if end <= first:
                continue
            self._forget(block)
            given += end - first
            if block.start + block.size > end:
                rest = block.split(end - block.start)
                insort(self.free, (rest.size, rest.start, rest))
            if first > block.start:
                middle = block.split(first - block.start)
                insort(self.free, (block.size, block.start, block))
                block = middle
            block.state = UNMAPPED
            insort(self.unmapped, block, key=_start)
            for one in (block, block.prev):
                if one and one.next and one.state == one.next.state == UNMAPPED:
                    self.unmapped.remove(one.next)
                    one.absorb_next()
        return given


class Allocator:
    """Replays allocations; `allocated` and `reserved` are bytes now, `peak_*` the most so far.

    Args:
        expandable: whether `expandable_segments:True` is set, as `import llamanb` does.
    """

    def __init__(self, *, expandable: bool = True):
        self._small, self._large = _Pool(SMALL_PAGE, expandable), _Pool(LARGE_PAGE, expandable)
        self.allocated = self.reserved = self.peak_allocated = self.peak_reserved = 0

    def take(self, size: int) -> _Block:
        """Allocates `size` bytes; give the block back with `give`."""
        size = max(ROUND, -(-size // ROUND) * ROUND)
        block, grown = (self._small if size <= SMALL else self._large).take(size)
        self.allocated += block.size
        if self.allocated > self.peak_allocated:
            self.peak_allocated = self.allocated
        if grown:
            self.reserved += grown
            self.peak_reserved = max(self.peak_reserved, self.reserved)
        return block

    def give(self, block: _Block) -> None:
        self.allocated -= block.size
        (self._small if block.size <= SMALL else self._large).give(block)

    def empty_cache(self) -> None:
        """`torch.cuda.empty_cache()`: what is free as a whole goes back to the driver."""
        self.reserved -= self._small.release() + self._large.release()


def _reach(block: _Block) -> int:
    following = block.next
    return block.size + (following.size if following and following.state == UNMAPPED else 0)


def _start(block: _Block) -> int:
    return block.start
