"""What the Hub's refusals mean, against a server that answers as the Hub does."""

import errno
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from llamanb import hub
from llamanb.errors import DataError, DiskFullError, ModelError, ModelNotFoundError

LLAMA = json.dumps({"model_type": "llama"}).encode()
ROWS = b'{"instruction": "a", "output": "b"}\n{"instruction": "c", "output": "d"}\n'
ANSWERS = {  # repository: (status, X-Error-Code, X-Error-Message)
    "meta-llama/Llama-3.2-1B": (403, "GatedRepo", "Access to model is restricted"),
    "meta-llama/no-token": (401, "GatedRepo", "Access to model is restricted"),
    "meta-llama/Llama-3.2-3B": (403, "", "Please enable access to public gated repositories in your token's settings"),
    "owner/aggregated": (403, "", "Forbidden"),
    "owner/misspelled": (401, "RepoNotFound", "Repository not found"),
    "owner/wrong-token": (401, "", "Invalid credentials in Authorization header"),
    "owner/no-revision": (404, "RevisionNotFound", "Invalid rev id"),
    "owner/broken": (500, "", "Internal error"),
}


class FakeHub(http.server.BaseHTTPRequestHandler):
    """Refuses as the Hub does, and gives out one model, `owner/good`, one too large for any disk, and one pickled."""

    def do_GET(self):
        path = self.path.split("?")[0]
        for name, (status, code, message) in ANSWERS.items():
            if name in path:
                return self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": message})
        weights = {"owner/good": ("model.safetensors", 3), "owner/huge": ("model.safetensors", 10**18)}
        weights["owner/pickled"] = ("pytorch_model.bin", 3)
        for name, (file, size) in weights.items():
            if f"/api/models/{name}" in path:
                sizes = {"config.json": 10, "tokenizer.json": 3, file: size}
                files = [{"rfilename": n, "size": s} for n, s in sizes.items()]
                entries = [{"type": "file", "path": f["rfilename"], "size": f["size"], "oid": "0" * 40} for f in files]
                info = {"id": name, "sha": "a" * 40, "siblings": files}
                return self._send(200, json.dumps(entries if "/tree/" in path else info).encode())
            if path.startswith(f"/{name}/resolve/"):
                body = LLAMA if path.endswith("config.json") else b"abc"
                return self._send(200, body, {"ETag": f'"{hash(body)}"', "X-Repo-Commit": "a" * 40})
        if path.startswith("/api/datasets/owner/rows/tree/"):
            entry = {"type": "file", "path": "rows.jsonl", "size": len(ROWS), "oid": "0" * 40}
            return self._send(200, json.dumps([entry]).encode())
        if path.startswith("/api/datasets/owner/rows"):
            info = {"id": "owner/rows", "sha": "a" * 40, "siblings": [{"rfilename": "rows.jsonl"}], "tags": []}
            return self._send(200, json.dumps({**info, "private": False, "downloads": 0}).encode())
        if path.startswith("/datasets/owner/rows/resolve/") and path.endswith("rows.jsonl"):
            return self._send(200, ROWS, {"ETag": '"e"', "X-Repo-Commit": "a" * 40})
        return self._send(404, b"{}", {"X-Error-Code": "EntryNotFound" if "/rows" in path else "RepoNotFound"})

    do_HEAD = do_GET

    def _send(self, status: int, body: bytes, headers: dict | None = None):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def endpoint():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def ask(model: str, endpoint: str, home: Path, token: str = "", weights: bool = False) -> str:
    """What `checkpoint_folder` says."""
    return said_by(f'print("folder", hub.checkpoint_folder({model!r}, weights={weights}))', endpoint, home, token)


def said_by(statement: str, endpoint: str, home: Path, token: str = "") -> str:
    """What a statement prints in a fresh process (the Hub's client reads its settings once)."""
    code = f"""
from llamanb import LlamanbError, hub
from llamanb.data.read import read_rows
try:
    {statement}
except LlamanbError as error:
    print(type(error).__name__, error)
"""
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    env = {**keep, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": token}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize(
    ("model", "token", "error", "fix"),
    [
        ("meta-llama/Llama-3.2-1B", "hf_valid", "GatedModelError", "accept it at https://huggingface.co/meta-llama"),
        ("meta-llama/Llama-3.2-1B", "hf_valid", "GatedModelError", "mirror 'unsloth/Llama-3.2-1B'"),
        ("meta-llama/no-token", "", "MissingTokenError", "Colab secret HF_TOKEN"),
        ("meta-llama/Llama-3.2-3B", "hf_narrow", "GatedModelError", "one that may read public gated repositories"),
        ("owner/aggregated", "hf_valid", "NoNetworkError", "try again"),
        ("owner/misspelled", "", "ModelNotFoundError", "check the name"),
        ("owner/wrong-token", "hf_wrong", "WrongTokenError", "settings/tokens"),
        ("owner/no-revision", "", "ModelNotFoundError", "tree/main"),
        ("owner/broken", "", "NoNetworkError", "try again"),
    ],
)
def test_each_refusal_has_its_own_error(model, token, error, fix, endpoint, tmp_path):
    said = ask(model, endpoint, tmp_path, token)
    assert said.startswith(error)
    assert fix in said
    assert not token or token not in said


def test_rows_from_the_hub(endpoint, tmp_path):
    said = said_by('print([(r.place, r.values["output"]) for r in read_rows("owner/rows")[0]])', endpoint, tmp_path)
    assert said.strip() == "[('row 1', 'b'), ('row 2', 'd')]"


def test_a_dataset_that_is_not_there(endpoint, tmp_path):
    said = said_by('read_rows("owner/nothing")', endpoint, tmp_path)
    assert said.startswith("DataError dataset owner/nothing cannot be read")


def test_a_split_that_is_not_there(endpoint, tmp_path):
    said = said_by('read_rows("owner/rows", "tset")', endpoint, tmp_path)
    assert said.startswith("DataError dataset owner/rows cannot be read")
    assert "tset" in said


def test_no_network(tmp_path):
    said = ask("owner/good", "http://127.0.0.1:9", tmp_path)
    assert said.startswith("NoNetworkError")
    assert "'tiny'" in said


def test_a_name_server_that_does_not_answer_is_no_network(tmp_path):
    for weights in (False, True):
        said = ask("owner/good", "http://nowhere.invalid", tmp_path, weights=weights)
        assert said.startswith("NoNetworkError")


def test_a_cache_with_the_config_only_is_completed(endpoint, tmp_path):
    config_only = "import huggingface_hub; huggingface_hub.hf_hub_download('owner/good', 'config.json')"
    said_by(config_only, endpoint, tmp_path)
    said = said_by('hub.checkpoint_folder("owner/good", weights=False)', "http://127.0.0.1:9", tmp_path)
    assert said.startswith("NoNetworkError")  # it asks for the rest, and does not take what is there for all


def test_a_model_is_fetched_once_and_then_needs_no_network(endpoint, tmp_path):
    assert ask("owner/good", endpoint, tmp_path, weights=True).startswith("folder")
    assert ask("owner/good", "http://127.0.0.1:9", tmp_path, weights=True).startswith("folder")


def test_a_download_larger_than_the_disk_is_not_begun(endpoint, tmp_path):
    said = ask("owner/huge", endpoint, tmp_path, weights=True)
    assert said.startswith("DiskFullError")
    assert "1000000000.0 GB to download" in said
    assert not list(tmp_path.rglob("*.safetensors"))


def test_weights_that_could_run_code_are_left_where_they_are(endpoint, tmp_path):
    said = ask("owner/pickled", endpoint, tmp_path, weights=True)
    assert said.startswith("ModelError owner/pickled is not a complete checkpoint")
    assert "it has no *.safetensors" in said
    assert "other formats of weights can run code" in said
    assert not list(tmp_path.rglob("*.bin"))


def test_full_disk_while_fetching():
    error = hub.explain(OSError(errno.ENOSPC, "No space left on device"), "owner/good")
    assert isinstance(error, DiskFullError)


def test_unknown_failures_are_passed_on():
    assert "ValueError: what" in str(hub.explain(ValueError("what"), "owner/good"))
    assert isinstance(hub.explain(ValueError("what"), "owner/good", kind="dataset"), DataError)


@pytest.mark.parametrize("name", ["../up", "a/b/c", "/abs", "a b", ".hidden", ""])
def test_what_is_no_name_never_leaves_the_machine(name):
    assert not hub.is_name(name)


def test_neither_folder_nor_name():
    with pytest.raises(ModelNotFoundError, match="no such folder"):
        hub.checkpoint_folder("./not/here")


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (None, "no readable config"),
        ("{", "no readable config"),
        ("[]", "no readable config"),
        ('{"model_type": "qwen3"}', "'qwen3' model, not a Llama"),
        ("{}", "no model_type"),
    ],
)
def test_a_folder_that_is_no_llama(tmp_path, config, told):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(ModelError, match=told):
        hub.checkpoint_folder(str(tmp_path))


@pytest.mark.parametrize("token", ["hf_secret", None])
def test_processes_get_the_token_that_this_one_has(token, monkeypatch):
    """Colab tells a secret to the notebook's own process only."""
    monkeypatch.setattr("huggingface_hub.get_token", lambda: token)
    assert hub.token_of_children() == ({"HF_TOKEN": token} if token else {})
