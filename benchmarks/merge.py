"""Host memory of a merge: a synthetic checkpoint of a published shape, merged under a limit, killed half way, resumed.

python -m benchmarks.merge [1b|3b|8b] [FOLDER]      (8b: 48 GB of disk, half an hour on two cores)

The limit is RLIMIT_DATA: all private memory that a process may ask for, mapped files left out. What is reported is
RssAnon of /proc/self/status, sampled 20 times a second: what of that was really held. Files are read and not mapped, so
little is left out: VmHWM, which counts the libraries' own files too, is given beside it.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

LIMIT_GB = 4.0
RANK = 16


def make(size: str, folder: Path) -> Path:
    """A run on a checkpoint of random bf16 weights, written piece by piece: neither is ever held."""
    import torch

    from llamanb import Recipe, plan
    from llamanb.architecture import architecture
    from llamanb.export.read import pieces
    from llamanb.export.shards import layout, write_safetensors
    from llamanb.export.stored import INDEX
    from llamanb.recipe import LINEAR_LAYERS
    from llamanb.training import write_base
    from tests.checkpoints import byte_tokenizer

    name = {"8b": "meta-llama/Llama-3.1-8B", "3b": "meta-llama/Llama-3.2-3B", "1b": "meta-llama/Llama-3.2-1B"}[size]
    shape = architecture(name)
    base, run = folder / "base", folder / "run"
    parts = {part: ("self_attn." if part in LINEAR_LAYERS[:4] else "mlp.") + part for part in LINEAR_LAYERS}
    weights = {"model.embed_tokens.weight": (shape.vocabulary, shape.hidden)}
    for i in range(shape.layers):
        weights |= {f"model.layers.{i}.{parts[part]}.weight": shape.linear(part)[::-1] for part in parts}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{i}.{norm}.weight"] = (shape.hidden,)
    weights |= {"model.norm.weight": (shape.hidden,)}
    weights |= {} if shape.tied else {"lm_head.weight": (shape.vocabulary, shape.hidden)}
    numbers = torch.Generator().manual_seed(0)

    def rows(name: str):
        dtype = torch.float32 if "lora" in name else torch.bfloat16
        whole = shapes[name]
        for first, last in pieces(whole):
            yield (0.02 * torch.randn(last - first, *whole[1:], generator=numbers)).to(dtype)

    base.mkdir(parents=True)
    groups, shapes = layout(weights, torch.bfloat16), weights
    for file, group in groups.items():
        write_safetensors(base / file, {n: weights[n] for n in group}, torch.bfloat16, rows)
    if len(groups) > 1:
        places = {n: file for file, group in groups.items() for n in group}
        (base / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    fields = {"model_type": "llama", "hidden_size": shape.hidden, "num_hidden_layers": shape.layers}
    fields |= {
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocabulary,
    }
    fields |= {"intermediate_size": shape.intermediate, "head_dim": shape.head_size, "tie_word_embeddings": shape.tied}
    fields |= {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "max_position_embeddings": 131072}
    (base / "config.json").write_text(json.dumps(fields))
    byte_tokenizer(shape.vocabulary).save_pretrained(base)
    recipe = Recipe(model=str(base), rank=RANK, max_length=512)
    adapter = run / "adapter"
    adapter.mkdir(parents=True)
    shapes = {}
    for name in (name for name in weights if name.removesuffix(".weight").endswith(LINEAR_LAYERS)):
        out, width = weights[name]
        key = "base_model.model." + name.removesuffix("weight")
        shapes |= {f"{key}lora_A.weight": (RANK, width), f"{key}lora_B.weight": (out, RANK)}
    write_safetensors(adapter / "adapter_model.safetensors", shapes, torch.float32, rows)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "bias": "none", "base_model_name_or_path": str(base)}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    recipe.save(run / "recipe.json")
    (run / "plan.json").write_text(plan(recipe, "T4", force=True).to_json())
    (run / "run.json").write_text(json.dumps({"status": "finished"}))
    from llamanb.timeline import Timeline

    Timeline("nothing").write(run)
    write_base(base, run)
    return run


def merge_here(run: Path, to: Path) -> None:
    """What the process under the limit does."""
    limit = int(LIMIT_GB * 1e9)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    peak, over = [0], threading.Event()

    def watch():
        while not over.wait(0.05):
            peak[0] = max(peak[0], _status("RssAnon"))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    from llamanb import merge

    loaded, begin_s = _status("RssAnon"), time.monotonic()
    merge(run, to)
    over.set()
    took_s = time.monotonic() - begin_s
    print(f"RssAnon {peak[0] / 1e9:.2f} GB at most, {loaded / 1e9:.2f} of it libraries; ", end="")
    print(f"VmHWM {_status('VmHWM') / 1e9:.2f} GB; {took_s:.0f} s", flush=True)


def _status(name: str) -> int:
    """Bytes."""
    return 1024 * int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def _merge(run: Path, to: Path, kill_at: int | None = None) -> int:
    """Merges in a process of its own; kills it once so many shards are done. Returns how many there are."""
    command = [sys.executable, "-m", "benchmarks.merge", "merge", str(run), str(to)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        shards = 0
        for line in process.stdout:
            if match := re.match(r"(\d+) of (\d+) shards$", line):
                shards = int(match[2])
                if kill_at and int(match[1]) == kill_at:
                    time.sleep(2)  # into the next one
                    os.kill(process.pid, signal.SIGKILL)
                    print(f"killed after {kill_at} of {shards} shards", flush=True)
                    break
            elif not re.match(r"\d+ of", line) or "already" in line:
                print(line, end="", flush=True)
    if not kill_at and process.returncode:
        sys.exit(f"the merge ended with {process.returncode}")
    return shards


def main(size: str, folder: Path) -> None:
    begin_s = time.monotonic()
    run = make(size, folder)
    print(
        f"{size}: checkpoint and adapter made in {time.monotonic() - begin_s:.0f} s; limit {LIMIT_GB:g} GB", flush=True
    )
    _merge(run, folder / "killed", kill_at=8 if size == "8b" else 1)
    _merge(run, folder / "killed")
    kept = {path.name: path.read_bytes() for path in (folder / "killed").iterdir() if path.suffix != ".safetensors"}
    shutil.rmtree(folder / "killed")
    _merge(run, folder / "whole")
    whole = {path.name: path.read_bytes() for path in (folder / "whole").iterdir() if path.suffix != ".safetensors"}
    print("identical, by the sha256 of each shard" if kept == whole else "NOT identical")  # merge.json has them


if __name__ == "__main__":
    if sys.argv[1:2] == ["merge"]:
        merge_here(*map(Path, sys.argv[2:]))
    else:
        place = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(tempfile.mkdtemp())
        try:
            main(sys.argv[1] if len(sys.argv) > 1 else "1b", place)
        finally:
            shutil.rmtree(place, ignore_errors=True)
