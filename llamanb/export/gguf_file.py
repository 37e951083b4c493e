"""`to_gguf`: a merged model as one GGUF file, for llama.cpp, Ollama and what is built on them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llamanb import hub
from llamanb.architecture import Architecture, from_config
from llamanb.data.encode import load_tokenizer
from llamanb.errors import DiskFullError, ModelError, RecipeError
from llamanb.export import stored
from llamanb.export.describe import gguf_card
from llamanb.export.ollama import modelfile
from llamanb.export.read import pieces, read_rows
from llamanb.export.shards import free_bytes
from llamanb.export.stored import Stored
from llamanb.training.checkpoints import flush

KINDS = ("f16", "q8_0")
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
"""How Llama 3 splits a text before its merges."""
TINY_SPLIT = r" ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {LLAMA3_SPLIT: "llama-bpe", TINY_SPLIT: "bloom"}
"""llama.cpp's names. It has none for the tiny Llama's; `bloom` splits less, and no merge of the tiny vocabulary reaches
over what it leaves together, so the tokens are the same."""
_PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_ENDS = {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm", "lm_head.weight": "output"}


def to_gguf(folder: str | Path, to: str | Path | None = None, *, kind: str = "f16") -> Path:
    """Writes a merged model as GGUF, with tokenizer and chat template, and an Ollama Modelfile and a model card (.md)
    beside it.

    A tensor at a time is held, the largest by pieces. Smaller kinds (Q4_K_M and the like) are made from f16 by
    llama.cpp's own tool; the command is printed.

    Args:
        folder: what `merge` made, or any 16-bit Llama 3 checkpoint.
        to: the file to write; left out, `NAME-KIND.gguf` in the folder above, NAME being the folder's.
        kind: f16, or q8_0: 8 bits in blocks of 32, half the size and nearly the same answers.

    Returns the file.

    Raises:
        RecipeError: an argument cannot be what it is.
        ModelError, MissingShardError: no complete 16-bit Llama with a byte-level BPE tokenizer.
        DiskFullError: there is too little room.
    """
    if kind not in KINDS:
        why = "others are made from f16 by llama.cpp: llama-quantize MODEL-f16.gguf MODEL-Q4_K_M.gguf Q4_K_M"
        raise RecipeError(f"kind = {kind!r}", why, f"kind = {' or '.join(KINDS)}")
    import gguf

    folder = Path(folder).expanduser().absolute()
    config = hub.read_config(folder, str(folder))
    shape = from_config(config, str(folder))
    if shape.quantization:
        raise ModelError(f"{folder} is stored in {shape.quantization}", "GGUF is made from 16 bits", "merge it first")
    target = Path(to).expanduser().absolute() if to else folder.parent / f"{folder.name}-{kind}.gguf"
    if target.suffix != ".gguf" or target.is_dir():
        raise RecipeError(
            f"to = {str(to)!r}", "it is the file to write, and its name ends in .gguf", "to = 'NAME.gguf'"
        )
    tokenizer = load_tokenizer(folder)
    vocabulary = _vocabulary(folder, shape.vocabulary)
    made = list(_tensors(stored.tensors(folder), shape, config, kind))
    new = target.with_name(f"{target.name}.new")
    writer = gguf.GGUFWriter(new, "llama")
    _add_shape(writer, shape, config, folder.name, kind)
    _add_tokenizer(writer, vocabulary, tokenizer)
    for tensor in made:
        writer.add_tensor_info(tensor.name, tensor.byte_shape, tensor.numpy, tensor.nbytes, tensor.kind)
    size, free = sum(tensor.nbytes for tensor in made), free_bytes(target.parent)
    if free < size + 2**26:
        raise DiskFullError(
            f"{target} does not fit on its disk",
            f"it takes {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free",
            "free some room, or give a file on another disk: to=",
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in made:
            writer.write_tensor_data(tensor)
        writer.close()
        flush(new)
        new.replace(target)
    finally:
        new.unlink(missing_ok=True)
    text, remark = modelfile(target.name, tokenizer)
    target.with_suffix(".Modelfile").write_text(text, encoding="utf-8")
    target.with_suffix(".md").write_text(gguf_card(folder, target.name, kind), encoding="utf-8")
    if not vocabulary.split:
        print("llama.cpp knows no splitting of text like this tokenizer's, will split as Llama 3 does, and may give")
        print("other tokens for the same text")
    if remark:
        print(remark)
    print(f"{target}: {target.stat().st_size / 1e9:.3g} GB; ollama create NAME -f {target.with_suffix('.Modelfile')}")
    if kind == "f16":
        print(f"smaller, with llama.cpp: llama-quantize {target} {target.with_name(folder.name)}-Q4_K_M.gguf Q4_K_M")
    return target


@dataclass(frozen=True)
class _Tensor:
    """One tensor of the file, made when it is written. Stands in for the array that GGUFWriter asks for its size, and
    to write itself."""

    name: str
    kind: int
    """gguf.GGMLQuantizationType."""
    byte_shape: tuple[int, ...]
    """As it lies in the file: of bytes where it is quantized."""
    numpy: np.dtype
    make: Callable[[], Iterator[np.ndarray]]
    """Its rows, in order."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.byte_shape) * self.numpy.itemsize

    def tofile(self, file) -> None:
        for part in self.make():
            file.write(np.ascontiguousarray(part).data.cast("B"))


def _tensors(found: dict[str, Stored], shape: Architecture, config: dict, kind: str) -> Iterator[_Tensor]:
    names = {
        f"model.layers.{i}.{ours}.weight": f"blk.{i}.{theirs}"
        for i in range(shape.layers)
        for ours, theirs in _PARTS.items()
    }
    names |= {ours: theirs for ours, theirs in _ENDS.items() if theirs != "output" or not shape.tied}
    missing = sorted(names.keys() - found.keys())
    odd = sorted(found.keys() - names.keys() - {"lm_head.weight"})
    odd = [name for name in odd if not name.endswith("rotary_emb.inv_freq")]
    if missing or odd:
        why = f"{missing[0]} is missing" if missing else f"GGUF's llama has no place for {odd[0]}"
        raise ModelError("these weights cannot be written as GGUF", why, "give the folder that merge() made")
    if (factors := rope_factors(config, shape)) is not None:
        yield _plain("rope_freqs.weight", factors.shape, lambda: iter([factors]))
    for ours, theirs in names.items():
        heads = {"attn_q": shape.heads, "attn_k": shape.kv_heads}.get(theirs.split(".")[-1])
        yield _tensor(f"{theirs}.weight", found[ours], kind, heads)


def _tensor(name: str, tensor: Stored, kind: str, heads: int | None) -> _Tensor:
    import gguf

    def rows() -> Iterator[np.ndarray]:
        if heads:
            yield _permuted(read_rows(tensor).float().numpy(), heads)
        else:
            for first, last in pieces(tensor.shape):
                yield read_rows(tensor, first, last).float().numpy()

    if len(tensor.shape) == 1:
        return _plain(name, tensor.shape, rows)
    wanted = (
        gguf.GGMLQuantizationType.Q8_0
        if kind == "q8_0" and tensor.shape[1] % 32 == 0
        else gguf.GGMLQuantizationType.F16
    )

    def narrow() -> Iterator[np.ndarray]:
        for part in rows():
            made = gguf.quantize(part, wanted)
            if wanted == gguf.GGMLQuantizationType.F16 and not np.isfinite(made).all():
                raise ModelError(f"{name} does not fit into f16", "bf16 reaches further", "kind = 'q8_0'")
            yield made

    if wanted == gguf.GGMLQuantizationType.F16:
        return _Tensor(name, wanted, tensor.shape, np.dtype(np.float16), narrow)
    return _Tensor(name, wanted, gguf.quant_shape_to_byte_shape(tensor.shape, wanted), np.dtype(np.uint8), narrow)


def _plain(name: str, shape: tuple[int, ...], make: Callable[[], Iterator[np.ndarray]]) -> _Tensor:
    import gguf

    return _Tensor(name, gguf.GGMLQuantizationType.F32, tuple(shape), np.dtype(np.float32), make)


def _permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries or keys in llama.cpp's order. transformers rotates the first half of a head against its second;
    llama.cpp rotates neighbours."""
    split = weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
    return split.swapaxes(1, 2).reshape(weight.shape)


def rope_factors(config: dict, shape: Architecture) -> np.ndarray | None:
    """What the wave lengths of the positions are stretched by, (head size / 2) in fp32: Llama 3.1's way to longer
    texts. None where they are as they are. Raises ModelError for other ways."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    how = rope.get("rope_type", rope.get("type", "default"))
    if how == "default":
        return None
    if how != "llama3":
        raise ModelError(
            f"positions are scaled by {how!r}", "only Llama 3's way is written here", "llama.cpp's own converter"
        )
    lengths = 2 * math.pi * _theta(config) ** (np.arange(0, shape.head_size, 2, dtype=np.float64) / shape.head_size)
    turns = rope["original_max_position_embeddings"] / lengths
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    share = np.clip((turns - low) / (high - low), 0, 1)  # 1: short waves, left as they are
    return (1 / ((1 - share) / rope["factor"] + share)).astype(np.float32)


def _theta(config: dict) -> float:
    return float((config.get("rope_parameters") or {}).get("rope_theta") or config.get("rope_theta") or 10000.0)


def _add_shape(writer, shape: Architecture, config: dict, name: str, kind: str) -> None:
    import gguf

    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0 if kind == "q8_0" else gguf.LlamaFileType.MOSTLY_F16)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_context_length(shape.max_positions)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_size)
    writer.add_value_length(shape.head_size)
    writer.add_rope_dimension_count(shape.head_size)
    writer.add_rope_freq_base(_theta(config))
    writer.add_layer_norm_rms_eps(float(config.get("rms_norm_eps", 1e-6)))


@dataclass(frozen=True)
class _Vocabulary:
    tokens: list[str]
    kinds: list[int]
    """gguf.TokenType of each."""
    merges: list[str]
    split: str
    """llama.cpp's name for how text is split before the merges; empty where it has none."""


def _vocabulary(folder: Path, size: int) -> _Vocabulary:
    """From tokenizer.json; ids without a token, up to the embedding's rows, are marked unused."""
    import gguf

    try:
        saved = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        model, added = saved["model"], saved.get("added_tokens", [])
        if model["type"] != "BPE" or "ByteLevel" not in json.dumps(saved.get("pre_tokenizer")):
            raise ValueError("it is no byte-level BPE")
        by_id = {number: (token, gguf.TokenType.NORMAL) for token, number in model["vocab"].items()}
        for token in added:
            kind = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
            by_id[token["id"]] = (token["content"], kind)
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = f"tokenizer.json: {type(error).__name__}: {error}"
        raise ModelError(
            f"the tokenizer in {folder} cannot be written as GGUF", why, "use a Llama 3 checkpoint"
        ) from None
    pairs = [by_id.get(number, (f"[PAD{number}]", gguf.TokenType.UNUSED)) for number in range(size)]
    before = saved["pre_tokenizer"].get("pretokenizers", [])
    split = next((SPLITS[regex] for part in before if (regex := part.get("pattern", {}).get("Regex")) in SPLITS), "")
    return _Vocabulary([token for token, _ in pairs], [int(kind) for _, kind in pairs], merges, split)


def _add_tokenizer(writer, vocabulary: _Vocabulary, tokenizer) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.split or "llama-bpe")
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    writer.add_token_merges(vocabulary.merges)
    ids = tokenizer.get_vocab()
    named = {
        writer.add_bos_token_id: tokenizer.bos_token,
        writer.add_eos_token_id: tokenizer.eos_token,
        writer.add_eot_token_id: "<|eot_id|>",
        writer.add_eom_token_id: "<|eom_id|>",
        writer.add_pad_token_id: tokenizer.pad_token,
    }
    for add, token in named.items():
        if token in ids:
            add(ids[token])
    writer.add_add_bos_token(tokenizer.bos_token is not None)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)
