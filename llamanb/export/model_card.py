"""The model card: README.md beside weights, for whoever finds them on the Hub. Base, licence, data, recipe, what it
took and how it scored; and how it is loaded.

What a person or a file said (names, scores) stands in it as code, on one line, so it can be neither Markdown nor YAML.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from llamanb import REPOSITORY, __version__, hub
from llamanb.html import visible
from llamanb.run import FINISHED, RUNNING, Run
from llamanb.training import BASE

CARD, NOTICE = "README.md", "NOTICE"
HERE = "YOUR_NAME/THIS_MODEL"
"""Stands in a card for the repository, until `push` knows its name."""
MAKER = f"[llamanb]({REPOSITORY}) {__version__}"
USE = "## How to use it"
_TOKENIZER = f'tokenizer = AutoTokenizer.from_pretrained("{HERE}")'
_META = re.compile(r"llama[-_. ]?v?(3(?:[._][123])?)(?![\d.]*b(?![a-z])|[\d.])", re.IGNORECASE)
_FILE = re.compile(r"\.(json|jsonl|ndjson|csv|parquet)$", re.IGNORECASE)


class Licence(NamedTuple):
    """Of a base, and so of what is made from it."""

    tag: str
    """The Hub's name of it."""
    name: str
    built_with: str = ""
    """What Meta's licences ask to be shown prominently; empty for others."""
    page: str = ""
    notice: str = ""
    """The line that Meta asks for in a NOTICE file, word by word."""


def licence(name: str) -> Licence | None:
    """The licence of a base: Meta's by its name, or, where it is a folder, by what its files say it comes from; else
    the one that its own card names. None where nothing says."""
    if name == "tiny":
        return Licence("apache-2.0", "apache-2.0")
    said, tag = _said(Path(os.path.expanduser(name)))
    found = next(filter(None, map(_META.search, (name.split("/")[-1], *said, name))), None)
    if found is None:
        return Licence(tag, tag) if tag else None
    version = found[1].replace("_", ".")
    family = "Meta Llama 3" if version == "3" else f"Llama {version}"
    name, page = f"{family} Community License", f"https://www.llama.com/llama{version.replace('.', '_')}/license/"
    notice = f"{family} is licensed under the {name}, Copyright © Meta Platforms, Inc. All Rights Reserved."
    return Licence(f"llama{version}", name, f"Built with {family if version == '3' else 'Llama'}", page, notice)


def noted(folder: Path) -> dict:
    """What training noted in a run's folder of the weights it began with: their `commit` on the Hub, and a
    `fingerprint`. Nothing for runs that did not."""
    try:
        return dict(json.loads((folder / BASE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


@dataclass(frozen=True)
class Origin:
    """The base of what a card is for."""

    name: str
    """On the Hub, a folder, or `tiny`."""
    revision: str
    on_the_hub: bool
    licence: Licence | None

    @classmethod
    def find(cls, name: str, revision: str, facts: dict) -> Origin:
        """`facts` is what `noted` gives."""
        fetched = facts["commit"] is not None if "commit" in facts else _is_on_the_hub(name)
        return cls(name, str(facts.get("commit") or revision), hub.is_name(name) and fetched, licence(name))

    @property
    def link(self) -> str:
        if self.on_the_hub:
            return f"[{self.name}](https://huggingface.co/{self.name}), revision {code(self.revision)}"
        return "the tiny Llama of llamanb" if self.name == "tiny" else f"{code(shown(self.name))}, a folder"

    @property
    def title(self) -> str:
        return code(shown(self.name).split("/")[-1])


def card_of(run: Run) -> str:
    """The card of what a run trained."""
    recipe = run.plan.recipe
    base, adapters = Origin.find(recipe.model, recipe.revision, noted(run.folder)), recipe.adapters
    kind = "LoRA adapter" if adapters else "fine-tuned model"
    made = f"A {kind} for {base.link}, trained on {code(shown(recipe.dataset))} with {MAKER}."
    if adapters:
        return model_card(base, f"{kind} for {base.title}", made, use_of_adapter(base, run), "peft", "adapter", run)
    return model_card(base, f"{base.title}, fine-tuned", made, use_of_model(), "transformers", "finetune", run)


def write(folder: Path, card: str, base: Origin) -> None:
    """Writes a card, and NOTICE where the licence of the base asks for one."""
    (folder / CARD).write_text(card, encoding="utf-8")
    if base.licence and base.licence.notice:
        (folder / NOTICE).write_text(f"{base.licence.notice}\n", encoding="utf-8")


def model_card(base: Origin, title: str, made: str, use: str, library: str, relation: str, run: Run | None) -> str:
    """The text of a card.

    Args:
        title, made: of what it is and how it was made, one line each, as Markdown.
        use: how it is loaded, as Markdown.
        library: the Hub's name of what loads it.
        relation: the Hub's word for what it is to its base: adapter, finetune.
        run: that trained it, where that is known.
    """
    known = base.licence
    fields = {"base_model": base.name, "base_model_relation": relation} if base.on_the_hub else {}
    fields |= {"license": known.tag} if known else {}
    fields |= {"library_name": library, "pipeline_tag": "text-generation", "tags": ["llamanb", "llama"]}
    dataset = run.plan.recipe.dataset.partition(":")[0] if run else "tiny"
    fields |= {"datasets": [dataset]} if _is_on_the_hub(dataset) else {}
    lines = [f"{name}: {json.dumps(value)}" for name, value in fields.items()]
    terms, badge = "See the base model's licence: it holds for these weights too.", []
    terms = f"Under {code(known.name)}, as its base is." if known else terms
    if known and known.built_with:
        terms = f"{known.built_with}. Under the [{known.name}]({known.page}), as its base is; {NOTICE} says so too."
        badge = [f"**{known.built_with}**", ""]
    lines = ["---", *lines, "---", f"# {title}", "", *badge, made, "", USE, "", use, "", "## Licence", "", terms]
    if run:
        scores = f"{run.scores.tables()[0]}\n\n{run.scores.verdict}" if run.scores else "not scored"
        lines += ["", "## Scores on held-out rows", "", "```", visible(scores).replace("`", "'"), "```"]
        lines += ["", "## How it was trained", "", *_training(run)]
    return "\n".join([*lines, ""])


def use_of_adapter(base: Origin, run: Run) -> str:
    """The adapter on the base as it was trained on it."""
    recipe, dtype = run.plan.recipe, {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}[run.plan.dtype]
    names = [base.name, base.revision] if base.on_the_hub else [shown(base.name)]
    where = ", revision=".join(json.dumps(code(name).strip("`"), ensure_ascii=False) for name in names)
    where = "tiny.CHECKPOINT" if base.name == "tiny" else where
    bits = f'load_in_4bit=True, bnb_4bit_quant_type="{recipe.quantization}", bnb_4bit_compute_dtype="{dtype}"'
    bits += f", bnb_4bit_use_double_quant={recipe.double_quant}"
    bits = "load_in_8bit=True" if recipe.quantization == "int8" else bits
    config = f"BitsAndBytesConfig({bits})" if recipe.quantization else None
    lines = ["from llamanb import tiny"] if base.name == "tiny" else []
    lines += ["from peft import PeftModel", "from transformers import AutoModelForCausalLM, AutoTokenizer"]
    lines[-1] += ", BitsAndBytesConfig\n" if config else "\n"
    options = f'{where}, dtype="{dtype}"' + (f",\n    quantization_config={config}" if config else "")
    lines.append(f"base = AutoModelForCausalLM.from_pretrained({options})")
    return "\n".join(["```python", *lines, f'model = PeftModel.from_pretrained(base, "{HERE}")', _TOKENIZER, "```"])


def use_of_model(dtype: str = "auto") -> str:
    load = f'model = AutoModelForCausalLM.from_pretrained("{HERE}", dtype="{dtype}")'
    return f"```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n{load}\n{_TOKENIZER}\n```"


def shown(name: str) -> str:
    """A model or dataset without where on this machine it lies, and an address without what it carries along."""
    if re.match(r"\w+://", name):
        return re.split(r"[?#]", name)[0]
    return name if _is_on_the_hub(name.partition(":")[0]) else Path(name).name or name


def code(text: str) -> str:
    """Text that Markdown takes as it is, on one line."""
    return "`{}`".format(" ".join(visible(text).replace("`", "'").split()) or "-")


def _is_on_the_hub(name: str) -> bool:
    return name != "tiny" and hub.is_name(name) and not _FILE.search(name) and not os.path.exists(name)


def _training(run: Run) -> list[str]:
    plan, recipe, timeline = run.plan, run.plan.recipe, run.timeline
    split = f", split {code(recipe.dataset_split)}" if _is_on_the_hub(recipe.dataset.partition(":")[0]) else ""
    counted = "".join(f", {count:,} rows {name}" for name, count in run.rows.items())
    lines = [f"- Data: {code(shown(recipe.dataset))}{split}{counted}", f"- On {code(plan.card.name)} in {plan.dtype}"]
    if timeline.steps:
        last, took = timeline.steps[-1], f" in {run.train_s:,.0f} s" if run.train_s else ""
        lines.append(f"- {last.step:,} steps over {last.tokens:,} tokens{took}")
    limit = f" of {timeline.limit_gib:.2f}" if timeline.limit_gib else ""
    lines.append(f"- Memory, measured: {run.peak_gib:.2f}{limit} GiB at most ({code(timeline.source)})")
    if timeline.peaks_gib:
        parts = ", ".join(f"{code(part)} {size:.2f}" for part, size in timeline.peaks_gib.items())
        lines.append(f"- Of that in tensors at the peak of each part, GiB: {parts}")
    if run.versions:
        lines.append("- With " + ", ".join(f"{code(name)} {code(version)}" for name, version in run.versions.items()))
    if run.status not in (FINISHED, RUNNING):
        lines.append(f"- It did not come to its end: {code(run.status)}")
    fields = dataclasses.asdict(recipe) | {"model": shown(recipe.model), "dataset": shown(recipe.dataset)}
    return [*lines, "", f"```json\n{json.dumps(fields, indent=1)}\n```"]


def _said(folder: Path) -> tuple[list[str], str]:
    """What a base's own files say it comes from, and the licence that its card names."""
    origin, card = "", ""
    with contextlib.suppress(OSError, ValueError, AttributeError, RecursionError):
        origin = str(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("_name_or_path"))
    with contextlib.suppress(OSError, ValueError):
        card = header((folder / CARD).read_text(encoding="utf-8"))
    tags = re.findall(r"^license: *[\"']?([\w.-]{1,40})[\"']?\s*$", card, re.MULTILINE)
    bases = re.findall(r"^base_model:\s*(?:- *)?(\S{1,200})\s*$", card, re.MULTILINE)
    return [*tags, *bases, origin], next((tag for tag in tags if tag not in ("other", "unknown", "llama2")), "")


def header(card: str) -> str:
    """The YAML that a card begins with; empty where it does not."""
    return card.split("\n---")[0] if card.startswith("---") else ""
