"""No secret is in the repository, and what its workflows run is pinned to a commit."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECRETS = {
    "Hugging Face": r"\bhf_[A-Za-z0-9]{30,}",
    "GitHub": r"\b(ghp|gho|ghu|ghs|ghr)_[A-Za-z0-9]{30,}|\bgithub_pat_\w{30,}",
    "PyPI": r"\bpypi-[\w-]{50,}",
    "AWS": r"\b(AKIA|ASIA)[0-9A-Z]{16}\b",
    "Google": r"\bAIza[\w-]{35}|\bya29\.[\w-]{30,}",
    "OpenAI, Anthropic": r"\bsk-[\w-]{32,}",
    "Slack": r"\bxox[abprs]-[\w-]{10,}",
    "Weights and Biases": r"(?i)wandb\w{0,12}[\"'\s:=]{1,4}[0-9a-f]{40}\b",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a password in an address": r"://[^/\s:@\"'{}<>]+:[^/\s:@\"'{}<>]{3,}@",
}
ALLOWED = {"tests/unit/test_canary.py": "://me:" + "secret@"}
"""Made up."""
MADE_UP = {
    "Hugging Face": "hf_" + "a1" * 17,
    "GitHub": "ghp_" + "a1" * 18,
    "PyPI": "pypi-" + "Ag" * 40,
    "AWS": "AKIA" + "A1" * 8,
    "Google": "AIza" + "a-1_b" * 7,
    "OpenAI, Anthropic": "sk-" + "ant-a1" * 8,
    "Slack": "xoxb-" + "1" * 12,
    "Weights and Biases": "WANDB_API_KEY=" + "0f" * 20,
    "a private key": "-----BEGIN RSA " + "PRIVATE KEY-----",
    "a password in an address": "https://me:" + "letmein" + "@example.org",
}


def found(text: str, allowed: str = "\0") -> list[str]:
    text = text.replace(allowed, "")
    return [kind for kind, pattern in SECRETS.items() if re.search(pattern, text)]


@pytest.mark.parametrize(("kind", "secret"), MADE_UP.items())
def test_each_kind_is_found(kind, secret):
    assert kind in found(f"x = {secret!r}  # and more")


def tracked() -> list[Path]:
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("this is no clone")
    return [ROOT / name for name in done.stdout.split("\0") if name]


def test_no_tracked_file_holds_one():
    files = [path for path in tracked() if path.is_file()]
    assert len(files) > 100
    told = {}
    for path in files:
        name = path.relative_to(ROOT).as_posix()
        if kinds := found(path.read_bytes().decode("utf-8", "replace"), ALLOWED.get(name, "\0")):
            told[name] = kinds
    assert told == {}


WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_what_a_workflow_runs_is_pinned_and_may_only_read(path):
    text = path.read_text()
    used = re.findall(r"uses:\s*(\S+)(.*)", text)
    assert used
    for action, comment in used:
        assert re.fullmatch(r"[\w-]+/[\w./-]+@[0-9a-f]{40}", action), action
        assert re.fullmatch(r" # v\d+\.\d+\.\d+", comment), f"{action}: which version that is"
    assert re.search(r"^permissions:\n  contents: read\n\n", text, re.MULTILINE)
    for line in re.findall(r"run: .*", text):
        assert "${{" not in line, "what comes from outside goes through the environment"
