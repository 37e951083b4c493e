"""kill -9 at any moment of a merge, also of one that goes on after another: it comes to its end, to the same bytes."""

import os
import random
import signal
import sys
import time

import pytest
import torch

from llamanb import merge
from llamanb.export import shards
from tests.adapted import adapted_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]
KILLS = int(os.environ.get("LLAMANB_KILLS", "10"))
KILLS_A_MERGE = 4
"""At most; then it is left to come to its end."""
TOUCHES = {"open", "os.rename", "os.remove", "os.mkdir", "os.listdir", "shutil.copyfile", "os.scandir"}


class Merges:
    """Merges in processes of their own, forked from this one."""

    def __init__(self, run, out):
        self.run, self.out, self.log = run, out, out.with_name("log")

    def start(self, name: str, number: int) -> int:
        """Begins one, which kills itself when it touches the disk, or writes a piece of a shard, for the n-th time."""
        pid = os.fork()
        if pid:
            return pid
        status, left = 1, number
        try:
            log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1)

            def touched():
                nonlocal left
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

            def audit(event, args):
                if event in TOUCHES and args and str(self.out) in str(args[0]):
                    touched()

            def counted(*args, pieces=shards._bytes):
                for piece in pieces(*args):
                    touched()  # with what came before in the file, or in its buffer
                    yield piece

            sys.addaudithook(audit)
            shards._bytes = counted
            merge(self.run, self.out / name)
            print(f"touched {number - left}", flush=True)
            status = 0
        finally:
            os._exit(status)

    def ends(self, pid: int, after_s: float | None = None) -> bool:
        """Waits for the end, or so many seconds and then kills it. Whether it came to its end."""
        limit = time.monotonic() + (after_s or 300)
        while not (done := os.waitpid(pid, os.WNOHANG))[0]:
            if time.monotonic() >= limit:
                assert after_s, f"a merge hangs:\n{self.said()}"
                os.kill(pid, signal.SIGKILL)
                done = os.waitpid(pid, 0)
                break
            time.sleep(0.001)
        code = os.waitstatus_to_exitcode(done[1])
        assert code in (0, -signal.SIGKILL), f"ended by {code}:\n{self.said()}"
        return code == 0

    def said(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def files(self, name: str) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (self.out / name).iterdir()}


@pytest.fixture(scope="module")
def merges(mini, tmp_path_factory) -> Merges:
    torch.set_num_threads(1)  # a forked process has none of the others
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    folder = tmp_path_factory.mktemp("merges")
    adapted_run(folder / "run", model=str(mini), rank=4, alpha=8.0)
    return Merges(folder / "run", folder / "out")


def test_every_merge_that_is_killed_comes_to_the_same_bytes(merges, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 40_000)
    begin_s = time.monotonic()
    assert merges.ends(merges.start("whole", sys.maxsize))
    took_s, touched = time.monotonic() - begin_s, int(merges.said().split()[-1])
    whole = merges.files("whole")
    assert len([name for name in whole if name.endswith(".safetensors")]) > 5
    source, kills, went_on, number = random.Random(int(os.environ.get("LLAMANB_SEED", "0"))), 0, 0, 0
    while kills < KILLS:
        number += 1
        for again in range(KILLS_A_MERGE + 1):
            left_alone = again == KILLS_A_MERGE or kills >= KILLS
            aimed = source.random() < 0.7 and not left_alone
            pid = merges.start(f"merge{number}", source.randint(1, touched) if aimed else sys.maxsize)
            done = merges.ends(pid, None if aimed or left_alone else source.uniform(0, 1.1 * took_s))
            went_on += "shards are there already" in merges.said()
            kills += not done
            if done:
                break
        assert merges.files(f"merge{number}") == whole
    assert went_on > KILLS / 4
    assert not list(merges.out.glob("*.aside"))
