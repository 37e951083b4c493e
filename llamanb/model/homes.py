"""Where the frozen weights of a layer wait until it is computed: in host memory, or on disk, from where they are read
into host memory that all such layers share."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor, nn

from llamanb.errors import ModelError
from llamanb.model.weight_files import Span
from llamanb.tape.workload import ALIGNED, STAGED

PARTS = ("", ".absmax", ".nested_absmax")
"""What of a 4-bit weight is frozen and large, as checkpoints name it after the weight; in the order of `_owners`."""
STORED_AS = {torch.uint8: "U8", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""What safetensors calls dtypes."""


class HostMemory:
    """Bytes of host memory, pinned in place where that is asked for and the driver does not refuse."""

    memory = torch.empty(0, dtype=torch.uint8)
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
            for one in self.slots:  # or the error, which leads to all tensors, would be led to by them
                one.number = one.read = None
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
