"""Frozen weights of decoder layers in host memory or on disk, each layer's brought to the card shortly before it is
computed.

A micro-batch reads a layer's weights twice: once on the way up, once on the way down. Between them the card needs
nothing of them, and since they are frozen nothing ever goes back. Two or more buffers on the card take turns: while one
layer is computed, the next one's weights are copied into another. The layers that the way up ends with are those that
the way down begins with, and they stay. Which layer is visited decides all of it; what is expected next is copied
early, and what comes otherwise is copied then, so an order that was not foreseen is slow and never wrong.

What waits on disk is read into host memory in that order too, by a thread, and copied from there.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from llamanb.model.homes import DiskLayer, HostLayer, Slot, Staging

MOST_WAITS = 50_000
"""That are kept until somebody asks: each word of an answer is one for every layer."""


class StreamedLayers:
    """Brings each of some layers to the card when it is visited.

    Args:
        layers: of the decoder, all of them; those in `numbers` with their weights in host memory.
        numbers: of the layers that are streamed; or their homes, by number, where `home` made them already.
        buffers: on the card, two at least: one that is read, one that is filled.
        device: the card.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        numbers: Sequence[int] | Mapping[int, HostLayer],
        buffers: int,
        device: torch.device | str,
    ):
        if buffers < 2:
            raise ValueError(f"buffers = {buffers}: one is read while another is filled")
        device = torch.device(device)
        made = isinstance(numbers, Mapping)
        self.hosts = dict(numbers) if made else {n: self.home(layers[n], device) for n in numbers}
        size = max(host.size for host in self.hosts.values())
        self.buffers = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(buffers)]
        self._views: dict[tuple[int, int], list[Tensor]] = {}
        """Of a layer in a buffer: to make them takes longer than all else of a visit."""
        self._held: list[int | None] = [None] * buffers
        self._at, self._down = -1, False
        on_gpu = device.type == "cuda"
        on_disk = {number: host for number, host in self.hosts.items() if isinstance(host, DiskLayer)}
        self.staging = Staging(on_disk, pinned=on_gpu) if on_disk else None
        self._side = torch.cuda.Stream(device) if on_gpu else None
        self._arrived = [torch.cuda.Event() for _ in range(buffers)] if on_gpu else []
        self.waits: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque(maxlen=MOST_WAITS)
        """Around each wait of the GPU's work for a copy, or for the disk."""
        self.copied = 0
        """Bytes brought to the card so far."""
        for number, layer in enumerate(layers):
            layer.register_forward_pre_hook(lambda module, args, number=number: self.visit(number))

    @property
    def size(self) -> int:
        """Bytes of all streamed layers."""
        return sum(host.size for host in self.hosts.values())

    @property
    def refused(self) -> str:
        """Why host memory is not pinned, where it is not."""
        taken = (*self.hosts.values(), *(self.staging.slots if self.staging else ()))
        return next((one.refused for one in taken if one.refused), "")

    @property
    def brings(self) -> str:
        """What each pass through all layers takes, in words."""
        said = f"{self.size / 1e9:.3g} GB of weights to the card"
        if self.staging is None:
            return said
        return f"{said}, {sum(host.size for host in self.staging.layers.values()) / 1e9:.3g} of them from disk"

    @staticmethod
    def home(layer: nn.Module, device: torch.device) -> HostLayer:
        """Where a layer's weights wait."""
        return HostLayer(layer, pinned=device.type == "cuda")

    def visit(self, number: int) -> None:
        """Has the layer's weights on the card before any work that is launched from here on; begins to copy those of
        the layers that come next, into buffers that no work launched so far has yet to read. To be called for every
        layer, streamed or not, before it is computed and before its backward pass."""
        if number == self._at:
            return
        order = self._coming(number)
        coming = order[: len(self.buffers)]
        for layer in coming:
            if layer not in self._held:
                self._fetch(layer, coming)
        self._down, self._at = number < self._at, number
        if self.staging:
            self.staging.expect(layer for layer in order if layer not in self._held)
        if number in self.hosts:
            self._use(number)

    def passes(self, count: int) -> contextlib.AbstractContextManager[Callable[[], None]]:
        """Around so many micro-batches; what it gives is to be called as each begins."""
        return contextlib.nullcontext(lambda: None)

    def stalled_s(self) -> float:
        """Seconds that the GPU's work has waited for copies since this was last asked; waits until it is done."""
        if not self.waits:
            return 0.0
        self.waits[-1][1].synchronize()
        milliseconds = sum(begin.elapsed_time(end) for begin, end in self.waits)
        self.waits.clear()
        return milliseconds / 1e3

    def _coming(self, number: int) -> list[int]:
        """Streamed layers in the order in which they will be read next, each once, from `number` on. On the way up they
        turn at the top where a backward pass follows, and else begin at the bottom again; on the way down they turn at
        the bottom, for the next micro-batch."""
        up, down = sorted(self.hosts), sorted(self.hosts, reverse=True)
        if number > self._at:
            rest = down if torch.is_grad_enabled() else up
            return [n for n in up if n >= number] + [n for n in rest if n < number]
        return [n for n in down if n <= number] + [n for n in up if n > number]

    def _fetch(self, number: int, coming: Sequence[int]) -> None:
        staged = self._staged(number)
        slot = next(i for i, held in enumerate(self._held) if held not in coming)
        if (before := self._held[slot]) is not None:
            self.hosts[before].bind(self.hosts[before].home)  # whoever reads it without a visit fails, or reads right
        self._held[slot] = number
        host, buffer, copied = self.hosts[number], self.buffers[slot], None
        memory = staged.memory[: host.size] if staged else host.memory
        self.copied += host.size
        if self._side is None:
            self._copy(buffer[: host.size], memory)
        else:
            self._side.wait_stream(torch.cuda.current_stream())  # what was launched so far may still read this buffer
            with torch.cuda.stream(self._side):
                self._copy(buffer[: host.size], memory)
                self._arrived[slot].record()
                copied = self._side.record_event() if staged else None
        if staged:
            self.staging.give_back(staged, copied)

    def _staged(self, number: int) -> Slot | None:
        """The host memory that a layer from disk is in by now; None for one that waits in host memory itself."""
        if self.staging is None or number not in self.staging.layers:
            return None
        with self._waiting():  # the host does, and launches nothing
            return self.staging.take(number)

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        """Notes how long the GPU's work waits for what is done in it."""
        if self._side is None:
            yield
            return
        stream, events = torch.cuda.current_stream(), [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record(stream)
        yield
        events[1].record(stream)
        self.waits.append((events[0], events[1]))

    @staticmethod
    def _copy(buffer: Tensor, memory: Tensor) -> None:
        buffer.copy_(memory, non_blocking=True)

    def _use(self, number: int) -> None:
        slot = self._held.index(number)
        if self._side is not None:
            with self._waiting():
                torch.cuda.current_stream().wait_event(self._arrived[slot])
        if (number, slot) not in self._views:
            self._views[number, slot] = self.hosts[number].views(self.buffers[slot])
        self.hosts[number].bind(self._views[number, slot])


class HostEmbedding(nn.Embedding):
    """A frozen token embedding in host memory: the rows that are looked up are copied to where their ids are.

    Args:
        table: (tokens of the vocabulary, hidden).
        device: where the model is; a `weight` without rows says so.
    """

    def __init__(self, table: Tensor, device: torch.device | str):
        super().__init__(*table.shape, device="meta")
        self.table = table.cpu()
        self.weight = nn.Parameter(table.new_empty(0, table.shape[1], device=device), requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.embedding(ids.cpu(), self.table).to(ids.device)
