"""Peaks by part of a step and times between losses, with a GPU's counters played by hand."""

from types import SimpleNamespace

import pytest
import torch

from llamanb import Card, Recipe, plan
from llamanb.data import TrainingData
from llamanb.data.encode import load_tokenizer
from llamanb.memory import SEEN
from llamanb.model import attach_adapters, load_model
from llamanb.rehearsal import random_rows
from llamanb.training.trainer import build_trainer
from llamanb.watch.instants import Instants

CPU = Card("CPU", None)


class Meter:
    """torch's counters of allocated and reserved memory, and a clock."""

    def __init__(self, monkeypatch):
        self.now = self.peak = self.reserved = 0
        self.clock_s, self.resets = 0.0, 0
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *args: self.peak)
        monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda *args: self.reserved)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", self.reset)
        monkeypatch.setattr("llamanb.watch.instants.time.perf_counter", lambda: self.clock_s)

    def reset(self, *args):
        self.peak, self.reserved, self.resets = self.now, self.now, self.resets + 1

    def work(self, peak: int, leaves: int, seconds: float = 0.0):
        """Takes as much as `peak` at once, and keeps `leaves`."""
        self.peak, self.now = max(self.peak, peak), leaves
        self.reserved = max(self.reserved, peak + 5)
        self.clock_s += seconds


@pytest.fixture
def meter(monkeypatch):
    return Meter(monkeypatch)


def fake_trainer(loss=lambda *args, **kwargs: None, backward=lambda *args, **kwargs: None):
    callbacks = []
    return SimpleNamespace(
        compute_loss=loss,
        accelerator=SimpleNamespace(backward=backward),
        add_callback=callbacks.append,
        callbacks=callbacks,
    )


def trained(instants, meter, steps, accumulation, *, backward_s=2.0, forward_s=1.0, optimizer_s=0.5):
    """A training of `steps`, its first step slow, played into `instants`."""

    def slowness():
        return 10 if not state["done"] else 1

    state = {"done": 0}
    trainer = fake_trainer(
        lambda *args, **kwargs: meter.work(300, 250, forward_s * slowness()),
        lambda *args, **kwargs: meter.work(500, 150, backward_s * slowness()),
    )
    meter.work(120, 100)
    instants.attach(trainer)
    instants.on_train_begin(None, None, None)
    for _ in range(steps):
        for _ in range(accumulation):
            trainer.accelerator.backward(trainer.compute_loss())
        meter.work(200, 150, optimizer_s * slowness())
        state["done"] += 1
    instants.on_train_end(None, None, None)
    return instants


@pytest.mark.parametrize("accumulation", [1, 2])
def test_each_peak_counts_where_it_belongs(meter, accumulation):
    instants = trained(Instants(), meter, 3, accumulation)
    assert instants.peaks == {"load": 120, "forward": 300, "backward": 500, "optimizer step": 200}
    assert instants.reserved == 505
    assert set(instants.peaks) == set(SEEN)


def test_the_last_optimizer_step_counts_though_no_loss_follows(meter):
    instants = trained(Instants(), meter, 1, 1)
    assert instants.peaks["optimizer step"] == 200


def test_the_highest_of_many_steps_counts(meter):
    instants = Instants()
    for peak in (10, 40, 20):
        meter.work(peak, 5)
        instants.ends("forward")
    assert instants.peaks["forward"] == 40
    assert instants.reserved == 45
    assert meter.resets == 3


def test_a_part_begins_with_what_the_one_before_left(meter):
    instants = Instants()
    meter.work(90, 60)
    instants.ends("forward")
    meter.work(30, 30)
    instants.ends("backward")
    assert instants.peaks["backward"] == 60


def test_loss_and_backward_get_and_give_what_they_did_before(meter):
    seen = []

    def loss(*args, **kwargs):
        seen.append((args, kwargs))
        return "the loss", {"logits": 1}

    def backward(*args, **kwargs):
        seen.append((args, kwargs))

    trainer, instants = fake_trainer(loss, backward), Instants()
    instants.attach(trainer)
    assert trainer.compute_loss("model", {"input_ids": 1}, return_outputs=True) == ("the loss", {"logits": 1})
    assert trainer.accelerator.backward("the loss", retain_graph=True) is None
    assert seen == [(("model", {"input_ids": 1}), {"return_outputs": True}), (("the loss",), {"retain_graph": True})]
    assert trainer.callbacks == [instants]


def test_what_a_loss_raises_comes_through(meter):
    def breaks(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    trainer, instants = fake_trainer(breaks), Instants()
    instants.attach(trainer)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.compute_loss()
    assert instants.losses_s == []


@pytest.mark.parametrize("accumulation", [2, 4])
def test_times_tell_micro_batches_from_the_optimizer(meter, accumulation):
    instants = trained(Instants(), meter, 4, accumulation)
    assert len(instants.losses_s) == 4 * accumulation
    assert instants.times(accumulation) == pytest.approx((3.0, 0.5))


def test_times_without_accumulation_are_of_whole_steps(meter):
    """A backward, the optimizer and the next forward lie between two losses; what each took cannot be told."""
    instants = trained(Instants(), meter, 5, 1)
    assert instants.times(1) == pytest.approx((3.5, 0.0))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_times_are_medians_without_the_first_step(accumulation):
    instants = Instants()
    at, now = [], 0.0
    for i in range(10 * accumulation):
        at.append(now)
        now += 100.0 if i < accumulation else 30.0 if i == 5 * accumulation else 2.0
    instants.losses_s = at
    assert instants.times(accumulation) == pytest.approx((2.0, 0.0))


def test_a_faster_boundary_is_no_negative_optimizer():
    instants = Instants()
    instants.losses_s = [0.0, 9.0, 18.0, 20.0, 21.0, 23.0, 24.0]
    assert instants.times(2) == pytest.approx((2.0, 0.0))


def test_two_steps_are_enough_for_a_time(meter):
    assert trained(Instants(), meter, 2, 2).times(2) == pytest.approx((3.0, 0.0))
    assert Instants.times(SimpleNamespace(losses_s=[1.0, 3.0]), 1) == (2.0, 0.0)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_losses_are_the_same_with_it_and_without(mini, tmp_path, meter, accumulation):
    def losses(*watchers):
        recipe = Recipe(
            model=str(mini),
            dataset="random",
            max_length=24,
            micro_batch_size=2,
            effective_batch_size=2 * accumulation,
            steps=4,
            eval_rows=0,
            learning_rate=1e-2,
            rank=4,
        )
        made, tokenizer = plan(recipe, CPU), load_tokenizer(mini)
        rows = random_rows(len(tokenizer), made.length, 2, 8 * accumulation)
        torch.manual_seed(0)
        model = attach_adapters(load_model(made, tokenizer), recipe)
        data = TrainingData("random", "token ids", tokenizer, rows, [], [], [])
        trainer = build_trainer(made, model, data, tmp_path, [])
        for watcher in watchers:
            watcher.attach(trainer)
        trainer.train()
        return [(log["loss"], log["grad_norm"]) for log in trainer.state.log_history if "loss" in log]

    instants = Instants()
    alone, watched = losses(), losses(instants)
    assert len(alone) == 4
    assert watched == alone
    assert len(instants.losses_s) == 4 * accumulation
