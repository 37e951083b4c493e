"""A whole training on the tape: loading, a micro-batch, trl's tiled loss, the optimizer."""

from __future__ import annotations

from llamanb.recipe import LINEAR_LAYERS
from llamanb.tape.fused import FusedLayers
from llamanb.tape.layer import DecoderLayer
from llamanb.tape.workload import (
    ACTIVATIONS,
    ADAPT,
    ADAPTERS,
    ALIGNED,
    BACKWARD,
    BLOCK,
    BUFFERS,
    CHECKPOINTED,
    CONSTANTS,
    EMBEDDINGS,
    EMPTIED,
    FORWARD,
    GRADIENTS,
    HEAD,
    HEAD_BACKWARD,
    LIBRARIES,
    LOAD,
    LOSS,
    LOSS_COLUMNS,
    LOSS_ROWS,
    OFFLOADED,
    OPTIMIZER,
    PAGED_FROM,
    QUANTIZED_FROM,
    RECOMPUTED,
    STATE_BLOCK,
    STEP,
    STORED,
    WEIGHTS,
    joined,
    spread,
)


class Step(DecoderLayer, FusedLayers):
    def load(self) -> None:
        self.tape.mark(LOAD)
        work, model, new, free = self.work, self.work.model, self.new, self.free
        new(work.blas_workspace, LIBRARIES)
        width = 4 if work.full else self.e
        per_weight = {None: width, "int8": 1}.get(work.quantization, 0.5)
        linear = model.layers * model.layer_linear_parameters
        rest = model.parameters - linear
        unused = -work.blas_workspace % (20 * 2**20)
        if not work.streamed:
            free(
                new(int(rest * width + linear * per_weight) - unused)
            )  # transformers asks for all of it, and gives it back
        for _ in range(1 if model.tied or work.streamed else 2):  # with streamed layers in host memory, but for a head
            new(width * model.embedding_parameters, EMBEDDINGS)
        streamed = spread(work.streamed, model.layers)
        for layer in range(model.layers):
            for name in ("down_proj", "gate_proj", "up_proj", "k_proj", "o_proj", "q_proj", "v_proj"):
                kept = self._load_linear(*self.sides[name], width)
                if layer in streamed:
                    free(*kept)
            if layer in streamed and work.shards > 1:
                new(self.part_bytes, WEIGHTS)
            for _ in range(2):
                new(width * self.hidden, WEIGHTS)
        new(width * self.hidden, WEIGHTS)
        for _ in range(BUFFERS if streamed else 0):
            new(self.part_bytes * work.shards if work.shards > 1 else self.streamed_bytes, WEIGHTS)
        self.tape.mark(ADAPT)
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
        self.tape.mark(EMPTIED)

    def _adapter(self, name: str, part: str) -> int:
        return self.work.rank * self.sides[name][part == "B"]

    def _load_linear(self, inputs: int, outputs: int, width: int) -> list[int]:
        """Returns what stays."""
        size, new, free = inputs * outputs, self.new, self.free
        if self.work.quantization is None:
            return [new(width * size, WEIGHTS)]
        if self.work.quantization == "int8":
            plain = new(width * size)
            as_fp16 = new(2 * size)
            kept = [new(4 * outputs, CONSTANTS), new(size, WEIGHTS)]
            free(as_fp16, plain)
            return kept
        plain = new(width * size)
        kept = [new(4 * size // BLOCK, CONSTANTS), new(size // 2, WEIGHTS)]
        if self.work.double_quant:
            shifted = new(4 * size // BLOCK)
            wide, kept[0] = kept[0], new(size // BLOCK + 4 * size // BLOCK // STATE_BLOCK, CONSTANTS)
            free(shifted, wide)
        free(plain)
        return kept

    @property
    def streamed_bytes(self) -> int:
        """A layer's linear weights and their constants, one behind the other."""
        total = 0
        for inputs, outputs in self.sides.values():
            size = inputs * outputs
            pieces = [self.e * size]
            if self.work.quantization:
                constants = size // BLOCK
                nested = [constants, 4 * -(-constants // STATE_BLOCK)]
                pieces = [size // 2, *(nested if self.work.double_quant else [4 * constants])]
            total += sum(-(-piece // ALIGNED) * ALIGNED for piece in pieces)
        return total

    @property
    def part_bytes(self) -> int:
        """What one of the cards that share a layer holds of it."""
        return -(-self.streamed_bytes // (self.work.shards * ALIGNED)) * ALIGNED

    def micro_batch(self) -> None:
        if self.work.fused:
            self.fused_micro_batch()
        else:
            self._micro_batch()

    def _micro_batch(self) -> None:
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
        self.tape.mark(HEAD)
        hidden = self.loss(y)
        free(*self.casts)
        self.tape.mark(HEAD_BACKWARD)
        gradient = self.norm_backward(self.loss_backward(hidden), final, None)
        for i in reversed(range(len(layers))):
            self.tape.mark(BACKWARD if layers[i] == STORED else RECOMPUTED)
            if layers[i] == STORED:
                gradient = self.layer_backward(i, gradient, saved[i])
                continue
            begun = self.before_recompute(i, gradient)
            x = saved[i] if layers[i] == CHECKPOINTED else new(self.stream * self.tokens * self.hidden, ACTIVATIONS)
            self.casts = []
            _, kept = self.layer(x, save=True, first=i == 0, recompute=True)
            unread = not self.shared or (i == 0 and not work.full)  # the norm has not kept it
            if unread and layers[i] == OFFLOADED:
                free(x)
            gradient = self.layer_backward(i, gradient, kept | begun)
            if unread and layers[i] == CHECKPOINTED:
                free(x)
        if work.full:
            embedding = new(4 * work.model.embedding_parameters, GRADIENTS)
            if work.model.tied:
                free(embedding)
            self._gradient("embedding", self.tied_gradient if work.model.tied else embedding)
        free(gradient, mask, *angles, *self.pinned)
        self.pinned = []

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
        """Each tile again, and the gradient of the hidden states in fp32; then of the final norm's output."""
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

    def optimizer_states(self) -> None:
        self.tape.mark(STEP)
        for numbers in self._together:
            size = sum(self.trained[number] for number in numbers)
            for _ in range(2):
                for state in _state_sizes(self.work.optimizer, size):
                    self.new(state, OPTIMIZER)

    def update(self) -> None:
        """The optimizer's copies of weights and gradients that it updates at once. Each layer's are as the first's; and
        where layers are fused, less than what is freed as it begins."""
        self.tape.mark(STEP)
        for numbers in self._together:
            if not self.work.fused and len(numbers) > 1 and numbers.start < 2 * len(self.targets):
                size = sum(self.trained[number] for number in numbers)
                self.free(*[self.new(4 * size) for _ in range(2)])

    @property
    def _together(self) -> list[range]:
        alone = self.work.full or self.work.optimizer == "adamw_torch_fused" or not self.work.joined
        return joined(self.trained, 1 if alone else 2 * len(self.targets))

    def make_gradients(self) -> None:
        for layer in range(self.work.model.layers):
            for name in LINEAR_LAYERS if self.work.full else self.targets:
                if self.work.full:
                    inputs, outputs = self.sides[name]
                    self.gradients[layer, name] = self.new(4 * inputs * outputs, GRADIENTS)
                else:
                    for part in "AB":
                        self.gradients[layer, name, part] = self.new(4 * self._adapter(name, part), GRADIENTS)
        if self.work.full:
            for key in ("embedding",) if self.work.model.tied else ("embedding", "head"):
                self.gradients[key] = self.new(4 * self.work.model.embedding_parameters, GRADIENTS)

    def drop_gradients(self) -> None:
        self.free(*self.gradients.values())
        self.gradients = {}


def _state_sizes(optimizer: str, size: int) -> list[int]:
    """Bytes on the device that one of Adam's two states takes for a parameter of `size` elements."""
    paged = optimizer.startswith("paged") and size >= PAGED_FROM
    if "8bit" in optimizer and size >= QUANTIZED_FROM:
        return [4 * size // STATE_BLOCK] + ([] if paged else [size])
    return [] if paged else [4 * size]
