"""How well attention's backward pass fills a GPU, where the memory-efficient kernel computes it.

One row's head is one block of threads there, and a GPU takes so many of them at once: 32 blocks on 132 multiprocessors
leave three quarters of them idle, 32 on 40 a fifth. Where a head's keys may be split among several blocks, fewer are
idle. `model.row_attention` splits by this, and `speed` predicts by it. Seen on an H200, and taken to be so elsewhere.
"""

from __future__ import annotations

import functools
import math

AMPERE = 8
"""Its major compute capability. Before it the kernel may set memory aside for each part of wide heads."""
NARROW, NARROW_AT_ONCE = 64, 3
"""Blocks that a multiprocessor takes at once with heads up to so wide; of wider ones it takes one."""
ADDING_UP, MOST_PARTS = 174, 16
"""Tokens of a row whose turn takes as long as adding up does. By these, the backward takes 1.01 times as long as with
the best of nine numbers of parts, on average over 23 shapes on an H200, and 1.11 at most
(benchmarks/attention_splits.py, benchmarks/results/speed.md)."""


def blocks_at_once(multiprocessors: int, head_size: int) -> int:
    """Blocks that the GPU takes at once."""
    return multiprocessors * (NARROW_AT_ONCE if head_size <= NARROW else 1)


def may_split(major: int, head_size: int) -> bool:
    """Whether a GPU of this major compute capability may split a head's keys."""
    return head_size <= NARROW or major >= AMPERE


@functools.lru_cache(maxsize=1024)
def best_parts(blocks: int, at_once: int, tokens: int) -> int:
    """Into how many parts the keys of each of so many blocks, of rows of `tokens`, are best split."""
    return min(range(1, MOST_PARTS + 1), key=lambda parts: taken(blocks, at_once, tokens, parts))


def taken(blocks: int, at_once: int, tokens: int, parts: int) -> float:
    """How many turns all blocks take, in turns of a block that is not split: a part takes its share of one, and what is
    split has to be added up."""
    adding_up = math.ceil(blocks / at_once) * ADDING_UP / tokens if parts > 1 else 0
    return math.ceil(blocks * parts / at_once) / parts + adding_up
