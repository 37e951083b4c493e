"""Linear layers on the tape: full, 8-bit and 4-bit weights, with adapters (peft, bitsandbytes)."""

from __future__ import annotations

from llamanb.recipe import LINEAR_LAYERS
from llamanb.tape.workload import BLOCK, BYTES, GRADIENTS, Tape, Workload


class LinearLayers:
    def __init__(self, work: Workload):
        self.work, self.tape = work, Tape()
        self.new, self.free, self.keep = self.tape.new, self.tape.free, self.tape.keep
        model = work.model
        self.tokens, self.hidden, self.wide = work.tokens, model.hidden, model.intermediate
        self.e = BYTES[work.dtype]
        self.stream = 4 if work.full else self.e  # bytes of a number between layers
        self.half = self.e == 2
        self.shared = self.stream == 4  # norms compute on their input itself, not on an fp32 copy, and keep that
        self.targets = () if work.full else work.targets
        self.sides = {name: model.linear(name) for name in LINEAR_LAYERS}
        self.masked = work.padded and work.rows > 1
        self.expanded = self.masked or work.kernel == "memory-efficient"
        self.pins = False
        self.gradients: dict = {}
        self.casts: list[int] = []  # autocast's 16-bit copies of what is trained, kept until the forward ends
        self.pinned: list[int] = []

    def linear(self, name: str, x: int, kept: dict, save: bool, stop: bool = False, leaf: bool = False) -> int | None:
        """A linear layer with its adapter, as peft's forward makes it."""
        new, free, N, e = self.new, self.free, self.tokens, self.e
        inputs, outputs = self.sides[name]
        quantized = self.work.quantization
        if self.work.full:
            own = new(e * N * inputs) if self.stream != e else None
            weight = new(e * inputs * outputs) if self.half else None
            self.keep(own, weight)
            out = None if stop else new(e * N * outputs)
            if save:
                kept[name] = (own, weight)
            else:
                free(own)
                self.casts.append(weight)
            return out
        if quantized == "int8":
            out = self._int8(name)
        elif quantized:
            constants = [new(4 * inputs * outputs // BLOCK) for _ in range(2)] if self.work.double_quant else []
            weight = new(e * inputs * outputs)
            out = new(e * N * outputs)
            free(*reversed(constants), weight)
        else:
            out = new(e * N * outputs)
        if name not in self.targets:
            return out
        if quantized in ("nf4", "fp4"):  # peft: the product of 4-bit weights is a view, and is copied
            copy = new(e * N * outputs)
            free(out)
            out = copy
        widened = new(4 * N * inputs) if quantized is None and self.half else None
        mask = dropped = None
        if self.work.dropout:
            mask = new(N * inputs)
            dropped = new((e if widened is None else 4) * N * inputs)
            if leaf:  # no gradient goes back through it
                free(mask)
                mask = None
        cast_a = new(e * self.work.rank * inputs) if self.half else None
        own = new(e * N * inputs) if widened is not None else None
        narrowed, dropped = (widened, dropped), None if own is not None else dropped
        low = new(e * N * self.work.rank)
        cast_b = new(e * self.work.rank * outputs) if self.half else None
        if not stop:
            high = new(e * N * outputs)
            if not save:
                free(low, own, mask, dropped)
            scaled = new(e * N * outputs)
            free(high)
            total = new(e * N * outputs)
            free(out, scaled)
        else:
            total = None
            free(out)
        free(*(narrowed if own is not None else ()))
        if save:
            self.keep(cast_a, low, cast_b, own, mask, dropped)
            kept[name] = (cast_a, low, cast_b, own, mask, dropped)
        else:
            self.casts += [slot for slot in (cast_a, cast_b) if slot is not None]
        return total

    def _int8(self, name: str) -> int:
        """LLM.int8: inputs rounded row by row, an int32 product, then scaled. Columns with an outlier are multiplied
        in 16 bits beside it; how many there are depends on the values, and the down projection is planned for all."""
        new, free, N = self.new, self.free, self.tokens
        inputs, outputs = self.sides[name]
        fp16 = new(2 * N * inputs) if self.work.dtype != "fp16" else None
        rounded = new(N * inputs)
        magnitude = new(2 * N * inputs)
        outliers = new(N * inputs)
        free(magnitude, outliers, fp16)
        beside = None
        if name == "down_proj":
            columns = new(2 * N * inputs)
            part, widened, scaled = new(inputs * outputs), new(4 * inputs * outputs), new(4 * inputs * outputs)
            free(widened, part)
            beside = new(2 * inputs * outputs)
            free(scaled)
            if self.pins:
                self.keep(columns)
                self.pinned.append(columns)
        product = new(4 * N * outputs)
        out = new(2 * N * outputs)
        if self.work.dtype != "fp16":
            cast = new(self.e * N * outputs)
            free(out)
            out = cast
        free(product)
        if beside is not None:
            total = new(self.e * N * outputs)
            free(out, beside, None if self.pins else columns)
            out = total
        free(rounded)
        return out

    def linear_backward(
        self, layer: int, name: str, gradient: int, kept: dict, acc: int | None, x: int | None, leaf: bool = False
    ) -> int | None:
        """Gradient of a linear layer's input, added to `acc` where another layer reads the same input; None for a
        leaf, whose input needs none."""
        new, free, N, e = self.new, self.free, self.tokens, self.e
        inputs, outputs = self.sides[name]
        if self.work.full:
            own, weight = kept[name]
            gradient_w = new(e * inputs * outputs)
            through = new(e * N * inputs)
            free(weight, own)
            if self.half:
                wide = new(4 * inputs * outputs)
                free(gradient_w)
                gradient_w = wide
            self._gradient((layer, name), gradient_w)
            if self.stream != e and name != "down_proj" and name != "o_proj":
                wide = new(4 * N * inputs)
                free(through)
                through = wide
            if acc is not None:
                free(through)
            return through if acc is None else acc
        through = None
        if name in self.targets:
            cast_a, low, cast_b, own, mask, dropped = kept[name]
            scaled = kept.pop("scaled", None) if name == "down_proj" else None
            if scaled is None:
                scaled = new(e * N * outputs)
            gradient_b = new(e * self.work.rank * outputs)
            gradient_low = new(e * N * self.work.rank)
            free(scaled, cast_b, low)
            self._gradient((layer, name, "B"), self._widened(gradient_b, 4 * self.work.rank * outputs))
            gradient_a = new(e * self.work.rank * inputs)
            if leaf:
                free(gradient_low, cast_a, x, own, dropped, mask)
                self._gradient((layer, name, "A"), self._widened(gradient_a, 4 * self.work.rank * inputs))
                return None
            through = new(e * N * inputs)
            free(gradient_low, cast_a, x, own, dropped)
            if own is not None:
                wide = new(4 * N * inputs)
                free(through)
                if mask is not None:
                    masked = new(4 * N * inputs)
                    free(wide, mask)
                    wide = masked
            elif mask is not None:
                wide = new(e * N * inputs)
                free(through, mask)
                through = wide
            elif acc is not None:
                free(through)
            self._gradient((layer, name, "A"), self._widened(gradient_a, 4 * self.work.rank * inputs))
            if own is not None:
                through = new(e * N * inputs)
                free(wide)
            if acc is not None and (own is not None or mask is not None):
                free(through)
        else:
            free(x)  # it was held for another layer's adapter
        if leaf:
            return None
        if self.work.quantization is not None:
            constants = self.work.quantization != "int8" and self.work.double_quant
            absolute = new(4 * inputs * outputs // BLOCK) if constants else None
            weight = new(e * inputs * outputs)
            free(absolute)
        base = new(e * N * inputs)
        if self.work.quantization is not None:
            free(weight)
        if acc is not None:
            free(base)
            return acc
        if through is None:
            return base
        if self.work.quantization is None:
            free(base)
            return through
        total = new(e * N * inputs)
        free(through, base)
        return total

    def _widened(self, gradient: int, size: int) -> int:
        if not self.half:
            return gradient
        wide = self.new(size)
        self.free(gradient)
        return wide

    def _gradient(self, key, slot: int) -> None:
        """Becomes the parameter's gradient, or is added to it."""
        if key in self.gradients:
            self.free(slot)
        else:
            self.gradients[key] = slot
            self.tape.buckets[slot] = GRADIENTS
