"""A training step as what it allocates and frees, in order: the tape that memory is predicted from.

The tape follows the code that runs: transformers' Llama layer (modeling_llama.py), peft's LoRA layers (tuners/lora),
bitsandbytes' products (autograd/_functions.py, backends/cuda/ops.py), torch's autograd and checkpointing, trl's tiled
loss (kernels/chunked_logprob.py). Each function below mirrors one of them, forward and backward, and is held to torch's
own recorded history (benchmarks/results/memory_tapes.md). Sizes are bytes. Scalars and tensors of a few bytes a
token are left out.

`N` is the tokens of a micro-batch, `e` the bytes of a number in the step's arithmetic, `r` the rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from llamanb.architecture import Architecture
from llamanb.recipe import LINEAR_LAYERS

STORED, CHECKPOINTED, OFFLOADED = "stored", "checkpointed", "offloaded"
"""What becomes of a layer's activations: kept; recomputed from its input; the same with the input in host memory."""
KERNELS = ("flash", "cudnn", "memory-efficient", "math")
"""Attention kernels; `memory-efficient` is taken with keys and values expanded to all heads (model/attention.py)."""
BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}

LOSS_ROWS, LOSS_COLUMNS = 4096, 32768
"""Tile of logits in trl 1.16 (TOKEN_CHUNK_SIZE, _CHUNKED_LOGPROB_CHUNK_SIZE)."""
BLOCK = 64
"""Weights under one quantization constant in 4 bits (bitsandbytes' default)."""
PAGED_FROM, QUANTIZED_FROM, STATE_BLOCK = 100_000, 4096, 256
"""bitsandbytes' optimizers: elements from which a state is paged, from which it is 8-bit, and under one constant."""

WEIGHTS, CONSTANTS, EMBEDDINGS, ADAPTERS = "weights", "quantization constants", "embeddings and head", "adapters"
GRADIENTS, OPTIMIZER, ACTIVATIONS = "gradients", "optimizer", "activations"
LOSS, TEMPORARIES, LIBRARIES = "loss", "temporaries", "cuBLAS workspace"
BUCKETS = (WEIGHTS, CONSTANTS, EMBEDDINGS, ADAPTERS, GRADIENTS, OPTIMIZER, ACTIVATIONS, LOSS, TEMPORARIES, LIBRARIES)
LOAD, FORWARD, BACKWARD, STEP = "load", "forward", "backward", "optimizer step"
INSTANTS = (LOAD, FORWARD, BACKWARD, STEP)


@dataclass(frozen=True)
class Workload:
    """All that a step's memory depends on."""

    model: Architecture
    rows: int
    """Rows of a micro-batch."""
    length: int
    """Tokens a row, the longest of the micro-batch."""
    layers: tuple[str, ...]
    """STORED, CHECKPOINTED or OFFLOADED for each decoder layer, the first one first."""
    dtype: str = "fp16"
    quantization: str | None = "nf4"
    """nf4, fp4, int8, or None for weights in `dtype`."""
    full: bool = False
    """All weights are trained, in fp32 under autocast; no adapters."""
    double_quant: bool = True
    rank: int = 16
    targets: tuple[str, ...] = LINEAR_LAYERS
    dropout: bool = False
    optimizer: str = "paged_adamw_8bit"
    kernel: str = "memory-efficient"
    padded: bool = True
    """Rows of unequal length in a micro-batch: attention then needs a mask. One row alone never does."""
    accumulation: int = 2
    """Micro-batches in an optimizer step; from the second on gradients are there from the start."""
    trained_tokens: int | None = None
    """Tokens of a micro-batch that the loss is taken on; None: all of them, the most there can be."""
    blas_workspace: int = 2 * 8_519_680
    """Bytes that cuBLAS holds, once for the forward's thread and once for the backward's."""

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    def replace(self, **changes) -> Workload:
        return replace(self, **changes)


class Tape:
    """Allocations and frees in order. `events`: slot + 1 where one is allocated, -(slot + 1) where it is freed."""

    def __init__(self):
        self.events: list[int] = []
        self.sizes: list[int] = []
        self.buckets: list[str] = []
        self.marks: list[tuple[int, str]] = []
        """(events before it, what begins there)."""

    def new(self, size: int, bucket: str = TEMPORARIES) -> int:
        self.sizes.append(size)
        self.buckets.append(bucket)
        self.events.append(len(self.sizes))
        return len(self.sizes) - 1

    def free(self, *slots: int | None) -> None:
        self.events.extend(-slot - 1 for slot in slots if slot is not None)

    def keep(self, *slots: int | None) -> None:
        """Makes temporaries activations: they wait for the backward pass."""
        for slot in slots:
            if slot is not None:
                self.buckets[slot] = ACTIVATIONS

    def mark(self, name: str) -> None:
        self.marks.append((len(self.events), name))


def record(work: Workload, steps: int = 2) -> Tape:
    """The tape of loading, and of the first `steps` optimizer steps of at most two micro-batches each: after that
    nothing new happens."""
    writer = _Writer(work)
    writer.load()
    for _ in range(steps):
        for _ in range(min(work.accumulation, 2)):
            writer.micro_batch()
        writer.optimizer_step()
    return writer.tape


class _Writer:
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
        self.states = False
        self.casts: list[int] = []  # autocast's 16-bit copies of what is trained, kept until the forward ends
        self.pinned: list[int] = []

    # what stays

    def load(self) -> None:
        self.tape.mark(LOAD)
        work, model, new, free = self.work, self.work.model, self.new, self.free
        for _ in range(2):
            new(work.blas_workspace // 2, LIBRARIES)
        width = 4 if work.full else self.e
        per_weight = {None: width, "int8": 1}.get(work.quantization, 0.5)
        linear = model.layers * model.layer_linear_parameters
        rest = model.parameters - linear
        free(new(int(rest * width + linear * per_weight)))  # transformers asks for all of it once, and gives it back
        for _ in range(1 if model.tied else 2):
            new(width * model.embedding_parameters, EMBEDDINGS)
        for _ in range(model.layers):
            for name in ("down_proj", "gate_proj", "up_proj", "k_proj", "o_proj", "q_proj", "v_proj"):
                self._load_linear(*self.sides[name], width)
            for _ in range(2):
                new(width * self.hidden, WEIGHTS)
        new(width * self.hidden, WEIGHTS)
        adapters = [
            (layer, name, part) for layer in range(model.layers) for name in self.targets for part in "AB"
        ]  # peft makes them in the model's dtype, then widens them
        made = [new(self.e * self._adapter(name, part), ADAPTERS) for _, name, part in adapters]
        for slot, (_, name, part) in zip(made, adapters, strict=True):
            new(4 * self._adapter(name, part), ADAPTERS)
            free(slot)
        self.trained = [self._adapter(name, part) for _, name, part in adapters]
        if work.full:
            self.trained = [model.embedding_parameters] * (1 if model.tied else 2)
            self.trained += [a * b for _ in range(model.layers) for a, b in self.sides.values()]
        self.tape.mark("trainer")  # transformers empties the cache as training begins

    def _adapter(self, name: str, part: str) -> int:
        return self.work.rank * self.sides[name][part == "B"]

    def _load_linear(self, inputs: int, outputs: int, width: int) -> None:
        size, new, free = inputs * outputs, self.new, self.free
        if self.work.quantization is None:
            new(width * size, WEIGHTS)
        elif self.work.quantization == "int8":
            plain = new(width * size)
            as_fp16 = new(2 * size)
            new(4 * outputs, CONSTANTS)
            new(size, WEIGHTS)
            free(as_fp16, plain)
        else:
            plain = new(width * size)
            constants = new(4 * size // BLOCK, CONSTANTS)
            new(size // 2, WEIGHTS)
            if self.work.double_quant:
                shifted = new(4 * size // BLOCK)
                new(size // BLOCK + 4 * size // BLOCK // STATE_BLOCK, CONSTANTS)
                free(shifted, constants)
            free(plain)

    # a step

    def micro_batch(self) -> None:
        work, new, free = self.work, self.new, self.free
        self.tape.mark(FORWARD)
        self.casts = []
        layers = work.layers
        x = embedded = new(self.stream * self.tokens * self.hidden, ACTIVATIONS)
        angles = [new(self.stream * work.length * work.model.head_size, ACTIVATIONS) for _ in range(2)]
        mask = new(work.rows * work.length**2, ACTIVATIONS) if self.masked else None
        saved = []
        for i, kind in enumerate(layers):
            before = x
            x, kept = self.layer(before, save=kind == STORED, first=i == 0)
            if kind == CHECKPOINTED:
                kept = before
                self.keep(before)
            elif kind == OFFLOADED:
                kept = None
            if before is not embedded and kept is not before and not (kind == STORED and self.shared):
                free(before)
            saved.append(kept)
        y, final = self.norm(x, save=True)
        if not self.shared:
            free(x)
        if layers[0] == OFFLOADED or (layers[0] == STORED and not work.full):
            free(embedded)
        hidden = self.loss(y)
        for slot in self.casts:
            free(slot)
        self.tape.mark(BACKWARD)
        gradient = self.norm_backward(self.loss_backward(hidden), final, None)
        for i in reversed(range(len(layers))):
            if layers[i] == STORED:
                gradient = self.layer_backward(i, gradient, saved[i])
                continue
            x = saved[i] if layers[i] == CHECKPOINTED else new(self.stream * self.tokens * self.hidden, ACTIVATIONS)
            self.casts = []
            _, kept = self.layer(x, save=True, first=i == 0, recompute=True)
            gradient = self.layer_backward(i, gradient, kept)
            if not self.shared or (i == 0 and not work.full):
                free(x)
        if work.full:
            embedding = new(4 * work.model.embedding_parameters, GRADIENTS)
            if work.model.tied:
                free(embedding)
            self._gradient("embedding", self.tied_gradient if work.model.tied else embedding)
        free(gradient, mask, *angles, *self.pinned)
        self.pinned = []

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
        narrow = new(2 * n) if copied else None
        y = new(self.stream * n)
        free(narrow)
        if not (save and self.work.full):
            free(scaled)
        free(variance)
        if not save:
            free(root, wide)
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

    def linear(
        self, name: str, x: int, kept: dict, save: bool, stop: bool = False, leaf: bool = False
    ) -> int | None:
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
            dropped = new(e * N * inputs)
            if leaf:  # no gradient goes back through it
                free(mask)
                mask = None
        cast_a = new(e * self.work.rank * inputs) if self.half else None
        own = new(e * N * inputs) if widened is not None else None
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
        free(widened)
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

    def layer_backward(self, i: int, gradient: int, kept: dict) -> int:
        """Returns the gradient of the layer's input; the residual's is added in place."""
        new, free, N, e = self.new, self.free, self.tokens, self.e
        narrow = new(e * N * self.hidden) if self.stream != e else None
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

    def loss(self, y: int) -> int:
        """trl's fused head: the trained tokens' hidden states, and their logits tile by tile."""
        hidden = self.new(self.stream * self._trained * self.hidden, LOSS)
        tile = self.new(self._tile, LOSS)
        self.free(*[self.new(size, LOSS) for size in self._head_casts], tile, y)
        return hidden

    @property
    def _head_casts(self) -> tuple[int, ...]:
        """A trained head is fp32, and cast tile by tile."""
        if not self.work.full or not self.half:
            return ()
        return (self.e * min(LOSS_COLUMNS, self.work.model.vocabulary) * self.hidden,)

    @property
    def _trained(self) -> int:
        most = self.tokens - self.work.rows  # nothing predicts a row's first token
        return most if self.work.trained_tokens is None else min(self.work.trained_tokens, most)

    @property
    def _tile(self) -> int:
        return self.e * min(self._trained, LOSS_ROWS) * min(LOSS_COLUMNS, self.work.model.vocabulary)

    def loss_backward(self, hidden: int) -> int:
        new, free, model = self.new, self.free, self.work.model
        size = self._trained * self.hidden
        gradient = new(4 * size, LOSS)
        head = new(4 * model.embedding_parameters, GRADIENTS) if self.work.full else None
        tile = new(self._tile, LOSS)
        if self.stream == 2:
            narrow = new(2 * size, LOSS)
            free(gradient)
            gradient = narrow
        free(*[new(cast, LOSS) for cast in 2 * self._head_casts], tile, hidden)
        spread = new(self.stream * size, LOSS)
        free(gradient)
        out = new(self.stream * self.tokens * self.hidden, LOSS)
        free(spread)
        if head is not None and model.tied:
            self.tied_gradient = head  # waits for the embedding's
        elif head is not None:
            self._gradient("head", head)
        return out

    def optimizer_step(self) -> None:
        self.tape.mark(STEP)
        if not self.states:
            for size in self.trained:
                for _ in range(2):
                    for state in _state_sizes(self.work.optimizer, size):
                        self.new(state, OPTIMIZER)
            self.states = True
        self.free(*self.gradients.values())
        self.gradients = {}


def _state_sizes(optimizer: str, size: int) -> list[int]:
    """Bytes on the device that one of Adam's two states takes for a parameter of `size` elements."""
    paged = optimizer.startswith("paged") and size >= PAGED_FROM
    if "8bit" in optimizer and size >= QUANTIZED_FROM:
        return [4 * size // STATE_BLOCK] + ([] if paged else [size])
    return [] if paged else [4 * size]
