"""The sampler with readers that are told what to do. Threads are waited for by events, never by the clock."""

import sys
import threading
from types import SimpleNamespace

import pytest

from llamanb.watch import sampler as sampler_module
from llamanb.watch.sampler import MemorySampler

LIMIT_S = 30
"""When a thread that should have acted long ago is given up on."""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(sampler_module, "INTERVAL_S", 0.0)


class Reader:
    """Gives `values` one after another, then the last one again and again; an exception among them is raised."""

    def __init__(self, *values):
        self._values, self._last = iter(values), None
        self.used_up = threading.Event()
        """Set once all values have been taken in."""

    def __call__(self):
        try:
            self._last = next(self._values)
        except StopIteration:
            self.used_up.set()
        if isinstance(self._last, Exception):
            raise self._last
        return self._last


def test_samples_hold_what_the_reader_said_in_order():
    reader = Reader((1.0, 0.5), (2.0, 0.7), (1.5, 0.6), (1.25, 0.6))
    with MemorySampler(reader, "fake") as sampler:
        assert reader.used_up.wait(LIMIT_S)
    assert [(s.used_gib, s.torch_gib) for s in sampler.samples[:3]] == [(1.0, 0.5), (2.0, 0.7), (1.5, 0.6)]
    times = [s.time_s for s in sampler.samples]
    assert times == sorted(times)
    assert sampler.peak_gib == 2.0
    assert sampler.missing == ""


def test_phases_are_marked_with_the_time_they_began():
    with MemorySampler(Reader((1.0, None)), "fake") as sampler:
        sampler.phase("load")
        sampler.phase("train")
    assert [phase.name for phase in sampler.phases] == ["load", "train"]
    assert 0 <= sampler.phases[0].start_s <= sampler.phases[1].start_s


def test_a_reader_that_starts_failing_ends_the_samples_and_nothing_else():
    reader = Reader((1.0, None), (2.0, None), OSError("the driver went away"))
    with MemorySampler(reader, "fake") as sampler:
        sampler._thread.join(LIMIT_S)
        assert not sampler._thread.is_alive()
        sampler.phase("train")  # what is watched goes on
    assert [s.used_gib for s in sampler.samples] == [1.0, 2.0]
    assert sampler.missing.startswith("no more samples after ")
    assert sampler.missing.endswith("OSError: the driver went away")
    assert sampler.peak_gib == 2.0


def test_no_sample_at_all_is_fine():
    with MemorySampler(Reader(OSError("never there")), "fake") as sampler:
        sampler._thread.join(LIMIT_S)
    assert sampler.samples == []
    assert sampler.peak_gib == 0.0


def test_stop_ends_the_thread_and_may_come_twice():
    sampler = MemorySampler(Reader((1.0, None)), "fake").start()
    sampler.stop()
    assert not sampler._thread.is_alive()
    count = len(sampler.samples)
    sampler.stop()
    assert len(sampler.samples) == count


def test_stop_before_start_is_no_error():
    MemorySampler(Reader((1.0, None)), "fake").stop()


def test_an_error_inside_the_block_comes_out_and_the_thread_ends():
    sampler = MemorySampler(Reader((1.0, None)), "fake")
    with pytest.raises(KeyError, match="mine"), sampler:
        raise KeyError("mine")
    assert not sampler._thread.is_alive()


def test_without_a_gpu_it_is_the_hosts_memory_and_says_so(monkeypatch):
    monkeypatch.setattr(sampler_module, "gpu_in_use", lambda torch: (None, "no GPU"))
    sampler = MemorySampler.here()
    assert "host memory of this process (no GPU here)" in sampler.source
    used, reserved = sampler.read()
    assert 0 < used < 1024
    assert reserved is None
    assert sampler.limit_gib is None


def gpu(monkeypatch, *, nvml):
    """A GPU of 16 GiB with 4 used, of which torch holds 1, as torch and as `nvml` say."""
    gib = 2**30
    cuda = SimpleNamespace(
        get_device_properties=lambda index: SimpleNamespace(name="Fake"),
        mem_get_info=lambda index: (12 * gib, 16 * gib),
        memory_reserved=lambda index: gib,
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(sampler_module, "gpu_in_use", lambda torch: (0, ""))
    monkeypatch.setattr(sampler_module, "start_nvml", lambda: (nvml, ""))
    monkeypatch.setattr(sampler_module, "nvml_handle", lambda nvml, properties: "handle")
    return gib


def test_on_a_gpu_it_is_nvmls_count_beside_torchs(monkeypatch):
    gib = gpu(monkeypatch, nvml="nvml")
    memory = SimpleNamespace(used=5 * gib, total=16 * gib, is_of=lambda total: True)
    monkeypatch.setattr(sampler_module, "nvml_memory", lambda nvml, handle: memory)
    sampler = MemorySampler.here()
    assert sampler.source == "VRAM in use (NVML)"
    assert sampler.read() == (5.0, 1.0)
    assert sampler.limit_gib == 16.0

    monkeypatch.setattr(sampler_module, "nvml_memory", lambda nvml, handle: None)
    with sampler:
        sampler._thread.join(LIMIT_S)
    assert "NVML no longer answers" in sampler.missing


@pytest.mark.parametrize("memory", [None, SimpleNamespace(is_of=lambda total: False)])
def test_where_nvml_does_not_answer_or_means_another_gpu_it_is_the_drivers(monkeypatch, memory):
    gpu(monkeypatch, nvml="nvml")
    monkeypatch.setattr(sampler_module, "nvml_memory", lambda nvml, handle: memory)
    sampler = MemorySampler.here()
    assert sampler.source == "VRAM in use (driver)"
    assert sampler.read() == (4.0, 1.0)
    assert sampler.limit_gib == 16.0
