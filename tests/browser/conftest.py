"""JupyterLab with the project's notebooks, and a headless Chromium to drive it as a person would.

Without Chromium these tests fail where CI is set, and are skipped, with the reason, on a developer's machine.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.browser.lab import Lab

ROOT = Path(__file__).parents[2]
PICTURES = ROOT / "artifacts" / "browser"
TOKEN = "browser-tests"
START_LIMIT_S = 60
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WIDTH, HEIGHT = 1280, 1000
SETTINGS = {
    "@jupyterlab/apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "@jupyterlab/notebook-extension/tracker": {"windowingMode": "none"},  # cells out of sight stay in the page too
}


class Server(NamedTuple):
    """A running JupyterLab."""

    url: str
    folder: Path
    """What it serves: copies of the notebooks, and the runs that they leave."""
    settings: Path

    def ask(self, method: str, path: str) -> bytes:
        """The answer of the server's API."""
        request = urllib.request.Request(
            f"{self.url}/{path}", headers={"Authorization": f"token {TOKEN}"}, method=method
        )
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.read()


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of a Chromium."""
    for name in ("/usr/bin/chromium", "chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    missing = "no Chromium on this machine, and the browser tests need one: apt-get install chromium"
    if os.environ.get("CI"):
        pytest.fail(missing, pytrace=False)
    pytest.skip(missing)


@pytest.fixture(scope="session")
def server(chromium, tmp_path_factory) -> Iterator[Server]:
    """JupyterLab on a free port, with nothing of this user's own configuration and a kernel of this interpreter."""
    base = tmp_path_factory.mktemp("lab")
    folder = base / "notebooks"
    folder.mkdir()
    kernel = base / "data" / "kernels" / "python3"
    kernel.mkdir(parents=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": argv, "display_name": "Python 3", "language": "python", "env": {"PYTHONPATH": str(ROOT)}}
    (kernel / "kernel.json").write_text(json.dumps(spec))
    settings = base / "config" / "lab" / "user-settings"
    for name, values in SETTINGS.items():
        write_setting(settings, name, values)

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1"]
    command += [f"--ServerApp.port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={TOKEN}"]
    command += [f"--ServerApp.root_dir={folder}", "--LabApp.news_url=", "--LabApp.extension_manager=readonly"]
    command += ["--LabApp.expose_app_in_browser=True"]  # to change the theme of a page
    places = {"CONFIG_DIR": "config", "DATA_DIR": "data", "RUNTIME_DIR": "runtime"}
    environment = {**os.environ, **{f"JUPYTER_{name}": str(base / place) for name, place in places.items()}}
    environment |= {"JUPYTERLAB_SETTINGS_DIR": str(settings), "JUPYTERLAB_WORKSPACES_DIR": str(base / "workspaces")}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "IPYTHONDIR": str(base / "ipython")}
    environment.pop("JUPYTER_PATH", None)
    log = base / "lab.log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, env=environment, cwd=folder, stdout=file, stderr=subprocess.STDOUT)
    try:
        started = Server(url, folder, settings)
        wait_until_up(started, process, log)
        yield started
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def write_setting(settings: Path, name: str, values: dict) -> None:
    """What JupyterLab's settings editor would save: `name` is `owner/extension/plugin`."""
    path = settings / f"{name}.jupyterlab-settings"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))


def wait_until_up(server: Server, process: subprocess.Popen, log: Path) -> None:
    """Returns once the server answers; fails with its log when it ends or takes too long."""
    limit = time.monotonic() + START_LIMIT_S
    while time.monotonic() < limit and process.poll() is None:
        try:
            server.ask("GET", "api/status")
        except OSError:
            time.sleep(0.1)
        else:
            return
    pytest.fail(f"JupyterLab did not start; its log:\n{log.read_text()[-4000:]}", pytrace=False)


@pytest.fixture(scope="session")
def browser(chromium):
    """A headless Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield started
        started.close()


@pytest.fixture
def open_lab(server, browser):
    """`open_lab(name, **parameters)`: a copy of a notebook with these parameters, in a fresh page."""
    pages = []

    def open_notebook(name: str, **parameters) -> Lab:
        notebook = server.folder / f"{name}-{uuid.uuid4().hex[:8]}.ipynb"
        write_copy(ROOT / "notebooks" / f"{name}.ipynb", notebook, parameters)
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        pages.append(page)
        lab = Lab(page, notebook, PICTURES)
        lab.open(f"{server.url}/lab/workspaces/{notebook.stem}/tree/{notebook.name}?token={TOKEN}")
        return lab

    yield open_notebook
    for page in pages:
        page.close(run_before_unload=False)
    for session in json.loads(server.ask("GET", "api/sessions")):  # a test's kernel ends with it
        server.ask("DELETE", f"api/sessions/{session['id']}")


def write_copy(source: Path, target: Path, parameters: dict) -> None:
    """The notebook with other values in its parameters cell."""
    notebook = json.loads(source.read_text())
    (cell,) = (c for c in notebook["cells"] if "parameters" in c["metadata"].get("tags", ()))
    lines = "".join(cell["source"]).splitlines()
    for name, value in parameters.items():
        (number,) = (i for i, line in enumerate(lines) if line.startswith(f"{name} = "))
        lines[number] = f"{name} = {value!r}"
    cell["source"] = "\n".join(lines)
    target.write_text(json.dumps(notebook))
