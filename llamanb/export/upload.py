"""The way to the Hub: the one place that sends, and what a refusal there means. Counterpart of `hub.py`, which fetches.

The token goes from where the user keeps it to the Hub's own client, and is in no variable here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from llamanb import __version__, hub
from llamanb.errors import LlamanbError, MissingTokenError, NoNetworkError, WrongTokenError

HOME = "https://huggingface.co"
AGAIN = "run this again: files that are there whole are not sent twice"
_TOKENS = f"{HOME}/settings/tokens"
_WRITE = f"make a token of the kind 'write' at {_TOKENS}, and give it as the Colab secret HF_TOKEN, the environment "
_WRITE += "variable HF_TOKEN, or with `hf auth login`"


class PushError(LlamanbError):
    """Something that cannot be pushed, or that the Hub did not take."""


def endpoint() -> str:
    """Of the Hub; HF_ENDPOINT names another."""
    return (os.environ.get("HF_ENDPOINT") or HOME).rstrip("/")


def address(repo: str) -> str:
    """Of a repository's page, for people: a password in HF_ENDPOINT is left out."""
    return re.sub(r"//[^/@]*@", "//", f"{endpoint()}/{repo}")


def holds_token(text: object) -> bool:
    return re.search(r"(^|[^A-Za-z0-9])hf_[A-Za-z0-9]{20}", str(text)) is not None


def require_name(repo: str) -> None:
    """Raises PushError where the Hub would not take the name of a repository. A token in its place is not repeated."""
    if holds_token(repo):
        raise PushError("that is no name, but holds a token", "a repository is named OWNER/NAME", "set HF_TOKEN to it")
    owner, slash, name = repo.partition("/") if isinstance(repo, str) else ("", "", "")
    parts = all(re.fullmatch(r"[A-Za-z0-9_](?:[\w.-]{0,94}[A-Za-z0-9_])?", part, re.ASCII) for part in (owner, name))
    if not (slash and parts and len(repo) <= 96) or "--" in repo or ".." in repo or name.endswith(".git"):
        raise PushError(
            f"a repository cannot be named {repo!r}",
            "its name is OWNER/NAME: letters, digits, dashes, dots and underscores, a letter or digit at both ends",
            "your name on the Hub, or that of an organization, then the model's: 'me/Llama-3.2-1B-notes'",
        )


def upload(repo: str, files: Mapping[str, Path | bytes], *, private: bool) -> tuple[str, list[str]]:
    """Sends files in one commit: the repository gets all of them or, where something fails, none.

    Large files go first, each to the Hub's storage; one that is there already, from a try that broke off, is not sent
    again. The repository is made where there is none.

    Args:
        files: by name in the repository: where they lie, or what is in them.

    Returns the commit's address, and what a person should know. Raises MissingTokenError, WrongTokenError, PushError
    or NoNetworkError.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    if get_token() is None:
        raise MissingTokenError(f"{repo} cannot be pushed: there is no Hugging Face token", "the Hub asks who", _WRITE)
    try:
        hub.require_network(repo)
    except NoNetworkError as error:
        raise _lost(repo, error.why, "the Hugging Face Hub is out of reach") from None
    owner = ""
    try:
        api = HfApi(endpoint=endpoint(), library_name="llamanb", library_version=__version__)
        owner = _who_may_write(api, repo)
        remarks = _make(api, repo, private, files.keys())
        operations = [CommitOperationAdd(name, file) for name, file in files.items()]
        commit = api.create_commit(repo, operations, commit_message=f"Pushed with llamanb {__version__}")
    except LlamanbError:
        raise
    except Exception as error:  # the client raises a wide family
        raise explain(error, repo, owner) from None
    return commit.commit_url, remarks


def _who_may_write(api, repo: str) -> str:
    """The name that the token stands for. Raises WrongTokenError for one that says of itself that it can only read."""
    account = api.whoami()
    token = (account.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise WrongTokenError(f"{repo} cannot be pushed with this token", "it is one that can only read", _WRITE)
    return str(account.get("name", ""))


def _make(api, repo: str, private: bool, names) -> list[str]:
    """Makes the repository where there is none. Raises PushError where it is public and was asked for as private."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        there = api.model_info(repo)
    except RepositoryNotFoundError:
        api.create_repo(repo, private=private, exist_ok=True)
        return []
    if private and not there.private:
        raise PushError(
            f"{repo} is there already, and everyone can see it",
            "private = True was asked for",
            "another name, or private = False",
        )
    remarks = [f"{repo} is private and stays so; its settings page makes it public"] if there.private > private else []
    others = sorted({file.rfilename for file in there.siblings or ()} - {*names, ".gitattributes"})
    if others:
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        remarks.append(f"{repo} held other files before, which stay: {', '.join(others[:5])}{more}")
    return remarks


def explain(error: Exception, repo: str, owner: str) -> LlamanbError:
    """The LlamanbError that says what a failure of the Hub's client means.

    Args:
        owner: whom the token stands for; empty where the Hub has not said.
    """
    from huggingface_hub import errors

    chain = hub.causes(error)
    refused = next((e for e in chain if isinstance(e, errors.HfHubHTTPError)), None)
    status = getattr(getattr(refused, "response", None), "status_code", None)
    said = (getattr(refused, "server_message", None) or str(error) or type(error).__name__).strip().splitlines()
    why = f"the Hub says: {said[0][:300]}" if refused is not None else f"{type(error).__name__}: {' '.join(said)[:300]}"
    what = f"{repo} was not pushed"
    if isinstance(error, ValueError) and "metadata in README.md" in str(error):
        return PushError(f"{what}: the Hub does not take the header of its card", str(error), "correct README.md")
    if status == 413 or re.search(r"too large|size limit|maximum.{0,20}size", " ".join(said), re.IGNORECASE):
        fix = "safetensors in smaller shards; a GGUF in a smaller kind, or split by llama.cpp's llama-gguf-split"
        return PushError(f"{what}: a file is too large for the Hub", why, fix)
    if status == 401 and not isinstance(refused, errors.RepositoryNotFoundError):
        return WrongTokenError(f"{what}: the Hub refused the Hugging Face token", "it is not valid any more", _WRITE)
    if status in (401, 402, 403, 404):
        first, name = repo.split("/")
        if owner and first != owner:
            fix = f"{owner}/{name}, or a token of the kind 'write' of someone who may write to {first}"
            return WrongTokenError(f"{what}: {owner} may not write to {first}'s repositories", why, fix)
        return WrongTokenError(f"{what}: this token may not write there", why, _WRITE)
    if status in (409, 412):
        return PushError(f"{what}: something else was written there meanwhile", why, AGAIN)
    if status == 429:
        return NoNetworkError(f"{what}: the Hub asks to wait", why, f"wait some minutes, then {AGAIN}")
    if status is not None and status >= 500:
        return NoNetworkError(f"{what}: the Hub cannot take it now", why, f"in some minutes, {AGAIN}")
    if any(isinstance(e, errors.OfflineModeIsEnabled) for e in chain):
        return NoNetworkError(f"{what}: HF_HUB_OFFLINE is set", "it forbids asking the Hub", "unset it, and restart")
    network = isinstance(chain[-1], ConnectionError | TimeoutError)
    if network or (refused is None and any(type(e).__module__.startswith("httpx") for e in chain)):
        return _lost(repo, f"{type(chain[-1]).__name__}: {chain[-1]}", "the connection was lost")
    return PushError(what, why, AGAIN)


def _lost(repo: str, why: str, how: str) -> NoNetworkError:
    return NoNetworkError(f"{repo} was not pushed: {how}", why, f"check the network, then {AGAIN}")
