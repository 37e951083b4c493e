"""Linear layers that read one value: frozen weights, 4-bit or not, with LoRA adapters, as one step of autograd.

What the value is made of (`Prologue`) is kept, the value is made again. Weights are dequantized for each product and
never kept; adapters are added by products that accumulate (`addmm`), from copies in the layers' dtype that are made
once for an optimizer step. Gradients reach the adapters and the inputs: weights are frozen.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from llamanb.model.elementwise import dequantize


class Prologue(NamedTuple):
    """What happens to a product's inputs first. Both functions are elementwise, or nearly."""

    value: Callable[..., Tensor]
    """inputs -> (tokens, width)"""
    backward: Callable[..., tuple[Tensor, ...]]
    """gradient of the value, inputs -> gradient of each input"""


class Linear(NamedTuple):
    """One frozen linear layer with the adapter on it, if any."""

    base: nn.Module
    scale: float
    down: Tensor | None
    """LoRA's A: (rank, in)."""
    up: Tensor | None
    """LoRA's B: (out, rank)."""

    @classmethod
    def of(cls, module: nn.Module) -> Linear:
        if not isinstance(module, LoraLayer):
            return cls(module, 1.0, None, None)
        name = module.active_adapters[0]
        down, up = module.lora_A[name].weight, module.lora_B[name].weight
        return cls(module.get_base_layer(), module.scaling[name], down, up)

    def weight(self, dtype: torch.dtype) -> Tensor:
        """(out, in), dequantized."""
        weight = self.base.weight
        return (dequantize(weight) if hasattr(weight, "quant_state") else weight.detach()).to(dtype)


class Copies(NamedTuple):
    """The adapters of a part in the layers' dtype."""

    down: Tensor
    """Every A, one below the other, times its scale: (sum of ranks, in)."""
    ups: tuple[Tensor, ...]
    """Every B: (out, rank)."""


def nothing() -> None:
    """What a visit is where weights are always there."""


class Part:
    """Linear layers that read the same value; `visit` is called before their weights are read."""

    copies: Copies | None = None
    """Of the adapters, for as long as an optimizer step takes."""

    def __init__(self, prologue: Prologue, *modules: nn.Module, visit: Callable[[], None] = nothing):
        self.prologue, self.linears, self.visit = prologue, tuple(map(Linear.of, modules)), visit
        adapted = [(i, linear) for i, linear in enumerate(self.linears) if linear.down is not None]
        ranks = [len(linear.down) for _, linear in adapted]
        ends = itertools.accumulate(ranks)
        self.places = [(i, slice(end - rank, end)) for (i, _), rank, end in zip(adapted, ranks, ends, strict=True)]
        """Which linear layers have adapters, and where each one's rank lies among all."""
        self.scales = [linear.scale for _, linear in adapted]
        self.adapters = (*(linear.down for _, linear in adapted), *(linear.up for _, linear in adapted))
        """Every A, then every B."""

    def copy_in(self, flat: Tensor) -> list[Tensor]:
        """Makes `copies` in a tensor of as many elements; returns the place of each of `adapters`."""
        downs, ups = self.adapters[: len(self.places)], self.adapters[len(self.places) :]
        down, *rest = flat.split([sum(t.numel() for t in downs), *(t.numel() for t in ups)])
        down = down.view(-1, downs[0].shape[1])
        self.copies = Copies(down, tuple(t.view_as(up) for t, up in zip(rest, ups, strict=True)))
        return [*(down[at] for _, at in self.places), *self.copies.ups]

    def __call__(self, *inputs: Tensor, residual: Tensor | None = None) -> tuple[Tensor, ...]:
        """Each linear layer's output, (tokens, out); `residual` is added to the only one."""
        return _Products.apply(self, residual, len(inputs), *inputs, *self.adapters)

    def compute(self, residual: Tensor | None, inputs: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """Outputs, and the value in the adapters' low rank: (tokens, sum of ranks)."""
        self.visit()
        value = self.prologue.value(*inputs)
        low = value @ self.copies.down.t() if self.places else None
        outputs = tuple(_product(value, linear, residual) for linear in self.linears)
        if low is not None:
            for (i, at), up in zip(self.places, self.copies.ups, strict=True):
                outputs[i].addmm_(low[:, at], up.t())
        return outputs, low

    def gradients(
        self, inputs: Sequence[Tensor], low: Tensor | None, gradients: Sequence[Tensor], wanted: bool
    ) -> tuple[tuple[Tensor | None, ...], list[Tensor]]:
        """Gradients of the inputs (where `wanted`) and of the adapters. `low` as `compute` made it; made again where it
        was not kept."""
        self.visit()
        of_low, of_adapters = None, []
        if self.places:
            value = self.prologue.value(*inputs)
            low = value @ self.copies.down.t() if low is None else low
            of_low, of_adapters = self._of_adapters(value, low, gradients)
            del value
        if not wanted:
            return (None,) * len(inputs), of_adapters
        of_value = None
        for linear, gradient in zip(self.linears, gradients, strict=True):
            of_value = _product_backward(gradient, linear, of_value)
        if of_low is not None:
            of_value.addmm_(of_low, self.copies.down)
        return self.prologue.backward(of_value, *inputs), of_adapters

    def _of_adapters(self, value: Tensor, low: Tensor, gradients: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The gradient of `low`, and those of each adapter's A and B."""
        of_low, of_ups = torch.empty_like(low), []
        for (i, at), up in zip(self.places, self.copies.ups, strict=True):
            torch.mm(gradients[i], up, out=of_low[:, at])
            of_ups.append(_wide(gradients[i].t(), low[:, at]))
        of_downs = _wide(of_low.t(), value)
        scaled = (of_downs[at] * scale for (_, at), scale in zip(self.places, self.scales, strict=True))
        return of_low, [*scaled, *of_ups]


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx, part: Part, residual: Tensor | None, count: int, *tensors: Tensor):
        outputs, low = part.compute(residual, tensors[:count])
        ctx.part, ctx.count, ctx.has_residual = part, count, residual is not None
        ctx.save_for_backward(*tensors[:count], *([] if low is None else [low]))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor):
        inputs, low = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        wanted = any(ctx.needs_input_grad[3 : 3 + ctx.count])
        of_inputs, of_adapters = ctx.part.gradients(inputs, low[0] if low else None, gradients, wanted)
        return None, gradients[0] if ctx.has_residual else None, None, *of_inputs, *of_adapters


def _product(value: Tensor, linear: Linear, residual: Tensor | None) -> Tensor:
    weight = linear.weight(value.dtype).t()
    return value @ weight if residual is None else torch.addmm(residual, value, weight)


def _product_backward(gradient: Tensor, linear: Linear, sum_: Tensor | None) -> Tensor:
    weight = linear.weight(gradient.dtype)
    return gradient @ weight if sum_ is None else sum_.addmm_(gradient, weight)


def _wide(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in fp32: an adapter's gradient is summed over all tokens, and may leave fp16's range on the way."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).float()


def copy_adapters(parts: Sequence[Part], like: Tensor) -> None:
    """Sets each part's `copies`: the adapters as they are now, in one tensor of the dtype and device of `like`."""
    adapters = [t.detach() for part in parts for t in part.adapters]
    sizes = [sum(t.numel() for t in part.adapters) for part in parts]
    pieces = like.new_empty(sum(sizes)).split(sizes)
    torch._foreach_copy_([t for part, piece in zip(parts, pieces, strict=True) for t in part.copy_in(piece)], adapters)
    downs = [part.copies.down[at] for part in parts for _, at in part.places]
    torch._foreach_mul_(downs, [scale for part in parts for scale in part.scales])
