"""What a run of `benchmarks.speed` needs before its first row: the GPU's own rates, and checkpoints for the peers.

    python -m benchmarks.speed_prepare FOLDER 8b,1b     prints one JSON object

A checkpoint is the published shape with llamanb's random weights, already in nf4 with double quantization and 16-bit
embeddings, as the checkpoints that Unsloth's notebooks load are.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.speed_rows import MODELS


def machine() -> dict:
    """The GPU's name, driver and measured rates."""
    import torch

    from llamanb.card import Card
    from llamanb.rates import measure_rates

    if not torch.cuda.is_available():
        return {"gpu": "CPU", "driver": "", "torch": torch.__version__, "rates": None, "published_gbs": None}
    here = Card.here()
    # As in training: fp16, random numbers; for longer than a plan needs, so that the clock settles
    rates = measure_rates("fp16", "cuda", free_gib=8.0, seconds=2.0)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    known = next((Card.known(name) for name in ("H200", "H100") if name in here.name), here)
    return {
        "gpu": here.name,
        "driver": driver,
        "torch": torch.__version__,
        "rates": {name: value and round(value, 2) for name, value in dataclasses.asdict(rates).items()},
        "published_gbs": known.bandwidth_gbs,
    }


def make_checkpoint(model: str, folder: Path) -> Path:
    """Writes what is not there yet."""
    import torch
    from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    from tests.checkpoints import byte_tokenizer

    target = folder / model
    if (target / "done").exists():
        return target
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.float32
    fields = config_fields(model)
    tokenizer = byte_tokenizer(fields["vocab_size"])
    tokenizer.pad_token = "<|finetune_right_pad_id|>"
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = LlamaConfig(**fields, **special)
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            state = LlamaForCausalLM(config).state_dict()
    finally:
        torch.set_default_dtype(default)
    if fields["tie_word_embeddings"]:
        del state["lm_head.weight"]
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    made = LlamaForCausalLM.from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, quantization_config=quantization, device_map={"": device}
    )
    made.save_pretrained(target)
    tokenizer.save_pretrained(target)
    (target / "done").touch()
    return target


def config_fields(model: str) -> dict:
    """Of the published config.json; `tiny` is the size of the project's tiny Llama."""
    from llamanb.architecture import architecture

    shape = architecture(MODELS.get(model, "tiny"))
    return {
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_size,
        "intermediate_size": shape.intermediate,
        "vocab_size": shape.vocabulary,
        "tie_word_embeddings": shape.tied,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    }


def main() -> None:
    folder, models = Path(sys.argv[1]), [name for name in sys.argv[2].split(",") if name]
    found = machine()
    begin = time.perf_counter()
    for model in models:
        make_checkpoint(model, folder)
    print("RESULT " + json.dumps({**found, "checkpoints_s": round(time.perf_counter() - begin, 1)}), flush=True)


if __name__ == "__main__":
    main()
