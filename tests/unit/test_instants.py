"""Peaks by part of a step and times between losses, with a GPU's counters played by hand; the same parts, in order,
in a real training on the CPU."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback

from llamanb import Card, Recipe, plan
from llamanb.data import TrainingData
from llamanb.data.encode import load_tokenizer
from llamanb.layout import GIB
from llamanb.memory import SEEN
from llamanb.model import attach_adapters, load_model
from llamanb.rehearsal import random_rows
from llamanb.tape.workload import ADAPTERS, BUCKETS, GRADIENTS, OPTIMIZER
from llamanb.timeline import Timeline
from llamanb.training.trainer import build_trainer
from llamanb.watch.instants import Instants
from tests.unit.fake_gpu import Moment

CPU = Card("CPU", None)


class Meter:
    """torch's counters of allocated and reserved memory, and a clock that the GPU's events read."""

    def __init__(self, monkeypatch):
        self.now = self.peak = self.reserved = 0
        self.clock_s, self.resets = 0.0, 0
        monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", self.stats)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", self.reset)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr("llamanb.watch.instants._now", lambda gpu: Moment(self.clock_s))

    def stats(self, *args):
        peaks = {"allocated_bytes": self.peak, "reserved_bytes": self.reserved}
        return {name: {"all": {"peak": peak, "current": self.now}} for name, peak in peaks.items()}

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
    """`layers_done()` plays the end of the decoder's forward pass."""
    callbacks, hooks = [], []
    decoder = SimpleNamespace(register_forward_hook=hooks.append)
    return SimpleNamespace(
        model=SimpleNamespace(get_decoder=lambda: decoder),
        compute_loss=loss,
        accelerator=SimpleNamespace(backward=backward),
        add_callback=callbacks.append,
        callbacks=callbacks,
        layers_done=lambda: [hook(None, None, None) for hook in hooks],
    )


def trained(instants, meter, steps, accumulation, *, backward_s=2.0, forward_s=1.0, optimizer_s=0.5):
    """A training of `steps`, its first step slow, played into `instants`."""

    def slowness():
        return 10 if not state["done"] else 1

    def loss(*args, **kwargs):
        meter.work(300, 250, forward_s * slowness())
        trainer.layers_done()
        meter.work(400, 250)

    state = {"done": 0}
    trainer = fake_trainer(loss, lambda *args, **kwargs: meter.work(500, 150, backward_s * slowness()))
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


PEAKS = {"load": 120, "forward": 300, "loss": 400, "backward": 500, "optimizer step": 200}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_each_peak_counts_where_it_belongs(meter, accumulation):
    timeline = Timeline("test")
    instants = trained(Instants(timeline), meter, 3, accumulation)
    assert instants.peaks == PEAKS
    assert instants.reserved == 505
    assert [*instants.peaks] == [*SEEN]
    assert timeline.peaks_gib == {part: peak / GIB for part, peak in PEAKS.items()}


def test_without_a_timeline_peaks_count_all_the_same(meter):
    assert trained(Instants(), meter, 2, 1).peaks == PEAKS


def test_without_a_gpu_no_counter_is_asked(meter, monkeypatch):
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", None)
    timeline = Timeline("test")
    instants = trained(Instants(timeline, gpu=False), meter, 2, 1)
    assert timeline.peaks_gib == {}
    assert set(instants.peaks.values()) == {0}
    assert timeline.phase == "optimizer step"


def test_a_forward_pass_that_is_not_training_is_no_part_of_a_step(meter):
    timeline = Timeline("test")
    trainer, instants = fake_trainer(), Instants(timeline)
    instants.attach(trainer)
    instants.begins("score")
    trainer.layers_done()
    assert timeline.phase == "score"


def test_scoring_has_a_peak_of_its_own(meter):
    """It takes more than loading and is not in the plan."""
    timeline = Timeline("test")
    instants = Instants(timeline)
    instants.begins("load")
    meter.work(120, 100)
    instants.begins("score")
    meter.work(900, 100)
    trained(instants, meter, 2, 1)
    instants.begins("save")
    meter.work(1000, 150)
    instants.begins("score")
    meter.work(950, 150)
    instants.begins("over")
    assert instants.peaks == PEAKS | {"score": 950, "save": 1000}
    assert timeline.peaks_gib == {part: peak / GIB for part, peak in instants.peaks.items()}


def test_the_last_optimizer_step_counts_though_no_loss_follows(meter):
    instants = trained(Instants(), meter, 1, 1)
    assert instants.peaks["optimizer step"] == 200


def test_the_highest_of_many_steps_counts(meter):
    instants = Instants()
    for peak in (10, 40, 20):
        instants.begins("forward")
        meter.work(peak, 5)
        instants.begins("loss")
    assert instants.peaks["forward"] == 40
    assert instants.reserved == 45
    assert meter.resets == 6


def test_a_part_begins_with_what_the_one_before_left(meter):
    instants = Instants()
    instants.begins("forward")
    meter.work(90, 60)
    instants.begins("backward")
    meter.work(30, 30)
    instants.begins("optimizer step")
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
    assert not instants._losses


@pytest.mark.parametrize("accumulation", [2, 4])
def test_times_tell_micro_batches_from_the_optimizer(meter, accumulation):
    instants = trained(Instants(), meter, 4, accumulation)
    assert len(instants._losses) == 4 * accumulation
    assert instants.times(accumulation) == pytest.approx((3.0, 0.5))


def test_times_without_accumulation_are_of_whole_steps(meter):
    """A backward, the optimizer and the next forward lie between two losses; what each took cannot be told."""
    instants = trained(Instants(), meter, 5, 1)
    assert instants.times(1) == pytest.approx((3.5, 0.0))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_times_are_medians_without_the_first_step(accumulation):
    instants, now = Instants(gpu=False), 0.0
    for i in range(10 * accumulation):
        instants._losses.append(now)
        now += 100.0 if i < accumulation else 30.0 if i == 5 * accumulation else 2.0
    assert instants.times(accumulation) == pytest.approx((2.0, 0.0))


def test_a_faster_boundary_is_no_negative_optimizer():
    instants = Instants(gpu=False)
    instants._losses.extend([0.0, 9.0, 18.0, 20.0, 21.0, 23.0, 24.0])
    assert instants.times(2) == pytest.approx((2.0, 0.0))


def test_two_steps_are_enough_for_a_time(meter):
    assert trained(Instants(), meter, 2, 2).times(2) == pytest.approx((3.0, 0.0))
    instants = Instants(gpu=False)
    instants._losses.extend([1.0, 3.0])
    assert instants.times(1) == (2.0, 0.0)


@pytest.fixture
def train(mini, tmp_path):
    """`train(instants, accumulation)`: four real steps; their losses and gradients, and the model."""

    def trained(instants, accumulation, fused=False, **fields):
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
            **fields,
        )
        made, tokenizer = plan(recipe, CPU).replace(fused=fused), load_tokenizer(mini)
        rows = random_rows(len(tokenizer), made.length, 2, 8 * accumulation)
        torch.manual_seed(0)
        model = load_model(made, tokenizer)
        model = attach_adapters(model, recipe) if recipe.adapters else model
        data = TrainingData("random", "token ids", tokenizer, rows, [], [], [])
        trainer = build_trainer(made, model, data, tmp_path, [])
        assert bool(trainer.fused) == fused
        if instants:
            instants.attach(trainer)
        trainer.train()
        return [(log["loss"], log["grad_norm"]) for log in trainer.state.log_history if "loss" in log], model

    return trained


@pytest.mark.parametrize(("accumulation", "fused"), [(1, False), (2, False), (2, True)])
def test_losses_are_the_same_with_it_and_without(train, meter, accumulation, fused):
    instants = Instants(Timeline("test"))
    (alone, _), (watched, _) = train(None, accumulation, fused), train(instants, accumulation, fused)
    assert len(alone) == 4
    assert watched == alone
    assert len(instants._losses) == 4 * accumulation


class Told(Timeline):
    """A timeline that keeps every phase it was told."""

    def __setattr__(self, name, value):
        if name == "phase":
            self.__dict__.setdefault("told", []).append(value)
        super().__setattr__(name, value)


@pytest.mark.parametrize(
    "fields",
    [{"method": "lora"}, {"method": "full"}, {"method": "lora", "checkpointing": "all"}, {"fused": True}],
)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_real_training_goes_through_its_parts_in_order(train, accumulation, fields):
    timeline = Told("test")
    train(Instants(timeline, gpu=False), accumulation, **fields)
    micro_batch = ["forward", "loss", "backward", "optimizer step"]
    once = [phase for phase, _ in itertools.groupby(timeline.told)]
    assert once == ["import", *micro_batch * (4 * accumulation)]


def test_each_part_of_a_real_step_is_what_it_is_called(train, monkeypatch):
    """The layers run in the forward pass, the head in the loss, gradients come in the backward pass."""
    timeline, ran = Timeline("test"), []
    seen = lambda what: lambda *args: ran.append((what, timeline.phase))  # noqa: E731
    begun = TrainerCallback()

    def on_train_begin(args, state, control, model=None, **kwargs):
        layer = model.get_decoder().layers[0]
        layer.register_forward_pre_hook(seen("layers"))
        next(p for p in layer.parameters() if p.requires_grad).register_hook(seen("gradient"))

    begun.on_train_begin = on_train_begin
    begun.on_pre_optimizer_step = lambda *args, **kwargs: ran.append(("optimizer", timeline.phase))
    instants, attach = Instants(timeline, gpu=False), Instants.attach

    def attached(self, trainer):
        attach(self, trainer)
        trainer.add_callback(begun)

    monkeypatch.setattr(Instants, "attach", attached)
    train(instants, 1)
    assert list(dict.fromkeys(ran)) == [
        ("layers", "forward"),
        ("gradient", "backward"),
        ("optimizer", "optimizer step"),
    ]


def test_what_lasts_is_counted_with_its_gradients_and_optimizer(train):
    instants = Instants(gpu=False)
    _, model = train(instants, 1)
    adapters = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert instants.lasting[ADAPTERS] == instants.lasting[GRADIENTS] == adapters
    assert instants.lasting[OPTIMIZER] == pytest.approx(2 * adapters, rel=0.01)
    assert set(instants.lasting) <= set(BUCKETS)
