"""Frozen weights of decoder layers in host memory, each layer's brought to the card shortly before it is computed.

A micro-batch reads a layer's weights twice: once on the way up, once on the way down. Between them the card needs
nothing of them, and since they are frozen nothing ever goes back. Two or more buffers on the card take turns: while one
layer is computed, the next one's weights are copied into another. The layers that the way up ends with are those that
the way down begins with, and they stay. Which layer is visited decides all of it; what is expected next is copied
early, and what comes otherwise is copied then, so an order that was not foreseen is slow and never wrong.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from llamanb.tape.workload import ALIGNED

MOST_WAITS = 50_000
"""That are kept until somebody asks: each word of an answer is one for every layer."""


class HostLayer:
    """A layer's frozen weights in one piece of host memory: of its linear layers the weights, and where those are in
    4 bits, their constants. Norms and adapters stay where they are.

    Args:
        layer: with its weights in host memory; they are copied into that piece, and are views of it from then on.
        pinned: whether copies from there can go on beside the GPU's work. Where the driver refuses to pin, `refused`
            says so, and copies take their time.
    """

    def __init__(self, layer: nn.Module, *, pinned: bool):
        self._owners = [owner for module in layer.modules() for owner in _owners(module)]
        tensors = [getattr(owner, name) for owner, name in self._owners]
        self._kinds = [(t.dtype, t.shape, t.numel() * t.element_size()) for t in tensors]
        ends = list(itertools.accumulate(-(-size // ALIGNED) * ALIGNED for _, _, size in self._kinds))
        self._begins, self.size = [0, *ends[:-1]], ends[-1]
        self.memory = torch.empty(self.size, dtype=torch.uint8)
        self.refused = _pin(self.memory) if pinned else ""
        self.home = self.views(self.memory)
        for tensor, view in zip(tensors, self.home, strict=True):
            view.copy_(tensor)
        self.bind(self.home)

    def views(self, memory: Tensor) -> list[Tensor]:
        """The weights as they lie in a copy of `memory`."""
        return [
            memory[begin : begin + size].view(dtype).view(shape)
            for begin, (dtype, shape, size) in zip(self._begins, self._kinds, strict=True)
        ]

    def bind(self, views: Sequence[Tensor]) -> None:
        """Has the layer read its weights from there."""
        for (owner, name), view in zip(self._owners, views, strict=True):
            setattr(owner, name, view)

    def __del__(self):
        if self.memory.is_pinned():
            torch.cuda.cudart().cudaHostUnregister(self.memory.data_ptr())


class StreamedLayers:
    """Brings each of some layers to the card when it is visited.

    Args:
        layers: of the decoder, all of them; those in `numbers` with their weights in host memory.
        numbers: of the layers that are streamed.
        buffers: on the card, two at least: one that is read, one that is filled.
        device: the card.
    """

    def __init__(self, layers: Sequence[nn.Module], numbers: Sequence[int], buffers: int, device: torch.device | str):
        if buffers < 2:
            raise ValueError(f"buffers = {buffers}: one is read while another is filled")
        device = torch.device(device)
        self.hosts = {n: self._home(layers[n], device) for n in numbers}
        size = max(host.size for host in self.hosts.values())
        self.buffers = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(buffers)]
        self._views: dict[tuple[int, int], list[Tensor]] = {}
        """Of a layer in a buffer: to make them takes longer than all else of a visit."""
        self._held: list[int | None] = [None] * buffers
        self._at, self._down = -1, False
        on_gpu = device.type == "cuda"
        self._side = torch.cuda.Stream(device) if on_gpu else None
        self._arrived = [torch.cuda.Event() for _ in range(buffers)] if on_gpu else []
        self.waits: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque(maxlen=MOST_WAITS)
        """Around each wait of the GPU's work for a copy."""
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
        return next((host.refused for host in self.hosts.values() if host.refused), "")

    @staticmethod
    def _home(layer: nn.Module, device: torch.device) -> HostLayer:
        return HostLayer(layer, pinned=device.type == "cuda")

    def visit(self, number: int) -> None:
        """Has the layer's weights on the card before any work that is launched from here on; begins to copy those of
        the layers that come next, into buffers that no work launched so far has yet to read. To be called for every
        layer, streamed or not, before it is computed and before its backward pass."""
        if number == self._at:
            return
        coming = self._coming(number)[: len(self.buffers)]
        self._down, self._at = number < self._at, number
        for layer in coming:
            if layer not in self._held:
                self._fetch(layer, coming)
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
        slot = next(i for i, held in enumerate(self._held) if held not in coming)
        if (before := self._held[slot]) is not None:
            self.hosts[before].bind(self.hosts[before].home)  # whoever reads it without a visit fails, or reads right
        self._held[slot] = number
        host, buffer = self.hosts[number], self.buffers[slot]
        self.copied += host.size
        if self._side is None:
            self._copy(buffer[: host.size], host.memory)
            return
        self._side.wait_stream(torch.cuda.current_stream())  # what was launched so far may still read this buffer
        with torch.cuda.stream(self._side):
            self._copy(buffer[: host.size], host.memory)
            self._arrived[slot].record()

    @staticmethod
    def _copy(buffer: Tensor, memory: Tensor) -> None:
        buffer.copy_(memory, non_blocking=True)

    def _use(self, number: int) -> None:
        slot = self._held.index(number)
        if self._side is not None:
            stream, events = torch.cuda.current_stream(), [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            events[0].record(stream)
            stream.wait_event(self._arrived[slot])
            events[1].record(stream)
            self.waits.append((events[0], events[1]))
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


def _owners(module: nn.Module) -> list[tuple[object, str]]:
    """Where a linear layer keeps what is frozen: (owner, attribute)."""
    if not isinstance(module, nn.Linear) or module.weight.requires_grad:
        return []
    found: list[tuple[object, str]] = [(module.weight, "data")]
    state = getattr(module.weight, "quant_state", None)
    if state is not None:
        found.append((state, "absmax"))
        if state.nested:
            found.append((state.state2, "absmax"))
    return found


def _pin(memory: Tensor) -> str:
    """Pins host memory in place: torch's own pinned memory comes in powers of two. Returns why not, or nothing."""
    with contextlib.suppress(RuntimeError):
        code = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0)
        return "" if int(code) == 0 else f"cudaHostRegister: error {int(code)}"
    return "cudaHostRegister failed"
