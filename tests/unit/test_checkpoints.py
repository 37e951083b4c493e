"""The protocol of checkpoints on a folder: what was committed is found whole or not at all, whatever happened to it."""

import errno
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamanb.training.checkpoints import ASIDE, MANIFEST, commit, flush, holds, lock, newest, step_of

NAMES = ("optimizer.pt", "progress.json", "rng_state.pth", "trained.safetensors")
OLD, NEW = "step-00000020", "step-00000030"


def write(folder: Path, step: int) -> Path:
    """What a training leaves aside."""
    shutil.rmtree(folder / ASIDE, ignore_errors=True)
    made = folder / ASIDE / f"checkpoint-{step}"
    made.mkdir(parents=True)
    for name in NAMES:
        (made / name).write_bytes(f"{name} of step {step} ".encode() * 40)
    return made


def save(folder: Path, step: int) -> Path:
    return commit(write(folder, step), folder, step)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def folder(tmp_path) -> Path:
    """A run's checkpoints: of the steps 10 and 20."""
    made = tmp_path / "checkpoints"
    made.mkdir()
    save(made, 10)
    save(made, 20)
    return made


def test_what_is_committed_is_found_the_newest_first(tmp_path):
    assert newest(tmp_path) is None
    assert newest(tmp_path / "nowhere") is None
    first = save(tmp_path, 7)
    assert first == newest(tmp_path) == tmp_path / "step-00000007"
    assert step_of(first) == 7
    assert names(first) == sorted([MANIFEST, *NAMES])
    assert newest(tmp_path) != save(tmp_path, 1234567)
    assert newest(tmp_path).name == "step-01234567"


def test_two_stay(folder):
    save(folder, 30)
    assert [path for path in names(folder) if path != ASIDE] == ["step-00000020", "step-00000030"]


def test_what_was_left_aside_is_removed_with_the_next_commit(folder):
    write(folder, 25)
    save(folder, 30)
    assert names(folder) == ["step-00000020", "step-00000030"]


def spoil(path: Path, other: Path, kind: str, source: random.Random) -> None:
    """Damages a file of a checkpoint; `other` is the same file of another one."""
    whole = path.read_bytes()
    at = source.randrange(len(whole))
    if kind == "truncate":
        path.write_bytes(whole[:at])
    elif kind == "flip":
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << source.randrange(8)]) + whole[at + 1 :])
    elif kind == "zero":
        end = source.randrange(at, len(whole)) + 1
        path.write_bytes(whole[:at] + bytes(end - at) + whole[end:])
    elif kind == "append":
        path.write_bytes(whole + source.randbytes(source.randint(1, 9)))
    elif kind == "delete":
        path.unlink()
    elif kind == "swap":
        there = other.read_bytes()
        other.write_bytes(whole)
        path.write_bytes(there)
    elif kind == "exchange":  # with its neighbour
        neighbour = path.with_name(source.choice([name for name in [MANIFEST, *NAMES] if name != path.name]))
        path.rename(path.with_name("kept"))
        neighbour.rename(path)
        path.with_name("kept").rename(neighbour)
    elif kind == "extra":
        path.with_name(path.name + source.choice([".bak", ".pt", "~"])).write_bytes(whole)
    else:
        path.unlink()
        path.mkdir()


KINDS = ("truncate", "flip", "zero", "append", "delete", "swap", "exchange", "extra", "folder")
LASTING = ("swap",)
"""Damages both of two checkpoints."""


@pytest.mark.parametrize("name", [MANIFEST, *NAMES])
@pytest.mark.parametrize("kind", KINDS)
def test_any_damage_is_noticed_and_the_one_before_is_used(folder, kind, name):
    for seed in range(12):
        shutil.copytree(folder, folder.with_name("kept"))
        spoil(folder / OLD / name, folder / "step-00000010" / name, kind, random.Random(seed))
        assert not holds(folder / OLD), (kind, name, seed)
        assert newest(folder) == (None if kind in LASTING else folder / "step-00000010")
        if kind not in LASTING:
            save(folder, 20)  # the training comes by again
            assert newest(folder) == folder / OLD
        shutil.rmtree(folder)
        folder.with_name("kept").rename(folder)


def test_a_checkpoint_under_another_s_name_does_not_count(folder):
    (folder / OLD).rename(folder / "step-00000099")
    assert newest(folder) == folder / "step-00000010"
    for other in ("step-20", "step-00000020.bak", "step-000000200", "aside", "20"):
        (folder / "step-00000099").rename(folder / other)
        assert newest(folder) == folder / "step-00000010"
        (folder / other).rename(folder / "step-00000099")


def with_manifest(checkpoint: Path, **changes) -> None:
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    (checkpoint / MANIFEST).write_text(json.dumps(manifest | changes))


TRAVERSALS = ["../step-00000010/optimizer.pt", "../../secret", "/etc/hostname", "./optimizer.pt", "a/b", "..", ".", ""]
TRAVERSALS += ["optimizer.pt/", "optimizer.pt\0", "~/x", "..\\x", "C:\\x", MANIFEST, "\ud800", "x" * 5000]


@pytest.mark.parametrize("name", TRAVERSALS)
@pytest.mark.parametrize("instead", [True, False])
def test_a_name_that_leads_elsewhere_is_refused(folder, name, instead):
    (folder.parent / "secret").write_bytes((folder / OLD / "optimizer.pt").read_bytes())
    files = json.loads((folder / OLD / MANIFEST).read_text())["files"]
    with_manifest(folder / OLD, files=dict(files))
    assert holds(folder / OLD), "the way the test writes it is fine"
    facts = files.pop("optimizer.pt") if instead else files["optimizer.pt"]
    with_manifest(folder / OLD, files={**files, name: facts})
    assert newest(folder) == folder / "step-00000010"


def test_links_are_refused_and_never_followed(folder, tmp_path):
    outside = tmp_path / "outside"
    shutil.copytree(folder / OLD, outside / OLD)
    for name in (MANIFEST, *NAMES):
        path = folder / OLD / name
        whole = path.read_bytes()
        path.unlink()
        path.symlink_to(outside / OLD / name)
        assert not holds(folder / OLD), name
        path.unlink()
        path.write_bytes(whole)
    assert holds(folder / OLD)
    shutil.rmtree(folder / OLD)
    (folder / OLD).symlink_to(outside / OLD)
    (folder / "step-00000099").symlink_to(outside)
    assert newest(folder) == folder / "step-00000010"
    save(folder, 30)
    save(folder, 40)
    assert names(outside / OLD) == sorted([MANIFEST, *NAMES]), "nothing is removed outside"


@pytest.mark.timeout(20)
def test_what_is_no_file_is_not_waited_for(folder):
    (folder / OLD / "optimizer.pt").unlink()
    os.mkfifo(folder / OLD / "optimizer.pt")
    assert newest(folder) == folder / "step-00000010"


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.just("files"), inner, max_size=3),
    max_leaves=10,
)


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("checkpoints"), 20)


@settings(max_examples=300, deadline=None)
@given(
    text=st.binary(max_size=200)
    | values.map(lambda value: json.dumps(value).encode())
    | st.fixed_dictionaries({"step": st.just(20) | values, "files": values}).map(lambda v: json.dumps(v).encode())
)
def test_no_manifest_can_make_it_fail(spoiled, text):
    (spoiled / MANIFEST).write_bytes(text)
    assert not holds(spoiled)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"step": ' + "9" * 10_000 + "}", '{"step": 1e999, "files": {}}', "[]"]
)
def test_nor_can_a_monstrous_one(spoiled, text):
    (spoiled / MANIFEST).write_text(text)
    assert not holds(spoiled)


def test_what_does_not_hold_is_not_counted_among_those_that_stay(folder):
    for step in (21, 22, 98):
        shutil.copytree(folder / OLD, folder / f"step-000000{step}")  # under wrong names
    (folder / OLD / "optimizer.pt").write_bytes(b"")
    save(folder, 30)
    assert names(folder) == ["step-00000010", NEW]


def test_the_last_one_that_holds_stays_until_there_is_another(folder):
    (folder / OLD / "optimizer.pt").write_bytes(b"")
    made = write(folder, 30)
    (made / "optimizer.pt").unlink()
    (made / "optimizer.pt").mkdir()
    with pytest.raises(OSError, match="not a file"):
        commit(made, folder, 30)
    assert newest(folder) == folder / "step-00000010"


def test_one_that_is_there_and_holds_is_left_as_it_is(folder):
    before = {path.name: path.stat().st_mtime_ns for path in (folder / OLD).iterdir()}
    save(folder, 20)
    assert {path.name: path.stat().st_mtime_ns for path in (folder / OLD).iterdir()} == before
    assert names(folder) == ["step-00000010", OLD]


class Faults:
    """Fails the n-th of a save's own calls to the system, a write after half of what it was to write."""

    CALLS = ((os, "fsync"), (Path, "write_text"), (Path, "rename"), (Path, "open"), (Path, "iterdir"), (os, "open"))

    def __init__(self, patch, number: int, code: int):
        self.left, self.failed = number, False
        for owner, name in self.CALLS:
            patch.setattr(owner, name, self.watched(getattr(owner, name), name, code))

    def watched(self, call, name, code):
        def outer(first, *args, **kwargs):
            self.left -= 1
            if self.left == 0:
                self.failed = True
                if name == "write_text":
                    with open(first, "w") as file:
                        file.write(args[0][: len(args[0]) // 2])
                raise OSError(code, os.strerror(code))
            return call(first, *args, **kwargs)

        return outer


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT])
def test_a_disk_that_fails_at_any_moment_leaves_the_old_one_and_the_next_try_succeeds(folder, monkeypatch, code):
    for number in itertools.count(1):
        shutil.copytree(folder, folder.with_name("kept"))
        made = write(folder, 30)
        with monkeypatch.context() as patch:
            faults = Faults(patch, number, code)
            try:
                commit(made, folder, 30)
                raised = False
            except OSError as error:
                raised = error.errno == code
        found = newest(folder)
        assert found.name == NEW or (found.name == OLD and (raised or not faults.failed)), number
        shutil.rmtree(folder / ASIDE, ignore_errors=True)
        assert save(folder, 30) == newest(folder)
        shutil.rmtree(folder)
        folder.with_name("kept").rename(folder)
        if not faults.failed:
            break
    assert number > 25, "every call of a save was made to fail once"


@pytest.fixture
def log(folder, monkeypatch) -> list[tuple[str, str]]:
    """What a save of step 30 asks of the disk, in order: the files it writes, what it flushes, what it renames."""
    made, seen, fsync, rename = write(folder, 30), [], os.fsync, Path.rename
    seen += [("write", name) for name in NAMES]
    write_text = Path.write_text

    def wrote(path, text, **kwargs):
        seen.append(("write", path.name))
        return write_text(path, text, **kwargs)

    def flushed(handle):
        seen.append(("flush", Path(os.readlink(f"/proc/self/fd/{handle}")).name))
        return fsync(handle)

    def renamed(path, target):
        seen.append(("rename", target.name))
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", wrote)
        patch.setattr(Path, "rename", renamed)
        patch.setattr(os, "fsync", flushed)
        commit(made, folder, 30)
    shutil.copytree(folder / NEW, folder.parent / "whole")
    shutil.rmtree(folder)
    folder.mkdir()
    save(folder, 10)
    save(folder, 20)
    return seen


def test_every_prefix_of_a_save_with_unflushed_writes_dropped_leaves_one_that_holds(folder, log):
    """A machine that loses power: what was flushed is there, of the rest each file may be there, in part, or not."""
    assert log[-1] == ("flush", folder.name)
    whole = folder.parent / "whole"
    tried = 0
    for end in range(len(log) + 1):
        done = log[:end]
        written = [name for what, name in done if what == "write"]
        flushed = {name for what, name in done if what == "flush"}
        renamed, sure = ("rename", NEW) in done, ("flush", folder.name) in done
        for seed in range(12):
            source = random.Random(seed)
            shutil.copytree(folder, folder.with_name("disk"))
            disk = folder.with_name("disk")
            named = renamed and (sure or source.random() < 0.5)
            place = disk / NEW if named else disk / ASIDE / "checkpoint-30"
            place.mkdir(parents=True)
            for name in written:
                content = (whole / name).read_bytes()
                if name not in flushed:
                    content = source.choice([content, b"", content[: len(content) // 2], bytes(len(content)), None])
                if content is not None:
                    (place / name).write_bytes(content)
            assert newest(disk).name == (NEW if named else OLD), (end, seed)
            assert newest(disk).name == NEW or not sure
            save(disk, 30)
            assert newest(disk).name == NEW
            shutil.rmtree(disk)
            tried += 1
    assert tried > 150


def test_a_drive_that_flushes_no_folders_is_no_obstacle(folder, monkeypatch):
    fsync = os.fsync

    def refuses_folders(handle):
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", refuses_folders)
    assert newest(folder) != save(folder, 30) == newest(folder)
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(errno.EINVAL, "Invalid argument")))
    with pytest.raises(OSError, match="Invalid"):
        flush(folder / OLD / "optimizer.pt")


HOLD = """
import sys, time, pathlib
from llamanb.training.checkpoints import lock
with lock(pathlib.Path(sys.argv[1])) as free:
    print(free, flush=True)
    time.sleep(600)
"""


def test_a_lock_is_one_process_s_and_ends_with_it(tmp_path):
    other = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "True\n"
        with lock(tmp_path) as free:
            assert not free
        other.send_signal(signal.SIGKILL)
        other.wait()
        with lock(tmp_path) as free:
            assert free
            with lock(tmp_path) as again:
                assert not again, "nor does a thread of this one have it besides"
        with lock(tmp_path) as free:
            assert free
        assert list(tmp_path.iterdir()) == []
    finally:
        other.kill()
        other.wait()


def test_a_file_system_without_locks_is_no_obstacle(tmp_path, monkeypatch):
    def refuses(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuses)
    with lock(tmp_path) as free:
        assert free


def test_checkpoints_are_told_good_from_bad_without_torch():
    heavy = "torch", "transformers"
    code = f"import sys, llamanb.training.resume; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
