"""Cards: precision by capability, the GPU that torch uses, NVML that may be absent, refuse, or see other GPUs."""

import dataclasses
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from fake_gpu import MIB, FakeNvml, FakeTorch, attention_that_runs, no_nvml, t4

from llamanb import card as cards
from llamanb import nvml as views
from llamanb.card import Card
from llamanb.errors import GpuError, RecipeError
from llamanb.precision import choose_precision

LATER = cards.KERNELS_LATER_GIB
T4_BY_HAND = Card(name="T4", capability=(7, 5), vram_gib=14.56, free_gib=14.0)


def present(torch, nvml=None, **runs):
    return Card.present(torch=torch, nvml=nvml or no_nvml(), try_attention=attention_that_runs(**runs))


def test_importing_a_card_loads_neither_torch_nor_nvml():
    code = "import sys, llamanb.card; print({'torch', 'pynvml'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


@pytest.mark.parametrize(
    ("capability", "wanted", "dtype"),
    [
        (None, "auto", "fp32"),
        (None, "fp32", "fp32"),
        (None, "bf16", "bf16"),
        ((6, 0), "auto", "fp16"),
        ((7, 5), "auto", "fp16"),
        ((7, 5), "fp16", "fp16"),
        ((7, 5), "fp32", "fp32"),
        ((8, 0), "auto", "bf16"),
        ((8, 6), "fp16", "fp16"),
        ((12, 0), "auto", "bf16"),
        ([8, 9], "auto", "bf16"),
    ],
)
def test_precision_by_capability(capability, wanted, dtype):
    chosen = choose_precision(capability, wanted)
    assert chosen.dtype == dtype
    assert chosen.reason


def test_bf16_on_a_t4_is_refused_with_the_trap_named():
    with pytest.raises(GpuError, match=r"capability 7\.5") as caught:
        choose_precision((7, 5), "bf16")
    assert "is_bf16_supported() says True here" in caught.value.why
    assert 'precision="auto"' in caught.value.fix


def test_fp16_without_a_gpu_is_refused():
    with pytest.raises(GpuError, match='"fp16" without a GPU'):
        choose_precision(None, "fp16")


def test_a_precision_that_is_none():
    with pytest.raises(RecipeError, match="precision='half'"):
        choose_precision((8, 0), "half")


def test_a_card_by_hand_starts_from_all_its_memory_and_survives_json():
    card = Card(name="RTX 4090", capability=(8, 9), vram_gib=23.5, attention=["flash", "math"])
    assert card.free_gib == 23.5
    assert card.dtype == "bf16"
    assert card.attention == ("flash", "math")
    assert Card(**json.loads(json.dumps(dataclasses.asdict(card)))) == card
    assert hash(card) == hash(dataclasses.replace(card))
    measured = dataclasses.replace(card, context_gib=0.4, tflops=130.0, launch_us=7, source="measured")
    assert Card(**json.loads(json.dumps(dataclasses.asdict(measured)))) == measured


def test_a_context_is_not_for_tensors():
    assert Card("T4", (7, 5), 14.56, context_gib=0.16).free_gib == pytest.approx(14.40)
    assert Card("T4", (7, 5), 14.56, 10, context_gib=0.16).free_gib == 10


@pytest.mark.parametrize(
    ("capability", "mib"),
    [(None, 0), ((6, 0), 8.125), ((7, 5), 8.125), ((8, 9), 8.125), ((9, 0), 32), ((10, 0), 32), ((12, 0), 32)],
)
def test_cublas_takes_its_workspace_by_capability(capability, mib):
    assert Card("X", capability, 8).workspace_mib == mib
    assert Card("X", capability, 8, blas_workspace_mib=4).workspace_mib == 4


def test_a_torch_that_knows_its_workspace_is_believed():
    torch = FakeTorch()
    assert present(torch).workspace_mib == 8.125
    torch.backends.cuda.cublas_workspace_size = lambda: 16 * MIB
    assert present(torch).workspace_mib == 16


@pytest.mark.parametrize(
    ("capability", "runs"), [(None, True), ((6, 0), False), ((7, 0), False), ((7, 5), True), ((12, 0), True)]
)
def test_whether_the_default_build_of_torch_has_code_for_it(capability, runs):
    assert Card("X", capability, 8).runs_default_torch is runs


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vram_gib": float("nan")}, "vram_gib=nan"),
        ({"vram_gib": -1}, "vram_gib=-1"),
        ({"vram_gib": float("inf")}, "vram_gib=inf"),
        ({"vram_gib": "16"}, "vram_gib='16'"),
        ({"vram_gib": True}, "vram_gib=True"),
        ({"vram_gib": 8, "free_gib": 9}, "free_gib=9"),
        ({"vram_gib": 8, "free_gib": -0.1}, "free_gib=-0.1"),
        ({"capability": 7.5}, "capability=7.5"),
        ({"capability": (7,)}, "capability="),
        ({"capability": ("7", "5")}, "capability="),
        ({"attention": ("flush",)}, "flush"),
        ({"vram_gib": None}, "vram_gib=None"),
        ({"vram_gib": 8, "context_gib": float("nan")}, "context_gib=nan"),
        ({"vram_gib": 8, "context_gib": -1}, "context_gib=-1"),
        ({"vram_gib": 8, "context_gib": 8}, "context_gib=8"),
        ({"vram_gib": 8, "context_gib": 9.5}, "context_gib=9.5"),
        ({"blas_workspace_mib": -1}, "blas_workspace_mib=-1"),
        ({"tflops": float("nan")}, "tflops=nan"),
        ({"tflops": 0}, "tflops=0"),
        ({"bandwidth_gbs": -300}, "bandwidth_gbs=-300"),
        ({"host_link_gbs": float("inf")}, "host_link_gbs=inf"),
        ({"launch_us": "8"}, "launch_us='8'"),
    ],
)
def test_a_card_that_cannot_be(fields, message):
    with pytest.raises(GpuError, match=r"Card 'X'") as caught:
        Card(**({"name": "X", "capability": (7, 5)} | fields))
    assert message in caught.value.what
    assert "Card(name=" in caught.value.fix


def test_how_a_card_reads():
    text = str(dataclasses.replace(T4_BY_HAND, attention=("memory-efficient", "math"), attention_gqa=("math",)))
    assert "14.56 GiB, 14.00 GiB free" in text
    assert "fp16: compute capability 7.5" in text
    assert "memory-efficient, math" in text
    assert "not tried" in str(T4_BY_HAND)
    known = str(Card.known("T4"))
    assert "24 TFLOP/s" in known
    assert "15 microseconds" in known
    assert "figures from" in known
    assert "<b>" not in Card(name="<b>", capability=None)._repr_html_()


# The GPU that torch uses


def test_a_machine_without_a_gpu_gets_a_cpu_card():
    card = present(FakeTorch.without_gpu(), plain=("flash", "math"), grouped=("flash",))
    assert card == Card("CPU", None, attention=("flash", "math"), attention_gqa=("flash",))
    assert not card.is_gpu
    assert card.dtype == "fp32"


def test_a_t4_by_torch_alone():
    card = present(FakeTorch())
    assert (card.name, card.capability, card.dtype) == ("Tesla T4", (7, 5), "fp16")
    assert card.vram_gib == pytest.approx(14910 / 1024)
    assert card.free_gib == pytest.approx(14700 / 1024 - LATER)
    assert card.attention_gqa == ("math",)


@pytest.mark.parametrize(("place", "pages"), [((), True), (("WSL2",), False), (("Colab",), True)])
def test_wsl2_pages_nothing_out(place, pages, monkeypatch):
    monkeypatch.setattr(cards, "surroundings", lambda: place)
    assert present(FakeTorch()).pages == pages


def test_kernels_that_ran_come_before_those_of_the_capability():
    assert Card("X", (8, 6), 12.0).grouped_kernels == ("flash", "cudnn", "math")
    assert T4_BY_HAND.grouped_kernels == ("math",)
    assert Card("X", (8, 6), 12.0, attention_gqa=("math",)).grouped_kernels == ("math",)


def test_no_less_than_nothing_is_free():
    assert present(FakeTorch(free=10)).free_gib == 0


def test_torchs_own_cache_counts_as_free():
    card = present(FakeTorch(free=9000, reserved=3000, allocated=1000))
    assert card.free_gib == pytest.approx(11000 / 1024 - LATER)


@pytest.mark.parametrize(
    ("seen", "free"),
    [
        (t4(free=9000), 9000),  # NVML sees other processes' memory that the driver would hand out
        (t4(free=14800), 14700),
        (t4(name="A100 in seven slices", total=81920, free=1000), 14700),  # the whole card says nothing of a slice
        (t4(total=0), 14700),  # a part with unified memory
        (t4(total=2**63 // MIB), 14700),  # "N/A"
        (t4(uuid="GPU-other", pci="other"), 14700),
    ],
)
def test_free_memory_is_the_smaller_of_driver_and_nvml(seen, free):
    assert present(FakeTorch(), FakeNvml(seen)).free_gib == pytest.approx(free / 1024 - LATER)


def test_nvml_without_version_2_of_its_memory_call():
    nvml = FakeNvml(t4(), refuses=["v2"])
    assert views.nvml_memory(nvml, t4()) == (15360 * MIB, 660 * MIB, 14700 * MIB, None)
    assert views.nvml_memory(FakeNvml(t4()), t4()) == (15360 * MIB, 210 * MIB, 14700 * MIB, 450 * MIB)
    old = SimpleNamespace(nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(total=8, used=2, free=6))
    assert views.nvml_memory(old, "handle") == (8, 2, 6, None)


@pytest.mark.parametrize("call", ["current_device", "get_device_properties", "mem_get_info", "memory_reserved"])
def test_a_gpu_that_does_not_answer(call):
    with pytest.raises(GpuError, match="does not answer") as caught:
        present(FakeTorch().break_call(call, "CUDA error: GPU is lost\nCompile with TORCH_USE_CUDA_DSA"))
    assert caught.value.why == "torch says: CUDA error: GPU is lost"


@pytest.mark.parametrize(
    ("torch", "visible", "why"),
    [
        (FakeTorch.without_gpu(), None, "this torch (2.13.0+cpu) is built without CUDA"),
        (FakeTorch.without_gpu(), "0", "this torch (2.13.0+cpu) is built without CUDA"),
        (FakeTorch.without_gpu(built="13.0", says="driver too old\n(found 11040)"), None, "torch says: driver too old"),
        (FakeTorch.without_gpu(built="13.0"), "", "CUDA_VISIBLE_DEVICES='' leaves torch no GPU"),
        (FakeTorch.without_gpu(built="13.0"), None, "torch finds no NVIDIA GPU or no driver"),
    ],
)
def test_why_torch_has_no_gpu(torch, visible, why, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert cards.gpu_in_use(torch) == (None, why)


# NVML


def test_nvml_is_asked_for_torchs_gpu_and_never_by_number():
    other = t4(name="Quadro", uuid="GPU-other", pci="00000000:00:03.0", free=100)
    nvml = FakeNvml(other, t4(free=9000))  # CUDA_VISIBLE_DEVICES=1: torch's number 0 is NVML's number 1
    assert present(FakeTorch(), nvml).free_gib == pytest.approx(9000 / 1024 - LATER)
    assert "nvmlDeviceGetHandleByIndex" not in nvml.asked


def test_a_slice_of_a_gpu_is_found_under_its_own_kind_of_uuid():
    mig = t4(uuid=f"MIG-{t4()['uuid'].removeprefix('GPU-')}", total=10000, free=5000)
    assert present(FakeTorch(total=9900, free=9800), FakeNvml(mig)).free_gib == pytest.approx(5000 / 1024 - LATER)


@pytest.mark.parametrize("uuid", [None, "GPU-unknown-to-nvml"])
def test_without_a_common_uuid_the_bus_address_is_tried(uuid):
    properties = SimpleNamespace(pci_domain_id=0, pci_bus_id=0x3B, pci_device_id=4)
    if uuid:
        properties.uuid = uuid
    gpu = t4(pci="00000000:3B:04.0")
    assert views.nvml_handle(FakeNvml(t4(uuid="a", pci="b"), gpu), properties) is gpu
    assert views.nvml_handle(FakeNvml(), properties) is None
    assert views.nvml_handle(FakeNvml(gpu), SimpleNamespace()) is None
    assert views.nvml_handle(None, properties) is None


def test_nvml_that_cannot_start_says_why():
    assert views.start_nvml(no_nvml()) == (None, "NVML says: Not Supported")


def test_nvml_that_is_not_installed_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    module, why = views.start_nvml()
    assert module is None
    assert "pip install nvidia-ml-py" in why


@pytest.mark.parametrize(
    ("gpus", "environ", "found"),
    [
        ([], {}, None),
        ([0], {}, 0),
        ([0], {"CUDA_VISIBLE_DEVICES": "0"}, 0),
        ([0], {"CUDA_VISIBLE_DEVICES": "GPU-0"}, 0),
        ([0], {"CUDA_VISIBLE_DEVICES": "GPU-1"}, None),
        ([0], {"CUDA_VISIBLE_DEVICES": "1"}, None),
        ([0], {"CUDA_VISIBLE_DEVICES": ""}, None),
        ([0], {"CUDA_VISIBLE_DEVICES": "-1"}, None),
        ([0], {"CUDA_VISIBLE_DEVICES": "MIG-0"}, None),
        ([0], {"CUDA_VISIBLE_DEVICES": "0,0"}, None),
        ([0, 1], {}, None),
        ([0, 1], {"CUDA_VISIBLE_DEVICES": "1"}, None),  # torch counts the fastest first
        ([0, 1], {"CUDA_VISIBLE_DEVICES": "1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, 1),
        ([0, 1], {"CUDA_VISIBLE_DEVICES": "GPU-1"}, 1),
        ([0, 1], {"CUDA_VISIBLE_DEVICES": "GPU-"}, None),
    ],
)
def test_the_one_gpu_that_a_process_would_see(gpus, environ, found):
    gpus = [t4(uuid=f"GPU-{number}") for number in gpus]
    assert views.only_gpu(FakeNvml(*gpus), environ) is (None if found is None else gpus[found])


def test_a_gpu_in_slices_is_not_the_one_gpu():
    assert views.only_gpu(FakeNvml(t4(mig=[1, 1])), {}) is None
    assert views.only_gpu(FakeNvml(t4(), refuses=["nvmlDeviceGetMigMode"]), {})["name"] == "Tesla T4"


def test_the_real_nvml_never_raises():
    module, why = views.start_nvml()
    assert (module is None) == bool(why)


def test_processes_that_compute_and_draw_are_counted_once():
    gpu = t4(compute=[(10, 500), (11, None)], graphics=[(10, 520), (12, 900), (13, 2**63 // MIB)])
    nvml = FakeNvml(gpu, names={10: "/usr/bin/python3", 12: "/usr/lib/xorg/Xorg"})
    assert views.gpu_processes(nvml, gpu) == [
        (12, "/usr/lib/xorg/Xorg", 900 * MIB),
        (10, "/usr/bin/python3", 520 * MIB),
        (11, "", None),
        (13, "", None),
    ]


def test_processes_that_nvml_does_not_list():
    both = ["nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetGraphicsRunningProcesses"]
    gpu = t4(compute=[(10, 500)])
    assert views.gpu_processes(FakeNvml(gpu, refuses=both), gpu) is None
    assert len(views.gpu_processes(FakeNvml(gpu, refuses=both[1:]), gpu)) == 1
    assert views.gpu_processes(FakeNvml(t4()), t4()) == []
