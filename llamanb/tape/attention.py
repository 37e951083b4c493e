"""Attention on the tape: rotary embeddings and the kernels of scaled_dot_product_attention."""

from __future__ import annotations

from llamanb.tape.linear import LinearLayers


class Attention(LinearLayers):
    def rope(self, x: int, name: str) -> int:
        """apply_rotary_pos_emb on one of q and k; frees what it turns."""
        new, free = self.new, self.free
        size = self.tokens * self.sides[name][1]
        cosine = new(self.stream * size)
        negated = new(self.e * size // 2)
        turned = new(self.e * size)
        free(negated)
        sine = new(self.stream * size)
        free(turned)
        out = new(self.stream * size)
        free(cosine, sine, x)
        return out

    def rope_backward(self, gradient: int, name: str) -> int:
        new, free = self.new, self.free
        size = self.tokens * self.sides[name][1]
        sine = new(self.stream * size)
        negated = new(self.stream * size // 2)
        out = new(self.stream * size)
        free(negated)
        padded = new(self.stream * size)
        free(sine, padded)
        cosine = new(self.stream * size)
        free(gradient, cosine)
        return out

    def attention(self, q: int, k: int, v: int, kept: dict, save: bool) -> int:
        """scaled_dot_product_attention. Where a mask is needed or the kernel takes no grouped heads, keys and values
        are repeated for every query head first."""
        new, free, work, e, N = self.new, self.free, self.work, self.e, self.tokens
        queries, heads = self.sides["q_proj"][1], work.model.heads
        scores = work.rows * work.length**2
        if work.kernel == "math":
            return self._math_attention(kept, save)
        expanded = [new(e * N * queries) for _ in range(2)] if self.expanded else []
        mask = new(e * scores) if self.masked else None
        out = new(e * N * queries)
        normalizer = new(4 * work.rows * heads * work.length)
        if save:
            self.keep(q, out, normalizer, mask, *(expanded or (k, v)))
            kept["attention"] = (q, *(expanded or (k, v)), None if self.pins else out, normalizer, mask)
        else:
            free(mask, normalizer, *expanded)
        return out

    def attention_backward(self, gradient: int, kept: dict) -> tuple[int, int, int]:
        """Gradients of q, k and v; frees the gradient of the output and all that was saved."""
        new, free, work, e, N = self.new, self.free, self.work, self.e, self.tokens
        queries, keys = self.sides["q_proj"][1], self.sides["k_proj"][1]
        if work.kernel == "math":
            return self._math_backward(gradient, kept)
        saved = kept["attention"]
        wide = queries if self.expanded else keys
        gradients = [new(e * N * queries), new(e * N * wide), new(e * N * wide)]
        rows = 4 * work.rows * work.model.heads * work.length
        if work.kernel == "flash" and not self.masked:
            scratch = [new(rows), new(4 * N * queries), new(e * N * queries), new(e * N * queries)]
        elif work.kernel == "cudnn":
            scratch = [new((4 if self.masked else 8) * N * queries + rows)]
        else:
            scratch = [new(rows), new(4 * N * queries)]
        free(*reversed(scratch), gradient, *saved)
        q, k, v = gradients
        if self.expanded:
            reduced = new(e * N * keys)
            free(v)
            v = reduced
            reduced = new(e * N * keys)
            free(k)
            k = reduced
        return q, k, v

    def _math_attention(self, kept: dict, save: bool) -> int:
        """The math kernel: in fp32, with every score."""
        new, free, work, N = self.new, self.free, self.work, self.tokens
        queries, keys = self.sides["q_proj"][1], self.sides["k_proj"][1]
        scores = work.rows * work.model.heads * work.length**2
        narrow = [new(4 * N * queries), new(4 * N * keys), new(4 * N * keys), new(4 * N * queries)]
        causal = new(4 * work.length**2)
        passing = new(4 * N * queries)
        held = [new(4 * N * queries) for _ in range(3)]
        raw, weights = new(4 * scores), new(4 * scores)
        free(new(scores), raw)
        copy = new(self.e * scores)
        out32 = new(4 * N * queries)
        out = new(self.e * N * queries)
        free(out32, passing, narrow[3], causal, *narrow[2::-1], copy)
        attended = new(self.e * N * queries)
        free(out)
        if save:
            self.keep(weights, *held)
            kept["attention"] = (*held, weights)
        else:
            free(*held, weights)
        return attended

    def _math_backward(self, gradient: int, kept: dict) -> tuple[int, int, int]:
        new, free, work, e, N = self.new, self.free, self.work, self.e, self.tokens
        queries, keys = self.sides["q_proj"][1], self.sides["k_proj"][1]
        scores = 4 * work.rows * work.model.heads * work.length**2
        one, two, three, weights = kept["attention"]
        wide = new(4 * N * queries)
        free(gradient)
        scaled = new(4 * N * queries)
        free(wide)
        gradient_v = new(4 * N * queries)
        first = new(scores)
        free(scaled, one)
        second, third = new(scores), new(scores)
        free(third, first, weights)
        gradient_q, gradient_k = new(4 * N * queries), new(4 * N * queries)
        free(second, two, three)
        turned = new(4 * N * queries)
        free(gradient_q)
        summed = [new(4 * N * keys)]
        free(gradient_v)
        summed.append(new(4 * N * keys))
        free(turned)
        wide_q = new(4 * N * queries)
        free(gradient_k)
        v = new(e * N * keys)
        free(summed[0])
        k = new(e * N * keys)
        free(summed[1])
        q = new(e * N * queries)
        free(wide_q)
        return q, k, v
