"""Checkpoints for tests: the published shapes of Llama 3 with random weights. Memory and speed do not depend on what
the weights are, so these stand in for gated ones. `python -m tests.checkpoints 8b FOLDER` writes one."""

from __future__ import annotations

import sys
from pathlib import Path

SHAPES = {  # from the published config.json files
    "8b": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 14336},
    "3b": {"hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24, "intermediate_size": 8192},
    "1b": {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "intermediate_size": 8192},
    "mini": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128},
}
HEAD_SIZE = {"8b": 128, "3b": 128, "1b": 64, "mini": 16}
SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"]
SPECIAL += ["<|finetune_right_pad_id|>", "<|reserved_special_token_2|>", "<|start_header_id|>", "<|end_header_id|>"]
SPECIAL += ["<|eom_id|>", "<|eot_id|>", "<|python_tag|>"] + [f"<|reserved_special_token_{i}|>" for i in range(3, 248)]


def byte_tokenizer(vocabulary: int = 512, template: str | None = None):
    """One token a byte, then fillers, then Llama 3's 256 special tokens at the end, as in the real vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    fillers = [f"filler{i}" for i in range(vocabulary - 256 - len(letters))]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(letters + fillers)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _with_special(tokenizer, template)


def real_tokenizer(ranks: Path, template: str | None = None):
    """Llama 3's own vocabulary, from the file of tiktoken ranks that Meta publishes."""
    from transformers.convert_slow_tokenizer import TikTokenConverter

    pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    pattern += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    return _with_special(TikTokenConverter(str(ranks), pattern=pattern).converted(), template)


def _with_special(tokenizer, template: str | None):
    from transformers import PreTrainedTokenizerFast

    tokenizer.add_special_tokens(SPECIAL)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=SPECIAL[0], eos_token="<|eot_id|>")
    fast.chat_template = template
    return fast


def make_checkpoint(size: str, folder: Path, tokenizer=None, *, wide: bool = False, **changes) -> Path:
    """Writes a Llama of a published shape with random bf16 weights (fp32 for `mini`), on the GPU where there is one.

    `wide`: gate and up projections so spread that each column of their product has outliers, for int8 the worst case.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tokenizer or byte_tokenizer(512 if size == "mini" else 128256)
    tied = size != "8b"
    shape = {**SHAPES[size], "num_key_value_heads": 2 if size == "mini" else 8, "head_dim": HEAD_SIZE[size], **changes}
    config = LlamaConfig(
        **shape,
        vocab_size=len(tokenizer),
        tie_word_embeddings=tied,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    )
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if size == "mini" else torch.bfloat16)
    try:
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    if wide:
        for layer in model.model.layers:
            for projection in (layer.mlp.gate_proj, layer.mlp.up_proj):
                projection.weight.data *= 3
    model.save_pretrained(folder, max_shard_size="4GB")
    tokenizer.save_pretrained(folder)
    return Path(folder)


if __name__ == "__main__":
    print(make_checkpoint(sys.argv[1], Path(sys.argv[2]), wide="wide" in sys.argv[3:]))
