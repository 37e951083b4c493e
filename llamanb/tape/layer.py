"""A decoder layer on the tape, forward and backward (transformers' modeling_llama.py)."""

from __future__ import annotations

from llamanb.tape.attention import Attention


class DecoderLayer(Attention):
    def norm(self, x: int, save: bool) -> tuple[int, tuple]:
        """LlamaRMSNorm: in fp32, on a copy where the stream is narrower."""
        new, free, n = self.new, self.free, self.tokens * self.hidden
        copied = not self.shared
        wide = new(4 * n) if copied else None
        square = new(4 * n)
        variance = new(4 * self.tokens)
        free(square)
        root = new(4 * self.tokens)
        scaled = new(4 * n)
        if not save:
            free(root, wide)
        narrow = new(2 * n) if copied else None
        y = new(self.stream * n)
        free(narrow)
        if not (save and self.work.full):
            free(scaled)
        free(variance)
        if not save:
            return y, ()
        self.keep(wide, root, scaled)
        return y, (wide if copied else x, root, scaled if self.work.full else None)

    def norm_backward(self, gradient: int, saved: tuple, residual: int | None) -> int:
        new, free, n = self.new, self.free, self.tokens * self.hidden
        wide, root, scaled = saved
        weighted = new(self.stream * n)
        free(gradient)
        if self.stream == 2:
            g = new(4 * n)
            free(weighted)
        else:
            g = weighted
        a = new(4 * n)
        total = new(4 * n)
        free(a, g, scaled, root)
        parts = [new(4 * n) for _ in range(4)]
        free(*parts[2:0:-1], parts[0], wide, parts[3])
        if self.stream == 2:
            out = new(2 * n)
            free(total)
        else:
            out = total
        if residual is None:
            return out
        free(out)
        return residual

    def layer(self, x: int, *, save: bool, first: bool, recompute: bool = False) -> tuple[int | None, dict]:
        """One decoder layer's forward. Returns its output and, with `save`, what its backward needs by name. A
        recompute stops as soon as the last of that is there (torch's checkpoint, early stop). The first layer's input
        has no gradient, so its norm keeps nothing.

        int8 holds the input of every product until the whole backward is over, checkpointed or not: bitsandbytes keeps
        it on the node (MatMul8bitLt's ctx.tensors), where checkpointing does not see it.
        """
        new, free, N = self.new, self.free, self.tokens
        kept: dict = {"mask": None}
        y, kept["norm1"] = self.norm(x, save and not (first and not self.work.full))
        leaf = first and not self.work.full
        q, k, v = (self.linear(name, y, kept, save, leaf=leaf) for name in ("q_proj", "k_proj", "v_proj"))
        q, k = self.rope(q, "q_proj"), self.rope(k, "k_proj")
        turned = (q, k) if self.stream != self.e else ()  # autocast narrows them for attention
        if turned:
            q, k = (new(self.e * N * self.sides[name][1]) for name in ("q_proj", "k_proj"))
        self.pins = self.work.quantization == "int8" and not recompute
        attended = self.attention(q, k, v, kept, save)
        o = self.linear("o_proj", attended, kept, save)
        free(*turned)
        if self.pins and self.work.kernel != "math":
            self.pinned.append(attended)
        if self.work.kernel == "math":
            free(q, k, v)
            kept["attended"] = self._held(attended, ("o_proj",), save)
        elif not save:
            free(None if self.pins else attended, q, k, v)
        elif self.expanded:
            free(k, v)
        kept["y1"] = self._held(y, ("q_proj", "k_proj", "v_proj"), save)
        h = new(self.stream * N * self.hidden)
        free(o)
        y, kept["norm2"] = self.norm(h, save)
        gate = self.linear("gate_proj", y, kept, save)
        activated = new(self.e * N * self.wide)
        if not save:
            free(gate)
        up = self.linear("up_proj", y, kept, save)
        product = new(self.e * N * self.wide)
        if save:
            self.keep(gate, activated, up)
            kept |= {"gate": gate, "activated": activated, "up": up}
        else:
            free(activated, up)
        if recompute and "down_proj" not in self.targets and not self.work.full:
            kept |= {"product": None, "y2": self._held(y, ("gate_proj", "up_proj"), save)}
            free(product, None if self.shared else h)
            return None, kept
        down = self.linear("down_proj", product, kept, save, stop=recompute)
        kept["product"] = self._held(product, ("down_proj",), save)
        kept["y2"] = self._held(y, ("gate_proj", "up_proj"), save)
        if recompute:
            free(None if self.shared else h)
            return None, kept
        out = new(self.stream * N * self.hidden)
        free(down)
        free(None if save and self.shared else h)
        return out, kept

    def _held(self, y: int, readers: tuple[str, ...], save: bool) -> int | None:
        """What several linear layers read, held for their adapters' gradients where there are any, or freed."""
        if self.pins:
            self.keep(y)
            self.pinned.append(y)
            return None
        own_copy = self.work.full or self.work.quantization is None  # then each layer kept one of its own
        if save and not own_copy and not self.work.dropout and any(name in self.targets for name in readers):
            self.keep(y)
            return y
        self.free(y)
        return None

    def before_recompute(self, i: int, gradient: int) -> dict:
        """What a recomputed layer's backward does before it meets the first tensor that must be recomputed."""
        if self.work.full:
            return {}
        if "down_proj" in self.targets:
            return {"scaled": self.new(self.e * self.tokens * self.hidden)}
        return {"passed": self.linear_backward(i, "down_proj", gradient, {}, None, None)}

    def layer_backward(self, i: int, gradient: int, kept: dict) -> int:
        """Returns the gradient of the layer's input; the residual's is added in place."""
        new, free, N, e = self.new, self.free, self.tokens, self.e
        narrow = new(e * N * self.hidden) if self.stream != e else None
        product = kept.pop("passed", None)
        if product is None:
            product = self.linear_backward(i, "down_proj", gradient, kept, None, kept["product"])
        free(narrow)
        activated, up = new(e * N * self.wide), new(e * N * self.wide)
        free(product, kept["up"], kept["activated"])
        acc = self.linear_backward(i, "up_proj", up, kept, None, None)
        free(up)
        gate = new(e * N * self.wide)
        free(activated, kept["gate"])
        acc = self.linear_backward(i, "gate_proj", gate, kept, acc, kept["y2"])
        free(gate)
        gradient = self.norm_backward(acc, kept["norm2"], gradient)
        attended = self.linear_backward(i, "o_proj", gradient, kept, None, kept.get("attended"))
        q, k, v = self.attention_backward(attended, kept)
        k, q = self.rope_backward(k, "k_proj"), self.rope_backward(q, "q_proj")
        leaf = i == 0 and not self.work.full
        acc = self.linear_backward(i, "v_proj", v, kept, None, None, leaf)
        free(v)
        for name, turned in (("k_proj", k), ("q_proj", q)):
            copy = new(e * N * self.sides[name][1])  # back to (batch, tokens, heads)
            free(turned)
            acc = self.linear_backward(i, name, copy, kept, acc, kept["y1"] if name == "q_proj" else None, leaf)
            free(copy)
        if leaf:
            return gradient
        return self.norm_backward(acc, kept["norm1"], gradient)
