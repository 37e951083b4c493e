"""Stand-ins for torch and NVML on machines that the tests do not have. Sizes in MiB, as nvidia-smi prints them."""

import warnings
from types import SimpleNamespace

from llamanb.trials import KERNELS, Attention

MIB = 2**20
T4_UUID = "11111111-2222-3333-4444-555555555555"


class Moment(float):
    """Seconds, asked as a CUDA event is."""

    def elapsed_time(self, later: float) -> float:
        return 1000 * (later - self)


class FakeTorch:
    """As much of torch as a card needs: one T4 unless told otherwise."""

    __version__ = "2.11.0+cu128"

    def __init__(
        self, name="Tesla T4", capability=(7, 5), total=14910, free=14700, reserved=0, allocated=0, gpus=1, built="12.8"
    ):
        self.version = SimpleNamespace(cuda=built)
        self.properties = SimpleNamespace(
            name=name, major=capability[0], minor=capability[1], uuid=T4_UUID, multi_processor_count=40
        )
        self.cuda = SimpleNamespace(
            is_available=lambda: gpus > 0,
            device_count=lambda: gpus,
            current_device=lambda: 0,
            get_device_properties=lambda index: self.properties,
            mem_get_info=lambda index: (free * MIB, total * MIB),
            memory_reserved=lambda index: reserved * MIB,
            memory_allocated=lambda index: allocated * MIB,
            is_initialized=lambda: self.initialized,
            set_per_process_memory_fraction=lambda fraction, index: setattr(self, "fraction", fraction),
        )
        self.initialized, self.fraction = False, 1.0
        self.switches = dict.fromkeys(("flash", "cudnn", "mem_efficient", "math"), True)
        self.backends = SimpleNamespace(cuda=SimpleNamespace())
        for name in self.switches:
            setattr(self.backends.cuda, f"{name}_sdp_enabled", lambda name=name: self.switches[name])
            setattr(self.backends.cuda, f"enable_{name}_sdp", lambda on, name=name: self.switches.update({name: on}))

    @classmethod
    def without_gpu(cls, version="2.13.0+cpu", built=None, says=""):
        """A torch that finds no GPU, and why: a CPU build, or a warning as with too old a driver."""

        def is_available():
            if says:
                warnings.warn(says, stacklevel=2)
            return False

        torch = cls(gpus=0, built=built)
        torch.__version__, torch.cuda.is_available = version, is_available
        return torch

    def break_call(self, name, text="CUDA error: GPU is lost"):
        """From now on `torch.cuda.<name>` raises."""

        def broken(*args):
            raise RuntimeError(text)

        setattr(self.cuda, name, broken)
        return self


class NVMLError(Exception):
    pass


class FakeNvml:
    """NVML's functions over a list of GPUs: dicts with name, uuid, pci, total, used, free, reserved, and processes
    as (pid, MiB or None) under `compute` and `graphics`. `refuses` names functions that answer "N/A"."""

    nvmlMemory_v2 = 2

    def __init__(self, *gpus, names=(), refuses=()):
        self.gpus, self.names, self.refuses = list(gpus), dict(names), set(refuses)
        self.asked = []

    def _answer(self, function, value):
        self.asked.append(function)
        if function in self.refuses:
            raise NVMLError("Not Supported")
        return value

    def _find(self, function, key, value):
        found = [gpu for gpu in self.gpus if gpu.get(key) == value]
        if not found:
            raise NVMLError("Not Found")
        return self._answer(function, found[0])

    def nvmlInit(self):
        self._answer("nvmlInit", None)

    def nvmlSystemGetDriverVersion(self):
        return self._answer("nvmlSystemGetDriverVersion", "580.65.06")

    def nvmlDeviceGetCount(self):
        return self._answer("nvmlDeviceGetCount", len(self.gpus))

    def nvmlDeviceGetHandleByIndex(self, index):
        return self._answer("nvmlDeviceGetHandleByIndex", self.gpus[index])

    def nvmlDeviceGetHandleByUUID(self, uuid):
        return self._find("nvmlDeviceGetHandleByUUID", "uuid", uuid)

    def nvmlDeviceGetHandleByPciBusId(self, address):
        return self._find("nvmlDeviceGetHandleByPciBusId", "pci", address)

    def nvmlDeviceGetUUID(self, gpu):
        return self._answer("nvmlDeviceGetUUID", gpu["uuid"])

    def nvmlDeviceGetMigMode(self, gpu):
        return self._answer("nvmlDeviceGetMigMode", gpu.get("mig", [0, 0]))

    def nvmlDeviceGetName(self, gpu):
        return self._answer("nvmlDeviceGetName", gpu["name"])

    def nvmlDeviceGetMemoryInfo(self, gpu, version=None):
        if version and "v2" in self.refuses:
            raise NVMLError("Function Not Found")
        info = {key: gpu[key] * MIB for key in ("total", "used", "free")}
        if version:
            info["reserved"] = gpu["reserved"] * MIB
        else:
            info["used"] += gpu["reserved"] * MIB
        return self._answer("nvmlDeviceGetMemoryInfo", SimpleNamespace(**info))

    def _processes(self, function, gpu, kind):
        entries = [SimpleNamespace(pid=pid, usedGpuMemory=mib and mib * MIB) for pid, mib in gpu.get(kind, ())]
        return self._answer(function, entries)

    def nvmlDeviceGetComputeRunningProcesses(self, gpu):
        return self._processes("nvmlDeviceGetComputeRunningProcesses", gpu, "compute")

    def nvmlDeviceGetGraphicsRunningProcesses(self, gpu):
        return self._processes("nvmlDeviceGetGraphicsRunningProcesses", gpu, "graphics")

    def nvmlSystemGetProcessName(self, pid):
        if pid not in self.names:
            raise NVMLError("Not Found")
        return self._answer("nvmlSystemGetProcessName", self.names[pid])


def t4(**changes):
    """A T4 as NVML sees it, with a little memory in use."""
    gpu = {"name": "Tesla T4", "uuid": f"GPU-{T4_UUID}", "pci": "00000000:00:04.0"}
    return gpu | {"total": 15360, "used": 210, "free": 14700, "reserved": 450} | changes


def no_nvml():
    """NVML on a machine without a driver."""
    return FakeNvml(refuses=["nvmlInit"])


def attention_that_runs(plain=("memory-efficient", "math"), grouped=("math",)):
    """A stand-in for `working_attention`: by default, what a T4 does."""

    def tried(dtype, device):
        return Attention(
            dtype,
            device,
            plain={kernel: "" if kernel in plain else "No available kernel" for kernel in KERNELS},
            grouped={kernel: "" if kernel in grouped else "No available kernel" for kernel in KERNELS},
        )

    return tried
