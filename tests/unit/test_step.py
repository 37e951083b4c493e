"""An optimizer step: a pool of rows, split as memory asks; what is learned does not depend on how."""

import random
import threading
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from llamanb import Card, Recipe, plan
from llamanb.data import TrainingData
from llamanb.data.encode import IGNORE, Encoded, load_tokenizer
from llamanb.model import attach_adapters, load_model
from llamanb.tape import CHECKPOINTED, HALVED, OFFLOADED, STORED
from llamanb.training.optimizer import JoinedAdamW
from llamanb.training.step import StepTrainer, pool
from llamanb.training.trainer import build_trainer

CPU = Card("CPU", None)
KINDS = (STORED, HALVED, CHECKPOINTED, OFFLOADED)
LONGEST = 24


def rows_of(count, seed=0, lengths=None, trained=0.7):
    """Rows of random tokens and lengths; the first label, and some others, are not trained."""
    source = random.Random(seed)
    made = []
    for length in lengths or [source.randint(2, LONGEST) for _ in range(count)]:
        ids = [source.randrange(500) for _ in range(length)]
        made.append(Encoded(ids, [IGNORE, *(t if source.random() < trained else IGNORE for t in ids[1:])]))
    return made


def pooled(rows):
    return pool([{"input_ids": row.input_ids, "labels": row.labels} for row in rows])


def test_a_pool_is_all_rows_one_behind_the_other():
    made = pool([{"input_ids": [5, 6, 7], "labels": [5, IGNORE, 7]}, {"input_ids": [8, 9], "labels": [8, 9]}])
    assert made["input_ids"].tolist() == [5, 6, 7, 8, 9]
    assert made["labels"].tolist() == [IGNORE, IGNORE, 7, IGNORE, 9], "nothing predicts a row's first token"
    assert made["lengths"] == [3, 2]
    assert {made[name].dtype for name in ("input_ids", "labels")} == {torch.int64}


def split(rows, *, fused, micro=2, length=LONGEST):
    """Micro-batches of a step."""
    of_plan = SimpleNamespace(micro_batch_size=micro, length=length)
    trainer = SimpleNamespace(fused=fused or None, plan=of_plan, processing_class=SimpleNamespace(pad_token_id=499))
    return list(StepTrainer._micro_batches(trainer, pooled(rows)))


def rows_in(micro):
    ids, labels = (micro[name].split(micro["lengths"]) for name in ("input_ids", "labels"))
    return [(one.tolist(), right.tolist()) for one, right in zip(ids, labels, strict=True)]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("count", "micro"), [(1, 1), (7, 1), (16, 2), (40, 4), (16, 16)])
def test_fused_micro_batches_hold_all_rows_once_within_the_budget_longest_first(count, micro, seed):
    rows, most = rows_of(count, seed), micro * LONGEST
    made = split(rows, fused=True, micro=micro)
    every = [row for one in made for row in rows_in(one)]
    assert sorted(every) == sorted((row.input_ids, row.labels) for row in rows)
    assert all(len(one["lengths"]) * one["lengths"][0] <= most for one in made), "what kernels set aside"
    assert all(one["lengths"] == sorted(one["lengths"], reverse=True) for one in made)
    begins = [one["lengths"][0] for one in made]
    assert begins == sorted(begins, reverse=True), "memory is asked for at once, not at some later step"
    for one in made[:-1]:
        assert (len(one["lengths"]) + 1) * one["lengths"][0] > most, "it takes as many as it can"
    assert len(made) <= -(-count // micro), "no more than padded ones would be"


def test_a_row_longer_than_planned_for_stands_alone():
    made = split(rows_of(3, lengths=[5, 60, 5]), fused=True)
    assert [one["lengths"] for one in made] == [[60], [5, 5]]


def test_padded_micro_batches_hold_rows_in_their_order():
    rows = rows_of(5, lengths=[3, 9, 4, 4, 6])
    made = split(rows, fused=False)
    assert [tuple(one["input_ids"].shape) for one in made] == [(2, 9), (2, 4), (1, 6)]
    padded = [row for one in made for row in zip(one["input_ids"], one["labels"], one["attention_mask"], strict=True)]
    for row, (ids, labels, mask) in zip(rows, padded, strict=True):
        real = mask == 1
        assert (ids[real].tolist(), labels[real].tolist()) == (row.input_ids, row.labels)
        assert (ids[~real] == 499).all()
        assert (labels[~real] == IGNORE).all()


@pytest.fixture
def make(mini, tmp_path):
    """`make(rows, ...)`: a trainer of the mini checkpoint with adapters."""

    def trainer(rows, *, fused=True, layers=(STORED, STORED), effective=8, micro=1, method="lora", steps=5, **fields):
        sizes = {"effective_batch_size": effective, "micro_batch_size": micro, "max_length": LONGEST}
        rest = {"eval_rows": 0, "learning_rate": 1e-2, "rank": 4, **fields}
        recipe = Recipe(model=str(mini), dataset="random", method=method, steps=steps, **sizes, **rest)
        made, tokenizer = plan(recipe, CPU).replace(fused=fused, layers=layers), load_tokenizer(mini)
        torch.manual_seed(0)
        model = attach_adapters(load_model(made, tokenizer), recipe)
        data = TrainingData("random", "token ids", tokenizer, rows, [], [], [])
        return build_trainer(made, model, data, tmp_path, [])

    return trainer


def stepped(trainer, rows):
    """Loss of one step, and the adapters' gradients."""
    for name, weight in trainer.model.named_parameters():
        if "lora_B" in name:
            weight.data.copy_(torch.linspace(-0.1, 0.1, weight.numel()).view_as(weight))
    inputs = pooled(rows)
    items = inputs["labels"].ne(IGNORE).sum()
    loss = trainer.training_step(trainer.model, inputs, num_items_in_batch=items)
    return loss.item(), {name: p.grad for name, p in trainer.model.named_parameters() if p.requires_grad}


def mean_loss(trainer, rows):
    """Over the trained tokens of all rows, each row computed by itself."""
    total = count = 0
    for row in rows:
        logits = trainer.model(input_ids=torch.tensor([row.input_ids])).logits[0, :-1].float()
        labels = torch.tensor(row.labels[1:])
        total += F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum").item()
        count += int((labels != IGNORE).sum())
    return total / count


class Keeps(torch.autograd.Function):
    """Holds a tensor on its node, as bitsandbytes' int8 products do with their inputs: backward does not free it."""

    @staticmethod
    def forward(ctx, x, held):
        ctx.kept = x.clone()
        held.append(weakref.ref(ctx.kept))
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


@pytest.mark.parametrize("fused", [True, False])
def test_a_micro_batch_leaves_nothing_to_the_next(make, fused):
    rows = rows_of(4)
    trainer, held, alive = make(rows, fused=fused, effective=4), [], []
    compute_loss = trainer.compute_loss

    def watched(*args, **kwargs):
        alive.append(sum(one() is not None for one in held))
        return Keeps.apply(compute_loss(*args, **kwargs), held)

    trainer.compute_loss = watched
    stepped(trainer, rows)
    assert len(alive) > 2
    assert not any(alive)
    assert not any(one() is not None for one in held)


def test_the_backward_stays_in_the_thread_of_the_training(make):
    """Python takes longer in one of autograd's, and cuBLAS sets memory aside for each thread."""
    rows = rows_of(2)
    trainer, threads = make(rows, layers=(CHECKPOINTED, STORED)), set()
    weight = next(p for p in trainer.model.parameters() if p.requires_grad)
    weight.register_hook(
        lambda gradient: threads.add((threading.get_ident(), torch.autograd.is_multithreading_enabled()))
    )
    stepped(trainer, rows)
    assert threads == {(threading.get_ident(), False)}
    assert torch.autograd.is_multithreading_enabled()


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "adamw_torch_fused"])
def test_adapters_are_updated_layer_by_layer_where_bitsandbytes_updates_them(make, optimizer):
    trainer = make(rows_of(2), optimizer=optimizer, rank=128)
    made = trainer.create_optimizer()
    assert isinstance(made, JoinedAdamW) == (optimizer == "adamw_8bit")
    stepped(trainer, rows_of(2))
    made.step()
    trained = sum(parameter.requires_grad for parameter in trainer.model.parameters())
    assert len(made.state) == (2 if optimizer == "adamw_8bit" else trained)


@pytest.mark.parametrize("fused", [True, False])
def test_loss_and_gradients_are_the_same_however_a_step_is_split(make, fused):
    rows = rows_of(8)
    whole, gradients = stepped(make(rows, fused=fused, micro=8), rows)
    assert max(gradient.abs().max() for gradient in gradients.values()) > 1e-3
    for micro in (4, 2, 1):
        trainer = make(rows, fused=fused, micro=micro)
        assert len(list(trainer._micro_batches(pooled(rows)))) > 1
        loss, got = stepped(trainer, rows)
        assert loss == pytest.approx(whole, rel=1e-6)
        for name, gradient in gradients.items():
            torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("fused", [True, False])
def test_the_loss_is_the_mean_over_the_trained_tokens_of_the_whole_step(make, fused):
    """Rows with many and with few trained tokens: a mean of micro-batches' means would be another number."""
    rows = [*rows_of(2, lengths=[20, 22], trained=1.0), *rows_of(6, lengths=[3] * 6, trained=0.5)]
    trainer = make(rows, fused=fused, micro=1)
    loss, _ = stepped(trainer, rows)
    assert loss == pytest.approx(mean_loss(trainer, rows), rel=1e-5)


@pytest.mark.parametrize("fused", [True, False])
def test_tokens_are_counted_without_padding(make, fused):
    rows = rows_of(8)
    trainer = make(rows, fused=fused, micro=4)
    stepped(trainer, rows)
    stepped(trainer, rows[:3])
    assert trainer.tokens == sum(len(row.input_ids) for row in [*rows, *rows[:3]])
    assert trainer._metrics["train"]["num_tokens"] == [trainer.tokens]


def test_a_step_without_a_trained_token_learns_nothing(make):
    rows = rows_of(8, trained=0)
    loss, gradients = stepped(make(rows), rows)
    assert loss == 0
    assert not any(gradient.any() for gradient in gradients.values())


def test_who_watches_is_told_when_the_layers_are_done(make):
    rows = rows_of(8)
    trainer, told = make(rows, micro=2), []
    trainer.layers_done = lambda: told.append(1)
    stepped(trainer, rows)
    assert len(told) == len(list(trainer._micro_batches(pooled(rows))))


def trained(trainer):
    trainer.train()
    return [(log["loss"], log["grad_norm"]) for log in trainer.state.log_history if "loss" in log]


@pytest.mark.parametrize(("accumulation", "method"), [(1, "lora"), (8, "lora"), (8, "qlora-nf4")])
def test_a_fused_training_is_the_training_of_transformers_and_peft(make, accumulation, method):
    rows = rows_of(accumulation)
    settings = {"effective": accumulation, "method": method, "learning_rate": 3e-2}
    right = trained(make(rows, fused=False, **settings))
    assert len(right) == 5
    assert right[-1][0] < right[0][0] - 0.1, "something is learned"
    for kind in KINDS:
        trainer = make(rows, layers=(kind,) * 2, **settings)
        assert trainer.fused is not None
        for (loss, norm), (right_loss, right_norm) in zip(trained(trainer), right, strict=True):
            assert loss == pytest.approx(right_loss, abs=1e-5), kind
            assert norm == pytest.approx(right_norm, rel=1e-4), kind


def test_layers_that_cannot_be_fused_are_laid_out_as_the_plan_says_with_a_warning(make):
    rows = rows_of(8)
    with pytest.warns(UserWarning, match="not fused, and may take more memory than planned: adapters with dropout"):
        trainer = make(rows, layers=(HALVED, STORED), dropout=0.1)
    assert trainer.fused is None
    assert [layer.gradient_checkpointing for layer in trainer.model.get_decoder().layers] == [True, False]
    assert trainer.slow == "not fused: adapters with dropout"
    assert len(trained(trainer)) == 5


def test_a_run_of_one_step_learns(make):
    """Its only step would be the first of a warmup, whose rate is 0."""
    trainer = make(rows_of(4), effective=4, steps=1)
    trainer.train()
    weights = [p for name, p in trainer.model.named_parameters() if "lora_B" in name]
    assert weights
    assert all(weight.any() for weight in weights)
