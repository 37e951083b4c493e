"""The small files of a merged model: config, tokenizer, how it generates, and a model card with base and licence."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from llamanb import REPOSITORY, __version__, hub
from llamanb.data.encode import end_token_ids, load_tokenizer
from llamanb.export.source import Source
from llamanb.html import visible
from llamanb.run import Run

TOKENIZER = ("tokenizer*", "special_tokens_map.json", "chat_template.jinja")
LICENCES = {  # part of a Llama's name: the Hub's name of its licence, and Meta's
    "3.3": ("llama3.3", "Llama 3.3 Community License"),
    "3.2": ("llama3.2", "Llama 3.2 Community License"),
    "3.1": ("llama3.1", "Llama 3.1 Community License"),
    "3": ("llama3", "Meta Llama 3 Community License"),
}
_LLAMA = re.compile(r"llama-?(3(?:\.[123])?)-\d+b", re.IGNORECASE)


def write_small_files(folder: Path, source: Source, base: str, dtype: str) -> None:
    """Writes everything but the weights; the same bytes for the same source."""
    full = {"fp16": "float16", "bf16": "bfloat16"}[dtype]
    tokens = source.saved if (source.saved / "tokenizer.json").is_file() else source.checkpoint
    for pattern in TOKENIZER:
        for path in tokens.glob(pattern):
            shutil.copyfile(path, folder / path.name)
    tokenizer = load_tokenizer(tokens)
    config = {
        name: value for name, value in source.config.items() if name not in ("quantization_config", "torch_dtype")
    }
    _write(folder / "config.json", config | {"dtype": full, "pad_token_id": tokenizer.pad_token_id, "use_cache": True})
    ends = {"eos_token_id": end_token_ids(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    _write(folder / "generation_config.json", _json(source.checkpoint / "generation_config.json") | ends)
    (folder / "README.md").write_text(model_card(source, base, dtype), encoding="utf-8")


def licence(name: str) -> tuple[str, str] | None:
    """The Hub's name of a base's licence, and Meta's; None where the base is not known to be Meta's."""
    found = _LLAMA.search(name.split("/")[-1])
    return LICENCES[found[1]] if found else None


def model_card(source: Source, base: str, dtype: str) -> str:
    """README.md: which base, under which licence, merged how, trained on what, and how it scored."""
    on_the_hub = hub.is_name(source.name) and source.name != "tiny"
    known = licence(source.name)
    header = ["---", *([f"base_model: {source.name}", "base_model_relation: merge"] if on_the_hub else [])]
    header += [f"license: {known[0]}"] if known else []
    header += ["license: apache-2.0"] if source.name == "tiny" else []
    header += ["library_name: transformers", "tags: [llamanb, llama]", "---"]
    title = source.name.split("/")[-1]
    quantized = source.shape.quantization or (source.plan and source.plan.recipe.quantization)
    into = {
        "trained": "the weights that it was trained on" + (": quantized, and dequantized again" if quantized else ""),
        "original": "the base's own weights" + ("; it was trained on quantized ones" if quantized else ""),
    }[base]
    terms = "The base's licence holds for these weights too; see its page."
    if known:
        terms = f"Built with Llama. Under the {known[1]}, as its base is (https://llama.com/license)."
    elif source.name == "tiny":
        terms = "Apache-2.0, as the tiny Llama that comes with llamanb is."
    lines = [
        *header,
        f"# {_code(title)}, fine-tuned",
        "",
        f"An adapter for {_code(source.name)} (revision {_code(source.revision)}), merged in {dtype} into {into}.",
        f"Made with [llamanb]({REPOSITORY}) {__version__}.",
        "",
        "## Licence",
        "",
        terms,
    ]
    if source.plan:
        lines += ["", "## Scores on held-out rows, of base and adapter", "", "```", _scores(source), "```"]
        lines += ["", "## How it was trained", "", f"```json\n{source.plan.recipe.to_json()}\n```"]
    return "\n".join([*lines, ""])


def _scores(source: Source) -> str:
    scores = Run.open(source.home).scores
    return visible(str(scores.tables()[0]) if scores else "not scored").replace("`", "'")


def _code(text: str) -> str:
    return "`{}`".format(" ".join(visible(text).replace("`", "'").split()))


def _json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _write(path: Path, fields: dict) -> None:
    path.write_text(json.dumps(fields, indent=2, sort_keys=True), encoding="utf-8")
