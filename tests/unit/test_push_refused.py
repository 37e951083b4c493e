"""What the Hub and the network can do to a push, and that it is gone on with when it is run again."""

import json
import socket

import pytest
from huggingface_hub import constants

from llamanb import push
from llamanb.errors import MissingTokenError, NoNetworkError, WrongTokenError
from llamanb.export.model_card import CARD
from llamanb.export.push import PushError
from tests.hub_server import Fault, Repo
from tests.unit.test_push import REPO, TOKEN, hub, made, refused, run, waits  # noqa: F401

# ruff: noqa: F811


@pytest.fixture
def merged(made):
    return made[0] / "run" / "merged"


def test_no_token(merged, hub, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert "settings/tokens" in refused(MissingTokenError, merged)
    assert hub.requests == []


def test_a_token_that_is_not_valid(merged, hub):
    hub.tokens.clear()
    assert "not valid" in refused(WrongTokenError, merged)


def test_a_token_that_only_reads(merged, hub):
    hub.account(TOKEN, role="read")
    assert "only read" in refused(WrongTokenError, merged)
    assert not hub.asked("POST")


@pytest.mark.parametrize("there", [None, Repo(private=False), Repo(private=True)], ids=["none", "public", "private"])
def test_a_name_that_is_someone_else_s(merged, hub, there):
    if there:
        hub.repos["them/Llama-3.1-notes"] = there
    said = refused(WrongTokenError, merged, "them/Llama-3.1-notes", private=False)
    assert "me may not write to them's" in said
    assert "fix: me/Llama-3.1-notes" in said
    assert not there or not there.files


def test_an_organization_s_name(merged, hub):
    assert push(merged, "our-team/Llama-3.1-notes", dry_run=False).commit


@pytest.mark.parametrize("path", ["repos/create", "preupload", "objects/batch", "/commit/"])
@pytest.mark.parametrize("status", [401, 403])
def test_no_right_to_write(merged, hub, path, status):
    hub.faults = [Fault("POST", path, status=status, error="Forbidden: no write access")]
    assert "settings/tokens" in refused(WrongTokenError, merged)
    assert not hub.repos.get(REPO) or not hub.repos[REPO].files


def test_a_public_repository_does_not_become_private_by_a_push(merged, hub):
    push(merged, REPO, private=False, dry_run=False)
    commits = list(hub.repos[REPO].commits)
    assert "everyone can see it" in refused(PushError, merged)
    assert hub.repos[REPO].commits == commits


def test_what_is_there_already_is_said(made, merged, hub):
    push(merged, REPO, dry_run=False)
    remarks = push(made[0] / "run" / "merged-f16.gguf", REPO, private=False, dry_run=False).remarks
    assert any("stays so" in remark for remark in remarks)
    assert any("other files" in remark and "config.json" in remark for remark in remarks)
    assert {"config.json", "merged-f16.gguf"} <= hub.repos[REPO].files.keys()


def test_a_repository_that_was_made_meanwhile(merged, hub):
    hub.repos[REPO] = Repo(private=True)
    hub.faults = [Fault("GET", f"/api/models/{REPO}$", status=404, headers={"X-Error-Code": "RepoNotFound"})]
    assert push(merged, REPO, dry_run=False).commit
    assert hub.asked("POST /api/repos/create"), "409, and that is fine"


def test_a_file_that_is_too_large(merged, hub):
    hub.largest = 50_000
    assert "too large" in refused(PushError, merged)
    hub.largest, hub.faults = 0, [Fault("PUT", "/storage/", status=413)]
    assert "too large" in refused(PushError, merged)


def test_a_card_whose_header_is_no_yaml(run, hub):
    (run / "adapter" / CARD).write_text("---\nlicense: llama3.1\nx: [\n---\n# Mine, Built with Llama\n")
    assert "correct README.md" in refused(PushError, run)
    assert hub.stored == []


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "whoami"), ("POST", "create"), ("POST", "preupload"), ("POST", "batch"), ("PUT", "storage"),
     ("POST", "verify"), ("POST", "/commit/")],
)  # fmt: skip
@pytest.mark.parametrize(("status", "words"), [(429, "asks to wait"), (503, "cannot take it now")])
def test_a_hub_that_will_not_now(merged, hub, method, path, status, words):
    hub.faults = [Fault(method, path, times=99, status=status, error="busy")]
    said = refused(NoNetworkError, merged)
    assert words in said
    assert "run this again" in said
    hub.faults = []
    assert push(merged, REPO, dry_run=False).commit
    assert len(hub.repos[REPO].commits) == 1


@pytest.mark.parametrize("fault", [{"status": 500}, {"status": 429, "headers": {"Retry-After": "7"}}, {"drop": True}])
@pytest.mark.parametrize(("method", "path"), [("POST", "preupload"), ("POST", "batch"), ("PUT", "storage")])
def test_what_passes_by_itself(merged, hub, waits, fault, method, path):
    hub.faults = [Fault(method, path, times=2, **fault)]
    assert push(merged, REPO, dry_run=False).commit
    assert len(waits) >= 2
    assert ("Retry-After" not in fault.get("headers", {})) or 8.0 in waits


def test_a_slow_hub(merged, hub):
    hub.faults = [Fault("PUT", "storage", times=1, wait_s=1.0), Fault("POST", "/commit/", wait_s=1.0)]
    assert push(merged, REPO, dry_run=False).commit


def test_a_connection_lost_half_way(merged, hub):
    """One of the shards never arrives; run again, only that one is sent."""
    largest = max(merged.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    oid = json.loads((merged / "merge.json").read_text())["done"][largest.name]["sha256"]
    hub.faults = [Fault("PUT", oid, times=99, drop=True)]
    said = refused(NoNetworkError, merged)
    assert "connection was lost" in said
    assert "run this again" in said
    assert hub.repos[REPO].files == {}, "not half of a model"
    assert oid not in hub.stored
    before = list(hub.stored)
    assert len(before) == len(list(merged.glob("*.safetensors"))) - 1
    hub.faults = []
    push(merged, REPO, dry_run=False)
    assert hub.stored == [*before, oid]
    hub.requests.clear()
    again = push(merged, REPO, dry_run=False)
    assert not hub.asked("PUT")
    assert not hub.asked("/commit/main")
    assert again.commit.endswith(hub.repos[REPO].sha)


def test_an_answer_to_the_commit_that_is_lost(merged, hub):
    hub.faults = [Fault("POST", "/commit/", drop=True)]
    assert "connection was lost" in refused(NoNetworkError, merged)
    push(merged, REPO, dry_run=False)
    assert len(hub.repos[REPO].commits) == 1


def test_someone_else_commits_meanwhile(merged, hub):
    hub.faults = [Fault("POST", "/commit/", status=412, error="A commit has happened since")]
    assert "meanwhile" in refused(PushError, merged)


def test_offline(merged, hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "unset it" in refused(NoNetworkError, merged)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with socket.socket() as taken:  # bound, and not listening
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        assert "out of reach" in refused(NoNetworkError, merged)
    assert hub.requests == []


def test_what_the_client_says_otherwise_is_passed_on(merged, hub, monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("something of a storage backend\nand more")

    monkeypatch.setattr("huggingface_hub.HfApi.create_commit", fails)
    assert "RuntimeError: something of a storage backend" in refused(PushError, merged)
