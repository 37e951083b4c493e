"""Whether what was made of an adapter still says what it said: each loaded again, and asked the same."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from llamanb.attempts import forget
from llamanb.errors import ModelError, RecipeError
from llamanb.export.shards import in_words
from llamanb.generate import asked, generate
from llamanb.html import Table
from llamanb.machine import GIB, host_memory
from llamanb.quiet import quiet_libraries

ROOM = 1.15
"""Memory that is asked for, as a multiple of the weights' size: keys, values and what a layer computes come on top."""


def load_merged(path: str | Path):
    """A merged model, or a GGUF of it, as transformers loads them, on the GPU where there is one.

    Args:
        path: a folder that `merge` made, or a file that `to_gguf` made; its config is taken from the folder beside it,
            since transformers reads no stretched positions from GGUF.

    Returns the model, in eval mode: fp16 on a GPU, fp32 on a CPU. Raises ModelError where it does not fit, or is none.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    path = Path(path).expanduser().absolute()
    is_file = path.suffix == ".gguf"
    if not (path.is_file() if is_file else (path / "config.json").is_file()):
        raise ModelError(f"{path} is no merged model", "it is neither a folder nor a .gguf file", "merge a run first")
    device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
    need = ROOM * _parameters(path) * dtype.itemsize
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else min(host_memory()[1:]) * GIB
    host = min(host_memory()[1:]) * GIB
    if need > free or need > host:  # transformers loads through the host's memory
        raise ModelError(
            f"{path.name} does not fit here",
            f"it takes {need / 1e9:.1f} GB; {free / 1e9:.1f} are free on the {device}, {host / 1e9:.1f} on the host",
            "a larger machine, or a program that runs GGUF: llama.cpp, Ollama",
        )
    with quiet_libraries():
        if is_file:
            beside = path.with_name(path.stem.rpartition("-")[0]) / "config.json"
            config = {"config": AutoConfig.from_pretrained(beside.parent)} if beside.is_file() else {}
            model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype, **config)
        else:
            model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    return model.to(device).eval()


def same_answers(
    model, tokenizer, questions: Sequence[str], paths: Sequence[str | Path], *, max_new_tokens: int = 64
) -> Table:
    """Asks the model, and then each of what was made of it, the same questions; the likeliest token each time.

    Args:
        model: base and adapter, as `load_adapter` returns.
        paths: folders that `merge` made, and files that `to_gguf` made. One is loaded at a time.

    Returns a row for each: its size, how many answers are the same, and how many ended by themselves. Where one cannot
    be loaded here, its row says why.
    """
    if not questions:
        raise RecipeError("nothing can be compared", "there is no question", "questions = ['...']")
    prompts = [asked(tokenizer, question) for question in questions]
    wanted = generate(model, tokenizer, prompts, max_new_tokens)
    rows = [["base and adapter", "", "", _ended(wanted)]]
    for path in map(Path, paths):
        files = [path] if path.is_file() else [*path.glob("*.safetensors")]
        size = in_words(sum(file.stat().st_size for file in files))
        try:
            answers = generate(load_merged(path), tokenizer, prompts, max_new_tokens)
        except ModelError as error:
            forget(error)
            rows.append([path.name, size, f"not loaded: {error.why}", ""])
            continue
        same = sum(one.text == other.text for one, other in zip(answers, wanted, strict=True))
        rows.append([path.name, size, f"{same} of {len(wanted)}", _ended(answers)])
    return Table(["loaded again", "size", "the same answers", "ended by themselves"], rows)


def _ended(answers) -> str:
    return f"{sum(one.ended for one in answers)} of {len(answers)}"


def _parameters(path: Path) -> int:
    """Weights, from the size of 16 bits each; those of q8_0 count double."""
    if path.is_file():
        return path.stat().st_size // (1 if path.stem.endswith("q8_0") else 2)
    return sum(file.stat().st_size for file in path.glob("*.safetensors")) // 2
