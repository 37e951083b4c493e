"""The report of notebook 00 on machines that the tests do not have."""

import os

import pytest
from fake_gpu import FakeNvml, FakeTorch, attention_that_runs, no_nvml, t4

import llamanb
from llamanb import gpu_check
from llamanb.card import KERNELS_LATER_GIB
from llamanb.errors import RecipeError
from llamanb.gpu_check import check_gpu
from llamanb.setup import loaded

OWN = os.getpid()
LINUX = "Linux version 6.8.0-45-generic"
WSL2 = "Linux version 5.15.153.1-microsoft-standard-WSL2"


@pytest.fixture
def check(tmp_path, monkeypatch):
    """`check_gpu` with a T4 unless told otherwise."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def run(torch=None, nvml=None, *, kernel=LINUX, environ=None, runs=None, speeds=None, **options):
        (tmp_path / "version").write_text(kernel)
        return check_gpu(
            torch=torch or FakeTorch(),
            nvml=nvml or FakeNvml(t4()),
            try_attention=attention_that_runs(**(runs or {})),
            try_precision=lambda device: speeds or {"fp32": 4.1, "fp16": 24.6, "bf16": 2.2},
            proc=str(tmp_path),
            environ=environ or {},
            **options,
        )

    return run


def row(section, name):
    (found,) = (cells for cells in section.table.rows if str(cells[0]).startswith(name))
    return found


def said(section):
    return " ".join(section.notes)


def test_a_t4_in_one_table(check):
    summary = check().summary
    assert summary.table.rows[0] == ["GPU", "Tesla T4, compute capability 7.5"]
    assert row(summary, "GPU memory")[1] == "14.2 GiB free of 14.6 GiB"
    assert row(summary, "driver")[1] == "580.65.06, torch 2.11.0+cu128"
    assert row(summary, "computes in")[1].startswith("fp16: compute capability 7.5 is below 8.0")
    assert row(summary, "attention for Llama 3")[1] == "math"
    assert row(summary, "runs on")[1] == "Linux"
    assert "14.2 GiB of this Tesla T4 can be used now, computing in fp16." in summary.notes
    assert "With keys and values repeated for every query head memory-efficient runs." in said(summary)


def test_what_it_can_train_is_the_planners_to_say(check):
    assert "trainable()" in said(check().summary)
    assert callable(llamanb.trainable)


def test_three_views_of_memory_and_why_they_differ(check):
    memory = check(FakeTorch(free=11000, reserved=3000, allocated=2000), FakeNvml(t4(used=3910, free=11000))).memory
    assert row(memory, "NVML")[1:4] == ["15,360", "3,910", "11,000"]
    assert row(memory, "driver")[1:4] == ["14,910", "3,910", "11,000"]
    assert row(memory, "torch, reserved")[2] == "3,000"
    assert row(memory, "torch, in tensors")[2:4] == ["2,000", "1,000"]
    assert "NVML's total is 450 MiB larger" in said(memory)
    assert "910 MiB are used beyond torch's" in said(memory)


def test_memory_is_looked_at_before_kernels_are_tried(check):
    torch, tried = FakeTorch(), []
    look = torch.cuda.memory_reserved
    torch.cuda.memory_reserved = lambda index: tried.append("memory") or look(index)
    check_gpu(
        torch=torch,
        nvml=no_nvml(),
        try_attention=lambda *args: tried.append("kernels") or attention_that_runs()(*args),
        try_precision=lambda device: tried.append("precision") or {},
    )
    assert tried[0] == "memory"
    assert {"kernels", "precision"} < set(tried)


def test_a_slice_of_a_gpu(check):
    memory = check(nvml=FakeNvml(t4(total=81920, used=40000, free=41920))).memory
    assert "has a slice of it" in said(memory)


@pytest.mark.parametrize(
    ("nvml", "why"),
    [
        (no_nvml(), "NVML says: Not Supported"),
        (FakeNvml(t4(uuid="GPU-other", pci="other")), "it does not find the GPU that torch uses"),
        (FakeNvml(t4(), refuses=["nvmlDeviceGetMemoryInfo"]), "it does not tell"),
    ],
)
def test_memory_without_nvml(check, nvml, why):
    found = check(nvml=nvml)
    assert f"No view from NVML ({why})" in said(found.memory)
    assert row(found.memory, "driver")[1] == "14,910"
    assert found.card.free_gib == pytest.approx(14700 / 1024 - KERNELS_LATER_GIB)


def test_who_holds_memory(check):
    gpu = t4(used=2300, compute=[(OWN, 300), (77, 900)], graphics=[(5, 600)])
    names = {OWN: "/venv/bin/python", 77: "/usr/bin/python3.12", 5: "/usr/lib/xorg/Xorg"}
    processes = check(nvml=FakeNvml(gpu, names=names)).processes
    assert processes.table.rows == [
        ["python3.12", 77, "900"],
        ["Xorg", 5, "600"],
        ["python (this process)", OWN, "300"],
        ["not on the list", "", "500"],
    ]
    assert "often another notebook" in said(processes)
    assert "hidden" not in said(processes)


def test_processes_that_a_container_hides(check):
    processes = check(nvml=FakeNvml(t4(used=210))).processes
    assert processes.table.rows == [["not on the list", "", "210"]]
    assert "In a container NVML shows processes under the host's numbers or not at all" in said(processes)


def test_processes_without_name_or_size(check):
    processes = check(nvml=FakeNvml(t4(used=10, compute=[(9, None)]))).processes
    assert processes.table.rows == [["name not told", 9, "not told"]]


@pytest.mark.parametrize(
    ("torch", "nvml", "why"),
    [
        (None, no_nvml(), "NVML says: Not Supported"),
        (FakeTorch.without_gpu(), FakeNvml(), "torch uses no GPU"),
        (
            None,
            FakeNvml(t4(), refuses=["nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetGraphicsRunningProcesses"]),
            "NVML does not list processes on this machine",
        ),
    ],
)
def test_processes_that_cannot_be_told(check, torch, nvml, why):
    assert f"cannot be told: {why}." in said(check(torch, nvml).processes)


def test_precisions_show_what_was_tried_and_what_is_refused(check):
    table = check(speeds={"fp32": 4.12, "fp16": 24.6, "bf16": 0.5}).precision
    assert row(table, "fp16")[1:] == ["24.6 TFLOP/s", "used: " + row(check().summary, "computes in")[1][6:]]
    assert row(table, "fp32")[1:] == ["4.1 TFLOP/s", "possible"]
    assert row(table, "bf16")[1] == "500 GFLOP/s"
    assert row(table, "bf16")[2].startswith("refused: bf16 matrix units begin at 8.0")
    assert row(check(speeds={"bf16": "no kernel image"}).precision, "bf16")[1] == "no kernel image"


def test_a_precision_that_this_gpu_lacks_is_a_finding(check):
    summary = check(precision="bf16").summary
    assert row(summary, "computes in")[1].startswith("fp16")
    assert summary.notes[0].startswith('precision="bf16" on a GPU of compute capability 7.5 why: ')
    assert "fix: " in summary.notes[0]


def test_a_precision_that_is_none_is_an_error(check):
    with pytest.raises(RecipeError, match="int3"):
        check(precision="int3")


@pytest.mark.parametrize(
    ("runs", "words"),
    [
        ({"plain": ("flash", "math"), "grouped": ("flash", "math")}, ""),
        ({"plain": ("flash",), "grouped": ("flash",)}, ""),
        ({"plain": ("math",), "grouped": ("math",)}, "grows with the square of the length"),
        ({"plain": ("flash", "math"), "grouped": ("math",)}, "repeated for every query head flash runs."),
        ({"plain": (), "grouped": ()}, "torch cannot compute on this device"),
    ],
)
def test_what_attention_means_for_llama(check, runs, words):
    text = said(check(runs=runs).attention)
    assert words in text
    assert bool(text) == bool(words)


def test_a_gpu_too_old_for_this_torch(check):
    torch = FakeTorch(name="Tesla P100", capability=(6, 0))
    summary = check(torch, runs={"plain": (), "grouped": ()}).summary
    assert row(summary, "attention for Llama 3")[1] == "none runs"
    assert "Torch sees the Tesla P100 but does not compute on it: No available kernel." in summary.notes
    assert "CUDA 13 builds begin at compute capability 7.5" in said(summary)


def test_several_gpus(check):
    assert "number 0 of the 2 that torch sees" in str(check(FakeTorch(gpus=2)).summary)


@pytest.mark.parametrize("call", ["current_device", "get_device_properties", "mem_get_info"])
def test_a_gpu_that_does_not_answer_is_a_finding(check, call):
    found = check(FakeTorch().break_call(call, "CUDA error: GPU is lost"))
    assert found.card is None
    assert row(found.summary, "GPU")[1] == "does not answer"
    assert "torch says: CUDA error: GPU is lost" in said(found.summary)
    assert row(found.memory, "NVML: Tesla T4")[1] == "15,360"


# No GPU in use


@pytest.mark.parametrize(
    ("torch", "nvml", "options", "words"),
    [
        (FakeTorch.without_gpu(), no_nvml(), {}, "`nvidia-smi` must list the GPU"),
        (FakeTorch.without_gpu(), no_nvml(), {"environ": {"COLAB_GPU": ""}}, "Change runtime type > T4 GPU"),
        (FakeTorch.without_gpu(), no_nvml(), {"environ": {"KAGGLE_KERNEL_RUN_TYPE": "Batch"}}, "GPU T4 x2"),
        (FakeTorch.without_gpu(), no_nvml(), {"kernel": WSL2}, "install its driver in Windows"),
        (FakeTorch.without_gpu(), FakeNvml(t4()), {}, "rm -r .venv && make quickstart"),
        (FakeTorch.without_gpu(built="13.0", says="driver too old"), FakeNvml(t4()), {}, "Update the NVIDIA driver"),
    ],
)
def test_no_gpu_in_use_and_what_to_do(check, torch, nvml, options, words):
    found = check(torch, nvml, runs={"plain": ("flash", "math"), "grouped": ("math", "flash")}, **options)
    text = said(found.summary)
    assert words in text
    assert "a real Llama needs a GPU" in text
    assert row(found.summary, "GPU")[1] == "none in use"
    assert row(found.summary, "computes in")[1].startswith("fp32")
    assert found.attention.table.caption.startswith("Attention kernels tried on cpu in fp32")


def test_a_hidden_gpu(check, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    text = said(check(FakeTorch.without_gpu(built="13.0"), FakeNvml(t4())).summary)
    assert "NVML sees Tesla T4, but torch uses no GPU: CUDA_VISIBLE_DEVICES=''" in text
    assert "Unset CUDA_VISIBLE_DEVICES" in text


def test_gpus_that_only_nvml_sees(check):
    memory = check(FakeTorch.without_gpu(), FakeNvml(t4(), t4(name="<i>RTX</i>", used=500))).memory
    assert row(memory, "NVML: Tesla T4")[1:4] == ["15,360", "210", "14,700"]
    assert "<i>" not in memory._repr_html_()
    silent = FakeNvml(t4(), refuses=["nvmlDeviceGetName", "nvmlDeviceGetMemoryInfo"])
    assert row(check(FakeTorch.without_gpu(), silent).memory, "NVML: a GPU")[1] == "not told"
    nobody = check(FakeTorch.without_gpu(), FakeNvml()).memory
    assert row(nobody, "nobody")[4] == "NVML sees no GPU"


# Around the GPU


def test_wsl2_is_said_plainly(check):
    found = check(kernel=WSL2)
    for section in (found.summary, found.memory):
        assert "moves memory to the host's instead of failing" in said(section)
    assert row(found.summary, "runs on")[1] == "WSL2"
    assert "WSL2" not in str(check().summary)


def test_a_containers_limit_on_host_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check.machine, "host_memory", lambda: (64.0, 60.0, 8.0))
    host = gpu_check.host_memory_and_disk(tmp_path)
    assert row(host, "host RAM")[1] == "60.0 GiB free of 64.0 GiB"
    assert "may hold 8.0 GiB" in said(host)


def test_a_stale_package_asks_for_a_restart(monkeypatch):
    assert not gpu_check.versions(["pytest"]).notes
    monkeypatch.setattr(loaded.metadata, "version", lambda package: "0.0.1")
    stale = gpu_check.versions(["pytest", "not-loaded"])
    assert row(stale, "pytest") == ["pytest", pytest.__version__, "0.0.1", "restart"]
    assert row(stale, "not-loaded") == ["not-loaded", "not yet", "0.0.1", ""]
    assert "Restart the kernel" in said(stale)


def test_everything_shows_as_text_and_as_html_and_outside_text_is_escaped(check):
    found = check(FakeTorch(name="<script>alert(1)</script>"))
    assert str(found).count("\n\n") == 6
    assert repr(found) == str(found)
    html = found._repr_html_()
    assert html.count("<table>") == 7
    assert "<script>" not in html
    assert "&lt;script&gt;" in html
