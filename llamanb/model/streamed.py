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
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor, nn

from llamanb.errors import ModelError
from llamanb.model.weight_files import Span
from llamanb.tape.workload import ALIGNED, STAGED

MOST_WAITS = 50_000
"""That are kept until somebody asks: each word of an answer is one for every layer."""
PARTS = ("", ".absmax", ".nested_absmax")
"""What of a 4-bit weight is frozen and large, as checkpoints name it after the weight; in the order of `_owners`."""
STORED_AS = {torch.uint8: "U8", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""What safetensors calls dtypes."""


class HostMemory:
    """Bytes of host memory, pinned in place where that is asked for and the driver does not refuse."""

    memory: Tensor
    refused = ""
    """Why it is not pinned."""

    def take(self, size: int, *, pinned: bool) -> None:
        self.memory = torch.empty(size, dtype=torch.uint8)
        self.refused = _pin(self.memory) if pinned else ""

    def __del__(self):
        if self.memory.is_pinned():
            torch.cuda.cudart().cudaHostUnregister(self.memory.data_ptr())


class HostLayer(HostMemory):
    """A layer's frozen weights in one piece of host memory: of its linear layers the weights, and where those are in
    4 bits, their constants. Norms and adapters stay where they are.

    Args:
        layer: with its weights in host memory; they are copied into that piece, and are views of it from then on.
        pinned: whether copies from there can go on beside the GPU's work. Where the driver refuses to pin, `refused`
            says so, and copies take their time.
    """

    def __init__(self, layer: nn.Module, *, pinned: bool):
        tensors = self._lay_out(layer)
        self.take(self.size, pinned=pinned)
        self.home = self.views(self.memory)
        for tensor, view in zip(tensors, self.home, strict=True):
            view.copy_(tensor)
        self.bind(self.home)

    def _lay_out(self, layer: nn.Module) -> list[Tensor]:
        """Says what lies where; returns the weights as they are."""
        self._owners = [owner for module in layer.modules() for owner in _owners(module)]
        tensors = [getattr(owner, name) for owner, name in self._owners]
        self._kinds = [(t.dtype, t.shape, t.numel() * t.element_size()) for t in tensors]
        ends = list(itertools.accumulate(-(-size // ALIGNED) * ALIGNED for _, _, size in self._kinds))
        self._begins, self.size = [0, *ends[:-1]], ends[-1]
        return tensors

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


class DiskLayer(HostLayer):
    """A layer's frozen weights in files, to be read into host memory in the order that HostLayer has. Without a visit
    nothing of them can be read.

    Args:
        layer: with its weights in 4 bits; they are let go of.
        where: each of them lies, by its name.
        name: of the layer.

    Raises ModelError where a file does not hold what was loaded.
    """

    def __init__(self, layer: nn.Module, where: Callable[[str], Span], name: str):
        self.memory = torch.empty(0, dtype=torch.uint8)
        tensors = self._lay_out(layer)
        linear = [(path, module) for path, module in layer.named_modules() if _owners(module)]
        names = [f"{name}.{path}.weight{part}" for path, module in linear for part in PARTS[: len(_owners(module))]]
        self._spans = [where(one) for one in names]
        for one, span, tensor in zip(names, self._spans, tensors, strict=True):
            if (span.size, span.dtype) != (tensor.nbytes, STORED_AS.get(tensor.dtype)):
                why = f"{one}: {span.size:,} bytes ({span.dtype}) there, {tensor.nbytes:,} ({tensor.dtype}) here"
                fix = "take the model's 16-bit checkpoint: its layers are kept in 4 bits here"
                raise ModelError(f"layers of {span.file.path} cannot wait on disk", why, fix)
        self.home = [torch.empty(0, dtype=tensor.dtype) for tensor in tensors]
        self.bind(self.home)

    @property
    def path(self):
        """A file that it is read from."""
        return self._spans[0].file.path

    def read(self, memory: Tensor) -> None:
        """Its weights into host memory. Raises ModelError where that cannot be done."""
        into = memoryview(memory.numpy())
        for begin, span in zip(self._begins, self._spans, strict=True):
            span.file.read_into(into[begin : begin + span.size], span.offset)


class Slot(HostMemory):
    """Host memory that one layer after the other is read into."""

    def __init__(self, size: int, *, pinned: bool):
        self.take(size, pinned=pinned)
        self.number: int | None = None
        """Of the layer that is in it, or that is being read; None: of none that is still to be copied."""
        self.read: Future | None = None
        self.copied: torch.cuda.Event | None = None
        """After which it may be read into again."""


class Staging:
    """Layers on their way from the disk: a thread reads those that come next into host memory that they share. The
    thread ends with this.

    Args:
        layers: that wait on disk, by number.
        pinned: as in HostLayer.
    """

    def __init__(self, layers: Mapping[int, DiskLayer], *, pinned: bool, slots: int = STAGED):
        size = max(layer.size for layer in layers.values())
        self.layers, self.slots = layers, [Slot(size, pinned=pinned) for _ in range(slots)]
        self._order: list[int] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="llamanb-disk")
        self.read = 0
        """Bytes so far."""

    def expect(self, order: Iterable[int]) -> None:
        """Begins to read those layers that will be asked for first, in that order, as far as there is memory."""
        self._order = [number for number in order if number in self.layers]
        first = self._order[: len(self.slots)]
        for number in first:
            if number not in [slot.number for slot in self.slots]:
                idle = (slot for slot in self.slots if slot.number not in first)
                slot = min(idle, key=lambda one: one.number is not None)  # what is in it was read in vain, else
                self.read += self.layers[number].size
                slot.number = number
                slot.read = self._thread.submit(_read, self.layers[number], slot.memory, slot.copied)

    def take(self, number: int) -> Slot:
        """The memory that the layer is in; waits until it is read. Raises ModelError where it cannot be."""
        if number not in [slot.number for slot in self.slots]:
            self.expect([number, *(other for other in self._order if other != number)])
        slot = next(slot for slot in self.slots if slot.number == number)
        try:
            slot.read.result()
        except Exception:
            for one in self.slots:  # or what failed as well would be told again, should somebody go on
                one.number = None
            raise
        return slot

    def give_back(self, slot: Slot, copied: torch.cuda.Event | None) -> None:
        """Has another layer be read into that memory after `copied`."""
        self._order = [number for number in self._order if number != slot.number]
        slot.number, slot.copied = None, copied


def _read(layer: DiskLayer, memory: Tensor, copied: torch.cuda.Event | None) -> None:
    if copied is not None:
        copied.synchronize()
    layer.read(memory)


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
