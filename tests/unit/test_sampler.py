"""The sampler with sources that are told what to do. Threads are waited for by events, never by the clock."""

import sys
import threading
from types import SimpleNamespace

import pytest

from llamanb.timeline import Sample, Timeline
from llamanb.watch import sampler as sampler_module
from llamanb.watch.sampler import MemorySampler, Source
from tests.unit.fake_gpu import MIB, FakeNvml, FakeTorch, no_nvml, t4

LIMIT_S = 30
"""When a thread that should have acted long ago is given up on."""
GONE = "the driver went away\nand a long explanation"


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


def sampler_of(*readers, **more) -> MemorySampler:
    return MemorySampler([Source(f"source {i}", reader) for i, reader in enumerate(readers, 1)], **more)


def ended(sampler: MemorySampler) -> None:
    sampler._thread.join(LIMIT_S)
    assert not sampler._thread.is_alive()


def test_samples_hold_what_the_source_said_in_order():
    reader, torch_gib = Reader(1.0, 2.0, 1.5, 1.25), Reader((0.4, 0.5), (0.6, 0.7), (0.5, 0.6), (0.5, 0.6))
    with sampler_of(reader, torch_gib=torch_gib, limit_gib=16.0) as sampler:
        assert reader.used_up.wait(LIMIT_S)
    timeline = sampler.timeline
    first = [(s.used_gib, s.allocated_gib, s.reserved_gib) for s in timeline.samples[:3]]
    assert first == [(1.0, 0.4, 0.5), (2.0, 0.6, 0.7), (1.5, 0.5, 0.6)]
    times = [s.time_s for s in timeline.samples]
    assert times == sorted(times)
    assert timeline.peak_gib == 2.0
    assert (timeline.source, timeline.limit_gib, timeline.missing) == ("source 1", 16.0, "")


def test_without_a_gpu_torch_has_nothing_to_say():
    reader = Reader(1.0)
    with sampler_of(reader) as sampler:
        assert reader.used_up.wait(LIMIT_S)
    assert {(s.allocated_gib, s.reserved_gib) for s in sampler.timeline.samples} == {(None, None)}


def test_each_sample_knows_what_the_run_did():
    asked, go_on = threading.Event(), threading.Event()

    def reader():
        asked.set()
        assert go_on.wait(LIMIT_S)
        go_on.clear()
        return 1.0

    sampler = sampler_of(reader)
    sampler.timeline.phase = "load"
    with sampler:
        for next_phase in ("score", "forward", "over"):
            assert asked.wait(LIMIT_S)
            asked.clear()
            sampler.timeline.phase = next_phase  # a sample has the phase in which it began
            go_on.set()
        assert asked.wait(LIMIT_S)
        sampler._stop.set()
        go_on.set()
    assert [s.phase for s in sampler.timeline.samples] == ["load", "score", "forward", "over"]


def test_a_source_that_fails_gives_way_to_the_next():
    second = Reader(3.0, 4.0, 3.5)
    with sampler_of(Reader(1.0, 2.0, OSError(GONE)), second) as sampler:
        assert second.used_up.wait(LIMIT_S)
    timeline = sampler.timeline
    assert [s.used_gib for s in timeline.samples[:4]] == [1.0, 2.0, 3.0, 4.0]
    assert timeline.missing.startswith("source 1 stopped answering after ")
    assert timeline.missing.endswith(" s (OSError: the driver went away); from then on: source 2")
    assert timeline.peak_gib == 4.0


def test_when_all_fail_the_samples_end_and_nothing_else():
    with sampler_of(Reader(1.0, OSError(GONE)), Reader(2.0, RuntimeError("CUDA error"))) as sampler:
        ended(sampler)
        sampler.timeline.phase = "loss"  # what is watched goes on
    assert [s.used_gib for s in sampler.timeline.samples] == [1.0, 2.0]
    first, second = sampler.timeline.missing.split(". ")
    assert first.endswith("; from then on: source 2")
    assert second.startswith("source 2 stopped answering")
    assert second.endswith("(RuntimeError: CUDA error), and nothing else does")


def test_no_sample_at_all_is_fine():
    with sampler_of(Reader(OSError("never there"))) as sampler:
        ended(sampler)
    assert sampler.timeline.samples == []
    assert sampler.timeline.peak_gib == 0.0


def test_torch_that_fails_ends_the_samples_too():
    with sampler_of(Reader(1.0), torch_gib=Reader((0.1, 0.2), RuntimeError("no CUDA any more"))) as sampler:
        ended(sampler)
    assert len(sampler.timeline.samples) == 1
    assert "no CUDA any more" in sampler.timeline.missing


def test_stop_ends_the_thread_and_may_come_twice():
    sampler = sampler_of(Reader(1.0)).start()
    sampler.stop()
    assert not sampler._thread.is_alive()
    count = len(sampler.timeline.samples)
    sampler.stop()
    assert len(sampler.timeline.samples) == count


def test_stop_does_not_wait_for_the_next_sample(monkeypatch):
    monkeypatch.setattr(sampler_module, "INTERVAL_S", 3600.0)
    sampler = sampler_of(Reader(1.0)).start()
    sampler.stop()
    assert not sampler._thread.is_alive()
    assert len(sampler.timeline.samples) <= 1


def test_a_run_of_days_is_looked_at_less_often(monkeypatch):
    sampler, hours, waited = MemorySampler([Source("it", lambda: 1.0)]), [0.0, 0.9, 2.0, 24.0], []
    monkeypatch.setattr(sampler_module, "INTERVAL_S", 0.1)
    monkeypatch.setattr(Timeline, "time_s", property(lambda timeline: 3600 * hours[len(waited)]))
    monkeypatch.setattr(sampler._stop, "wait", waited.append)
    monkeypatch.setattr(sampler._stop, "is_set", lambda: len(waited) == len(hours))
    sampler._run()
    assert waited == pytest.approx([0.1, 0.1, 0.2, 2.4])


def test_stop_before_start_is_no_error():
    sampler_of(Reader(1.0)).stop()


def test_an_error_inside_the_block_comes_out_and_the_thread_ends():
    sampler = sampler_of(Reader(1.0))
    with pytest.raises(KeyError, match="mine"), sampler:
        raise KeyError("mine")
    assert not sampler._thread.is_alive()


def test_it_does_not_hold_the_process_up():
    assert sampler_of(Reader(1.0))._thread.daemon


def test_without_a_gpu_it_is_the_hosts_memory_and_says_so(monkeypatch):
    monkeypatch.setattr(sampler_module, "gpu_in_use", lambda torch: (None, "no GPU"))
    sampler = MemorySampler.here()
    assert sampler.timeline.source == "host memory of this process (no GPU here)"
    assert sampler.timeline.limit_gib is None
    [source] = sampler._sources
    assert 0 < source.read_gib() < 1024
    assert sampler._torch_gib() == (None, None)


@pytest.fixture
def gpu(monkeypatch):
    """`gpu(nvml)`: a T4 of 14910 MiB with 4910 in use, of which torch holds 2048 and has filled 1024."""

    def found(nvml, fraction=1.0) -> FakeTorch:
        torch = FakeTorch(free=10000)
        sizes = {"allocated_bytes": 1024 * MIB, "reserved_bytes": 2048 * MIB}
        stats = {name: {"all": {"current": size, "peak": size}} for name, size in sizes.items()}
        torch.cuda.memory_stats_as_nested_dict = lambda index: stats
        torch.cuda.get_per_process_memory_fraction = lambda index: fraction
        monkeypatch.setitem(sys.modules, "torch", torch)
        monkeypatch.setitem(sys.modules, "pynvml", nvml)
        return torch

    return found


T4_GIB, USED_GIB = 14910 / 1024, 4910 / 1024
WATCHED = {"total": 15360, "used": 5000, "free": 9910, "reserved": 450}


def watched(sampler: MemorySampler, samples: int = 2) -> MemorySampler:
    """The sampler after so many samples."""
    enough, held = threading.Event(), sampler._torch_gib

    def torch_gib():
        if len(sampler.timeline.samples) >= samples:
            enough.set()
        return held()

    sampler._torch_gib = torch_gib
    with sampler:
        assert enough.wait(LIMIT_S)
    return sampler


def test_on_a_gpu_it_is_nvmls_count_beside_torchs(gpu):
    gpu(FakeNvml(t4(**WATCHED)))
    timeline = watched(MemorySampler.here()).timeline
    assert timeline.source == "VRAM in use (NVML)"
    assert timeline.limit_gib == T4_GIB
    assert timeline.samples[0][2:] == (5000 / 1024, 1.0, 2.0)
    assert timeline.missing == ""


def silent() -> FakeNvml:
    """An NVML that says "N/A": all ones."""
    nvml = FakeNvml(t4())
    nvml.nvmlDeviceGetMemoryInfo = lambda *args: SimpleNamespace(total=2**64 - 1, used=2**64 - 1, free=2**64 - 1)
    return nvml


@pytest.mark.parametrize(
    "nvml",
    [
        pytest.param(None, id="not installed"),
        pytest.param(no_nvml(), id="no driver"),
        pytest.param(silent(), id="N/A"),
        pytest.param(FakeNvml(t4(), refuses=["nvmlDeviceGetMemoryInfo"]), id="refuses"),
        pytest.param(FakeNvml(t4(uuid="GPU-another")), id="another GPU"),
        pytest.param(FakeNvml(t4(total=81920, used=60000, free=21000)), id="the whole card of a slice"),
    ],
)
def test_where_nvml_has_no_answer_for_this_gpu_it_is_the_drivers(gpu, nvml):
    gpu(nvml)
    timeline = watched(MemorySampler.here()).timeline
    assert timeline.source == "VRAM in use (driver)"
    assert timeline.limit_gib == T4_GIB
    assert timeline.samples[0][2:] == (USED_GIB, 1.0, 2.0)
    assert timeline.missing == "", "it was never there"


def watched_then(change, used_gib: float) -> MemorySampler:
    """A sampler under which `change` comes after the first sample, until one says `used_gib`."""
    sampler, changed, seen = MemorySampler.here(), threading.Event(), threading.Event()
    held = sampler._torch_gib

    def torch_gib():
        samples = sampler.timeline.samples
        if samples and not changed.is_set():
            change()
            changed.set()
        if samples and samples[-1].used_gib == used_gib:
            seen.set()
        return held()

    sampler._torch_gib = torch_gib
    with sampler:
        assert seen.wait(LIMIT_S)
    return sampler


def test_an_nvml_that_loses_the_gpu_gives_way_to_the_driver(gpu):
    """As when the driver is updated under a run: NVML is then of another version."""
    nvml = FakeNvml(t4(**WATCHED))
    gpu(nvml)
    sampler = watched_then(lambda: nvml.refuses.add("nvmlDeviceGetMemoryInfo"), USED_GIB)
    timeline = sampler.timeline
    assert timeline.samples[0].used_gib == 5000 / 1024
    assert "VRAM in use (NVML) stopped answering" in timeline.missing
    assert "NVML no longer answers" in timeline.missing
    assert timeline.missing.endswith("from then on: VRAM in use (driver)")


def test_where_the_driver_goes_too_it_is_what_torch_holds(gpu):
    nvml = FakeNvml(t4(**WATCHED))
    torch = gpu(nvml)

    def lost():
        torch.break_call("mem_get_info")
        nvml.refuses.add("nvmlDeviceGetMemoryInfo")

    sampler = watched_then(lost, 2.0)
    assert "VRAM in use (driver) stopped answering" in sampler.timeline.missing
    assert "GPU is lost" in sampler.timeline.missing
    assert sampler.timeline.missing.endswith("from then on: VRAM that torch holds")
    assert {s.used_gib for s in sampler.timeline.samples} == {5000 / 1024, 2.0}


def test_a_pretended_card_shows_what_torch_holds_of_its_share(gpu):
    """What the whole GPU holds says nothing about the card it pretends to be."""
    gpu(FakeNvml(t4(**WATCHED)), fraction=0.5)
    timeline = watched(MemorySampler.here()).timeline
    assert timeline.source == "VRAM that torch holds"
    assert timeline.limit_gib == T4_GIB / 2
    assert timeline.samples[0][2:] == (2.0, 1.0, 2.0)


def test_what_was_seen_is_written_as_it_comes_whatever_the_run_does(tmp_path, monkeypatch):
    """Loading and scoring log nothing, and may be where a session dies."""
    written = threading.Event()
    monkeypatch.setattr(sampler_module, "WRITE_S", 0.0)
    sampler = MemorySampler([Source("fake", lambda: 1.0)])
    sampler.folder, write = tmp_path, sampler.timeline.write

    def watched(folder):
        write(folder)
        if sampler.timeline.samples:
            written.set()

    monkeypatch.setattr(sampler.timeline, "write", watched)
    with sampler:
        assert written.wait(LIMIT_S)
        assert Timeline.read(tmp_path).samples


def test_a_disk_that_is_full_for_a_while_leaves_whole_rows(tmp_path):
    made = Timeline("fake")
    made.samples = [Sample(float(i), "load", 1.0, None, None) for i in range(5)]
    made.write(tmp_path)
    with (tmp_path / "memory.csv").open("a") as file:
        file.write("5.0,lo")  # as far as it came
    made.samples += [Sample(5.0, "load", 2.0, None, None)]
    made.write(tmp_path)
    assert Timeline.read(tmp_path).samples == made.samples
