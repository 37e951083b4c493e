"""The processes that train one model together: what a training asks of them, and the one that is alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any


class Ranks:
    """This process among those that train together, each with a copy of the model; here the only one.

    All are given the same optimizer step. Each computes its share of the rows, gradients and loss are added up, and
    then all take the same step, so that adapters and optimizer stay alike. Files, scores and decisions are rank 0's.
    `scale.peers.Peers` is one of several.
    """

    number, count, joined = 0, 1, False
    streams: Callable | None = None
    """What brings layers to the card whose weights several ranks share; in the place of `StreamedLayers`."""

    def tell(self, what: Any) -> None:
        """Rank 0's word for the others, who wait for it."""

    def all_of(self, what: Any) -> list:
        """What each rank has to say, in the order of their numbers."""
        return [what]

    def watchers(self, timeline) -> list:
        """Callbacks of the Trainer, which come after those that may end training."""
        return []

    def scoring(self, model) -> AbstractContextManager:
        """Around what rank 0 computes alone."""
        return nullcontext()

    def share(self, lengths: Sequence[int]) -> list[int]:
        """Which of a step's rows, of so many tokens, are this rank's."""
        return list(range(len(lengths)))

    def drawing(self, seed: int, step: int) -> AbstractContextManager:
        """Around a step, in which each rank draws random numbers of its own, for dropout."""
        return nullcontext()

    def summed(self, total, parameters):
        """The sum of all ranks' loss; their gradients are added up in place."""
        return total


ALONE = Ranks()
