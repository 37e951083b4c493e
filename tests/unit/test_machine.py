"""The machine around the GPU, from files and variables made for the test."""

from types import SimpleNamespace

import psutil
import pytest

from llamanb import machine


@pytest.mark.parametrize(
    ("kernel", "environ", "places"),
    [
        ("Linux version 6.8.0-45-generic (buildd@lcy02)", {}, ()),
        ("Linux version 5.15.153.1-microsoft-standard-WSL2 (root@941d701f84f1)", {}, ("WSL2",)),
        ("Linux version 4.4.0-19041-Microsoft", {}, ("WSL2",)),
        ("Linux version 6.1.85+", {"COLAB_RELEASE_TAG": "release-colab_2026"}, ("Colab",)),
        ("Linux version 6.6", {"KAGGLE_KERNEL_RUN_TYPE": "Interactive"}, ("Kaggle",)),
        (None, {}, ()),
    ],
)
def test_surroundings(kernel, environ, places, tmp_path):
    if kernel:
        (tmp_path / "version").write_text(kernel)
    assert machine.surroundings(environ, str(tmp_path)) == places


def test_host_memory_and_a_containers_limit(tmp_path, monkeypatch):
    memory = SimpleNamespace(total=13290480 * 1024, available=11 * 2**30)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    total, available, limit = machine.host_memory(str(tmp_path))
    assert (total, available) == (pytest.approx(12.675, abs=0.001), 11.0)
    assert limit == total

    (tmp_path / "memory.max").write_text("max\n")
    assert machine.host_memory(str(tmp_path))[2] == total
    (tmp_path / "memory.max").write_text(f"{4 * 2**30}\n")
    assert machine.host_memory(str(tmp_path))[2] == 4
    (tmp_path / "memory.max").unlink()
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text(f"{2**63 - 4096}\n")
    assert machine.host_memory(str(tmp_path))[2] == total


@pytest.mark.parametrize(
    ("environ", "folder"),
    [
        ({"HF_HUB_CACHE": "/a", "HF_HOME": "/b"}, "/a"),
        ({"HF_HOME": "/b", "XDG_CACHE_HOME": "/c"}, "/b/hub"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/huggingface/hub"),
    ],
)
def test_where_models_are_kept(environ, folder):
    assert str(machine.hub_cache(environ)) == folder
    assert machine.hub_cache({}).parts[-3:] == (".cache", "huggingface", "hub")


def test_room_of_a_folder_that_is_not_there_yet(tmp_path):
    missing = tmp_path / "runs" / "first"
    assert machine.room(missing).endswith(f"({missing})")
    assert " GiB free of " in machine.room(missing)
    (tmp_path / "file").touch()
    assert " GiB free of " in machine.room(tmp_path / "file" / "below")


def test_room_of_a_drive_that_went_away(tmp_path, monkeypatch):
    def unplugged(path):
        raise OSError(107, "Transport endpoint is not connected")

    monkeypatch.setattr(machine.shutil, "disk_usage", unplugged)
    assert machine.room(tmp_path) == f"not known: Transport endpoint is not connected ({tmp_path})"


@pytest.mark.parametrize(
    ("limit", "used", "stat"),
    [
        ("memory.max", "memory.current", "anon 1\ninactive_file {0}\nactive_file {1}\nfile 7\n"),
        (
            "memory/memory.limit_in_bytes",
            "memory/memory.usage_in_bytes",
            "inactive_file 9\nactive_file 9\ntotal_inactive_file {0}\ntotal_active_file {1}\n",
        ),
    ],
)
def test_what_a_container_uses_is_not_available_but_for_files_it_has_read(limit, used, stat, tmp_path, monkeypatch):
    memory = SimpleNamespace(total=512 * 2**30, available=400 * 2**30)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    (tmp_path / limit).parent.mkdir(exist_ok=True)
    (tmp_path / limit).write_text(f"{64 * 2**30}\n")
    assert machine.host_memory(str(tmp_path)) == (512, 64, 64)
    (tmp_path / used).write_text(f"{50 * 2**30}\n")
    assert machine.host_memory(str(tmp_path)) == (512, 14, 64)
    (tmp_path / used).with_name("memory.stat").write_text(stat.format(10 * 2**30, 4 * 2**30))
    assert machine.host_memory(str(tmp_path)) == (512, 28, 64)
    memory.available = 3 * 2**30
    assert machine.host_memory(str(tmp_path)) == (512, 3, 64), "the host has less"
