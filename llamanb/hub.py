"""The Hugging Face Hub: where checkpoints come from, and what its refusals mean.

All that is fetched passes here, so each cause has one error that says what to do (`export/upload.py` is where things
are sent). Neither torch nor transformers is loaded; weights are safetensors only, and no code from a checkpoint is ever
run.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import http.client
import json
import os
import re
import shutil
import socket
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from llamanb import tiny
from llamanb.errors import (
    UNREADABLE,
    DataError,
    DiskFullError,
    GatedModelError,
    LlamanbError,
    MissingTokenError,
    ModelError,
    ModelNotFoundError,
    NoNetworkError,
    WrongTokenError,
)

SMALL_FILES = ("*.json", "*.jinja", "tokenizer*")
WEIGHTS = "*.safetensors"
FOREIGN = ("auto_map", "configuration_files", "transformers_weights")
"""Fields of a config.json that would have code run, or other files read."""
MIRRORS = {  # gated name: the same weights, free to download under the same licence
    "meta-llama/Llama-3.2-1B": "unsloth/Llama-3.2-1B",
    "meta-llama/Llama-3.2-1B-Instruct": "unsloth/Llama-3.2-1B-Instruct",
    "meta-llama/Llama-3.2-3B": "unsloth/Llama-3.2-3B",
    "meta-llama/Llama-3.2-3B-Instruct": "unsloth/Llama-3.2-3B-Instruct",
    "meta-llama/Llama-3.1-8B": "unsloth/Meta-Llama-3.1-8B",
    "meta-llama/Llama-3.1-8B-Instruct": "unsloth/Meta-Llama-3.1-8B-Instruct",
    "meta-llama/Llama-3.3-70B-Instruct": "unsloth/Llama-3.3-70B-Instruct",
}
_TIMEOUT_S = 3
_TOKEN_HELP = (
    "make a read token at https://huggingface.co/settings/tokens and give it as the Colab secret HF_TOKEN, "
    "the environment variable HF_TOKEN, or with `hf auth login`"
)


def is_name(text: str) -> bool:
    """Whether the text can be the name of something on the Hub: `name` or `owner/name`."""
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text) is not None and ".." not in text and not text.startswith(".")


def token_of_children() -> dict[str, str]:
    """The token for processes that this one starts: a secret of Colab's is told to a notebook's own process only."""
    from huggingface_hub import get_token

    return {"HF_TOKEN": token} if (token := get_token()) else {}


def require_network(what: str) -> None:
    """Raises NoNetworkError within seconds where the Hub cannot be reached; a library's own retries take half a
    minute. Honours HF_ENDPOINT, proxies and HF_HUB_OFFLINE (which means: use what was downloaded before)."""
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON"):
        return
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=_TIMEOUT_S).close()
    except urllib.error.HTTPError:
        return  # it answered
    except (OSError, http.client.HTTPException) as error:
        raise _no_network(what, getattr(error, "reason", error)) from None


def checkpoint_folder(model: str, revision: str = "main", *, weights: bool = True) -> Path:
    """The folder of a checkpoint, downloaded to the Hub's cache where it is not on disk; checked to be a Llama.

    Args:
        model: a Hub name, a folder, or `tiny`.
        revision: branch, tag or commit on the Hub.
        weights: with False only config and tokenizer are fetched (kilobytes).

    Raises ModelNotFoundError, GatedModelError, MissingTokenError, WrongTokenError, NoNetworkError or DiskFullError for
    what the Hub or the disk refuses, and ModelError for a checkpoint that is no Llama.
    """
    if model == "tiny":
        return tiny.CHECKPOINT
    folder = Path(model).expanduser()
    if not folder.is_dir():
        if not is_name(model):
            raise ModelNotFoundError(
                f"model {model!r} does not exist",
                "there is no such folder, and a Hub name is `owner/name`",
                "check the path, or the name on https://huggingface.co/models",
            )
        folder = _download(model, revision, weights)
    read_config(folder, model)
    return folder


def read_config(folder: Path, model: str) -> dict:
    """The checkpoint's config.json. Raises ModelError where it has none, is not a Llama, or where loading it would run
    code or read what is not a safetensors file of that folder."""
    index = folder / "model.safetensors.index.json"
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        require_llama(config, model)
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values() if index.exists() else ()
        foreign = [name for name in FOREIGN if config.get(name)]
        foreign += [name for name in shards if not re.fullmatch(r"[\w.-]+\.safetensors", str(name))]
        if foreign or (folder / "adapter_config.json").exists():
            why = f"it names {foreign[0]!r}" if foreign else "an adapter_config.json lies beside its config.json"
            fix = "choose a checkpoint of plain weights: config.json, tokenizer.json and *.safetensors"
            raise ModelError(f"{model} would have other code or weights read than its own", why, fix)
    except UNREADABLE as error:
        raise ModelError(
            f"{model} has no readable config.json",
            f"{folder}: {type(error).__name__}: {error}",
            "give the folder of a complete checkpoint, with config.json, tokenizer.json and *.safetensors",
        ) from None
    return config


def require_llama(config: Mapping, model: str) -> None:
    """Raises ModelError where a config.json is that of another architecture."""
    kind = config.get("model_type")
    if kind != "llama":
        raise ModelError(
            f"{model} is a {kind!r} model, not a Llama" if kind else f"{model}: config.json has no model_type",
            "llamanb plans and trains the Llama architecture (no mixture of experts, no vision, no Llama 4), and does "
            "not run code that a checkpoint brings",
            "choose a Llama 3 checkpoint, such as meta-llama/Llama-3.2-1B-Instruct",
        )


def fingerprint(folder: Path) -> str:
    """The same for the same files of weights, wherever they lie: 256 looks into each. Another revision, or another
    fine-tune of the same shape, has another one. Raises OSError."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob(WEIGHTS)):
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            for at in range(0, size, max(1024, size // 256)):
                file.seek(at)
                digest.update(file.read(1024))
    return digest.hexdigest()


def _download(model: str, revision: str, weights: bool) -> Path:
    from huggingface_hub import errors, snapshot_download

    wanted = [*SMALL_FILES, WEIGHTS] if weights else list(SMALL_FILES)
    needed = ("config.json", "tokenizer*", *([WEIGHTS] if weights else []))

    def fetch(**options) -> Path:
        return Path(snapshot_download(model, revision=revision, allow_patterns=wanted, **options))

    def lacks(folder: Path) -> list[str]:
        return [name for name in needed if not any(folder.glob(name))]

    try:
        folder = None
        with contextlib.suppress(OSError, errors.HfHubHTTPError):
            folder = fetch(local_files_only=True)
        is_here = folder is not None and not lacks(folder)
        if weights and not is_here:
            _check_room(model, revision)
        if weights or not is_here:
            folder = fetch()
    except LlamanbError:
        raise
    except Exception as error:  # the Hub's client raises a wide family; `explain` passes on what it does not know
        raise explain(error, model) from None
    if missing := lacks(folder):  # without a network the client hands out what it has of a checkpoint
        require_network(f"model {model}")
        raise ModelError(
            f"{model} is not a complete checkpoint",
            f"it has no {' or no '.join(missing)}",
            "choose a checkpoint with config.json, tokenizer.json and *.safetensors (other formats of weights can run "
            "code when they are read, so they are not)",
        )
    return folder


def _check_room(model: str, revision: str) -> None:
    """Compares the download with the disk before the first byte."""
    from huggingface_hub import HfApi, constants

    files = HfApi().model_info(model, revision=revision, files_metadata=True).siblings
    sizes = [f.size or 0 for f in files if f.rfilename.endswith(".safetensors") and "/" not in f.rfilename]
    home = Path(constants.HF_HUB_CACHE)
    home.mkdir(parents=True, exist_ok=True)
    need, free = sum(sizes), shutil.disk_usage(home).free
    if need > free:
        raise DiskFullError(
            f"{model} does not fit on the disk: {need / 1e9:.1f} GB to download, {free / 1e9:.1f} GB free",
            f"downloads go to {home}",
            "free some room, set HF_HOME to a larger disk, or take a 4-bit checkpoint (8B is 5.5 GB)",
        )


def causes(error: BaseException) -> list[BaseException]:
    """The error, what it came of, and so on."""
    chain = [error]
    while (inner := chain[-1].__cause__ or chain[-1].__context__) and inner not in chain:
        chain.append(inner)
    return chain


def explain(error: Exception, name: str, kind: str = "model") -> LlamanbError:
    """The LlamanbError that says what a failure of the Hub's client means for this model or dataset."""
    from huggingface_hub import errors, get_token

    chain = causes(error)

    def first(*types: type) -> Exception | None:
        return next((e for e in chain if isinstance(e, types)), None)

    page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{name}"
    status = getattr(getattr(first(errors.HfHubHTTPError), "response", None), "status_code", None)
    mirror = f", or use the ungated mirror {MIRRORS[name]!r}" if name in MIRRORS else ""
    if first(errors.GatedRepoError) or (status == 403 and any("gated repositor" in str(e) for e in chain)):
        if get_token() is None:
            return MissingTokenError(
                f"{kind} {name} is gated, and there is no Hugging Face token",
                f"its owner asks every user to accept a licence at {page}",
                f"accept it there and {_TOKEN_HELP}{mirror}",
            )
        return GatedModelError(
            f"{kind} {name} is gated, and this account may not download it",
            "the token is valid, but the licence is not accepted yet, or the token may not read gated repositories",
            f"accept it at {page}, with a token of type 'read', or one that may read public gated repositories{mirror}",
        )
    if first(errors.RevisionNotFoundError):
        missing = f"{kind} {name} has no such revision"
        return ModelNotFoundError(missing, "the Hub answered 404", f"see {page}/tree/main")
    unknown = first(errors.RepositoryNotFoundError)  # the Hub says 401 for it to whoever brings no token
    if status == 401 and (get_token() is not None or not unknown):
        refused = f"the Hub refused the Hugging Face token, asked for {name}"
        return WrongTokenError(refused, "not valid any more", _TOKEN_HELP)
    if unknown:
        return ModelNotFoundError(
            f"{kind} {name!r} is not on the Hub",
            "the name is misspelled, or it is private and the token may not see it",
            f"check the name at https://huggingface.co/{kind}s?search={name.split('/')[-1]}",
        )
    full = first(OSError)
    if full is not None and getattr(full, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return DiskFullError(f"the disk is full, while fetching {name}", str(full), "free some room, or set HF_HOME")
    if status is not None:
        return NoNetworkError(f"the Hub cannot give {name} now", f"it answered {status}", "try again in some minutes")
    unreachable = (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, ConnectionError, TimeoutError)
    # the client's own network errors descend from none of these: they are known by where they come from
    if first(*unreachable, socket.gaierror) or any(type(e).__module__.startswith("httpx") for e in chain):
        return _no_network(f"{kind} {name}", chain[-1])
    reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if kind == "dataset":
        return DataError(f"dataset {name} cannot be read", reason, f"see {page}; `owner/name:config` names a part")
    return ModelError(f"model {name} cannot be fetched", reason, f"see {page}")


def _no_network(what: str, reason: object) -> NoNetworkError:
    return NoNetworkError(
        f"{what} cannot be fetched: the Hugging Face Hub is out of reach",
        str(reason),
        "check the network; model = 'tiny' and dataset = 'tiny' need none; HF_HUB_OFFLINE=1 uses earlier downloads",
    )
