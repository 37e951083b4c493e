"""A fused layer on the tape (model/fused.py), the loss of model/head.py, and a micro-batch of both."""

from __future__ import annotations

from collections.abc import Callable

from llamanb.tape.linear import LinearLayers
from llamanb.tape.workload import (
    ACTIVATIONS,
    ADAPTERS,
    BACKWARD,
    CHECKPOINTED,
    FORWARD,
    HALVED,
    HEAD,
    HEAD_BACKWARD,
    HEAD_TILE,
    LOSS,
    OFFLOADED,
    RECOMPUTED,
    STEP,
    STORED,
    mlp_tile,
)

ENTRY, OUT, GATE_UP, DOWN = ("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)


class FusedLayers(LinearLayers):
    def products(self, names: tuple[str, ...], value: int | None, save: bool) -> tuple[list[int], int | None]:
        """`_forward` of linear layers that read one value; `value` is None where they read a tensor as it is. Returns
        their outputs and the adapters' low rank, which is kept."""
        new, free, N, e = self.new, self.free, self.tokens, self.e
        adapted = [name for name in names if name in self.targets]
        low = new(e * N * self.work.rank * len(adapted)) if adapted else None
        outputs = []
        for name in names:
            weight = self._weight(name)
            outputs.append(new(e * N * self.sides[name][1]))
            free(weight)
        free(value)
        if save:
            self.keep(*outputs, low)
            return outputs, low
        free(low)
        return outputs, None

    def _weight(self, name: str) -> int | None:
        """A base weight, dequantized; one that is not quantized is used where it lies."""
        if not self.work.quantization:
            return None
        inputs, outputs = self.sides[name]
        self.tape.dequantized += (size := self.e * inputs * outputs)
        return self.new(size)

    def products_backward(
        self, layer: int, names: tuple[str, ...], value: bool, low: int | None, wanted: bool = True
    ) -> int | None:
        """`_backward`, but for the prologue's own: the gradient of the value, where one is wanted. `value`: whether it
        must be computed again."""
        new, free, work, N, e = self.new, self.free, self.work, self.tokens, self.e
        rank, inputs = work.rank, self.sides[names[0]][0]
        adapted = [name for name in names if name in self.targets]
        of_low = again = None
        grown = []
        if adapted:
            made = new(e * N * inputs) if value else None
            again = new(e * N * rank * len(adapted)) if low is None else None
            of_low = new(e * N * rank * len(adapted))
            for name in adapted:
                grown.append(((layer, name, "B"), new(4 * rank * self.sides[name][1])))
            all_down = new(4 * rank * inputs * len(adapted))
            for name in adapted:
                grown.append(((layer, name, "A"), new(4 * rank * inputs)))
            free(all_down, made)
        of_value = None
        for name in names if wanted else ():
            weight = self._weight(name)
            of_value = new(e * N * inputs) if of_value is None else of_value
            free(weight)
        free(of_low, again)
        self.grown = grown
        return of_value

    def _grow(self) -> None:
        """What `products_backward` made becomes the adapters' gradients, or is added to them."""
        for key, slot in self.grown:
            self._gradient(key, slot)

    def enter(self, save: bool) -> dict:
        """Attention's half of a layer; what is kept, by name."""
        new, free, N, e, work = self.new, self.free, self.tokens, self.e, self.work
        (q, k, v), low = self.products(ENTRY, new(e * N * self.hidden), save)
        turned = []
        for x, name in ((q, "q_proj"), (k, "k_proj")):
            turned.append(new(e * N * self.sides[name][1]))
            free(x)
        queries = e * N * self.sides["q_proj"][1]
        repeated = [new(queries), new(queries)] if work.kernel == "memory-efficient" else []
        attended = new(queries)
        normalizer = new(4 * work.model.heads * N)
        free(*repeated)
        (stream,), low_o = self.products(OUT, None, save)
        kept = {"low": low, "qkv": (*turned, v), "attended": attended, "normalizer": normalizer, "low_o": low_o}
        if save:
            self.keep(*turned, v, attended, normalizer, stream)
        else:
            free(*turned, v, attended, normalizer)
        return {"stream": stream, **kept}

    def fused_layer(self, x: int, kind: str) -> tuple[int, dict]:
        """One layer's forward: its output, and what its backward needs."""
        kept = self.enter(save=kind in (STORED, HALVED))
        if kind == STORED:
            out, more = self.mlp(save=True)
            return out, kept | more
        out = self.tiled(self.passing_mlp)
        if kind != HALVED:
            self.free(kept["stream"])
            kept = {}
        return out, kept

    def gate_up(self, save: bool) -> dict:
        (gate, up), low = self.products(GATE_UP, self.new(self.e * self.tokens * self.hidden), save)
        return {"gate": gate, "up": up, "low_gate": low}

    def mlp(self, save: bool) -> tuple[int, dict]:
        kept = self.gate_up(save)
        (out,), low_down = self.products(DOWN, self.new(self.e * self.tokens * self.wide), save)
        return out, kept | {"low_down": low_down}

    def passing_mlp(self) -> int:
        out, made = self.mlp(save=False)
        self.free(made["gate"], made["up"])
        return out

    def tiled(self, work: Callable[[], int]) -> int:
        """What `work` makes of a tile's tokens, for all of them."""
        tokens, tile = self.tokens, mlp_tile(self.tokens)
        if tile == tokens:
            return work()
        whole = self.new(self.e * tokens * self.hidden)
        for begin in range(0, tokens, tile):
            self.tokens = min(tile, tokens - begin)
            self.free(work())
        self.tokens = tokens
        return whole

    def mlp_backward(self, layer: int, kept: dict) -> int:
        """The gradient of the stream between a layer's halves, as it comes through the MLP."""
        new, free, N, e = self.new, self.free, self.tokens, self.e
        of_product = self.products_backward(layer, DOWN, True, kept["low_down"])
        of_up = new(e * N * self.wide)
        self._grow()
        if kept["low_down"] is not None:
            free(kept["low_down"])
        free(kept["gate"], kept["up"])
        of_stream = self.products_backward(layer, GATE_UP, True, kept["low_gate"])
        self._grow()
        free(of_product, of_up, kept["low_gate"], kept["stream"])
        return of_stream

    def attention_half_backward(self, layer: int, gradient: int, kept: dict) -> int:
        new, free, N, e, work = self.new, self.free, self.tokens, self.e, self.work
        of_attended = self.products_backward(layer, OUT, False, kept["low_o"])
        self._grow()
        free(kept["low_o"])
        queries, keys = e * N * self.sides["q_proj"][1], e * N * self.sides["k_proj"][1]
        expanded = work.kernel == "memory-efficient"
        repeated = [new(queries), new(queries)] if expanded else []
        wide = queries if expanded else keys
        gradients = [new(queries), new(wide), new(wide)]
        rows = 4 * work.model.heads * N
        if work.kernel == "cudnn":
            scratch = [new(8 * N * self.sides["q_proj"][1] + rows)]
        elif expanded:
            scratch = [new(rows), new(4 * N * self.sides["q_proj"][1])]
        else:
            scratch = [new(rows), new(4 * N * self.sides["q_proj"][1]), new(queries), new(queries)]
        free(*reversed(scratch), *repeated)
        if expanded:
            for i in (1, 2):
                reduced = new(keys)
                free(gradients[i])
                gradients[i] = reduced
        free(of_attended, *kept["qkv"], kept["attended"], kept["normalizer"])
        for i, name in ((1, "k_proj"), (0, "q_proj")):
            turned = new(e * N * self.sides[name][1])
            free(gradients[i])
            gradients[i] = turned
        wanted = layer > 0
        of_x = self.products_backward(layer, ENTRY, True, kept["low"], wanted)
        self._grow()
        free(*gradients, kept["low"], of_x)
        return gradient

    def fused_backward(self, layer: int, kind: str, gradient: int, kept: dict) -> int:
        if kind in (CHECKPOINTED, OFFLOADED):
            kept = self.enter(save=True)
        if kind == STORED:  # what came through the MLP is added to what passed by; else it is the other way round
            self.free(self.mlp_backward(layer, kept))
            return self.attention_half_backward(layer, gradient, kept)
        made_again = {"low_down": None, "stream": None}
        of_stream = self.tiled(lambda: self.mlp_backward(layer, self.gate_up(save=True) | made_again))
        self.free(kept["stream"])
        if kind == HALVED:
            self.free(gradient)
            return self.attention_half_backward(layer, of_stream, kept)
        of_x = self.attention_half_backward(layer, of_stream, kept)
        self.free(gradient)
        return of_x

    def fused_micro_batch(self) -> None:
        work, new, free, N = self.work, self.new, self.free, self.tokens
        self.tape.mark(FORWARD)
        copies = new(
            self.e * sum(self.trained), ADAPTERS
        )  # once for a step, not for a micro-batch; the peak is the same
        angles = [new(self.e * N * work.model.head_size, ACTIVATIONS) for _ in range(2)]
        x = new(self.e * N * self.hidden, ACTIVATIONS)
        saved = []
        for kind in work.layers:
            out, kept = self.fused_layer(x, kind)
            self.keep(x)
            if kind == OFFLOADED:
                free(x)
                x = None
            saved.append((x, kept))
            x = out
        y = new(self.e * N * self.hidden)
        self.keep(x, y)
        self.tape.mark(HEAD)
        trained = min(N if work.trained_tokens is None else work.trained_tokens, N - work.rows)
        of_hidden = new(self.e * trained * self.hidden, LOSS)
        tile = min(trained, HEAD_TILE)
        rows = new(self.e * tile * self.hidden, LOSS)
        free(new(self.e * tile * work.model.vocabulary, LOSS), rows, y)
        self.tape.mark(HEAD_BACKWARD)
        gradient = new(self.e * N * self.hidden, LOSS)
        free(*[new(4 * tile * self.hidden, LOSS) for _ in range(2)], of_hidden, x)
        for i in reversed(range(len(work.layers))):
            x, kept = saved[i]
            self.tape.mark(BACKWARD if work.layers[i] == STORED else RECOMPUTED)
            if x is None:
                x = new(self.e * N * self.hidden, ACTIVATIONS)
            gradient = self.fused_backward(i, work.layers[i], gradient, kept)
            free(x)
        free(gradient, *angles)
        self.tape.mark(STEP)  # which begins where the last backward ends, and copies are let go of behind that
        free(copies)
