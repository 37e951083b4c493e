"""The stop button, pressed once or twice, at any moment and at each part of a session: the kernel stays usable, and the
run goes on to what it would have come to.

`make faults` presses in 100 sessions, CI in ten, and 1,000 times, in CI 20, memory runs out besides. All of it in one
process, as in a notebook.
"""

import ctypes
import gc
import json
import os
import random
import shutil
import signal
import threading
import time
from itertools import cycle, product
from pkgutil import resolve_name

import psutil
import pytest
import torch

from llamanb import Card, Recipe, load_data, plan, show_run, train
from llamanb.run import FINISHED, INTERRUPTED, newest_folder
from llamanb.tape import STORED
from llamanb.training import _write_report
from llamanb.training.checkpoints import holds, newest, step_of
from llamanb.training.resume import CHECKPOINTS
from tests.injected import ERRORS, NoMemory, Presses, inject

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]
COUNT = int(os.environ.get("LLAMANB_KILLS", "10"))
SEED = int(os.environ.get("LLAMANB_SEED", "0"))
STEPS = 12
STATES = ("trained.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")
BEFORE = ["llamanb.model.load_model", "llamanb.model.attach_adapters"]
BEFORE += ["llamanb.evaluate.evaluate", "llamanb.training.trainer.build_trainer"]
DURING = {
    "llamanb.training.step.StepTrainer.compute_loss": 1,
    "transformers.models.llama.modeling_llama.LlamaMLP.forward": 1,
    "llamanb.training.saves.CheckpointedTrainer._clip_grad_norm": 1,
    "llamanb.watch.live.LiveView.on_log": 2,
    "llamanb.training.saves.save_file": 2,
    "torch.save": 2,
    "llamanb.training.saves.commit": 2,
}
"""Steps that are done when the button has been pressed once there; the first checkpoint is of the second step."""
AFTER = ["llamanb.model.save_model", "llamanb.evaluate.compare", "llamanb.model.write_model_card"]
PLACES = [(place, times) for place in (*BEFORE, *DURING, *AFTER) for times in (1, 2)]
DRAWN = PLACES if COUNT >= 100 else random.Random(SEED).sample(PLACES, 5)

PLACES_OF_LACK = ("forward", "backward", "optimizer", "evaluation", "save")
CYCLES = 2 * COUNT
WARM_UP = max(10, CYCLES // 50)


class Kernel:
    """Runs sessions in this process, and hears interrupts as a notebook's kernel does: while a cell runs."""

    def __init__(self, base):
        self.runs, self.busy = base / "runs", False
        rows = base / "rows.jsonl"
        rows.write_text("\n".join(json.dumps({"instruction": f"Say {n}.", "output": f"It is {n}."}) for n in range(12)))
        fields = {"model": "tiny", "dataset": str(rows), "max_length": 128, "effective_batch_size": 4}
        fields |= {"micro_batch_size": 2, "steps": STEPS, "dropout": 0.2, "learning_rate": 1e-2, "eval_rows": 2}
        recipe = Recipe(**fields, checkpoint_every_steps=2)
        self.plan, self.data = plan(recipe, Card("CPU", None)), load_data(recipe)

    def hear(self, number, frame):
        if self.busy:
            raise KeyboardInterrupt

    def session(self, name: str, plan=None):
        """A cell that trains; the run, or the KeyboardInterrupt that ended it."""
        before = self._committed(name)
        try:
            self.busy = True
            try:
                ended = train(plan or self.plan, self.data, name=name, runs=self.runs)
            finally:
                self.busy = False
        except KeyboardInterrupt as error:
            ended = error
        assert signal.getsignal(signal.SIGINT) == self.hear
        self._nothing_is_left()
        assert self._committed(name) >= before, "nothing is lost"
        return ended

    def _committed(self, name: str) -> int:
        found = newest(self.runs / name / CHECKPOINTS)
        return step_of(found) if found else 0

    def _nothing_is_left(self) -> None:
        """Whoever holds an error, as IPython does, holds no tensors with it; and no thread goes on."""
        gc.collect()
        assert sum(thing.nbytes for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)) < 10_000
        for thread in threading.enumerate():
            if thread.name == "llamanb-memory":
                thread.join(5)
                assert not thread.is_alive()
        assert torch.is_grad_enabled()


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    made = Kernel(tmp_path_factory.mktemp("interrupts"))
    before = signal.signal(signal.SIGINT, made.hear)
    yield made
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def whole(kernel):
    """An undisturbed run and how long it took; the first one warms up."""
    kernel.session("warm")
    begin_s = time.monotonic()
    return kernel.session("whole"), time.monotonic() - begin_s


def states(run) -> dict[str, bytes]:
    last = run.folder / CHECKPOINTS / f"step-{STEPS:08d}"
    assert holds(last)
    return {name: (last / name).read_bytes() for name in STATES} | {
        path.name: path.read_bytes() for path in run.saved.glob("*.safetensors")
    }


def same(run, undisturbed) -> None:
    assert run.status == FINISHED
    assert [s._replace(time_s=0) for s in run.timeline.steps] == [
        s._replace(time_s=0) for s in undisturbed.timeline.steps
    ]
    assert states(run) == states(undisturbed)
    assert run.scores == undisturbed.scores


def goes_on(kernel, name: str, undisturbed) -> None:
    """The same cell again, and what it comes to."""
    folder = newest_folder(kernel.runs, name)
    facts = folder / "run.json" if folder else None
    if not (facts and facts.exists() and json.loads(facts.read_text())["status"] == FINISHED):
        kernel.session(name)
    same(show_run(newest_folder(kernel.runs, name)), undisturbed)


@pytest.mark.parametrize(("place", "times"), DRAWN)
def test_pressed_in_any_part(kernel, whole, monkeypatch, place, times):
    name, presses = f"at-{place}-{times}", []

    def pressed(call, number):
        def outer(*args, **kwargs):
            if len(presses) < number and (not place.endswith("MLP.forward") or args[0].training):
                presses.append(place)
                signal.raise_signal(signal.SIGINT)
                return outer(*args, **kwargs)
            return call(*args, **kwargs)

        return outer

    with monkeypatch.context() as patch:
        patch.setattr(place, pressed(resolve_name(place), times if place in DURING else 1))
        patch.setattr("llamanb.training._write_report", pressed(_write_report, times))
        ended = kernel.session(name)
    assert len(presses) == times
    if times == 1 and place in DURING:
        assert (ended.status, len(ended.losses)) == (INTERRUPTED, DURING[place])
        assert step_of(newest(ended.folder / CHECKPOINTS)) == DURING[place]
    else:
        assert isinstance(ended, KeyboardInterrupt)
    goes_on(kernel, name, whole[0])


def press_after(delays_s: list[float], over: threading.Event) -> None:
    for delay_s in delays_s:
        if over.wait(delay_s):
            return
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("number", range(max(3, COUNT // 5)))
def test_pressed_at_any_moment(kernel, whole, number):
    """Once, twice or often, as people do who wait."""
    undisturbed, took_s = whole
    source = random.Random(1000 * SEED + number)
    delays_s = [source.uniform(0, 1.05 * took_s), *(source.uniform(0, 0.3) for _ in range(source.choice((0, 1, 1, 5))))]
    name, over = f"random{number}", threading.Event()
    button = threading.Thread(target=press_after, args=(delays_s, over))
    button.start()
    kernel.session(name)
    over.set()
    button.join()
    goes_on(kernel, name, undisturbed)


def test_memory_stays_what_it_is(kernel, monkeypatch):
    """Cells that run out of memory and recover, are interrupted and go on, again and again in one kernel: what it holds
    in memory at most, against what it held after a warm-up, in which caches fill."""
    recipe = kernel.plan.recipe.replace(steps=3, dropout=0.0, learning_rate=1e-4, checkpoint_every_steps=1)
    plain, whole, held = plan(recipe, kernel.plan.card), {}, []
    plans = plain, plain.replace(fused=True, layers=(STORED,) * 4)
    for one in plans:
        whole[one.fused] = kernel.session(f"whole-{one.fused}", one)
    for number, (place, error, one) in zip(range(WARM_UP + CYCLES), cycle(product(PLACES_OF_LACK, ERRORS, plans))):
        with monkeypatch.context() as patch:
            # Of the first step, after the probe's
            first = 3 - one.fused if place in ("forward", "backward") else 1
            lack = NoMemory(patch, place, first, error)
            inject(patch, Presses(step=2, times=1 + number // 2 % 2))
            kernel.session("again", one)
        assert lack.raised
        run = kernel.session("again", one)
        assert run.status == FINISHED
        assert (run.plan.micro_batch_size < one.micro_batch_size) == (place in ("forward", "backward"))
        losses = [step.loss for step in whole[one.fused].timeline.steps]
        assert [step.loss for step in run.timeline.steps] == pytest.approx(losses, rel=1e-6)
        shutil.rmtree(run.folder)
        del run, lack
        held.append(resident_mib())
    warm, after = held[WARM_UP - 1], held[WARM_UP:]
    print(f"{CYCLES} cycles after {WARM_UP}: {warm:.1f} to {after[-1]:.1f} MiB, at most {max(after):.1f}")
    assert max(after) < 1.01 * warm


def resident_mib() -> float:
    """Of this process, once Python and the C library have given back what they can."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return psutil.Process().memory_info().rss / 2**20
