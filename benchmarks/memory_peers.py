"""What other estimators say about rows of `benchmarks.memory` that a GPU has measured.

    python -m benchmarks.memory_peers GRID MEASURED     a Markdown table, to standard output

Each estimator gets a row's model, method, rank, targets, micro-batch and recomputed layers, as far as it asks for them,
and is held against what torch reserved. Nothing is asked of a Hub.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import statistics
import tempfile
from collections.abc import Callable
from types import SimpleNamespace
from unittest import mock

from benchmarks.memory import H200, MODELS, error, recipe_of, work_of
from llamanb.architecture import Architecture, architecture
from llamanb.layout import GIB
from llamanb.memory import predict
from llamanb.planner import MARGIN
from llamanb.tape import STORED

ACCELERATE_DTYPES = {"qlora-nf4": "int4", "qlora-int8": "int8", "lora": "float16"}
"""What `accelerate estimate-memory --dtypes` calls the weights of a method."""
WEIGHT_BYTES = {"qlora-nf4": 0.5, "qlora-int8": 1.0, "lora": 2.0}
"""Bytes a parameter, as calculators count them."""
SIXTEEN_BIT, MIXED = 2 + 2 + 8, 4 + 4 + 8
"""Bytes that a trained parameter costs with Adam: itself, its gradient and two fp32 moments; 16 or 32 bits of it."""


def config_fields(model: Architecture) -> dict:
    """The config.json of a shape."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": model.hidden,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_size,
        "intermediate_size": model.intermediate,
        "vocab_size": model.vocabulary,
        "tie_word_embeddings": model.tied,
        "max_position_embeddings": model.max_positions,
    }


@functools.cache
def accelerate_sizes(model: Architecture, dtype: str) -> tuple[float, int | None]:
    """Bytes that `accelerate estimate-memory` prints as "Total Size" and as "Training using Adam"; the latter is None
    where it prints "N/A", which is for int8 and int4.

    Source: accelerate's own `gather_data` (accelerate/commands/estimate.py), which makes the model on the meta device
    from a config.json. Only its question whether the Hub has the repository is answered here. It takes transformers'
    `AutoModel`, and so leaves out a head that is not tied to the embedding, 1 GiB of the 8B in 16 bits.
    """
    from accelerate.commands import estimate

    with tempfile.TemporaryDirectory() as folder:
        with open(f"{folder}/config.json", "w") as file:
            json.dump(config_fields(model), file)
        asked = SimpleNamespace(model_name=folder, library_name="transformers", trust_remote_code=False, dtypes=[dtype])
        found = SimpleNamespace(config={})
        with (
            mock.patch.object(estimate, "verify_on_hub", return_value=found),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            [[_, _, total, training]] = estimate.gather_data(asked)
    highest = max(training.values())
    return total, None if highest == -1 else highest


def adapter_parameters(row: dict) -> int:
    """r × (in + out) for each adapted layer (Hu et al. 2021, LoRA)."""
    model, recipe = architecture(MODELS[row["model"]]), recipe_of(row)
    return model.layers * sum(sum(model.linear(name)) for name in recipe.target_modules) * recipe.rank


def activation_bytes(row: dict, *, scores: bool, logits: bool = True) -> int:
    """Activations of a micro-batch: s·b·h·(34 + 5·a·s/h) bytes for a layer that keeps them, 2·s·b·h for one that is
    recomputed, and fp32 logits of 4·b·s·V.

    The layers are formulas 2 and table 2 of Korthikanti et al. 2022, "Reducing Activation Recomputation in Large
    Transformer Models" (arXiv 2205.05198). A layer whose inputs wait in host memory counts as recomputed, since
    calculators have no word for it. Without `scores` the 5·a·s/h is dropped, the paper's selective recomputation, for
    attention that keeps no scores (FlashAttention); without `logits` theirs, for a loss that is taken in tiles, which
    trl 1.16 does and what was measured did.
    """
    model = architecture(MODELS[row["model"]])
    b, s, h, a = row["rows"], row["length"], model.hidden, model.heads
    kept = row["layout"].get(STORED, 0)
    layer = s * b * (34 * h + (5 * a * s if scores else 0))
    head = 4 * b * s * model.vocabulary if logits else 0
    return kept * layer + (model.layers - kept) * 2 * s * b * h + head


def formula_bytes(row: dict, *, trained: int, scores: bool, logits: bool = True) -> float:
    """Weights + adapters + activations, the rule of most calculators and posts on LoRA and QLoRA, such as EleutherAI's
    "Transformer Math 101" (blog.eleuther.ai/transformer-math) with the trained parameters of Hu et al. 2021.

    Args:
        trained: bytes a trained parameter, SIXTEEN_BIT or MIXED.
        scores, logits: count them, as `activation_bytes` says.
    """
    weights = architecture(MODELS[row["model"]]).parameters * WEIGHT_BYTES[row["method"]]
    return weights + adapter_parameters(row) * trained + activation_bytes(row, scores=scores, logits=logits)


def weights_and_a_fifth(row: dict) -> float:
    """Weights × 1.2: "up to an additional 20 %", which accelerate's documentation (usage_guides/model_size_estimator)
    adds for inference after EleutherAI's "Transformer Math 101", and which is quoted for training as well."""
    return 1.2 * architecture(MODELS[row["model"]]).parameters * WEIGHT_BYTES[row["method"]]


def _accelerate(row: dict, figure: int) -> float | None:
    return accelerate_sizes(architecture(MODELS[row["model"]]), ACCELERATE_DTYPES[row["method"]])[figure]


OTHERS: dict[str, Callable[[dict], float | None]] = {
    "accelerate estimate-memory, total size": lambda row: _accelerate(row, 0),
    "accelerate estimate-memory, training using Adam": lambda row: _accelerate(row, 1),
    "weights × 1.2": weights_and_a_fifth,
    "formula, 12 bytes a trained parameter": lambda row: formula_bytes(row, trained=SIXTEEN_BIT, scores=True),
    "formula, 16 bytes a trained parameter": lambda row: formula_bytes(row, trained=MIXED, scores=True),
    "formula, 16 bytes, scores only where the math kernel keeps them": lambda row: formula_bytes(
        row, trained=MIXED, scores=row["kernel"] == "math"
    ),
    "the same, and no logits": lambda row: formula_bytes(
        row, trained=MIXED, scores=row["kernel"] == "math", logits=False
    ),
}
"""Bytes that each says of a row; None where it says nothing."""


def estimates(row: dict, result: dict) -> dict[str, float | None]:
    """GiB that each estimator says of a row; None where it says nothing."""
    said = {name: size and size / GIB for name, of in OTHERS.items() for size in [of(row)]}
    now = predict(work_of(row, H200), expandable=row["expandable"]).reserved / GIB
    return {
        **said,
        "llamanb, closed form as the grid has it": row["predicted"]["reserved"],
        "llamanb, closed form today": now,
        "llamanb, after a rehearsal": result.get("rehearsed", {}).get("reserved"),
    }


def summary(grid: list[dict], measured: list[dict]) -> str:
    """Errors of each estimator over the rows that were measured, as Markdown; `rows` counts those it answers, "too
    small" those it says need less than they took, and the last column by more than a plan leaves free."""
    rows = {row["id"]: row for row in grid}
    good = [result for result in measured if "measured" in result]
    errors: dict[str, list[float]] = {}
    for result in good:
        for name, gib in estimates(rows[result["id"]], result).items():
            errors.setdefault(name, [])
            if gib is not None:
                errors[name].append(error(gib, result["measured"]["reserved"]))
    lines = [
        f"{len(good)} rows; what torch reserved, against what each says.",
        "",
        f"| estimator | rows | mean absolute error | worst | mean signed | too small | by over {MARGIN:.0%} |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in errors.items():
        if not found:
            continue
        cells = [f"{statistics.mean(map(abs, found)):.1%}", f"{max(found, key=abs):+.1%}"]
        cells += [f"{statistics.mean(found):+.1%}", sum(e < 0 for e in found), sum(e < -MARGIN for e in found)]
        lines.append("| " + " | ".join(map(str, [name, len(found), *cells])) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("grid", type=argparse.FileType())
    parser.add_argument("measured", type=argparse.FileType())
    args = parser.parse_args()
    print(summary([json.loads(line) for line in args.grid], [json.loads(line) for line in args.measured]))


if __name__ == "__main__":
    main()
