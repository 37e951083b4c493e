"""`launch`: a training on several cards of this machine, from a notebook or a script."""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from llamanb import hub
from llamanb.errors import LlamanbError, RecipeError
from llamanb.recipe import Recipe
from llamanb.run import Run, newest_folder
from llamanb.scale.launched import ENDED

ENDS_S = 600.0
"""For the ranks to end by themselves after an interrupt: the step at hand, a checkpoint, scores. Another one ends them
at once. torchrun knows of it from torch 2.12 on; before, it kills them after 30."""
TAIL = 200
"""Last lines that are kept, to find in them what failed."""
FIX = "mend that, and run this again: it goes on from the newest checkpoint"


class LaunchError(LlamanbError):
    """A training on several cards ended before its end; `why` is what its first rank said."""


def launch(
    recipe: Recipe,
    cards: int = 2,
    *,
    name: str = "run",
    runs: str | Path = "runs",
    resume: bool | None = None,
    cpu: bool = False,
) -> Run:
    """Trains on so many cards of this machine, a process each, or on as many CPU processes where there is no GPU.

    The processes are torchrun's and not this one's, so a notebook whose kernel has used the GPU can launch them; what
    they print is shown as it comes. Run again, it goes on from the newest checkpoint, as `train` does.

    Args:
        recipe: what to train; effective batch, order of the rows and result are those of one card.
        cards: processes; at most the rows of a step.
        name, runs, resume: as for `train`.
        cpu: on CPU processes, also where there are GPUs: to try it with a tiny model.

    Raises:
        RecipeError: no sensible number of cards.
        LaunchError: with what the first rank that failed said.
    """
    if isinstance(cards, bool) or not isinstance(cards, int) or not 0 < cards <= recipe.effective_batch_size:
        why = f"a step has {recipe.effective_batch_size} rows, and each card computes some of them"
        raise RecipeError(f"cards = {cards!r}", why, "a number from 1 to that, or a larger effective_batch_size")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "recipe.json")
        path.write_text(recipe.to_json(), encoding="utf-8")
        status, said = _shown(command(path, cards, name, Path(runs), resume), cards, cpu)
    if status:
        raise LaunchError(f"the training on {cards} cards ended with status {status}", _why(said), FIX)
    return Run.open(newest_folder(Path(runs), name))


def command(
    recipe: Path, cards: int, name: str, runs: Path, resume: bool | None = None, module: str = "llamanb"
) -> list[str]:
    """torchrun's, for this machine: a free port, and all processes ended when one fails."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(cards)]
    options = {True: ["--resume"], False: ["--new"], None: []}[resume]
    return [*torchrun, "-m", module, str(recipe), "--name", name, "--runs", str(runs), *options]


def _why(said: list[str]) -> str:
    """What the first rank to end by itself said, or that another has ended; else the last line before torchrun's
    summary."""
    errors = [number for number, line in enumerate(said) if re.match(r"rank \d+: ", line)]
    begins = min(errors, key=lambda number: (ENDED in said[number], number), default=None)
    if begins is not None:
        return "\n".join(said[begins : begins + 3])
    before = itertools.takewhile(lambda line: "torch.distributed.elastic" not in line, said)
    return next((line for line in reversed(list(before)) if line.strip()), "a rank ended without a word")


def _shown(command: list[str], cards: int, cpu: bool) -> tuple[int, list[str]]:
    """Runs it, printing what it prints; an interrupt is passed on once, and it may end by itself."""
    said: list[str] = []
    usual = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // cards))}  # torchrun would take one
    usual |= {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": f"{ENDS_S:g}"}  # after which it kills the ranks
    environment = usual | hub.token_of_children() | os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if cpu else {})
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, env=environment, start_new_session=True, **pipes) as process:

        def show() -> None:
            for line in process.stdout:
                print(line, end="", flush=True)
                said[:] = [*said[1 - TAIL :], line.rstrip()]

        try:
            show()
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)
            too_long = threading.Timer(ENDS_S, process.terminate)  # on which torchrun ends its processes
            too_long.start()
            try:
                show()
            finally:
                too_long.cancel()
                process.terminate()
            raise
    return process.returncode, said
