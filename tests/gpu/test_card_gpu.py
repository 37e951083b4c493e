"""Cards and the GPU check on a real GPU: what fakes cannot tell.

python -m pytest tests/gpu/test_card_gpu.py -s      # -s: the report and the figures are worth reading
"""

import os
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use"),
]

MIB = 2**20


@pytest.fixture(scope="module")
def found():
    from llamanb.gpu_check import check_gpu

    found = check_gpu()
    print(f"\n{found}")
    return found


def test_the_card_is_the_gpu_of_torch(found):
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    card = found.card
    assert (card.name, card.capability) == (properties.name, (properties.major, properties.minor))
    assert card.vram_gib == pytest.approx(properties.total_memory / 2**30, rel=0.03)
    assert 0 < card.free_gib <= card.vram_gib
    assert card.dtype == ("bf16" if card.capability >= (8, 0) else "fp16")


def test_free_memory_falls_by_what_is_taken_and_a_cache_counts_as_free(found):
    from llamanb.card import Card

    before = Card.present().free_gib
    taken = torch.empty(512 * MIB, dtype=torch.uint8, device="cuda")
    during = Card.present().free_gib
    del taken
    after = Card.present().free_gib
    assert before - during == pytest.approx(0.5, abs=0.1)
    assert after == pytest.approx(before, abs=0.1)


def test_nvml_finds_torchs_gpu_and_agrees_with_the_driver(found):
    from llamanb import nvml as views

    nvml, why = views.start_nvml()
    if nvml is None:
        pytest.skip(why)
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    handle = views.nvml_handle(nvml, properties)
    assert handle is not None, f"uuid {properties.uuid}: NVML does not know it"
    seen = views.nvml_memory(nvml, handle)
    free, total = torch.cuda.mem_get_info()
    print(f"\nNVML {seen}\ndriver total {total}, free {free}")
    if seen is None or not seen.is_of(total):
        pytest.skip("NVML tells nothing of this device, or speaks of the card that it is a slice of")
    assert total <= seen.total < 1.1 * total
    assert abs(seen.free - free) < 256 * MIB
    processes = views.gpu_processes(nvml, handle)
    print(f"processes {processes}, this one {os.getpid()}")


def test_a_kernel_counts_only_if_it_runs_on_its_own(found):
    """The trial against the plain way: `can_use_*` of torch for the very same tensors."""
    from torch.backends.cuda import SDPAParams, can_use_efficient_attention, can_use_flash_attention

    from llamanb.trials import DTYPES, working_attention

    for dtype in DTYPES:
        tried = working_attention(dtype)
        print(f"\n{tried}")
        assert "math" in tried.runs()
        assert "math" in tried.runs(gqa=True)
        for gqa in (False, True):
            query = torch.zeros(1, 8, 64, 128, device="cuda", dtype=getattr(torch, DTYPES[dtype]), requires_grad=True)
            key = query[:, :2] if gqa else query
            parameters = SDPAParams(query, key, key, None, 0.0, True, gqa)
            assert ("flash" in tried.runs(gqa)) == can_use_flash_attention(parameters)
            assert ("memory-efficient" in tried.runs(gqa)) == can_use_efficient_attention(parameters)
    errors = [error for errors in (tried.plain, tried.grouped) for error in errors.values()]
    assert not any("torch has no such kernel" in error for error in errors), "each refusal has its reason"


def test_flash_and_cudnn_switched_off_leave_llama_the_math_kernel(found):
    """What a T4 does, on any GPU: the memory-efficient kernel runs, but not with grouped heads."""
    from llamanb.card import Card

    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        card = Card.present()
    finally:
        torch.backends.cuda.enable_flash_sdp(True)
        torch.backends.cuda.enable_cudnn_sdp(True)
    assert "flash" not in card.attention
    assert card.attention == ("memory-efficient", "math")
    assert card.attention_gqa == ("math",)


def test_precisions_run_and_have_sensible_rates():
    from llamanb.gpu_check import try_precisions

    rates = try_precisions()
    print(f"\nTFLOP/s {rates}")
    assert all(isinstance(rate, float) for rate in rates.values())
    assert rates["fp16"] > rates["fp32"]
    if torch.cuda.get_device_capability() >= (8, 0):
        assert rates["bf16"] == pytest.approx(rates["fp16"], rel=0.5)


FRESH = """
import os, time
import torch
from llamanb import card as cards
from llamanb.gpu_check import try_precisions
start = time.perf_counter()
free, total = torch.cuda.mem_get_info()
print(f"context made in {time.perf_counter() - start:.2f} s")
start = time.perf_counter()
card = cards.Card.present()
spent, left = time.perf_counter() - start, torch.cuda.mem_get_info()[0]
print(f"Card.present() {spent:.2f} s, driver's free memory fell by {(free - left) / 2**20:.0f} MiB,"
      f" of which torch reserved {torch.cuda.memory_reserved() / 2**20:.0f}")
start = time.perf_counter()
cards.Card.present()
print(f"again {time.perf_counter() - start:.3f} s")
try_precisions()
print(f"torch reserves {torch.cuda.memory_reserved() / 2**20:.0f} MiB after the precisions")
"""


def test_what_looking_costs():
    """Figures to read; the bounds only catch a look that eats a small card."""
    done = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True, timeout=120)
    print(f"\n{done.stdout}{done.stderr}")
    assert done.returncode == 0
    assert "Card.present()" in done.stdout


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_reordered_gpus_are_matched():
    code = (
        "import torch; from llamanb import nvml as c; n, _ = c.start_nvml();"
        "p = torch.cuda.get_device_properties(0);"
        "print(n.nvmlDeviceGetUUID(c.nvml_handle(n, p)) == f'GPU-{p.uuid}', torch.cuda.device_count())"
    )
    environ = os.environ | {"CUDA_VISIBLE_DEVICES": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ, timeout=120)
    assert done.stdout.split() == ["True", "1"], done.stderr


def test_every_speed_of_the_card_is_measured():
    from llamanb.card import SPEEDS, Card

    card = Card.measure(save=False)
    print(f"\n{card}")
    speeds = {speed: getattr(card, speed) for speed in SPEEDS}
    if "flash" not in card.attention:
        assert speeds.pop("flash_tflops") is None
    assert None not in speeds.values(), speeds
    assert speeds["efficient_tflops"] < speeds["tflops"]
