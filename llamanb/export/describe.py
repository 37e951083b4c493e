"""The small files of what is exported: config, tokenizer, how it generates, and a model card that goes on from that of
the run."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from llamanb.data.encode import end_token_ids, load_tokenizer
from llamanb.export.model_card import CARD, HERE, MAKER, USE, Origin, code, model_card, noted, use_of_model, write
from llamanb.export.source import Source
from llamanb.run import Run

TOKENIZER = ("tokenizer*", "special_tokens_map.json", "chat_template.jinja")

TERMS = ("LICENSE", "LICENSE.txt", "LICENSE.md", "USE_POLICY.md")
"""A licence's own text, where somebody has put it there."""


def write_small_files(folder: Path, source: Source, base: str, dtype: str) -> None:
    """Writes everything but the weights; the same bytes for the same source."""
    full = {"fp16": "float16", "bf16": "bfloat16"}[dtype]
    tokens = source.saved if (source.saved / "tokenizer.json").is_file() else source.checkpoint
    for place, patterns in ((tokens, TOKENIZER), (source.checkpoint, TERMS)):
        for pattern in patterns:
            for path in place.glob(pattern):
                shutil.copyfile(path, folder / path.name)
    tokenizer = load_tokenizer(tokens)
    config = {
        name: value for name, value in source.config.items() if name not in ("quantization_config", "torch_dtype")
    }
    _write(folder / "config.json", config | {"dtype": full, "pad_token_id": tokenizer.pad_token_id, "use_cache": True})
    ends = {"eos_token_id": end_token_ids(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    _write(folder / "generation_config.json", _json(source.checkpoint / "generation_config.json") | ends)
    origin = Origin.find(source.name, source.revision, noted(source.home))
    write(folder, merged_card(source, origin, base, dtype), origin)


def merged_card(source: Source, origin: Origin, base: str, dtype: str) -> str:
    """README.md of a merged model: which base, under which licence, merged how, trained on what, and how it scored."""
    quantized = source.shape.quantization or (source.plan and source.plan.recipe.quantization)
    into = {
        "trained": "the weights that it was trained on" + (": quantized, and dequantized again" if quantized else ""),
        "original": "the base's own weights" + ("; it was trained on quantized ones" if quantized else ""),
    }[base]
    made = f"An adapter for {origin.link}, merged in {dtype} into {into}. Made with {MAKER}."
    use = use_of_model({"fp16": "float16", "bf16": "bfloat16"}[dtype])
    run = Run.open(source.home) if source.plan else None
    return model_card(origin, f"{origin.title}, fine-tuned", made, use, "transformers", "finetune", run)


def gguf_card(folder: Path, file: str, kind: str) -> str:
    """README.md of a GGUF file: that of the folder it was made from, with another way to load it. Where that is not
    llamanb's, little more than the name and, if it is known, the licence."""
    use = use_of_gguf(file, f" in {kind}")
    try:
        card = (folder / CARD).read_text(encoding="utf-8")
    except (OSError, ValueError):
        card = ""
    if "llamanb" not in card or f"\n{USE}\n" not in card:
        base = Origin(str(folder), "main", False, Origin.find(str(folder), "main", {}).licence)
        made = f"Made from {code(folder.name)} with {MAKER}."
        return model_card(base, f"{code(folder.name)} as GGUF", made, use, "gguf", "finetune", None)
    card = re.sub(r"^library_name: .*$", "library_name: gguf", card, count=1, flags=re.MULTILINE)
    return re.sub(rf"^{USE}\n.*?(?=^## |\Z)", lambda _: f"{USE}\n\n{use}\n\n", card, count=1, flags=re.M | re.S)


def use_of_gguf(file: str, kind: str = "") -> str:
    """With Ollama, which reads the Modelfile beside it, and with llama.cpp."""
    name, stem = re.sub(r"[^\w.-]", "-", file), re.sub(r"[^\w.-]", "-", file.removesuffix(".gguf"))
    return (
        f"{code(file)} is this model as GGUF{kind}, for llama.cpp, Ollama and what is built on them.\n\n"
        f"```bash\nhf download {HERE} --local-dir model\n"
        f"ollama create {stem} -f model/{stem}.Modelfile && ollama run {stem}\n"
        f"llama-cli -m model/{name}  # llama.cpp\n```"
    )


def _json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _write(path: Path, fields: dict) -> None:
    path.write_text(json.dumps(fields, indent=2, sort_keys=True), encoding="utf-8")
