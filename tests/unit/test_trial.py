"""Trials of a rehearsal on a CPU: a few layers trained, and nothing left of them."""

import gc
import math
import weakref

import pytest
import torch

from llamanb import Card, Recipe, plan, rehearsal
from llamanb.architecture import architecture
from llamanb.data import TrainingData
from llamanb.data.encode import IGNORE, load_tokenizer
from llamanb.memory import SEEN
from llamanb.model import load_model
from llamanb.rehearsal import random_rows
from llamanb.tape import CHECKPOINTED, HALVED, STORED
from llamanb.training.trainer import build_trainer, let_go
from tests.unit.fake_gpu import Moment

CPU = Card("CPU", None)


def test_rows_are_full_and_need_a_mask():
    rows = random_rows(100, 8, 4, 12)
    assert [len(row.input_ids) for row in rows] == [8, 7, 7, 7, 8, 6, 6, 6, 8, 7, 7, 7]
    for row in rows:
        assert all(0 <= token < 100 for token in row.input_ids)
        assert row.labels == [IGNORE, *row.input_ids[1:]]
    assert random_rows(100, 8, 4, 12) == rows
    assert {len(row.input_ids) for row in random_rows(100, 8, 1, 3)} == {8}


@pytest.fixture
def counters(monkeypatch):
    """torch's counters of a GPU that holds 1000 bytes of others, at most 5000 allocated and 9000 reserved; the loss of
    a micro-batch comes a second after the one before. Returns those moments."""
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda *args: 1000)
    peaks = {"allocated_bytes": 5000, "reserved_bytes": 9000}
    stats = {name: {"all": {"peak": peak}} for name, peak in peaks.items()}
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", lambda *args: stats)
    for name in ("reset_peak_memory_stats", "empty_cache", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda *args: None)
    monkeypatch.setattr(rehearsal, "_make_workspaces", lambda torch: None)
    moments = []

    def now(gpu):
        moments.append(Moment(len(moments)))
        return moments[-1]

    monkeypatch.setattr("llamanb.watch.instants._now", now)
    return moments


@pytest.mark.parametrize(
    ("accumulation", "layers", "streamed"),
    [
        (1, (CHECKPOINTED, STORED), False),
        (4, (CHECKPOINTED, HALVED, STORED, STORED), False),
        (2, (CHECKPOINTED, HALVED, STORED, STORED), True),
    ],
)
def test_a_trial_trains_that_many_layers_and_leaves_nothing(
    mini, counters, monkeypatch, accumulation, layers, streamed
):
    from llamanb.training import trainer as module

    made_trainers, build = [], module.build_trainer

    def watched(plan, model, *rest):
        trainer = build(plan, model, *rest)
        layers = len(model.get_base_model().model.layers)
        facts = (layers, trainer.args.max_steps, bool(trainer.fused), trainer.streamed and len(trainer.streamed.hosts))
        made_trainers.append((facts, weakref.ref(model.get_input_embeddings().weight)))
        return trainer

    monkeypatch.setattr(module, "build_trainer", watched)
    recipe = Recipe(
        model=str(mini),
        dataset="rows.jsonl",
        max_length=16,
        micro_batch_size=2,
        effective_batch_size=2 * accumulation,
        optimizer="adamw_8bit",
        eval_rows=0,
    )
    shape = architecture(str(mini))
    fused = HALVED in layers
    made = plan(recipe, CPU).replace(fused=fused, streamed=tuple(range(shape.layers)) if streamed else ())
    found = rehearsal._try(made, shape, layers, math.inf)
    [(facts, embedding)] = made_trainers
    assert facts == (len(layers), rehearsal.STEPS, fused, len(layers) if streamed else None)
    assert len(counters) == rehearsal.STEPS * min(accumulation, 2), "a loss for each micro-batch"
    assert embedding() is None, "the model is gone"
    assert found.layers == layers
    assert found.peaks == dict.fromkeys(SEEN, 4000), "what others hold is not the trial's"
    assert found.reserved == 8000
    assert (found.micro_batch_s, found.optimizer_s) == (1.0, 0.0)


def test_letting_go_frees_the_embedding(mini, tmp_path):
    """The Trainer registers embeddings with bitsandbytes' manager of 8-bit optimizers, which lives on; where adapters
    are trained it does not."""
    from bitsandbytes.optim import GlobalOptimManager

    rows = {"max_length": 16, "micro_batch_size": 2, "effective_batch_size": 2, "eval_rows": 0}
    recipe = Recipe(model=str(mini), dataset="rows.jsonl", method="full", steps=1, optimizer="adamw_8bit", **rows)
    made, tokenizer = plan(recipe, CPU), load_tokenizer(mini)
    model = load_model(made, tokenizer)
    data = TrainingData("random", "token ids", tokenizer, random_rows(len(tokenizer), 16, 2, 2), [], [], [])
    trainer = build_trainer(made, model, data, tmp_path, [])
    trainer.train()
    embedding = weakref.ref(model.get_input_embeddings().weight)
    del model, trainer
    gc.collect()
    assert embedding() is not None, "else let_go is no longer needed"
    let_go()
    gc.collect()
    assert embedding() is None
    assert GlobalOptimManager.get_instance().module_weight_config_triple == []
