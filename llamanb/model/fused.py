"""A decoder layer's training in four products with what lies between them: the same numbers as transformers' and peft's
layer from fewer kernels, and only what the backward pass needs kept.

Autograd keeps what every operation read. Here a product (`_Products`) keeps what its prologue read - the residual
stream before a norm, gate and up before their product - and computes the rest again, which costs elementwise work
alone. Of a layer are kept: its input, queries, keys, values, attention's output and normalizer, the stream between,
gate and up; of the adapters their low rank.

The base's weights are dequantized for each product and never kept; adapters are added by products that accumulate
(`addmm`), from copies in the layers' dtype that are made once for an optimizer step (`FusedDecoder.step`). Gradients
reach the adapters and the layer's input: the base is frozen. `fits_layer` says which layers this can do.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from llamanb.model import attention
from llamanb.model.elementwise import Fast, dequantize, rms_norm, rms_norm_backward, rotate, swiglu, swiglu_backward
from llamanb.tape import HALVED, OFFLOADED, STORED


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


class Part:
    """Linear layers that read the same value."""

    copies: Copies | None = None
    """Of the adapters, for as long as an optimizer step takes."""

    def __init__(self, prologue: Prologue, *modules: nn.Module):
        self.prologue, self.linears = prologue, tuple(map(Linear.of, modules))
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


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx, part: Part, residual: Tensor | None, count: int, *tensors: Tensor):
        outputs, low = _forward(part, residual, tensors[:count])
        ctx.part, ctx.count, ctx.has_residual = part, count, residual is not None
        ctx.save_for_backward(*tensors[:count], *([] if low is None else [low]))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor):
        inputs, low = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        wanted = any(ctx.needs_input_grad[3 : 3 + ctx.count])
        of_inputs, of_adapters = _backward(ctx.part, inputs, low[0] if low else None, gradients, wanted)
        return None, gradients[0] if ctx.has_residual else None, None, *of_inputs, *of_adapters


def _forward(part: Part, residual: Tensor | None, inputs: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """Outputs, and the value in the adapters' low rank: (tokens, sum of ranks)."""
    value = part.prologue.value(*inputs)
    low = value @ part.copies.down.t() if part.places else None
    outputs = tuple(_product(value, linear, residual) for linear in part.linears)
    if low is not None:
        for (i, at), up in zip(part.places, part.copies.ups, strict=True):
            outputs[i].addmm_(low[:, at], up.t())
    return outputs, low


def _backward(
    part: Part, inputs: Sequence[Tensor], low: Tensor | None, gradients: Sequence[Tensor], wanted: bool
) -> tuple[tuple[Tensor | None, ...], list[Tensor]]:
    """Gradients of the inputs (where `wanted`) and of the adapters. `low` as `_forward` made it; made again where it
    was not kept."""
    of_low, of_adapters = None, []
    if part.places:
        value = part.prologue.value(*inputs)
        low = value @ part.copies.down.t() if low is None else low
        of_low, of_adapters = _adapters_backward(part, value, low, gradients)
        del value
    if not wanted:
        return (None,) * len(inputs), of_adapters
    of_value = None
    for linear, gradient in zip(part.linears, gradients, strict=True):
        of_value = _product_backward(gradient, linear, of_value)
    if of_low is not None:
        of_value.addmm_(of_low, part.copies.down)
    return part.prologue.backward(of_value, *inputs), of_adapters


def _adapters_backward(
    part: Part, value: Tensor, low: Tensor, gradients: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """The gradient of `low`, and those of each adapter's A and B."""
    of_low, of_ups = torch.empty_like(low), []
    for (i, at), up in zip(part.places, part.copies.ups, strict=True):
        torch.mm(gradients[i], up, out=of_low[:, at])
        of_ups.append(_wide(gradients[i].t(), low[:, at]))
    of_downs = _wide(of_low.t(), value)
    scaled = (of_downs[at] * scale for (_, at), scale in zip(part.places, part.scales, strict=True))
    return of_low, [*scaled, *of_ups]


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


class _Rotated(torch.autograd.Function):
    """Rotary position embeddings on queries or keys: (tokens, heads, head size)."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor):
        ctx.save_for_backward(cos, sin)
        return rotate(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        return rotate(gradient, *ctx.saved_tensors, -1), None, None


class _Recomputed(torch.autograd.Function):
    """A layer, or its MLP alone, keeping its input. The backward pass computes it again but for the last product, which
    checkpointing would compute too; and lets go of gate and up before it goes on to attention."""

    @staticmethod
    def forward(ctx, layer: FusedLayer, places: Places, whole: bool, x: Tensor, *adapters: Tensor):
        ctx.layer, ctx.places, ctx.whole = layer, places, whole
        ctx.save_for_backward(x)
        return layer.mlp(layer.attend(x, places) if whole else x)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        (x,), layer = ctx.saved_tensors, ctx.layer
        if not ctx.whole:
            return None, None, None, *layer.mlp_backward(x, gradient)
        with torch.enable_grad():
            x = x.detach().requires_grad_(ctx.needs_input_grad[3])
            stream = layer.attend(x, ctx.places)
        end = torch.autograd.graph.get_gradient_edge(stream) if stream.requires_grad else None
        of_stream, *of_mlp = layer.mlp_backward(stream.detach(), gradient)
        del stream
        wanted = [t for t in (x, *layer.attention_adapters) if t.requires_grad]
        found = list(torch.autograd.grad([end], wanted, [of_stream]) if end else ())
        return None, None, None, found.pop(0) if x.requires_grad else None, *found, *of_mlp


class _Normed(torch.autograd.Function):
    """The norm behind the last layer, keeping its input alone."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, epsilon: float):
        ctx.save_for_backward(x, weight)
        ctx.epsilon = epsilon
        return rms_norm(x, weight, epsilon)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        x, weight = ctx.saved_tensors
        return rms_norm_backward(gradient.clone(), x, weight, ctx.epsilon), None, None


class FusedLayer:
    """A LlamaDecoderLayer's training forward."""

    def __init__(self, layer: nn.Module):
        attention, mlp = layer.self_attn, layer.mlp
        self.head_size = attention.head_dim
        self.entry = Part(_norm(layer.input_layernorm), attention.q_proj, attention.k_proj, attention.v_proj)
        self.o = Part(AS_IT_IS, attention.o_proj)
        self.gate_up = Part(_norm(layer.post_attention_layernorm), mlp.gate_proj, mlp.up_proj)
        self.down = Part(SWIGLU, mlp.down_proj)
        self.parts = [part for part in (self.entry, self.o, self.gate_up, self.down) if part.places]

    def attend(self, x: Tensor, places: Places) -> Tensor:
        """The stream after attention."""
        q, k, v = (t.unflatten(1, (-1, self.head_size)) for t in self.entry(x))
        q, k = _Rotated.apply(q, places.cos, places.sin), _Rotated.apply(k, places.cos, places.sin)
        return self.o(places.attend(q, k, v).flatten(1), residual=x)[0]

    def mlp(self, stream: Tensor) -> Tensor:
        """The stream after the MLP."""
        return self.down(*self.gate_up(stream), residual=stream)[0]

    def mlp_backward(self, stream: Tensor, gradient: Tensor) -> list[Tensor]:
        """Gradients of the stream before the MLP and of the MLP's adapters."""
        inputs, low = _forward(self.gate_up, None, (stream,))
        of_inputs, of_down = _backward(self.down, inputs, None, (gradient,), True)
        del inputs
        (of_stream,), of_gate_up = _backward(self.gate_up, (stream,), low, of_inputs, True)
        return [of_stream.add_(gradient), *of_gate_up, *of_down]

    @property
    def attention_adapters(self) -> tuple[Tensor, ...]:
        return (*self.entry.adapters, *self.o.adapters)

    def __call__(self, x: Tensor, places: Places, kind: str = STORED) -> Tensor:
        """The stream after the layer, (tokens, hidden); `kind` says what of it is kept (tape.STORED and the others)."""
        if kind in (STORED, HALVED):
            x = self.attend(x, places)
        if kind == STORED:
            return self.mlp(x)
        whole = kind != HALVED
        adapters = (*(self.attention_adapters if whole else ()), *self.gate_up.adapters, *self.down.adapters)
        with torch.autograd.graph.save_on_cpu(pin_memory=x.is_cuda) if kind == OFFLOADED else contextlib.nullcontext():
            return _Recomputed.apply(self, places, whole, x, *adapters)


class Places(NamedTuple):
    """Where the tokens of a micro-batch stand."""

    cos: Tensor
    sin: Tensor
    """(tokens, head size)."""
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    """Causal attention of each row for itself: queries, keys, values, (tokens, heads, head size) each -> the same."""


class FusedDecoder:
    """A Llama's training forward up to the last norm: rows one behind the other, none padded.

    Args:
        model: with its adapters attached.
        layers: what becomes of each layer's activations.
        kernel: of attention (tape.KERNELS); empty on a CPU.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str], kernel: str):
        self.decoder = model.get_decoder()
        Fast.try_on(self.decoder.norm.weight)
        self.layers = [FusedLayer(layer) for layer in self.decoder.layers]
        self.parts = [part for layer in self.layers for part in layer.parts]
        self.kinds = layers or (STORED,) * len(self.layers)
        self.kernel = kernel

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Around the micro-batches of an optimizer step."""
        copy_adapters(self.parts, self.decoder.norm.weight)
        try:
            yield
        finally:
            for part in self.parts:
                part.copies = None

    def __call__(self, ids: Tensor, lengths: Sequence[int]) -> Tensor:
        """Hidden states, (tokens, hidden), of the token ids of rows of these lengths, (tokens,). Inside of `step`."""
        with torch.autocast(ids.device.type, enabled=False):
            x = self.decoder.embed_tokens(ids)
            positions = torch.cat([torch.arange(length) for length in lengths]).to(ids.device, non_blocking=True)
            cos, sin = (t[0] for t in self.decoder.rotary_emb(x, positions[None]))
            places = Places(cos, sin, attention.for_rows(lengths, self.kernel, ids.device))
            for layer, kind in zip(self.layers, self.kinds, strict=True):
                x = layer(x, places, kind)
            norm = self.decoder.norm
            return _Normed.apply(x, norm.weight, norm.variance_epsilon)


def copy_adapters(parts: Sequence[Part], like: Tensor) -> None:
    """Sets each part's `copies`: the adapters as they are now, in one tensor of the dtype and device of `like`."""
    adapters = [t.detach() for part in parts for t in part.adapters]
    sizes = [sum(t.numel() for t in part.adapters) for part in parts]
    pieces = like.new_empty(sum(sizes)).split(sizes)
    torch._foreach_copy_([t for part, piece in zip(parts, pieces, strict=True) for t in part.copy_in(piece)], adapters)
    downs = [part.copies.down[at] for part in parts for _, at in part.places]
    torch._foreach_mul_(downs, [scale for part in parts for scale in part.scales])


def fits_layer(layer: nn.Module) -> str:
    """Why a layer cannot be computed so; "" where it can."""
    for module in layer.modules():
        if isinstance(module, LoraLayer):
            if len(module.active_adapters) != 1 or module.merged or module.disable_adapters:
                return "more than one adapter, or none in use"
            name = module.active_adapters[0]
            if not isinstance(module.lora_dropout[name], nn.Identity):
                return "adapters with dropout"
            if module.use_dora[name]:
                return "DoRA"
            if module.lora_bias[name]:
                return "adapters with biases"
    config = layer.self_attn.config
    if config.hidden_act not in ("silu", "swish"):
        return f"{config.hidden_act} in the MLP"
    if config.attention_dropout:
        return "attention with dropout"
    for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        module = getattr(layer.self_attn if hasattr(layer.self_attn, name) else layer.mlp, name)
        base = module.get_base_layer() if isinstance(module, LoraLayer) else module
        if base.bias is not None:
            return "linear layers with biases"
        if base.weight.requires_grad:
            return "weights that are trained themselves"
        if base.weight.dtype == torch.int8:
            return "int8"
    return ""


def _norm(module: nn.Module) -> Prologue:
    weight, epsilon = module.weight.detach(), module.variance_epsilon
    return Prologue(
        lambda x: rms_norm(x, weight, epsilon), lambda gradient, x: (rms_norm_backward(gradient, x, weight, epsilon),)
    )


AS_IT_IS = Prologue(lambda x: x, lambda gradient, x: (gradient,))
SWIGLU = Prologue(swiglu, swiglu_backward)
