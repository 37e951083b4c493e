"""The base's weights as a merge takes them: those of the 16-bit checkpoint, or what the adapter was trained on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import bitsandbytes.functional as bnb
import torch

from llamanb.architecture import BLOCK
from llamanb.export.read import pieces, read_rows
from llamanb.export.stored import Stored
from llamanb.recipe import LINEAR_LAYERS

NESTED_BLOCK = 256
"""Constants that share a constant, as weights share one in BLOCK: bitsandbytes' own sizes, which training takes."""
QUANT_STATE = ".quant_state.bitsandbytes__"
"""Between a weight's name and its kind, in checkpoints that are stored in 4 bits."""


@dataclass(frozen=True)
class Base:
    """A checkpoint, and what training made of it when it loaded it.

    Args:
        tensors: of the checkpoint.
        computed: the dtype that training computed in, to which it cast each weight first; None: the weights as they
            are stored.
        quantization: what training quantized the linear layers to: nf4, fp4, int8 or None.
        double: whether it quantized the constants too.
    """

    tensors: dict[str, Stored]
    computed: torch.dtype | None = None
    quantization: str | None = None
    double: bool = False
    weights: dict[str, tuple[int, ...]] = field(init=False)
    """Shape of each weight, by name; one that is stored in 4 bits has the shape that it stands for."""

    def __post_init__(self):
        shapes = {}
        for name, tensor in self.tensors.items():
            _, _, rest = name.partition(".weight.")
            if rest or name.endswith((".SCB", ".weight_format", "rotary_emb.inv_freq")):
                continue  # constants of a quantized weight, and what is computed anew
            shapes[name] = tuple(self._saved_state(name).shape) if self._is_packed(name) else tensor.shape
        object.__setattr__(self, "weights", shapes)

    def rows(self, name: str) -> Iterator[tuple[int, torch.Tensor]]:
        """(first row, some rows in fp32) of a weight, from its first row to its last."""
        if self._is_packed(name):
            return self._unpacked(name)
        if name.removesuffix(".weight").endswith(LINEAR_LAYERS):
            if self.quantization in ("nf4", "fp4"):
                return self._four_bits(name)
            if self.quantization == "int8":
                return self._eight_bits(name)
        return ((first, part.float()) for first, part in self._stored(name))

    def _stored(self, name: str) -> Iterator[tuple[int, torch.Tensor]]:
        """Rows in the dtype that training computed in, or as they are."""
        for first, last in pieces(self.tensors[name].shape):
            part = read_rows(self.tensors[name], first, last)
            yield first, part if self.computed is None else part.to(self.computed)

    def _four_bits(self, name: str) -> Iterator[tuple[int, torch.Tensor]]:
        """A weight quantized and dequantized as `load_model` and the products after it do, a piece at a time: blocks
        do not touch each other, only the constants are quantized all together."""
        packed, constants, width = [], [], self.weights[name][1]
        for first, part in self._stored(name):
            bits, state = bnb.quantize_4bit(part, blocksize=BLOCK, quant_type=self.quantization)
            packed.append((first, part.shape, bits))
            constants.append(state.absmax)
        absmax = torch.cat(constants)
        if self.double:
            offset = absmax.mean()
            nested, state = bnb.quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK)
            absmax = bnb.dequantize_blockwise(nested, state) + offset
        for first, shape, bits in packed:
            begin = first * width // BLOCK
            own = absmax[begin : begin + -(-shape.numel() // BLOCK)].contiguous()
            yield first, _dequantized(bits, own, shape, self.quantization, self.computed)

    def _eight_bits(self, name: str) -> Iterator[tuple[int, torch.Tensor]]:
        """LLM.int8 (Dettmers et al. 2022): each row by its largest; bitsandbytes does it in fp16."""
        scales = self.tensors.get(name.removesuffix("weight") + "SCB")  # where the checkpoint is stored so
        for first, last in pieces(self.tensors[name].shape):
            values = read_rows(self.tensors[name], first, last)
            if scales:
                largest = read_rows(scales, first, last)
            else:
                values, largest, _ = bnb.int8_vectorwise_quant(values.to(self.computed).half())
            yield first, bnb.int8_vectorwise_dequant(values, largest).to(self.computed).float()

    def _unpacked(self, name: str) -> Iterator[tuple[int, torch.Tensor]]:
        """A weight that the checkpoint stores in 4 bits."""
        state = self._saved_state(name)
        absmax = state.absmax
        if state.nested:
            absmax = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
        bits, width = read_rows(self.tensors[name]).reshape(-1), state.shape[1]
        for first, last in pieces(tuple(state.shape)):
            own = bits[first * width // 2 : -(-last * width // 2)]
            constants = absmax[first * width // state.blocksize : -(-last * width // state.blocksize)].contiguous()
            shape = torch.Size([last - first, width])
            yield (
                first,
                _dequantized(own, constants, shape, state.quant_type, self.computed or state.dtype, state.blocksize),
            )

    def _is_packed(self, name: str) -> bool:
        return any(f"{name}{QUANT_STATE}{kind}" in self.tensors for kind in ("nf4", "fp4"))

    def _saved_state(self, name: str) -> bnb.QuantState:
        saved = {n.removeprefix(f"{name}."): read_rows(t) for n, t in self.tensors.items() if n.startswith(f"{name}.")}
        return bnb.QuantState.from_dict(saved, device=torch.device("cpu"))


def _dequantized(bits: torch.Tensor, absmax: torch.Tensor, shape: torch.Size, kind: str, dtype, block: int = BLOCK):
    """Rows in fp32, by way of the dtype that training computed in. On a CPU, bitsandbytes (0.50) gives rows that are
    no whole number of blocks wide each other's constants; here each block is a row."""
    blocks = torch.Size([shape.numel() // block, block]) if shape.numel() % block == 0 else shape
    state = bnb.QuantState(absmax=absmax.float(), shape=blocks, dtype=dtype, blocksize=block, quant_type=kind)
    return bnb.dequantize_4bit(bits.reshape(-1, 1), state).view(shape).float()
