"""A machine that dies with its disk, at any moment of a copy to the second home: the next one goes on from the newest
copy that is whole, and comes to the undisturbed result bit for bit.

`make faults` loses 100 machines, CI two. Now and then what is left in the home is damaged, or the home is away while
the machine lives.
"""

import os
import random
import shutil
from pathlib import Path

import pytest
import torch

from llamanb import show_run
from llamanb.run import FINISHED, newest_folder
from llamanb.training import second_home
from llamanb.training.checkpoints import newest, step_of
from llamanb.training.resume import CHECKPOINTS
from tests.faults.test_kills import STEPS, Sessions, states

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]
LOST = int(os.environ.get("LLAMANB_KILLS", "10")) // 5
LOST_A_RUN = 4
"""At most; then it is left to come to its end."""


@pytest.fixture(scope="module")
def sessions(mini, tmp_path_factory):
    torch.set_num_threads(1)  # a forked process has none of the others
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    base = tmp_path_factory.mktemp("lost")
    (base / "drive").mkdir()
    made = Sessions(mini, base)
    made.aim = base / "drive"
    made.asked = {"second_home": base / "drive" / "home"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(second_home, "LOOK_S", 0.01)
        yield made


@pytest.fixture(scope="module")
def whole(sessions):
    """An undisturbed run, and how often it touched its second home."""
    assert sessions.ends(sessions.start("whole"))
    (touched,) = [int(line.split()[1]) for line in sessions.said() if line.startswith("touched")]
    return show_run(sessions.runs / "whole"), touched


def damage(checkpoint: Path, source: random.Random) -> None:
    path = source.choice(sorted(checkpoint.iterdir()))
    content, at = bytearray(path.read_bytes()), source.random()
    kind = source.choice(["flip", "truncate", "delete"])
    if kind == "flip":
        content[int(at * len(content))] ^= 1 << source.randrange(8)
    path.write_bytes(content[: int(at * len(content))] if kind == "truncate" else content)
    if kind == "delete":
        path.unlink()


def test_every_run_comes_to_what_it_would_have_come_to(sessions, whole):
    undisturbed, touched = whole
    source = random.Random(int(os.environ.get("LLAMANB_SEED", "0")))
    home, lost, number, picked_up = sessions.asked["second_home"], 0, 0, 0
    while lost < LOST:
        number += 1
        name = f"run{number}"
        for again in range(LOST_A_RUN + 1):
            left_alone = again == LOST_A_RUN or lost >= LOST
            here = newest_folder(sessions.runs, name)
            here = here and newest(here / CHECKPOINTS)
            away = here and not left_alone and source.random() < 0.3
            place = newest_folder(home, name)
            there = place and newest(place / CHECKPOINTS)
            if away:
                home.parent.rename(home.parent.with_name("away"))
            done = sessions.ends(sessions.start(name, 0 if left_alone or away else source.randint(1, touched)))
            if away:
                home.parent.with_name("away").rename(home.parent)
            said = sessions.said()
            begun = [line for line in said if line.startswith("picking up")]
            if not here:  # it may have died before it could say so
                assert begun or not there or not done
                assert all(there and line.endswith(f"at step {step_of(there)} of {STEPS}") for line in begun)
                picked_up += bool(begun)
            assert not away or any(line.startswith(f"no copy in {home}") for line in said)
            lost += not done
            place = newest_folder(home, name)
            if done or (place and sessions.finished(place)):
                break
            if source.random() < 0.7:  # the machine with its disk
                for folder in sessions.runs.glob(f"{name}*"):
                    shutil.rmtree(folder)
                there = place and newest(place / CHECKPOINTS)
                if there and source.random() < 0.3:
                    damage(there, source)
        for folder in (newest_folder(home, name), newest_folder(sessions.runs, name)):
            if folder and (not done or not away):
                run = show_run(folder)
                assert run.status == FINISHED
                assert [s._replace(time_s=0) for s in run.timeline.steps] == [
                    s._replace(time_s=0) for s in undisturbed.timeline.steps
                ]
                assert states(run) == states(undisturbed)
                assert run.scores == undisturbed.scores
                assert len(list((folder / CHECKPOINTS).glob("step-*"))) <= 3  # one more where it died before removing
    assert picked_up > LOST / 4 or LOST < 20, "a few may all be lost before their first copy"
    assert step_of(newest(undisturbed.folder / CHECKPOINTS)) == STEPS
