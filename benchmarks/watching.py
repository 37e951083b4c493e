"""What watching a run costs: time spent sampling, drawing, saying and writing, as a share of the training it watches.

    python -m benchmarks.watching [--model tiny] [--dataset tiny] [--steps 300] [--card T4]

Trains in a Jupyter kernel with the display on, as a notebook does, and adds up what the watching did in the training's
own thread (the live view and the phases), and the processor time of the sampler's thread, which takes Python's lock
from the training while it runs. Training alone counts: loading and scoring are left out.
"""

from __future__ import annotations

import argparse
import json
import tempfile

TRAIN = """
import functools, json, threading, time
from llamanb import plan, starter_recipe, train, load_data
from llamanb.card import Card
from llamanb.watch import sampler
from llamanb.watch.instants import Instants
from llamanb.watch.live import LiveView

spent = dict.fromkeys(("view", "phases", "sampler"), 0.0)

def counted(kind, cls, name):
    inner = getattr(cls, name)
    @functools.wraps(inner)
    def outer(*args, **kwargs):
        begin = time.perf_counter()
        try:
            return inner(*args, **kwargs)
        finally:
            spent[kind] += time.perf_counter() - begin
    setattr(cls, name, outer)

for name in ("on_train_begin", "on_log", "on_train_end"):
    counted("view", LiveView, name)
counted("phases", Instants, "begins")
run_thread = sampler.MemorySampler._run
def timed_thread(self):
    begin = time.thread_time()
    run_thread(self)
    spent["sampler"] += time.thread_time() - begin
sampler.MemorySampler._run = timed_thread

recipe = starter_recipe(model={model!r}, dataset={dataset!r}).replace(steps={steps}, eval_rows=0)
card = Card.pretend({card!r}) if {card!r} else None
made = plan(recipe, card)
run = train(made, load_data(recipe), name="watched", runs={runs!r})
print("RESULT " + json.dumps(dict(spent, train_s=run.train_s, whole_s=run.timeline.samples[-1].time_s,
      steps=len(run.losses), samples=len(run.timeline.samples))))
"""


def measure(model: str, dataset: str, steps: int, card: str) -> dict:
    """Seconds of each kind of watching, and of the training, from a fresh kernel."""
    import nbformat
    from nbclient import NotebookClient

    with tempfile.TemporaryDirectory() as runs:
        source = TRAIN.format(model=model, dataset=dataset, steps=steps, card=card, runs=runs)
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
        NotebookClient(notebook, timeout=3600, kernel_name="python3").execute()
    text = "".join(out.get("text", "") for out in notebook.cells[0].outputs)
    (line,) = [line for line in text.splitlines() if line.startswith("RESULT ")]
    pictures = sum("image/png" in out.get("data", {}) for out in notebook.cells[0].outputs)
    return {**json.loads(line.removeprefix("RESULT ")), "last_frames_kept": pictures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--dataset", default="tiny")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--card", default="")
    found = measure(**vars(parser.parse_args()))
    print(json.dumps(found))
    for kind, base in (("view", "train_s"), ("phases", "train_s"), ("sampler", "whole_s")):
        print(f"{kind:8} {found[kind]:7.3f} s of {found[base]:.1f}: {found[kind] / found[base]:.2%}")
    total = (found["view"] + found["phases"]) / found["train_s"] + found["sampler"] / found["whole_s"]
    print(f"together {total:.2%} (wanted: under 1 %)")


if __name__ == "__main__":
    main()
