"""Frozen weights that several cards share: each keeps a part of every layer, and before a layer is computed all parts
are gathered on each card. Streamed layers (model/streamed.py) whose copies come from the other cards.

A gathering takes all ranks, so they go through the same layers in the same order: as many micro-batches each (one that
has no rows left, or no memory, visits them without computing), and while rank 0 scores alone, the others `serve` what
it visits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import nn

from llamanb.attempts import is_out_of_memory
from llamanb.model.quantized import QuantizedLayers, now_and_then
from llamanb.model.streamed import HostLayer, StreamedLayers
from llamanb.scale.peers import Peers
from llamanb.tape.workload import ALIGNED


class Shard(HostLayer):
    """This rank's part of a layer's frozen weights, on its card; of one that is not gathered nothing can be read."""

    def __init__(self, layer: nn.Module, ranks: Peers, device: torch.device):
        super().__init__(layer, pinned=False)
        part = -(-self.size // (ranks.count * ALIGNED)) * ALIGNED
        whole = torch.zeros(part * ranks.count, dtype=torch.uint8)
        whole[: self.size] = self.memory
        self.size, self.memory = len(whole), whole.view(ranks.count, part)[ranks.number].to(device, copy=True)
        self.home = [torch.empty(0, dtype=view.dtype, device=device) for view in self.home]
        self.bind(self.home)


class ShardedLayers(StreamedLayers):
    """Gathers each layer when it is visited; otherwise as StreamedLayers.

    Args:
        ranks: that share the layers; all of them make this with the same layers and number of buffers.
        shards: their parts here, by number.
    """

    def __init__(self, ranks: Peers, layers: Sequence[nn.Module], shards: Mapping[int, Shard], buffers: int, device):
        self.ranks, self.leads, self._top = ranks, False, len(layers) - 1
        super().__init__(layers, shards, buffers, device)

    def _fetch(self, number: int, coming: Sequence[int]) -> None:
        if self.leads:
            self.ranks.tell(number)
        super()._fetch(number, coming)

    def _copy(self, buffer: torch.Tensor, memory: torch.Tensor) -> None:
        with self.ranks.meeting():
            dist.all_gather_into_tensor(buffer, memory)

    @contextlib.contextmanager
    def passes(self, count: int) -> Iterator[Callable[[], None]]:
        """Goes up and down through the layers as often as the rank with most micro-batches does, also when this one's
        memory runs out."""
        most, begun = max(self.ranks.all_of(count)), 0

        def begin() -> None:
            nonlocal begun
            begun, self._down = begun + 1, False

        try:
            yield begin
        except BaseException as error:
            if is_out_of_memory(error):  # else this rank ends, and so do all
                self._finish(begun, most)
            raise
        self._finish(begun, most)

    def _finish(self, begun: int, most: int) -> None:
        if begun:
            self._rest()
        for _ in range(most - begun):
            self._down = False
            self._rest()

    def _rest(self) -> None:
        """The visits that the micro-batch at hand still has, with nothing computed: the others need these parts."""
        with torch.enable_grad():  # as in the micro-batch that they compute: it says what comes next
            for number in () if self._down else range(max(self._at, 0), self._top + 1):
                self.visit(number)
            for number in range(self._at - 1, -1, -1):
                self.visit(number)

    @contextlib.contextmanager
    def leading(self) -> Iterator[None]:
        """Rank 0 computes alone, in an order of its own; the others `serve` meanwhile."""
        self._forget()
        self.leads = True
        try:
            yield
        finally:
            self.leads = False
            self.ranks.tell(None)
            self._forget()

    def serve(self) -> None:
        """Takes part in what rank 0 gathers, until it has done with it."""
        self._forget()
        while (number := self.ranks.told()) is not None:
            self._fetch(number, (number,))
        self._forget()

    def _forget(self) -> None:
        """Nothing is on the card: from here on all ranks hold the same again."""
        for held in self._held:
            if held is not None:
                self.hosts[held].bind(self.hosts[held].home)
        self._held, self._at, self._down = [None] * len(self.buffers), -1, False


class Sharing:
    """Makes a rank's shards, and what gathers them: what loading asks for in the place of StreamedLayers."""

    def __init__(self, ranks: Peers):
        self.ranks, self.says = ranks, ranks.number == 0

    def make_together(self, cache: QuantizedLayers, depth: int) -> None:
        """Has each rank quantize some of the layers that are to be kept on disk, from where all then read them."""
        tell = now_and_then(self.says)
        for number in range(self.ranks.number, depth, self.ranks.count):
            tell(f"{number} of {depth} layers in 4 bits, by {self.ranks.count} ranks")
            cache.layer(number)
        for hashes in self.ranks.all_of(cache.hashes):
            cache.hashes |= hashes
        if self.says:
            with contextlib.suppress(OSError):  # else the next training quantizes again
                cache.note()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Around what rank 0 does while the others wait."""
        self.ranks.all_of(None)
        yield
        self.ranks.all_of(None)

    def home(self, layer: nn.Module, device: torch.device) -> Shard:
        return Shard(layer, self.ranks, device)

    def __call__(self, layers: Sequence[nn.Module], shards: Mapping[int, Shard], buffers: int, device) -> ShardedLayers:
        return ShardedLayers(self.ranks, layers, shards, buffers, device)
