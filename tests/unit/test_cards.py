"""The table of known cards, measurements that are kept, and cards that are pretended."""

import contextlib
import ctypes
import dataclasses
import json
import os
import subprocess
import sys

import pytest
from fake_gpu import T4_UUID, FakeNvml, FakeTorch, attention_that_runs, no_nvml, t4

from llamanb import Card, cards, measured, pretend
from llamanb.card import KERNELS_LATER_GIB, SPEEDS
from llamanb.errors import GpuError
from llamanb.rates import Rates

RATES = Rates(
    tflops=23.5, bandwidth_gbs=240.0, host_link_gbs=12.0, launch_us=11.0, flash_tflops=None, efficient_tflops=9.5
)
OWN = os.getpid()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    yield tmp_path / "llamanb" / "cards"
    pretend.release()


def measure(torch=None, nvml=None, rates=RATES, **options):
    return measured.measure(
        torch=torch or FakeTorch(),
        nvml=nvml or FakeNvml(t4(compute=[(OWN, 600)])),
        try_attention=attention_that_runs(),
        try_rates=lambda dtype, device, free_gib: rates,
        **options,
    )


def here(torch=None, nvml=None, **options):
    return measured.here(torch=torch, nvml=nvml or FakeNvml(t4()), try_attention=attention_that_runs(), **options)


# The table


def test_every_card_of_the_table_can_be_planned_for():
    for name, card in cards.KNOWN.items():
        assert card.name == name
        assert 0 < card.context_gib < 1
        assert card.free_gib == pytest.approx(card.vram_gib - card.context_gib)
        assert card.vram_gib < int(cards.ROWS[name]["nominal_gib"])
        assert None not in (card.tflops, card.bandwidth_gbs, card.host_link_gbs, card.launch_us)
        assert card.source.startswith("table: ")
        assert ("flash" in card.attention_gqa) == (card.dtype == "bf16") == (card.capability >= (8, 0))
        assert "memory-efficient" in card.attention
        assert "memory-efficient" not in card.attention_gqa
        assert Card(**json.loads(json.dumps(dataclasses.asdict(card)))) == card


def test_a_t4_and_what_was_measured_of_an_h200():
    t4_card = Card.known("T4")
    assert t4_card.free_gib == pytest.approx(14.40)
    assert (t4_card.dtype, t4_card.attention_gqa, t4_card.workspace_mib) == ("fp16", ("math",), 8.125)
    assert t4_card.tflops == pytest.approx(24)
    assert Card.known("H200").tflops == pytest.approx(683, abs=2)
    assert Card.known("RTX 4060 Ti 16").host_link_gbs == Card.known("T4").host_link_gbs


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("T4", "T4"),
        (" tesla t4 ", "T4"),
        ("rtx4090", "RTX 4090"),
        ("4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("GEFORCE RTX-3060 12GB", "RTX 3060"),
        ("a100 80GB", "A100 80"),
        ("V100-16", "V100 16"),
        ("3080 12 GiB", "RTX 3080 12"),
        ("rtx 4060ti 16gb", "RTX 4060 Ti 16"),
        ("nvidia l4", "L4"),
        ("h100 pcie", "H100 PCIe"),
        *((name, name) for name in cards.KNOWN),
    ],
)
def test_names_a_person_writes(said, name):
    assert Card.known(said) is cards.KNOWN[name]


@pytest.mark.parametrize(
    ("said", "hint"),
    [
        ("A100", "There is: A100 40, A100 80."),
        ("V100", "There is: V100 16, V100 32."),
        ("NVIDIA GeForce RTX 3080", "RTX 3080 10, RTX 3080 12"),
        ("RTX 4091", "RTX 4090"),
        ("RTX 4060 Ti 8", "RTX 4060 Ti 16"),
        ("Radeon", "There is: T4"),
        ("", "There is: T4"),
        (None, "There is: T4"),
        ("x" * 5000, "There is: T4"),
    ],
)
def test_names_that_are_none_of_the_table(said, hint):
    with pytest.raises(GpuError, match="no card called") as caught:
        Card.known(said)
    assert hint in caught.value.why
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize(
    ("product", "vram", "name"),
    [
        ("Tesla T4", 14.56, "T4"),
        ("Tesla P100-PCIE-16GB", 15.9, "P100"),
        ("Tesla V100-SXM2-16GB", 15.77, "V100 16"),
        ("Tesla V100-SXM2-32GB", 31.7, "V100 32"),
        ("NVIDIA GeForce RTX 3080", 9.7, "RTX 3080 10"),
        ("NVIDIA GeForce RTX 3080", 11.7, "RTX 3080 12"),
        ("NVIDIA A100-SXM4-80GB", 79.2, "A100 80"),
        ("NVIDIA A100 80GB PCIe", 79.2, "A100 80"),
        ("NVIDIA A100-SXM4-40GB", 39.4, "A100 40"),
        ("NVIDIA H100 80GB HBM3", 79.1, "H100"),
        ("NVIDIA H100 PCIe", 79.1, "H100 PCIe"),
        ("NVIDIA H200", 139.8, "H200"),
        ("NVIDIA RTX A6000", 47.4, "RTX A6000"),
        ("NVIDIA GeForce RTX 4060 Ti", 15.6, "RTX 4060 Ti 16"),
        ("NVIDIA GeForce RTX 4060 Ti", 7.6, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 15.6, None),
        ("NVIDIA GeForce RTX 4090 D", 23.5, None),
        ("NVIDIA H100 NVL", 93.0, None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", 4.8, None),
        ("NVIDIA A100-SXM4-40GB", 4.8, None),
        ("T400", 1.8, None),
        ("", 0, None),
    ],
)
def test_names_a_driver_writes(product, vram, name):
    assert cards.match(product, vram) is cards.KNOWN.get(name)


def test_the_table_reads_and_says_which_need_another_torch():
    text = str(cards.table())
    assert len(text.splitlines()) == len(cards.KNOWN) + 3
    lines = {line.split("  ")[0]: line for line in text.splitlines()}
    assert "CUDA 12.6" in lines["P100"]
    assert "CUDA 12.6" in lines["V100 32"]
    assert "CUDA 12.6" not in lines["T4"]


def test_the_table_needs_neither_torch_nor_nvml():
    code = "import sys, llamanb.cards, llamanb.measured, llamanb.pretend; print({'torch', 'pynvml'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


# Measured, and kept


def test_a_measured_card_is_kept_whole(cache):
    card = measure()
    assert card.context_gib == pytest.approx(600 / 1024)
    assert tuple(getattr(card, speed) for speed in SPEEDS) == dataclasses.astuple(RATES)
    assert card.multiprocessors == 40
    assert card.free_gib == pytest.approx(14700 / 1024 - KERNELS_LATER_GIB)
    assert card.source.startswith("measured 20")
    assert [path.name for path in cache.iterdir()] == [f"GPU-{T4_UUID}.json"]
    assert measured.kept(f"GPU-{T4_UUID}", FakeNvml(t4())) == card


def test_without_save_nothing_is_kept(cache):
    measure(save=False)
    assert not cache.exists()


def test_a_cpu_has_nothing_to_measure(cache):
    assert measure(FakeTorch.without_gpu()) == Card(
        "CPU", None, attention=("memory-efficient", "math"), attention_gqa=("math",)
    )
    assert not cache.exists()


def test_trials_that_did_not_run_leave_figures_out():
    card = measure(rates=Rates(None, 240.0, None, 11.0))
    assert (card.tflops, card.host_link_gbs) == (None, None)


def test_the_context_is_what_torch_did_not_reserve():
    torch = FakeTorch(reserved=100)
    assert measure(torch).context_gib == pytest.approx(500 / 1024)
    assert measure(torch, no_nvml()).context_gib is None
    assert measure(torch, FakeNvml(t4(compute=[(OWN, 50)]))).context_gib is None
    assert measure(torch, FakeNvml(t4(compute=[(OWN, 20000)]))).context_gib is None  # more than the card has


def test_hidden_processes_are_told_by_the_difference():
    gpu = t4(used=200)
    torch = FakeTorch(reserved=100)
    look = torch.cuda.current_device
    torch.cuda.current_device = lambda: gpu.update(used=900) or look()  # the context is made
    assert measure(torch, FakeNvml(gpu)).context_gib == pytest.approx(600 / 1024)
    torch.initialized = True  # a context that was there before: nothing to subtract
    assert measure(torch, FakeNvml(gpu)).context_gib is None


def test_a_folder_that_cannot_be_written_warns(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="could not be kept"):
        assert measure().tflops == RATES.tflops


def test_where_measurements_lie(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    default = tmp_path / ".cache" / "llamanb" / "cards"
    assert measured.folder({}) == measured.folder({"XDG_CACHE_HOME": "relative"}) == default
    assert measured._file("../../etc/passwd").parent == measured.folder()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: text.replace('"tflops": 23.5', '"tflops": NaN'),
        lambda text: text.replace('"tflops"', '"teraflops"'),
        lambda text: text.replace('"driver": "580', '"driver": "570'),
        lambda text: text.replace('"torch": "', '"torch": "1.'),
        lambda text: text.replace('"efficient_tflops"\n', '"launch_us"\n'),  # by an older llamanb, which knew fewer
        lambda text: "\x00" * 100,
    ],
)
def test_a_spoiled_or_stale_file_counts_as_none(cache, spoil):
    measure()
    (file,) = cache.iterdir()
    file.write_text(spoil(file.read_text()))
    assert measured.kept(f"GPU-{T4_UUID}", FakeNvml(t4())) is None
    assert here(FakeTorch()).tflops == Card.known("T4").tflops


def test_nothing_is_kept_under_no_name():
    assert measured.kept(None) is measured.kept("") is None


# Here


def test_a_kept_card_needs_no_torch():
    card = measure()
    seen = here(nvml=FakeNvml(t4(free=9000)))
    assert seen == dataclasses.replace(card, free_gib=9000 / 1024 - card.context_gib)
    assert here(nvml=FakeNvml(t4(free=100))).free_gib == 0


def test_a_kept_card_loads_no_torch_in_a_fresh_process(cache):
    measure()
    code = f"""
import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})
from types import ModuleType
import fake_gpu, llamanb.measured as measured
print(measured.here(nvml=fake_gpu.FakeNvml(fake_gpu.t4())).tflops, "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "23.5 False\n", done.stderr


@pytest.mark.parametrize(
    "nvml",
    [
        FakeNvml(t4(), t4(uuid="GPU-other", pci="other")),
        FakeNvml(t4(mig=[1, 1])),
        FakeNvml(t4(total=81920)),  # the whole card says nothing of a slice
        FakeNvml(t4(), refuses=["nvmlDeviceGetMemoryInfo"]),
        no_nvml(),
    ],
)
def test_otherwise_torch_is_asked_and_the_measurement_added(nvml, monkeypatch):
    measure()
    monkeypatch.setitem(sys.modules, "torch", FakeTorch())
    seen = here(nvml=nvml)
    assert seen.free_gib == pytest.approx(14700 / 1024 - KERNELS_LATER_GIB)
    known = RATES.tflops if nvml.refuses != {"nvmlInit"} else 24.0  # no driver's version, so the file may be stale
    assert seen.tflops == pytest.approx(known)


def test_a_process_with_a_context_asks_torch(monkeypatch):
    measure()
    torch = FakeTorch(free=3000)
    torch.initialized = True
    monkeypatch.setitem(sys.modules, "torch", torch)
    assert here(nvml=FakeNvml(t4(free=3000))).free_gib == pytest.approx(3000 / 1024 - KERNELS_LATER_GIB)


def test_an_unmeasured_card_has_the_tables_figures():
    seen, known = here(FakeTorch()), Card.known("T4")
    assert (seen.name, seen.free_gib) == ("Tesla T4", pytest.approx(14700 / 1024 - KERNELS_LATER_GIB))
    assert (seen.tflops, seen.context_gib, seen.source) == (known.tflops, known.context_gib, known.source)


def test_a_card_that_nobody_knows_has_no_figures():
    seen = here(FakeTorch(name="NVIDIA T400"))
    assert (seen.tflops, seen.source) == (None, "")
    assert here(FakeTorch.without_gpu(), no_nvml()).is_gpu is False


# Pretended


class FakeDriver:
    def __init__(self, code=0):
        self.code, self.held = code, 0

    def cuMemAlloc_v2(self, pointer, size):
        if not self.code:
            self.held += size.value
            ctypes.cast(pointer, ctypes.POINTER(ctypes.c_uint64))[0] = 7
        return self.code

    def cuMemFree_v2(self, pointer):
        assert pointer.value == 7
        self.held = 0
        return 0


def h200(**changes):
    torch = FakeTorch(**{"name": "NVIDIA H200", "capability": (9, 0), "total": 143155, "free": 142500} | changes)
    torch.properties.multi_processor_count = 132
    return torch


def test_an_h200_as_a_t4_and_back():
    torch = h200()
    card = pretend.pretend("t4", torch=torch)
    assert (card.name, card.capability, card.dtype) == ("pretend T4", (7, 5), "fp16")
    assert card.free_gib == pytest.approx(14.40)
    assert card.attention_gqa == ("math",)
    assert card.workspace_mib == 32  # cuBLAS is the H200's
    assert card.tflops == Card.known("H200").tflops
    assert card.multiprocessors == 132
    assert (card.computes_as, Card.known("T4").computes_as) == ((9, 0), None)
    assert "speed of the NVIDIA H200" in card.source
    assert torch.fraction * 143155 / 1024 == pytest.approx(14.40)
    assert torch.switches == {"flash": False, "cudnn": False, "mem_efficient": True, "math": True}
    pretend.release()
    assert torch.fraction == 1
    assert all(torch.switches.values())
    pretend.release()


@contextlib.contextmanager
def pretending(name, **options):
    try:
        yield pretend.pretend(name, **options)
    finally:
        pretend.release()


def test_switches_come_back_as_they_were():
    torch = h200()
    torch.switches["cudnn"] = False
    with pretending("RTX 3060", torch=torch) as card:
        assert torch.switches["flash"]
        assert card.dtype == "bf16"
    with pretending("T4", torch=torch):
        assert not torch.switches["flash"]
    assert torch.switches == {"flash": True, "cudnn": False, "mem_efficient": True, "math": True}


def test_one_pretended_card_at_a_time():
    torch = h200()
    pretend.pretend("T4", torch=torch)
    pretend.pretend("RTX 5090", torch=torch)
    assert torch.switches["flash"]
    assert torch.fraction * 143155 / 1024 == pytest.approx(Card.known("RTX 5090").free_gib)


def test_ballast_leaves_the_driver_what_the_small_card_would_have():
    torch, driver = h200(free=142000, reserved=500), FakeDriver()
    with pretending("T4", torch=torch, driver=driver, ballast=True):
        left = 142500 / 1024 - driver.held / 2**30
        assert left == pytest.approx(14.40 + KERNELS_LATER_GIB)
    assert driver.held == 0


def test_ballast_that_cannot_be_had_changes_nothing():
    torch = h200()
    with pytest.raises(GpuError, match="ballast") as caught:
        pretend.pretend("T4", torch=torch, driver=FakeDriver(code=2), ballast=True)
    assert "answers 2" in caught.value.why
    assert torch.fraction == 1
    assert all(torch.switches.values())


@pytest.mark.parametrize(
    ("torch", "name", "why"),
    [
        (FakeTorch.without_gpu(), "T4", "built without CUDA"),
        (FakeTorch(), "RTX 3090", "It has 14.56 GiB"),
        (FakeTorch(free=9000), "RTX 3060", "8.79 of them"),
        (FakeTorch(total=40000, free=40000), "RTX 3060", "neither bf16 nor FlashAttention"),
    ],
)
def test_a_card_that_cannot_be_pretended(torch, name, why):
    with pytest.raises(GpuError) as caught:
        pretend.pretend(name, torch=torch)
    assert why in caught.value.why
    assert f"Card.known('{name}')" in caught.value.fix
    assert torch.fraction == 1


def test_pretending_on_an_unknown_gpu_has_no_speed():
    card = pretend.pretend("T4", torch=h200(name="NVIDIA B999"))
    assert (card.tflops, card.launch_us) == (None, None)
    assert "not known" in card.source


def test_the_doors_on_card(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", h200())
    assert Card.pretend("T4").name == "pretend T4"
    monkeypatch.setattr(measured, "here", lambda: "here")
    monkeypatch.setattr(measured, "measure", lambda save: save)
    assert (Card.here(), Card.measure(save=False)) == ("here", False)
