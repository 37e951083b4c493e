"""What padding costs: one pass over rows that are filled up to the longest of each micro-batch, or lie end to end."""

from __future__ import annotations

import random
from collections.abc import Sequence

from llamanb.data.packing import pack
from llamanb.html import Table


class Packing:
    """One pass over rows of these lengths (tokens), padded and end to end; prints as a table.

    Args:
        lengths: tokens of each row; those over `max_length` are left out.
        max_length: of a row, in tokens.
        micro_batch_size: rows that are computed, and would be padded, together; end to end it is as many tokens as that
            many of the longest rows have.
        effective_batch_size: rows of an optimizer step.
        seed: of the random order in which rows meet.
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
        self.max_length, self.step_rows = max_length, effective_batch_size
        order = random.Random(seed).sample(self.lengths, len(self.lengths))
        steps = _cut(order, effective_batch_size)
        self.padded = [rows for step in steps for rows in _cut(step, micro_batch_size)]
        """Lengths of the rows of each micro-batch, in the order in which they come."""
        most = micro_batch_size * max(self.lengths, default=0)
        self.packed = [[step[row] for row in rows] for step in steps for rows in pack(step, most)]
        self.real = sum(self.lengths)

    @property
    def padded_tokens(self) -> int:
        """Tokens computed when each micro-batch is filled up to its longest row."""
        return sum(len(rows) * max(rows) for rows in self.padded)

    def _table(self) -> Table:
        def column(batches: list[list[int]], computed: int) -> list[str]:
            padding = f"{computed - self.real:,} ({1 - self.real / (computed or 1):.0%})"
            a_step = f"{computed / (len(self.lengths) or 1) * self.step_rows:,.0f}"
            return [f"{len(batches):,} micro-batches", f"{computed:,}", padding, a_step]

        names = ["computed in", "tokens computed", "of them padding", f"a step of {self.step_rows} rows, tokens"]
        columns = column(self.padded, self.padded_tokens), column(self.packed, self.real)
        caption = f"one pass over the {len(self.lengths):,} rows of at most {self.max_length:,} tokens"
        return Table(["", "padded", "end to end"], list(zip(names, *columns, strict=True)), caption)

    def __str__(self) -> str:
        return str(self._table())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return self._table()._repr_html_()


def _cut(lengths: list[int], size: int) -> list[list[int]]:
    return [lengths[i : i + size] for i in range(0, len(lengths), size)]
