"""How fast a GPU is: measured on this CPU, and by torch's account of its shapes."""

from types import SimpleNamespace

import pytest

from llamanb.rates import Rates, measure_rates

torch = pytest.importorskip("torch")


@pytest.fixture
def cpu_as_gpu(monkeypatch):
    """Lets the rates be measured on the CPU; returns the sizes in bytes of what was allocated."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    properties = SimpleNamespace(multi_processor_count=2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    sizes = []

    def recorded(make):
        def call(*args, pin_memory=False, **options):
            made = make(*args, **options)
            if made.numel() > 1:  # what launches are timed with
                sizes.append(made.numel() * made.element_size())
            return made

        return call

    for name in ("randn", "zeros", "empty_like"):
        monkeypatch.setattr(torch, name, recorded(getattr(torch, name)))
    return sizes


def test_rates_are_measured_in_little_memory_where_little_is_free(cpu_as_gpu):
    rates = measure_rates("bf16", "cpu", free_gib=0.01, seconds=0.01)
    assert min(rates.tflops, rates.bandwidth_gbs, rates.host_link_gbs, rates.launch_us) > 0
    assert sum(cpu_as_gpu[:3]) <= 0.01 * 2**30 / 4
    assert sum(cpu_as_gpu[3:5]) <= 0.01 * 2**30 / 4
    assert 0 < 3 * sum(cpu_as_gpu[7:11]) <= 0.01 * 2**30 / 2  # and its result, gradients, and what they are made in


def test_attention_is_measured_by_the_kernel_that_runs(cpu_as_gpu):
    rates = measure_rates("bf16", "cpu", free_gib=0.01, seconds=0.01)
    assert rates.flash_tflops > 0  # a CPU's flash kernel; it has no memory-efficient one
    assert rates.efficient_tflops is None


def test_the_memory_efficient_kernel_is_called_as_it_wants_to_be(cpu_as_gpu):
    """By torch's own account of its shapes, which needs no GPU."""
    assert measure_rates("fp16", "meta", free_gib=1.0, seconds=0.01).efficient_tflops > 0


def test_a_rate_that_cannot_be_measured_is_none(cpu_as_gpu, monkeypatch):
    def no_room(*args, **options):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch, "mm", no_room)
    rates = measure_rates("fp16", "cpu", free_gib=0.01, seconds=0.01)
    assert rates.tflops is None
    assert rates.bandwidth_gbs > 0
    for name in ("zeros", "randn"):
        monkeypatch.setattr(torch, name, no_room)
    assert measure_rates("fp16", "cpu", free_gib=0.01, seconds=0.01) == Rates(None, None, None, None)
