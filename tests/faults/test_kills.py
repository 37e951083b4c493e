"""kill -9 at any moment of a training, also of one that goes on after another: every run comes to its end, with nothing
lost of what was committed, and to the same result bit for bit.

`make faults` makes 500 kills, CI ten. Each session is forked from one process that has everything imported.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from llamanb import Card, Recipe, load_data, plan, show_run, train
from llamanb.run import FINISHED, newest_folder
from llamanb.training import saves
from llamanb.training.checkpoints import holds, newest, step_of
from llamanb.training.resume import CHECKPOINTS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]
KILLS = int(os.environ.get("LLAMANB_KILLS", "10"))
KILLS_A_RUN = 4
"""At most; then it is left to come to its end."""
STEPS = 9
STATES = ("trained.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")
TOUCHES = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.listdir"}


class Killer:
    """Ends this process as `kill -9` does when it touches the disk for the n-th time, torch with half a file."""

    def __init__(self, number: int, runs: Path):
        self.left, self.runs = number, os.fspath(runs)
        sys.addaudithook(self._audit)
        torch.save = self._halving(torch.save, 1)
        saves.save_file = self._halving(saves.save_file, 1)

    def _audit(self, event: str, args: tuple) -> None:
        if event in TOUCHES and args and isinstance(args[0], str | os.PathLike) and self.runs in os.fspath(args[0]):
            self._touched()

    def _touched(self) -> bool:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def _halving(self, write, place: int):
        def outer(*args, **kwargs):
            write(*args, **kwargs)
            if self.left == 1:
                os.truncate(args[place], os.path.getsize(args[place]) // 2)
            self._touched()

        return outer


class Sessions:
    """Trainings in processes of their own, forked from this one."""

    def __init__(self, mini: Path, base: Path):
        self.runs, self.log = base / "runs", base / "log"
        rows = base / "rows.jsonl"
        rows.write_text("\n".join(json.dumps({"instruction": f"Say {n}.", "output": f"It is {n}."}) for n in range(18)))
        fields = {"model": str(mini), "dataset": str(rows), "max_length": 128, "effective_batch_size": 4}
        fields |= {"micro_batch_size": 2, "steps": STEPS, "dropout": 0.2, "learning_rate": 1e-2, "eval_rows": 2}
        recipe = Recipe(**fields, checkpoint_every_steps=2)
        self.plan, self.data = plan(recipe, Card("CPU", None)), load_data(recipe)
        self.aim, self.asked = self.runs, {}

    def start(self, name: str, number: int = 0) -> int:
        """Begins one, which kills itself at its n-th touch of `aim` where a number is given; returns its process."""
        pid = os.fork()
        if pid:
            return pid
        status = 1
        try:
            log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1)
            commit = saves.commit

            def told(*args):
                made = commit(*args)
                print(f"committed {step_of(made)}", flush=True)
                return made

            saves.commit = told
            killer = Killer(number or sys.maxsize, self.aim)
            train(self.plan, self.data, name=name, runs=self.runs, **self.asked)
            print(f"touched {sys.maxsize - killer.left}", flush=True)
            status = 0
        finally:
            os._exit(status)

    def ends(self, pid: int, after_s: float | None = None) -> bool:
        """Waits for the end, or until so many seconds have passed and then kills it. Whether it came to its end."""
        limit = time.monotonic() + (after_s or 300)
        while not (done := os.waitpid(pid, os.WNOHANG))[0]:
            if time.monotonic() >= limit:
                assert after_s, f"a session hangs:\n{self.log.read_text()[-3000:]}"
                os.kill(pid, signal.SIGKILL)
                done = os.waitpid(pid, 0)
                break
            time.sleep(0.002)
        code = os.waitstatus_to_exitcode(done[1])
        assert code in (0, -signal.SIGKILL), f"ended by {code}:\n{self.log.read_text()[-3000:]}"
        return code == 0

    @staticmethod
    def finished(folder: Path) -> bool:
        """Whether a run had told so before it was killed."""
        facts = folder / "run.json"
        return facts.exists() and json.loads(facts.read_text())["status"] == FINISHED

    def said(self) -> list[str]:
        """The last session's lines."""
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return lines


@pytest.fixture(scope="module")
def sessions(mini, tmp_path_factory) -> Sessions:
    torch.set_num_threads(1)  # a forked process has none of the others
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return Sessions(mini, tmp_path_factory.mktemp("kills"))


@pytest.fixture(scope="module")
def whole(sessions):
    """An undisturbed run, how often it touched the disk, and how long it took."""
    begin_s = time.monotonic()
    assert sessions.ends(sessions.start("whole"))
    took_s = time.monotonic() - begin_s
    (touched,) = [int(line.split()[1]) for line in sessions.said() if line.startswith("touched")]
    return show_run(sessions.runs / "whole"), touched, took_s


def states(run) -> dict[str, bytes]:
    last = run.folder / CHECKPOINTS / f"step-{STEPS:08d}"
    assert holds(last)
    found = {name: (last / name).read_bytes() for name in STATES}
    return found | {path.name: path.read_bytes() for path in run.saved.glob("*.safetensors")}


def last_committed(lines: list[str]) -> int:
    return max((int(line.split()[1]) for line in lines if line.startswith("committed")), default=0)


def test_every_run_that_is_killed_comes_to_what_it_would_have_come_to(sessions, whole):
    undisturbed, touched, took_s = whole
    source, kills, number, picked_up = random.Random(int(os.environ.get("LLAMANB_SEED", "0"))), 0, 0, 0
    while kills < KILLS:
        number += 1
        name, committed, done = f"run{number}", 0, False
        for again in range(KILLS_A_RUN + 1):
            left_alone = again == KILLS_A_RUN or kills >= KILLS
            aimed = source.random() < 0.6 and not left_alone
            pid = sessions.start(name, source.randint(1, touched) if aimed else 0)
            done = sessions.ends(pid, None if aimed or left_alone else source.uniform(0, 1.1 * took_s))
            said = sessions.said()
            begun = [line for line in said if line.startswith("picking up")]
            assert bool(begun) or not (done and committed)
            assert all(line.endswith(f"at step {committed} of {STEPS}") for line in begun), "from the newest one"
            picked_up += bool(begun)
            kills += not done
            folder = newest_folder(sessions.runs, name)
            if done or (folder and sessions.finished(folder)):
                break
            there = folder and newest(folder / CHECKPOINTS)
            assert (step_of(there) if there else 0) >= max(committed, last_committed(said)), "nothing is lost"
            committed = step_of(there) if there else 0
        run = show_run(newest_folder(sessions.runs, name))
        assert run.status == FINISHED
        assert [s._replace(time_s=0) for s in run.timeline.steps] == [
            s._replace(time_s=0) for s in undisturbed.timeline.steps
        ]
        assert states(run) == states(undisturbed)
        assert run.scores == undisturbed.scores
    assert picked_up > KILLS / 4
