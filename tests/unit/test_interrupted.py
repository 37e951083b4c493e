"""Who hears the stop button, and what is left when it was pressed. At any moment: tests/faults/test_interrupts.py."""

import gc
import json
import signal
import threading
import weakref

import pytest
from transformers import TrainerCallback

from llamanb import Card, Recipe, plan, train, training
from llamanb.training.interrupts import set_handler, uninterrupted
from llamanb.training.trainer import StopOnInterrupt
from tests.injected import inject


def test_the_second_one_ends_at_once_and_the_handler_is_back_by_then():
    """It may come within __exit__, before that has put the handler back."""
    before = signal.getsignal(signal.SIGINT)
    stop = StopOnInterrupt().__enter__()
    signal.raise_signal(signal.SIGINT)
    assert stop.asked
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_what_must_come_to_its_end_does():
    before = signal.getsignal(signal.SIGINT)
    with uninterrupted(), uninterrupted():
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_handlers_that_are_not_python_s_and_other_threads_are_left_alone():
    before = signal.getsignal(signal.SIGINT)
    set_handler(None)
    thread = threading.Thread(target=set_handler, args=(signal.SIG_IGN,))
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGINT) is before


class Fails(TrainerCallback):
    """Fails in a layer, in the third step; keeps an eye on a weight and on what came in, without holding them."""

    def __init__(self, fail):
        self.fail = fail

    def __call__(self, trainer) -> None:
        self.trainer, self.weight = trainer, weakref.ref(next(trainer.model.parameters()))
        trainer.model.get_decoder().layers[-1].register_forward_pre_hook(self._in_layer)

    def _in_layer(self, module, args):
        if self.trainer.state.global_step == 2:
            self.came_in, self.trainer = weakref.ref(args[0]), None
            self.fail()


def press_twice():
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)


def raise_error():
    raise ZeroDivisionError


@pytest.mark.parametrize(("fail", "kind"), [(press_twice, KeyboardInterrupt), (raise_error, ZeroDivisionError)])
def test_an_error_holds_no_model_however_often_the_button_is_pressed(mini, tmp_path, monkeypatch, fail, kind):
    """People who wait press again; and a notebook keeps the last traceback for as long as it lives."""
    path, write, pressed, fault = tmp_path / "rows.jsonl", training._write_report, [], Fails(fail)
    path.write_text("\n".join(json.dumps({"instruction": f"Say {n}.", "output": f"It is {n}."}) for n in range(4)))
    recipe = Recipe(model=str(mini), dataset=str(path), max_length=128, effective_batch_size=4, steps=9, eval_rows=0)

    def presses(run):
        pressed.append(signal.raise_signal(signal.SIGINT))
        write(run)

    inject(monkeypatch, fault)
    monkeypatch.setattr(training, "_write_report", presses)
    with pytest.raises(kind) as caught:
        train(plan(recipe, Card("CPU", None)), runs=tmp_path)
    gc.collect()
    assert len(pressed) == 1
    assert fault.weight() is None
    if kind is KeyboardInterrupt:
        assert fault.came_in() is None
        assert caught.value.__context__ is None
    assert (tmp_path / "run" / "report.html").exists()
