"""What padding costs, and what packing would save: several rows end to end where one row and its padding stand today.

llamanb pads: a micro-batch is as long as its longest row. Nothing here changes a training.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from llamanb.html import Table


def pack(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Which rows (by number) go together into sequences of at most `max_length` tokens: first-fit decreasing.

    The longest row first, each into the first sequence with room for it: at most 11/9 of the fewest sequences possible,
    and 6/9 of one more (Dósa 2007). A tree finds the first with room, so a million rows take seconds.
    """
    assert max(lengths, default=0) <= max_length, "rows over max_length fit nowhere"
    leaves = 1 << max(len(lengths) - 1, 0).bit_length()
    room = [max_length] * (2 * leaves)  # from `leaves` on that of each sequence, above any two the larger of them
    sequences: list[list[int]] = [[] for _ in lengths]
    for row in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        node = 1
        while node < leaves:
            node = 2 * node + (room[2 * node] < lengths[row])
        sequences[node - leaves].append(row)
        room[node] -= lengths[row]
        while node := node // 2:
            room[node] = max(room[2 * node], room[2 * node + 1])
    return [rows for rows in sequences if rows]


class Packing:
    """One pass over rows of these lengths (tokens), padded and packed; prints as a table.

    Args:
        lengths: tokens of each row; those over `max_length` are left out.
        max_length: of a packed sequence, in tokens.
        micro_batch_size: rows that are computed, and therefore padded, together.
        effective_batch_size: rows of an optimizer step.
        seed: of the random order in which rows meet in a micro-batch.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        max_length: int,
        *,
        micro_batch_size: int,
        effective_batch_size: int = 16,
        seed: int = 0,
    ):
        self.lengths = [length for length in lengths if length <= max_length]
        self.max_length, self.micro_batch_size, self.step_rows = max_length, micro_batch_size, effective_batch_size
        order = random.Random(seed).sample(self.lengths, len(self.lengths))
        self.micro_batches = [order[i : i + micro_batch_size] for i in range(0, len(order), micro_batch_size)]
        self.sequences = pack(self.lengths, max_length)
        self.real = sum(self.lengths)
        self.padded = sum(len(rows) * max(rows) for rows in self.micro_batches)
        """Tokens computed when each micro-batch is filled up to its longest row."""
        self.packed = len(self.sequences) * max_length
        """Tokens computed when each sequence is filled up to `max_length`."""

    def _table(self) -> Table:
        rows = len(self.lengths)

        def column(made_of: str, computed: int) -> list[str]:
            padding = f"{computed - self.real:,} ({1 - self.real / (computed or 1):.0%})"
            a_step, real = (f"{tokens / (rows or 1) * self.step_rows:,.0f}" for tokens in (computed, self.real))
            return [made_of, f"{computed:,}", f"{self.real:,}", padding, f"{a_step} computed, {real} real"]

        names = ["computed in", "tokens computed", "real ones", "padding", f"tokens of {self.step_rows} rows, a step"]
        padded = column(f"{len(self.micro_batches):,} micro-batches of {self.micro_batch_size} rows", self.padded)
        packed = column(f"{len(self.sequences):,} sequences of {self.max_length:,} tokens", self.packed)
        caption = f"one pass over the {rows:,} rows of at most {self.max_length:,} tokens"
        return Table(["", "padded, as today", "packed"], list(zip(names, padded, packed, strict=True)), caption)

    def __str__(self) -> str:
        return str(self._table())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return self._table()._repr_html_()
