"""The copy of a run's folder: whole or not there, whatever happens meanwhile, and nothing outside of it."""

import errno
import itertools
import os
import shutil
from pathlib import Path

import pytest

from llamanb.timeline import replace_text
from llamanb.training.checkpoints import ASIDE, commit, holds, newest
from llamanb.training.resume import CHECKPOINTS
from llamanb.training.second_home import ID, STATUS, copy_run


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def a_run(folder: Path, step: int) -> Path:
    """A run's folder with a checkpoint of that step, and what tells of it."""
    made = folder / CHECKPOINTS / ASIDE / f"checkpoint-{step}"
    made.mkdir(parents=True)
    for name in ("optimizer.pt", "progress.json"):
        (made / name).write_bytes(f"{name} of step {step} ".encode() * 40)
    commit(made, folder / CHECKPOINTS, step)
    for name in (ID, "plan.json", "metrics.csv"):
        (folder / name).write_text(f"{name} of step {step}")
    (folder / STATUS).write_text(f"status of step {step}")
    (folder / "adapter").mkdir(exist_ok=True)
    (folder / "adapter" / "adapter_model.safetensors").write_text(f"adapter of step {step}")
    return folder


class Faults:
    """Fails the n-th of a copy's own calls to the system; a write after half of what it was to write."""

    CALLS = ((os, "fsync"), (shutil, "copyfileobj"), (Path, "replace"), (Path, "rename"), (Path, "mkdir"))
    CALLS += ((Path, "unlink"), (Path, "open"), (Path, "iterdir"), (os, "open"))

    def __init__(self, patch, number: int, code: int):
        self.left, self.failed = number, False
        for owner, name in self.CALLS:
            patch.setattr(owner, name, self.watched(getattr(owner, name), name, code))

    def watched(self, call, name, code):
        def outer(*args, **kwargs):
            self.left -= 1
            if self.left == 0:
                self.failed = True
                if name == "copyfileobj":
                    args[1].write(args[0].read()[:10])
                raise OSError(code, os.strerror(code))
            return call(*args, **kwargs)

        return outer


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_an_error_at_any_call_leaves_the_older_copy_and_the_next_try_succeeds(tmp_path, monkeypatch, code):
    source, target = a_run(tmp_path / "source", 10), tmp_path / "target"
    target.mkdir()
    copy_run(source, target)
    a_run(source, 20)
    for number in itertools.count(1):
        shutil.copytree(target, tmp_path / "kept")
        with monkeypatch.context() as patch:
            faults = Faults(patch, number, code)
            try:
                copy_run(source, target)
                raised = False
            except OSError:
                raised = True
        found = newest(target / CHECKPOINTS)
        assert found.name in ("step-00000010", "step-00000020")
        assert raised or faults.failed or found.name == "step-00000020"
        if raised:  # not: the source could not be read for a moment, and the checkpoint before is there already
            assert (target / STATUS).read_text().endswith("10") or found.name == "step-00000020"
        copy_run(source, target)
        assert newest(target / CHECKPOINTS).name == "step-00000020"
        assert (target / STATUS).read_text() == "status of step 20"
        shutil.rmtree(target)
        (tmp_path / "kept").rename(target)
        if not faults.failed:
            break
    assert number > 40, "every call was made to fail once"


def test_what_is_removed_while_it_is_copied_is_copied_all_the_same(tmp_path, monkeypatch):
    source, target = a_run(tmp_path / "source", 10), tmp_path / "target"
    target.mkdir()
    before, copy = contents(source / CHECKPOINTS), shutil.copyfileobj

    def slow(read, written):
        if written.name.endswith("optimizer.pt.new"):
            shutil.rmtree(source / CHECKPOINTS)
        copy(read, written)

    monkeypatch.setattr(shutil, "copyfileobj", slow)
    copy_run(source, target)
    assert contents(target / CHECKPOINTS) == before


def test_the_status_is_that_of_the_moment_the_copy_began(tmp_path, monkeypatch):
    """A run that finishes meanwhile has a checkpoint more, which is not there yet."""
    source, target = a_run(tmp_path / "source", 10), tmp_path / "target"
    target.mkdir()
    copy = shutil.copyfileobj

    def slow(read, written):
        if written.name.endswith("optimizer.pt.new"):
            replace_text(source / STATUS, "finished")
        copy(read, written)

    monkeypatch.setattr(shutil, "copyfileobj", slow)
    copy_run(source, target)
    assert (source / STATUS).read_text() == "finished"
    assert (target / STATUS).read_text() == "status of step 10"


def test_a_copy_that_is_not_what_was_written_is_none(tmp_path, monkeypatch):
    source, target = a_run(tmp_path / "source", 10), tmp_path / "target"
    target.mkdir()
    copy_run(source, target)
    a_run(source, 20)

    def flips(read, written):
        content = bytearray(read.read())
        content[len(content) // 2] ^= 4
        written.write(content)

    monkeypatch.setattr(shutil, "copyfileobj", flips)
    with pytest.raises(OSError, match="is not what was written"):
        copy_run(source, target)
    assert newest(target / CHECKPOINTS).name == "step-00000010"
    monkeypatch.undo()
    copy_run(source, target)
    assert newest(target / CHECKPOINTS).name == "step-00000020"


LINKS = [STATUS, "plan.json", "plan.json.new", CHECKPOINTS, f"{CHECKPOINTS}/{ASIDE}", "adapter"]
LINKS += ["adapter/adapter_model.safetensors", "adapter/adapter_model.safetensors.new"]


@pytest.mark.parametrize("name", LINKS)
def test_a_link_in_the_home_leads_nowhere(tmp_path, name):
    source, target, outside = a_run(tmp_path / "source", 10), tmp_path / "target", tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("secret")
    (target / name).parent.mkdir(parents=True)
    (target / name).symlink_to(
        outside if name in (CHECKPOINTS, f"{CHECKPOINTS}/{ASIDE}", "adapter") else outside / "file"
    )
    try:
        copy_run(source, target)
        assert holds(target / CHECKPOINTS / "step-00000010")
    except OSError:
        pass
    assert contents(outside) == {"file": b"secret"}


@pytest.mark.parametrize("name", ["plan.json", "metrics.csv", STATUS, "adapter/adapter_model.safetensors"])
def test_nor_is_one_there_fetched(tmp_path, name):
    source, target = a_run(tmp_path / "source", 10), tmp_path / "target"
    (tmp_path / "secret").write_text("secret")
    (source / name).unlink()
    (source / name).symlink_to(tmp_path / "secret")
    target.mkdir()
    with pytest.raises(OSError, match="not a file"):
        copy_run(source, target)
    assert b"secret" not in contents(target).values()
