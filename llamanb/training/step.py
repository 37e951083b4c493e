"""One optimizer step: its rows are a pool of tokens, done in as many micro-batches as memory asks for; and again in
more of them, where it was not enough."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
from bitsandbytes.optim import AdamW
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from trl import SFTTrainer

from llamanb.attempts import attempt
from llamanb.data.encode import IGNORE
from llamanb.data.packing import pack
from llamanb.errors import ModelError
from llamanb.layout import Plan
from llamanb.model.elementwise import Fast
from llamanb.model.fused import FusedDecoder, fits_layer
from llamanb.model.head import head_loss
from llamanb.model.layers import lay_out
from llamanb.nvml import first_line
from llamanb.ranks import ALONE, Ranks
from llamanb.training.optimizer import JoinedAdamW
from llamanb.training.recovery import go_on, smaller
from llamanb.training.resume import RAN_OUT


def pool(rows: Sequence[dict]) -> dict:
    """The rows of an optimizer step, one behind the other: `input_ids` and `labels`, (tokens,), and their `lengths`.
    Nothing predicts a row's first token, so it is not trained."""
    ids = [torch.as_tensor(row["input_ids"]) for row in rows]
    labels = [torch.as_tensor([IGNORE, *row["labels"][1:]]) for row in rows]
    return {"input_ids": torch.cat(ids), "labels": torch.cat(labels), "lengths": [len(row) for row in ids]}


def heaviest(rows: Sequence, plan: Plan, *, fused: bool) -> dict:
    """The pool of the rows that take most memory: a micro-batch of them, and a second one where steps have several.
    Fused layers take as many as have room if each were as long as the longest, so shorter rows may be more tokens."""
    rows = sorted(rows, key=lambda row: len(row.input_ids), reverse=True)
    lengths = [len(row.input_ids) for row in rows]

    def end(begin: int) -> int:
        fit = plan.micro_batch_size * plan.length // lengths[begin] if fused else plan.micro_batch_size
        return begin + max(1, min(fit, plan.share))

    begin = max(range(len(rows)), key=lambda i: sum(lengths[i : end(i)])) if fused else 0
    last = min(end(min(end(begin), len(rows) - 1)), begin + plan.share)
    return pool([{"input_ids": row.input_ids, "labels": row.labels} for row in reversed(rows[begin:last])])


class StepTrainer(SFTTrainer):
    """trl's trainer, with micro-batches of its own: it is given whole optimizer steps (`pool`), so that how they are
    split is a matter of memory alone and never of what is learned.

    Fused layers take rows as they are; transformers' take rows padded to the longest.
    """

    def __init__(self, plan: Plan, ranks: Ranks = ALONE, **settings):
        super().__init__(**settings)
        self.plan, self.ranks = plan, ranks
        self.tokens = 0
        """Trained on so far, padding left out."""
        self.fused = self.streamed = None
        self.passes = _alone
        """Around a step's micro-batches, where several ranks go through the layers together."""
        self.slow = ""
        """Why steps take longer than planned, in words."""
        self.probe: dict | None = None
        """Rows that take most memory, as `pool` gives them: tried before the first step, and nothing learned from
        them."""
        self.replanned: Callable[[Plan], None] = lambda plan: None
        """Told of each plan that took the place of one that ran out of memory."""
        if plan.fused:
            why_not = next(filter(None, map(fits_layer, self.model.get_decoder().layers)), "")
            if why_not and plan.streamed:
                raise ModelError(
                    "only fused layers fetch weights that are not on the card", why_not, 'weights = "resident"'
                )
            if why_not:
                warnings.warn(f"layers are not fused, and may take more memory than planned: {why_not}", stacklevel=2)
                lay_out(self.model, plan.layers)
                self.slow = f"not fused: {why_not}"
            else:
                self.streamed = getattr(self.model.get_base_model(), "streamed", None) if plan.streamed else None
                self.fused = FusedDecoder(self.model, plan.layers, plan.kernel, self.streamed)
                self.passes = self.streamed.passes if self.streamed else _alone
                if plan.card.is_gpu and Fast.why_not:
                    self.slow = f"fused, but without kernels: {Fast.why_not}"

    def layers_done(self) -> None:
        """Called between the last layer and the loss; for who watches."""

    def create_optimizer(self, *args, **kwargs):
        made, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        if self.plan.recipe.adapters and made is AdamW:
            trained = sum(parameter.requires_grad for parameter in self.model.parameters())
            of_layer = trained // self.model.config.num_hidden_layers
            self.optimizer_cls_and_kwargs = JoinedAdamW, {**settings, "of_layer": of_layer}
        optimizer = super().create_optimizer(*args, **kwargs)
        go_on(optimizer)
        return optimizer

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        model.train()
        if self.probe:
            probe, self.probe = self.probe, None
            before = _random_state()
            self._recovering(lambda: self._summed(model, probe, num_items_in_batch))
            model.zero_grad()
            _set_random_state(before)
        share = _rows(inputs, self.ranks.share(inputs["lengths"]))
        with self.ranks.drawing(self.args.seed, self.state.global_step):
            total = self._recovering(lambda: self._summed(model, share, num_items_in_batch))
        total = self.ranks.summed(total, model.parameters())
        self.tokens += sum(inputs["lengths"])
        self._metrics["train"]["num_tokens"] = [self.tokens]
        return total

    def _recovering(self, work: Callable[[], Tensor]) -> Tensor:
        """What `work` returns, with as many smaller plans as it takes; from the same random state, and no gradients."""
        if self.plan.shards > 1:
            return self._together(work)
        before = _random_state()

        def otherwise(error: BaseException) -> Callable[[], Tensor] | None:
            less, why = smaller(self.plan), first_line(error)

            def again() -> Tensor:
                self.model.zero_grad()
                _set_random_state(before)
                self._take(less, why)
                return self._recovering(work)

            return less and again

        return attempt(work, otherwise)

    def _together(self, work: Callable[[], Tensor]) -> Tensor:
        """The same for ranks that share the layers: when memory runs out on one, all do it again."""
        before = _random_state()
        while True:
            lacks: list[str] = []
            total = attempt(work, lambda error, lacks=lacks: lacks.append(first_line(error)) or (lambda: None))
            if not any(self.ranks.all_of(bool(lacks))):
                return total
            self.model.zero_grad()
            _set_random_state(before)
            if lacks:
                less = smaller(self.plan)
                if less is None:
                    raise torch.OutOfMemoryError(lacks[0])
                self._take(less, lacks[0])

    def _take(self, less: Plan, why: str) -> None:
        was, self.plan = self.plan, less
        if self.fused:
            self.fused.kinds = less.layers
        else:
            lay_out(self.model, less.layers)
        words = f"{less.micro_batch_size} rows at once after {was.micro_batch_size}"
        words += f", {less.recomputed} layers recomputed after {was.recomputed}"
        step = self.state.global_step + 1
        print(f"out of memory at step {step} ({why}); the same step again, nothing lost: {words}", flush=True)
        reason = f"{RAN_OUT} at step {step}: {words}"
        self.plan = less.replace(reasons={**less.reasons, "layers": reason, "micro_batch_size": reason})
        self.replanned(self.plan)

    def _summed(self, model, inputs: dict, num_items_in_batch) -> Tensor:
        total, micro_batches = 0, list(self._micro_batches(inputs))
        with (
            self.passes(len(micro_batches)) as begin,
            self.fused.step() if self.fused else contextlib.nullcontext(),
            torch.autograd.set_multithreading_enabled(False),  # or Python runs in a second thread, more slowly
        ):
            for micro in micro_batches:
                begin()
                with self.compute_loss_context_manager():
                    loss = self.compute_loss(model, self._prepare_inputs(micro), num_items_in_batch=num_items_in_batch)
                self.accelerator.backward(loss)
                total += loss.detach_()  # lets go of what int8 products hold on the graph, their inputs
        return total

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.fused is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        hidden = self.fused(inputs["input_ids"], inputs["lengths"])
        self.layers_done()
        loss = head_loss(hidden, self.model.get_output_embeddings().weight, inputs["labels"].roll(-1))
        return loss / torch.as_tensor(num_items_in_batch, device=loss.device).clamp(min=1)

    def _micro_batches(self, inputs: dict) -> Iterator[dict]:
        lengths, plan = inputs["lengths"], self.plan
        if self.fused is None:
            ids, labels = (inputs[name].split(lengths) for name in ("input_ids", "labels"))
            for begin in range(0, len(lengths), plan.micro_batch_size):
                rows = slice(begin, begin + plan.micro_batch_size)
                yield _padded(ids[rows], labels[rows], self.processing_class.pad_token_id)
            return
        for rows in pack(lengths, plan.micro_batch_size * plan.length):
            yield _rows(inputs, rows)


def _alone(count: int) -> contextlib.AbstractContextManager[Callable[[], None]]:
    return contextlib.nullcontext(lambda: None)


def _rows(inputs: dict, numbers: Sequence[int]) -> dict:
    """Some of a pool's rows, in this order."""
    lengths, taken = inputs["lengths"], {}
    for name in ("input_ids", "labels"):
        rows = inputs[name].split(lengths)
        taken[name] = torch.cat([inputs[name][:0], *(rows[n] for n in numbers)])
    return taken | {"lengths": [lengths[n] for n in numbers]}


def _padded(ids: Sequence[Tensor], labels: Sequence[Tensor], padding: int) -> dict[str, Tensor]:
    """Rows as transformers' layers take them: (rows, longest)."""
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=padding),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
    }


def _random_state() -> tuple[Tensor, list[Tensor]]:
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


def _set_random_state(state: tuple[Tensor, list[Tensor]]) -> None:
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])
