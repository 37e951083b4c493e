"""Out of memory explained, with a GPU whose counters are made up; real ones are in tests/gpu."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch

from llamanb import Card, Recipe, load_data, plan, starter_recipe, train
from llamanb.attempts import is_out_of_memory
from llamanb.errors import LlamanbError
from llamanb.layout import GIB
from llamanb.out_of_memory import EARLIER, GAPS, OTHERS, OutOfMemoryError, Scene, _planned
from llamanb.run import show_run
from llamanb.tape.workload import ACTIVATIONS, GRADIENTS, LOSS, OPTIMIZER, WEIGHTS
from llamanb.timeline import Timeline
from llamanb.training import trainer as trainer_module

ONE, EIGHT = "meta-llama/Llama-3.2-1B-Instruct", "meta-llama/Llama-3.1-8B-Instruct"
THREE = "meta-llama/Llama-3.2-3B-Instruct"
ERROR = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 512.00 MiB. GPU 0 has a total capacity of ...")


class Gpu:
    """A T4's counters, or a larger GPU's that pretends, in GiB; `others` is what other processes hold."""

    def __init__(self, monkeypatch, allocated=0.0, reserved=None, others=0.0, total=14.56):
        self.allocated, self.reserved, self.others, self.share = allocated, reserved, others, min(1.0, 14.56 / total)
        cuda = torch.cuda
        monkeypatch.setattr(cuda, "memory_allocated", lambda: round(self.allocated * GIB))
        monkeypatch.setattr(cuda, "memory_reserved", lambda: round(self.held * GIB))
        monkeypatch.setattr(
            cuda,
            "mem_get_info",
            lambda: [round(size * GIB) for size in (total - 0.16 - self.held - self.others, total)],
        )
        monkeypatch.setattr(cuda, "get_per_process_memory_fraction", lambda: self.share)
        monkeypatch.setattr(cuda, "empty_cache", lambda: None)
        monkeypatch.setattr(cuda, "reset_peak_memory_stats", lambda: None)
        monkeypatch.setattr(cuda.memory, "_dump_snapshot", lambda path: open(path, "w").close())

    @property
    def held(self):
        return self.allocated if self.reserved is None else self.reserved


def planned(force=False, **fields):
    fields = {"model": ONE, "max_length": 2048, "effective_batch_size": 4, "dataset": "rows.jsonl", **fields}
    return plan(Recipe(**fields), "T4", force=force)


def explained(made, phase, tmp_path, gpu, *, earlier=0.0, error=ERROR) -> OutOfMemoryError:
    scene = Scene(made, tmp_path)
    scene._earlier = round(earlier * GIB)
    timeline = Timeline("VRAM", 14.56)
    timeline.phase = phase
    return scene.explain(error, timeline)


def gib(made, phase, *buckets):
    found = _planned(made, phase)
    return sum(found[b] for b in buckets or found if b not in (GAPS, OTHERS)) / GIB


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_rows_that_took_more_than_planned_are_activations(tmp_path, monkeypatch, phase):
    made = planned()
    gpu = Gpu(monkeypatch, allocated=13.9)
    error = explained(made, phase, tmp_path, gpu)
    assert (error.phase, error.bucket) == (phase, ACTIVATIONS)
    assert "0.50 GiB more were asked for" in error.why
    assert f"{gib(made, phase, ACTIVATIONS):.2f} planned" in error.why
    assert error.fix == error.changes.rows[0][0]


def test_a_loss_larger_than_planned_is_the_loss(tmp_path, monkeypatch):
    made = planned()
    error = explained(made, "loss", tmp_path, Gpu(monkeypatch, allocated=14.3))
    assert error.bucket == LOSS
    assert error.held.parts[ACTIVATIONS] == pytest.approx(gib(made, "loss", ACTIVATIONS))


def test_what_others_hold_is_told_apart(tmp_path, monkeypatch):
    made = planned()
    error = explained(made, "forward", tmp_path, Gpu(monkeypatch, allocated=6.0, others=8.0))
    assert error.bucket == OTHERS
    assert error.held.parts[OTHERS] == pytest.approx(8.0, abs=0.01)
    assert error.changes.rows[0][0].startswith("free what other processes hold")


def test_others_are_not_asked_for_on_a_pretend_card(tmp_path, monkeypatch):
    error = explained(planned(), "forward", tmp_path, Gpu(monkeypatch, allocated=13.9, others=100.0, total=144.0))
    assert error.held.parts[OTHERS] == 0


def test_what_an_earlier_cell_holds_is_told_apart(tmp_path, monkeypatch):
    error = explained(planned(), "forward", tmp_path, Gpu(monkeypatch, allocated=13.9), earlier=8.0)
    assert error.bucket == EARLIER
    assert "restart the kernel" in error.fix


def test_gaps_between_tensors_are_named(tmp_path, monkeypatch):
    error = explained(planned(), "backward", tmp_path, Gpu(monkeypatch, allocated=10.0, reserved=14.3))
    assert error.bucket == GAPS
    assert error.held.parts[GAPS] == pytest.approx(4.3)


@pytest.mark.parametrize(
    ("phase", "fields", "bucket"),
    [
        ("load", {"model": EIGHT, "method": "lora"}, WEIGHTS),
        ("forward", {"checkpointing": "none", "micro_batch_size": 8, "effective_batch_size": 8}, ACTIVATIONS),
        ("backward", {"model": THREE, "method": "full", "optimizer": "adamw_8bit", "max_length": 64}, GRADIENTS),
        ("optimizer step", {"method": "full", "optimizer": "adamw_torch_fused", "max_length": 64}, OPTIMIZER),
    ],
)
def test_a_forced_plan_names_the_largest_of_what_it_wanted(tmp_path, monkeypatch, phase, fields, bucket):
    made = planned(force=True, **fields)
    assert made.needs_gib > made.limit_gib
    error = explained(made, phase, tmp_path, Gpu(monkeypatch, allocated=13.9))
    assert (error.phase, error.bucket) == (phase, bucket)


def test_each_change_is_planned_as_if_the_plan_were_wrong_again(tmp_path, monkeypatch):
    made = planned(micro_batch_size=4)
    missed = 12.0
    amount = gib(made, "backward", *[*_planned(made, "backward").keys() - {OTHERS}]) + missed - 13.9
    error = explained(made, "backward", tmp_path, Gpu(monkeypatch, allocated=13.9), error=_asks(amount))
    change, needs, _ = error.changes.rows[0]
    assert change == "micro_batch_size = 1", "a quarter of the rows, a quarter of what was missed"
    single = planned(micro_batch_size=1, effective_batch_size=4)
    assert float(needs.split()[1]) == pytest.approx(single.needs_gib + missed / 4, abs=0.05)
    for change, needs, _ in error.changes.rows[1:]:
        assert float(needs.split()[0]) < 14.4 - missed, change


def _asks(amount):
    return torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {amount:.2f} GiB. GPU 0 has")


@pytest.mark.parametrize(
    ("error", "is_it"),
    [
        (ERROR, True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("out of range"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_it_is_known_by_type_and_by_message(tmp_path, monkeypatch, error, is_it):
    assert is_out_of_memory(error) is is_it
    found = explained(planned(), "forward", tmp_path, Gpu(monkeypatch, allocated=13.9), error=error)
    assert (found is not None) is is_it


def test_an_error_that_is_its_own_cause_ends_too(tmp_path):
    error = ValueError("again")
    error.__cause__ = error
    Scene(plan(starter_recipe(model="tiny", dataset="tiny"), Card("CPU", None)), tmp_path).clear(error)
    assert error.__traceback__ is None


def test_on_a_cpu_nothing_is_explained(tmp_path):
    made = plan(starter_recipe(model="tiny", dataset="tiny"), Card("CPU", None))
    assert Scene(made, tmp_path).explain(ERROR, Timeline("host")) is None


def test_the_card_holds_bar_changes_and_where_the_snapshot_lies(tmp_path, monkeypatch):
    error = explained(planned(), "forward", tmp_path, Gpu(monkeypatch, allocated=13.9))
    assert (tmp_path / "memory_snapshot.pickle").exists()
    assert isinstance(error, LlamanbError)
    text = "\n".join(error._lines())
    assert "memory_snapshot.pickle" in text
    assert "what would fit" in text
    assert error.held.total == pytest.approx(13.9 + 0.5 + 0.16, abs=0.02)
    assert "role='img'" in error._repr_html_()


def test_a_training_that_runs_out_of_memory_lets_its_model_go_and_leaves_a_run(tmp_path, monkeypatch):
    """A real training on the CPU, where from the third step on no loss finds its memory, however small the plan."""
    seen = []
    build = trainer_module.build_trainer

    def watched(made, model, *args):
        trainer = build(made, model, *args)
        seen.append(weakref.ref(model))
        compute = trainer.compute_loss

        def loss(*args, **kwargs):
            if trainer.state.global_step == 2:
                raise torch.OutOfMemoryError(str(ERROR))
            return compute(*args, **kwargs)

        trainer.compute_loss = loss
        return trainer

    answer = OutOfMemoryError("what", "why", "fix", "loss", LOSS, SimpleNamespace(), SimpleNamespace(rows=[]))
    monkeypatch.setattr(trainer_module, "build_trainer", watched)
    monkeypatch.setattr(Scene, "explain", lambda self, error, timeline: answer)
    recipe = starter_recipe(model="tiny", dataset="tiny").replace(steps=5, eval_rows=0)
    with pytest.raises(OutOfMemoryError) as caught:
        train(plan(recipe), load_data(recipe), runs=tmp_path)
    gc.collect()
    assert caught.value.__context__ is None
    assert seen[0]() is None
    run = show_run(tmp_path / "run")
    assert run.status == "out of memory"
    assert len(run.losses) == 2
