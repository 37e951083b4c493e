"""A decoder layer's training in four products with what lies between them: the same numbers as transformers' and peft's
layer from fewer kernels, and only what the backward pass needs kept.

Autograd keeps what every operation read. Here a product (products.py) keeps what its prologue read - the residual
stream before a norm, gate and up before their product - and computes the rest again, which costs elementwise work
alone. Of a layer are kept: its input, queries, keys, values, attention's output and normalizer, the stream between,
gate and up; of the adapters their low rank. `fits_layer` says which layers this can do.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from llamanb.model import row_attention
from llamanb.model.elementwise import Fast, rms_norm, rms_norm_backward, rotate, swiglu, swiglu_backward
from llamanb.model.products import Part, Prologue, copy_adapters, nothing
from llamanb.model.streamed import StreamedLayers
from llamanb.tape import HALVED, OFFLOADED, STORED, mlp_tile


class _Rotated(torch.autograd.Function):
    """Rotary position embeddings on queries or keys: (tokens, width) -> (tokens, heads, head size)."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor):
        ctx.save_for_backward(cos, sin)
        return rotate(x.unflatten(1, (-1, cos.shape[1])), cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        return rotate(gradient, *ctx.saved_tensors, -1).flatten(1), None, None


class _Recomputed(torch.autograd.Function):
    """A layer, or its MLP alone, keeping its input. The backward pass computes it again but for the last product, which
    checkpointing would compute too; and lets go of gate and up before it goes on to attention. Both passes go through
    the MLP of a long micro-batch a tile of tokens at a time."""

    @staticmethod
    def forward(ctx, layer: FusedLayer, places: Places, whole: bool, x: Tensor, *adapters: Tensor):
        ctx.layer, ctx.places, ctx.whole = layer, places, whole
        ctx.save_for_backward(x)
        return layer.tiled_mlp(layer.attend(x, places) if whole else x)

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

    def __init__(self, layer: nn.Module, visit: Callable[[], None] = nothing):
        attention, mlp, self.visit = layer.self_attn, layer.mlp, visit
        self.head_size = attention.head_dim
        self.entry = Part(
            _norm(layer.input_layernorm), attention.q_proj, attention.k_proj, attention.v_proj, visit=visit
        )
        self.o = Part(AS_IT_IS, attention.o_proj, visit=visit)
        self.gate_up = Part(_norm(layer.post_attention_layernorm), mlp.gate_proj, mlp.up_proj, visit=visit)
        self.down = Part(SWIGLU, mlp.down_proj, visit=visit)
        self.parts = [part for part in (self.entry, self.o, self.gate_up, self.down) if part.places]

    def attend(self, x: Tensor, places: Places) -> Tensor:
        """The stream after attention."""
        q, k, v = self.entry(x)
        q, k = (_Rotated.apply(t, places.cos, places.sin) for t in (q, k))
        return self.o(places.attend(q, k, v.unflatten(1, (-1, self.head_size))).flatten(1), residual=x)[0]

    def mlp(self, stream: Tensor) -> Tensor:
        """The stream after the MLP."""
        return self.down(*self.gate_up(stream), residual=stream)[0]

    def tiled_mlp(self, stream: Tensor) -> Tensor:
        """The same with no more than MLP_TILE tokens' gate and up at once, without gradients."""
        tile = mlp_tile(len(stream))
        if tile == len(stream):
            return self.mlp(stream)
        after = torch.empty_like(stream)
        for piece, place in zip(stream.split(tile), after.split(tile), strict=True):
            place.copy_(self.mlp(piece))
        return after

    def mlp_backward(self, stream: Tensor, gradient: Tensor) -> list[Tensor]:
        """Gradients of the stream before the MLP and of the MLP's adapters, tile by tile."""
        tile = mlp_tile(len(stream))
        if tile == len(stream):
            return self._mlp_backward(stream, gradient)
        of_stream, of_adapters = torch.empty_like(stream), []
        for piece, of_piece, place in zip(*(t.split(tile) for t in (stream, gradient, of_stream)), strict=True):
            found, *more = self._mlp_backward(piece, of_piece)
            place.copy_(found)
            of_adapters = [a.add_(b) for a, b in zip(of_adapters, more, strict=True)] if of_adapters else more
        return [of_stream, *of_adapters]

    def _mlp_backward(self, stream: Tensor, gradient: Tensor) -> list[Tensor]:
        inputs, low = self.gate_up.compute(None, (stream,))
        of_inputs, of_down = self.down.gradients(inputs, None, (gradient,), True)
        del inputs
        (of_stream,), of_gate_up = self.gate_up.gradients((stream,), low, of_inputs, True)
        return [of_stream.add_(gradient), *of_gate_up, *of_down]

    @property
    def attention_adapters(self) -> tuple[Tensor, ...]:
        return (*self.entry.adapters, *self.o.adapters)

    def __call__(self, x: Tensor, places: Places, kind: str = STORED) -> Tensor:
        """The stream after the layer, (tokens, hidden); `kind` says what of it is kept (tape.STORED and the others)."""
        self.visit()
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
        streamed: brings layers to the card whose weights are not there.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str], kernel: str, streamed: StreamedLayers | None = None):
        self.decoder, self.streamed = model.get_decoder(), streamed
        Fast.try_on(self.decoder.norm.weight)
        self.layers = [
            FusedLayer(layer, functools.partial(streamed.visit, number) if streamed else nothing)
            for number, layer in enumerate(self.decoder.layers)
        ]
        self.parts = [part for layer in self.layers for part in layer.parts]
        self.kinds = layers or (STORED,) * len(self.layers)
        self.kernel = kernel

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Around the micro-batches of an optimizer step."""
        if self.streamed:
            self.streamed.waits.clear()  # of what came before, such as answers
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
            places = Places(cos, sin, row_attention.for_rows(lengths, self.kernel, ids.device))
            for layer, kind in zip(self.layers, self.kinds, strict=True):
                x = layer(x, places, kind)
            norm = self.decoder.norm
            return _Normed.apply(x, norm.weight, norm.variance_epsilon)


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
