"""Which PyTorch goes on which machine: the table, the parsers, and what pip is told."""

import http.server
import json
import os
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from llamanb.errors import GpuError
from llamanb.setup import torch_build
from llamanb.setup.torch_build import VERSION, answers, choose_build, parse_proc_version, read_gpus

ROOT = Path(__file__).parents[2]
P100, V100, T4, A100, RTX4090, H100 = (6, 0), (7, 0), (7, 5), (8, 0), (8, 9), (9, 0)
B200, RTX5090 = (10, 0), (12, 0)


@pytest.mark.parametrize(
    ("driver", "capabilities", "reachable", "index", "local"),
    [
        # no GPU
        (None, [], True, "cpu", "+cpu"),
        (None, [], False, None, ""),
        # the default build: Turing and newer on a driver for CUDA 13
        ("580.65.06", [T4], True, None, ""),
        ("580.65.06", [T4], False, None, ""),
        ("580", [RTX4090], True, None, ""),
        ("610.10", [T4, RTX5090], True, None, ""),
        ("580.65.06", [B200], True, None, ""),
        ("580.65.06", [], True, None, ""),
        # a driver for CUDA 12 only
        ("550.54.15", [T4], True, "cu126", "+cu126"),
        ("579.99", [H100], True, "cu126", "+cu126"),
        ("525.60.13", [A100], True, "cu126", "+cu126"),
        ("535.183.01", [], True, "cu126", "+cu126"),
        # GPUs that CUDA 13 dropped, whatever the driver
        ("580.65.06", [P100], True, "cu126", "+cu126"),
        ("610.10", [V100], True, "cu126", "+cu126"),
        ("610.10", [V100, H100], True, "cu126", "+cu126"),
        ("535.183.01", [P100], True, "cu126", "+cu126"),
        # the index that fits is out of reach
        ("550.54.15", [T4], False, None, ""),
        ("610.10", [V100], False, None, ""),
    ],
)
def test_build_fits_driver_and_gpu(driver, capabilities, reachable, index, local):
    build = choose_build(driver, capabilities, index_reachable=reachable)
    assert build.requirement == f"torch=={VERSION}{local}"
    assert build.index_url == (index and f"https://download.pytorch.org/whl/{index}")


@pytest.mark.parametrize(
    ("driver", "capabilities", "match"),
    [
        ("525.60.12", [T4], "525.60.13 or newer"),
        ("470.256.02", [T4], "driver 470.256.02 is too old"),
        ("470", [], "too old"),
        ("579.99", [RTX5090], "580 or newer"),
        ("570.86", [B200], "Blackwell"),
        ("470.1", [RTX5090], "580 or newer"),
        ("610.10", [P100, RTX5090], "both GPUs"),
        ("610.10", [(3, 7)], "compute capability 3.7"),
    ],
)
def test_what_cannot_run_is_an_error_with_a_way_out(driver, capabilities, match):
    for reachable in (True, False):
        with pytest.raises(GpuError, match=match) as caught:
            choose_build(driver, capabilities, index_reachable=reachable)
        assert driver in str(caught.value)
        assert caught.value.why
        assert caught.value.fix


def test_reason_says_what_is_downloaded_and_what_it_will_not_do():
    assert "about 0.2 GB" in choose_build(None).reason
    assert "about 2.7 GB" in choose_build(None, index_reachable=False).reason
    assert "out of reach" in choose_build(None, index_reachable=False).reason
    old_driver = choose_build("550.54.15", [T4], index_reachable=False).reason
    assert "before the driver is updated" in old_driver
    assert "2.7 GB" in old_driver
    assert "when the index answers" in choose_build("610.10", [V100], index_reachable=False).reason


def test_pip_is_told_the_index_only_where_one_is_needed():
    assert choose_build("580.65.06", [T4]).pip_arguments == [f"torch=={VERSION}"]
    assert choose_build(None).pip_arguments == [
        "--extra-index-url",
        "https://download.pytorch.org/whl/cpu",
        f"torch=={VERSION}+cpu",
    ]


def test_version_is_the_one_in_the_constraints():
    assert f"torch=={VERSION}" in (ROOT / "constraints.txt").read_text().splitlines()


@pytest.mark.parametrize(
    ("text", "version"),
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024\nGCC version: 12",
            "535.183.01",
        ),
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.124.06  Release Build  (a@b)\nGCC version: ",
            "570.124.06",
        ),
        ("", None),
        ("something else 1.2", None),
    ],
)
def test_proc_version(text, version):
    assert parse_proc_version(text) == version


@pytest.fixture
def smi(tmp_path, monkeypatch):
    """Puts an nvidia-smi in PATH that answers each field with the given lines, or fails."""

    def put(answers: dict[str, list[str]], status: int = 0) -> None:
        table = json.dumps({f"--query-gpu={field}": "\n".join(lines) for field, lines in answers.items()})
        script = tmp_path / "nvidia-smi"
        lines = ["import sys", f"print({table}.get(sys.argv[1], 'not a valid field'))", f"sys.exit({status})"]
        script.write_text("\n".join([f"#!{sys.executable}", *lines]))
        script.chmod(script.stat().st_mode | stat.S_IEXEC)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    return put


def test_smi_is_asked_for_driver_and_every_gpu(smi):
    smi({"driver_version": ["580.65.06", "580.65.06"], "compute_cap": ["7.5", "12.0"]})
    assert read_gpus() == ("580.65.06", [(7, 5), (12, 0)])


def test_smi_too_old_to_know_compute_capability(smi):
    smi({"driver_version": ["470.256.02"]})
    assert read_gpus() == ("470.256.02", [])


def test_smi_without_a_driver_is_no_gpu(smi, monkeypatch):
    smi({"driver_version": ["NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."]}, status=9)
    monkeypatch.setattr(torch_build.Path, "read_text", lambda *_, **__: (_ for _ in ()).throw(FileNotFoundError()))
    assert read_gpus() == (None, [])


def test_probe_sees_a_server_and_notices_its_absence(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nothing answers there
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    assert answers(f"{url}/")
    assert not answers(f"{url}/no-such-page")
    server.shutdown()
    server.server_close()
    assert not answers(f"{url}/")
    monkeypatch.delenv("no_proxy")
    monkeypatch.delenv("NO_PROXY")
    assert not answers(f"{url}/")


def test_probe_gives_up_in_time():
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)  # listens, never answers
    start = time.perf_counter()
    assert not answers(f"http://127.0.0.1:{server.server_port}/", timeout_s=0.2)
    assert time.perf_counter() - start < 2
    server.server_close()


def run_module(**changes: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-S", "-m", "llamanb.setup.torch_build"],  # -S: no site-packages, as before any installation
        cwd=ROOT,
        env={**os.environ, **changes},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_module_prints_arguments_on_stdout_and_the_reason_on_stderr(smi):
    smi({"driver_version": ["580.65.06"], "compute_cap": ["7.5"]})
    done = run_module()
    assert (done.returncode, done.stdout) == (0, f"torch=={VERSION}\n")
    assert done.stderr.startswith("torch: NVIDIA driver 580.65.06, compute capability 7.5: the default build")


def test_module_says_why_it_cannot(smi):
    smi({"driver_version": ["470.256.02"], "compute_cap": ["7.5"]})
    done = run_module()
    assert (done.returncode, done.stdout) == (1, "")
    assert "too old" in done.stderr
    assert "fix: " in done.stderr


def test_module_out_of_reach_falls_back_to_the_registry(smi):
    smi({"driver_version": ["535.183.01"], "compute_cap": ["8.9"]})
    nowhere = "http://127.0.0.1:9"
    done = run_module(https_proxy=nowhere, HTTPS_PROXY=nowhere, no_proxy="", NO_PROXY="")
    assert (done.returncode, done.stdout) == (0, f"torch=={VERSION}\n")
    assert "out of reach" in done.stderr
