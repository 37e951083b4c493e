"""`push`: an adapter, a merged model or a GGUF to the Hugging Face Hub, with a model card; or what that would send.

What goes up is a list of known names from one folder, and nothing else that lies there: no checkpoint, no record of
a run, no hidden file, and nothing that a link points to.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from llamanb.errors import UNREADABLE, LlamanbError, ModelError
from llamanb.export import stored
from llamanb.export.adapter import CONFIG
from llamanb.export.describe import TERMS, use_of_gguf
from llamanb.export.model_card import (
    CARD,
    HERE,
    MAKER,
    NOTICE,
    USE,
    Licence,
    Origin,
    card_of,
    code,
    header,
    licence,
    model_card,
    noted,
    use_of_model,
)
from llamanb.export.shards import in_words
from llamanb.export.upload import PushError, address, holds_token, require_name, upload
from llamanb.html import Table, join, paragraph, visible
from llamanb.model.save import training_card
from llamanb.run import FINISHED, INTERRUPTED, Run

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
WEIGHTS = re.compile(r"(adapter_model|model(-\d{5}-of-\d{5})?)\.safetensors")
BESIDE = {
    "start": "without the adapters to start from, these weights are not the model that they were made of",
    "adapter": "what a recovery learned lies there; merge() puts it into the weights",
}
"""Folders that may lie in a checkpoint's, and what is missing without them."""
_ADAPTER, _MODEL, _GGUF = "adapter", "merged or whole model", "GGUF"


@dataclass(frozen=True)
class Push:
    """What is sent to the Hub, or would be. Prints as a list of files and the card."""

    repo: str
    private: bool
    kind: str
    files: dict[str, Path | bytes]
    """By name in the repository: where they lie, or what is in them."""
    remarks: tuple[str, ...]
    """What a person should know before it goes up, or now that it has."""
    commit: str = ""
    """Address of the commit; empty where nothing was sent."""

    @property
    def card(self) -> str:
        return self.files[CARD].decode()

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(_size(file) for file in self.files.values())

    def _table(self) -> Table:
        seen = f"{'private' if self.private else 'public, for everyone to see'}; {in_words(self.size)}"
        where = address(self.repo)
        did = f"sent to {where}" if self.commit else f"would be sent to {where}; dry_run = False sends it"
        rows = [[name, in_words(_size(file)), _from(file)] for name, file in self.files.items()]
        return Table([f"{self.kind}: file", "size", "from"], rows, f"{did} ({seen})")

    def _notes(self) -> str:
        lines = [f"- {remark}" for remark in self.remarks]
        return "\n".join(["to know:", *lines] if lines else [])

    def __str__(self) -> str:
        parts = [str(self._table()), visible(self._notes()), visible(f"{CARD}:\n\n{self.card}"), visible(self.commit)]
        return "\n\n".join(part for part in parts if part)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        texts = (self._notes(), f"{CARD}:\n\n{self.card}", self.commit)
        return join(self._table()) + "".join(paragraph(text) for text in texts if text)


def push(what: Run | str | Path, repo: str, *, private: bool = True, dry_run: bool = True) -> Push:
    """Sends what was trained to the Hub, in one commit. As it is called, it only shows what it would send, and needs
    neither a network nor a token: what is on the Hub may be copied before it can be taken back.

    A push that broke off is run again; files that are there are not sent twice. HF_ENDPOINT names another Hub.

    Args:
        what: a Run or its folder, for the adapter or the model in it; the folder of an adapter, or one that `merge`
            made; a .gguf file, or a folder with one. A README.md that you wrote or changed there is the card.
        repo: `OWNER/NAME` on the Hub; made where there is none.
        private: whether only its owner sees it. A public repository is not made private.
        dry_run: False sends it.

    Returns what was sent, or would be.

    Raises:
        PushError: there is nothing to send, or not under that name, or the Hub did not take it.
        MissingShardError: weights are not complete.
        MissingTokenError, WrongTokenError: no token, or one that may not write there.
        NoNetworkError: the Hub is out of reach, the connection was lost, or the Hub asks to wait.
    """
    require_name(repo)
    found = _find(what)
    card = found.files[CARD].decode().replace(HERE, repo)
    if holds_token(card):
        raise PushError(f"{CARD} holds a Hugging Face token", "whoever reads it could use it", "take it out")
    known, files, remarks = _licence(found.base, card), {**found.files, CARD: card.encode()}, found.remarks
    if known is None:
        remarks.append(f"which licence the base is under is not known here: `license:` in {CARD} says so on the Hub")
    elif known.built_with:
        files.setdefault(NOTICE, f"{known.notice}\n".encode())
        remarks += _terms(known, repo, private, files)
    made = Push(repo, private, found.kind, files, tuple(remarks))
    if dry_run:
        return made
    print(f"sending {len(files)} files, {in_words(made.size)}, to {address(repo)}", flush=True)
    commit, more = upload(repo, files, private=private)
    return replace(made, commit=commit, remarks=(*remarks, *more))


class _Found(NamedTuple):
    """What there is to push."""

    kind: str
    files: dict[str, Path | bytes]
    """By name in the repository, in the order in which they are shown; the card as bytes."""
    remarks: list[str]
    base: str = ""
    """What it was trained from, where that is known."""


def _find(what: Run | str | Path) -> _Found:
    place = Path(what.folder if isinstance(what, Run) else what).expanduser().absolute()
    if not place.exists() or (place.is_file() and place.is_symlink()):
        why = "it is a link" if place.exists() else "there is no such file or folder"
        raise PushError(f"{place} cannot be pushed", why, "give a run, the folder of a model, or a .gguf file")
    if place.is_file():
        return _gguf(place)
    if (place / "run.json").is_file():
        run = Run.open(place)
        _require_trained(run)
        return _weights(run.saved, run)
    if (place / CONFIG).is_file() or (place / "config.json").is_file():
        return _weights(place, _run_of(place))
    ggufs = sorted(path for path in place.glob("*.gguf") if not path.is_symlink())
    if len(ggufs) == 1:
        return _gguf(ggufs[0])
    why = f"it holds {', '.join(path.name for path in ggufs[:4])}" if ggufs else "there is no model in it"
    fix = "give one of these files; both can go to the same repository, one after the other"
    raise PushError(
        f"what to push from {place} is not clear", why, fix if ggufs else "a run's folder, or one merge() made"
    )


def _weights(folder: Path, run: Run | None) -> _Found:
    is_adapter = (folder / CONFIG).is_file()
    needed = [CONFIG] if is_adapter else ["config.json"]
    shards = sorted({tensor.path.name for tensor in stored.tensors(folder).values()})
    odd = [name for name in shards if not WEIGHTS.fullmatch(name) or is_adapter != name.startswith("adapter_")]
    odd += [name for name in (*needed, *shards) if (folder / name).is_symlink()]
    if odd:
        why = f"{odd[0]} is a link" if (folder / odd[0]).is_symlink() else f"{odd[0]} is no name that its weights have"
        raise PushError(f"{folder} cannot be pushed", why, "give the folder of a run, or one that merge() made")
    names = [*needed, *([] if is_adapter else ["generation_config.json", stored.INDEX]), *TOKENIZER, NOTICE, *TERMS]
    card, remarks = _card(folder, run, is_adapter)
    files = {CARD: card.encode(), **_there(folder, names), **_there(folder, shards)}
    base = _base_of(folder) if is_adapter else run.plan.recipe.model if run else ""
    origin = Origin.find(base, "main", noted(folder.parent))
    if is_adapter and not origin.on_the_hub and base != "tiny":
        remarks.append(f"its base, {base}, is on this machine alone: others cannot load the adapter without it")
    remarks += [f"{folder / name} is not sent: {why}" for name, why in BESIDE.items() if (folder / name).is_dir()]
    if run is not None and run.status != FINISHED:
        remarks.append(f"its training did not come to its end: {run.status}")
    return _Found(_ADAPTER if is_adapter else _MODEL, files, remarks, base)


def _gguf(path: Path) -> _Found:
    with path.open("rb") as file:
        is_one = path.suffix == ".gguf" and file.read(4) == b"GGUF"
    if not is_one:
        raise PushError(f"{path} cannot be pushed", "it is no GGUF file", "give one that to_gguf() made, or a folder")
    if not re.fullmatch(r"\w[\w.-]*", path.name):
        raise PushError(f"{path.name!r} is no name for the Hub", "letters, digits, dots and dashes", "rename the file")
    own = path.with_suffix(".md")
    card = _read(own) if _is_file(own) else _unknown(path.stem, use_of_gguf(path.name), "gguf", path.parent)
    modelfile = f"{path.stem}.Modelfile"
    beside = _there(path.parent, [modelfile, *TERMS])
    lacks = "no Modelfile lies beside it: Ollama takes its own template; to_gguf() writes one"
    files = {CARD: card.encode(), path.name: path, **beside}
    return _Found(_GGUF, files, [] if modelfile in beside else [lacks])


def _require_trained(run: Run) -> None:
    """Raises PushError where a run has no weights that it ended with."""
    if not any(run.saved.glob("*.safetensors")):
        why = f"{run.saved} is missing or empty; the run is {run.status}"
        raise PushError(f"{run.folder} holds no trained weights", why, "train to the end first")
    if run.status not in (FINISHED, INTERRUPTED) and not run.status.startswith("stopped after"):
        raise PushError(
            f"{run.folder} has not finished",
            f"its status is: {run.status}; what lies in it may be of an earlier try",
            f"train() again, which goes on from the last checkpoint; or push {run.saved} as it is",
        )


def _licence(base: str, card: str) -> Licence | None:
    """The licence that the card's header names, or that of the base: Meta's, where one of the two is."""
    found = [one for one in (tagged(card), licence(base) if base else None) if one]
    return next((one for one in found if one.built_with), found[0] if found else None)


def tagged(card: str) -> Licence | None:
    """The licence that a card's header names."""
    found = re.search(r"^license: *[\"']?([\w.-]+)[\"']?\s*$", header(card), re.MULTILINE)
    return (licence(found[1]) or Licence(found[1], found[1])) if found else None


def _terms(known: Licence, repo: str, private: bool, files: dict) -> Iterator[str]:
    """What Meta's licence asks for and is not there yet. Raises PushError for a name that it does not allow, where all
    can see it; a private repository is made for nobody else, and can still be given another name."""
    if not files.keys() & set(TERMS):
        yield f"the {known.name} asks for a copy of itself: save {known.page} as LICENSE beside the weights"
    if known.built_with not in files[CARD].decode():
        yield f"the {known.name} asks that {CARD} show {known.built_with!r}"
    owner, name = repo.split("/")
    first_word = "Llama-3" if known.tag == "llama3" else "Llama"
    if not _letters(name).startswith(_letters(first_word)):
        fix = f"{owner}/{first_word}-{name}"
        asks = f"the {known.name} asks that of each model made from its own that others get to see ({known.page})"
        if not private:
            raise PushError(f"{repo} does not begin with {first_word}", asks, f"{fix}; or private = True")
        yield f"a name that begins with {first_word}, such as {fix}: {asks}"


def _letters(name: str) -> str:
    return re.sub(r"[-_.]", "", name).lower()


def _card(folder: Path, run: Run | None, is_adapter: bool) -> tuple[str, list[str]]:
    """The card and what to say of it: README.md as it lies there, unless training wrote it, before it knew all."""
    text = _read(folder / CARD) if _is_file(folder / CARD) else None
    if run and (text is None or text in _of_training(run)):
        return card_of(run), []
    if text is not None:
        says = f"its {CARD} is not as training left it, and goes up as it is; without it, one with licence, memory and "
        return text, [f"{says}versions is written"] if run and USE not in text else []
    if not is_adapter:
        return _unknown(folder.name, use_of_model(), "transformers", folder), []
    base = Origin.find(_base_of(folder), "main", noted(folder.parent))
    use = "```python\nfrom peft import AutoPeftModelForCausalLM\n\n"
    use += f'model = AutoPeftModelForCausalLM.from_pretrained("{HERE}")\n```'
    made = f"An adapter for {base.link}. Pushed with {MAKER}."
    return model_card(base, f"Adapter for {base.title}", made, use, "peft", "adapter", None), []


def _of_training(run: Run) -> list[str]:
    """The cards that training writes: with its scores, and before it has them."""
    scores = [str(run.scores.tables()[0])] if run.scores else []
    return [training_card(run.plan.recipe, run.plan, text) for text in ("", *scores)]


def _unknown(name: str, use: str, library: str, folder: Path) -> str:
    """A card for a model of which nothing is known but its name."""
    base = Origin(name, "main", False, Origin.find(str(folder / name), "main", {}).licence)
    made = f"{code(name)}, pushed with {MAKER}."
    return model_card(base, code(name), made, use, library, "finetune", None)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise PushError(f"{path} cannot be read", f"{type(error).__name__}: {error}", "write it as UTF-8") from None


def _run_of(folder: Path) -> Run | None:
    """The run that left this folder; None where none did, or it cannot be read."""
    try:
        run = Run.open(folder.parent)
    except LlamanbError:
        return None
    return run if run.saved == folder.resolve() else None


def _base_of(folder: Path) -> str:
    try:
        return str(json.loads((folder / CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"])
    except UNREADABLE as error:
        raise ModelError(
            f"{folder} holds no adapter that can be read", f"{CONFIG}: {type(error).__name__}", "train again"
        ) from None


def _there(folder: Path, names: Iterable[str]) -> dict[str, Path]:
    return {name: folder / name for name in names if _is_file(folder / name)}


def _is_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _size(file: Path | bytes) -> int:
    return len(file) if isinstance(file, bytes) else file.stat().st_size


def _from(file: Path | bytes) -> str:
    return "written for this push" if isinstance(file, bytes) else str(file)
