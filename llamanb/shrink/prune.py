"""Pruning: single weights set to zero, or whole layers, MLP channels and attention heads left out.

Unstructured, the shapes stay: a checkpoint with zeros, as large as before. Structured, what is written is a smaller
Llama that loads as any other: every layer loses as many channels or heads, since a Llama's config has one number for
all layers.
"""

from __future__ import annotations

from pathlib import Path

import torch

from llamanb.architecture import Architecture
from llamanb.card import Card
from llamanb.data import TrainingData
from llamanb.errors import RecipeError
from llamanb.recipe import LINEAR_LAYERS, Recipe
from llamanb.shrink.walk import CALIBRATION_ROWS, Checkpoint, Layer, Walk, calibration
from llamanb.shrink.write import require_free, written

UNSTRUCTURED = {
    "magnitude": "the smallest weights of each matrix",
    "magnitude-global": "the smallest weights of all matrices together",
    "wanda": "the weights of each output that do least to it, by size times input (Sun et al. 2023)",
}
STRUCTURED = {
    "layers": "the decoder layers that change least of what goes through them (Men et al. 2024)",
    "channels": "the MLP channels that add least to a layer's output",
    "heads": "the key and value heads that add least, with the query heads that share them",
}
METHODS = UNSTRUCTURED | STRUCTURED
MEASURED = ("wanda", *STRUCTURED)
"""Methods that need calibration rows."""
CHANNELS = 64
"""Channels are kept in such multiples: a block of 4-bit weights, and what tensor cores like."""
BINS_SHIFT = 11
"""Bits of a float32 that do not decide its bin: 2^20 bins over all sizes, each 2^-12 wide; 16-bit floats are exact."""


def write_pruned(
    recipe: Recipe,
    to: str | Path,
    *,
    method: str = "wanda",
    sparsity: float = 0.5,
    pattern: str | None = None,
    data: TrainingData | None = None,
    calibration_rows: int = CALIBRATION_ROWS,
    card: Card | None = None,
) -> Path:
    """Prunes the recipe's checkpoint, a layer at a time, and writes the result as a plain Llama.

    Args:
        recipe: whose `model` is pruned, in its `precision`.
        to: the folder to make.
        method: one of METHODS.
        sparsity: share of the weights, layers, channels or heads that go; between 0 and 1.
        pattern: `2:4` leaves two of four weights in a row, the pattern that some GPUs have a kernel for; at 0.5 only.
        data: from `load_data(recipe)`; what MEASURED methods calibrate on.
        calibration_rows: how many of its rows to train on.
        card: to compute on; None: the one at hand.

    Returns the folder, whose shrink.json says what went.

    Raises:
        RecipeError: a method, sparsity or pattern that cannot be, or the folder is taken.
        DataError: calibration rows are missing.
        ModelError: the checkpoint is quantized, or not complete.
        DiskFullError: there is too little room.
    """
    checkpoint = Checkpoint.open(recipe.model, recipe.revision)
    require_share("sparsity", sparsity)
    _require_pattern(method, sparsity, pattern, checkpoint.shape)
    rows = calibration(data, calibration_rows) if method in MEASURED else []
    kept = _kept(method, sparsity, checkpoint.shape)
    require_free(to)
    facts = {"method": method, "sparsity": sparsity, "pattern": pattern}
    facts |= {"calibration_rows": len(rows), "calibration_tokens": sum(map(len, rows))}
    changes, layers = {}, range(checkpoint.shape.layers)
    if method == "layers":
        facts["influence"] = influence = influences(Walk(checkpoint, recipe, rows, card))
        layers = sorted(sorted(layers, key=influence.__getitem__, reverse=True)[:kept])
        facts["kept"], changes = layers, {"num_hidden_layers": kept}
    elif method == "channels":
        changes = {"intermediate_size": kept}
    elif method == "heads":
        group = checkpoint.shape.heads // checkpoint.shape.kv_heads
        changes = {"num_key_value_heads": kept, "num_attention_heads": kept * group}
        changes["head_dim"] = checkpoint.shape.head_size  # no longer what the hidden size says
    with written(checkpoint, to, len(layers)) as output:
        walk = Walk(checkpoint, recipe, rows if method != "layers" else (), card)
        threshold = _threshold(walk, sparsity) if method == "magnitude-global" else None
        zeros = total = 0
        for number in layers:
            layer = walk.layer(number)
            if method in UNSTRUCTURED:
                inputs = walk.measure(layer) if method == "wanda" else {}
                for name in LINEAR_LAYERS:
                    drop = _drop(layer.weight(name), inputs.get(name), sparsity, pattern, threshold)
                    layer.put(name, layer.stored(name).masked_fill(drop.cpu(), 0))
                    zeros, total = zeros + int(drop.sum()), total + drop.numel()
            elif method != "layers":
                facts.setdefault("kept", []).append(_cut(layer, walk, method, kept, checkpoint.shape))
            if rows and method != "layers":
                walk.advance(layer)
            output.layer(layer.state)
        if total:
            facts["zeros"] = zeros / total
        words = f"{METHODS[method]} left out, {sparsity:.0%} asked for" + (f", {pattern}" if pattern else "")
        output.finish(changes, facts, words)
    return Path(to)


def influences(walk: Walk) -> list[float]:
    """How much each decoder layer changes what goes through it, in the whole model: see `Walk.advance`."""
    return [walk.advance(walk.layer(number)) for number in range(walk.checkpoint.shape.layers)]


def _drop(weight: torch.Tensor, inputs: torch.Tensor | None, sparsity: float, pattern: str | None, threshold):
    """Which weights (out, in) go: the smallest of each matrix, of each output where inputs are known, or of each four
    in a row; or those up to the threshold."""
    scores = weight.abs() if inputs is None else weight.abs() * inputs.sqrt()
    if threshold is not None:
        return scores <= threshold
    groups = scores.reshape(-1, 4) if pattern else scores.reshape(1, -1) if inputs is None else scores
    smallest = groups.topk(round(sparsity * groups.shape[1]), dim=1, largest=False, sorted=False).indices
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, smallest, True).view_as(weight)


def _threshold(walk: Walk, sparsity: float) -> float:
    """The size below which that share of all weights lies, counted in bins: no layer has to wait for another."""
    counts = torch.zeros(2 ** (31 - BINS_SHIFT), dtype=torch.int64)
    for number in range(walk.checkpoint.shape.layers):
        layer = walk.layer(number)
        for name in LINEAR_LAYERS:
            bins = layer.weight(name).abs().view(torch.int32).flatten() >> BINS_SHIFT
            counts += torch.bincount(bins, minlength=len(counts)).cpu()
    below = counts.cumsum(0)
    last = int((below - sparsity * below[-1]).abs().argmin())  # the bin's end that comes nearest
    return torch.tensor((last + 1 << BINS_SHIFT) - 1, dtype=torch.int32).view(torch.float32).item()


def _cut(layer: Layer, walk: Walk, method: str, kept: int, shape: Architecture) -> list[int]:
    """Leaves a layer its most important channels or heads; returns their numbers.

    Importance is the mean square of what each adds to the layer's output over the rows. For a channel that is its own
    mean square times that of its column; for a head with the products of its inputs G and its columns W, tr(W G Wᵀ).
    """
    if method == "channels":
        inputs = walk.measure(layer)["down_proj"]
        keep = _largest(inputs * layer.weight("down_proj").square().sum(0), kept)
        rows, columns = dict.fromkeys(("gate_proj", "up_proj"), keep), {"down_proj": keep}
    else:
        group, size = shape.heads // shape.kv_heads, shape.head_size
        products, weight = walk.measure(layer, products=True)["o_proj"], layer.weight("o_proj")
        added = (weight.T @ weight * products).view(shape.kv_heads, group * size, shape.kv_heads, group * size)
        keep = _largest(torch.stack([added[i, :, i].sum() for i in range(shape.kv_heads)]), kept)
        queries, keys = _spread(keep, group * size), _spread(keep, size)
        rows, columns = {"q_proj": queries, "k_proj": keys, "v_proj": keys}, {"o_proj": queries}
    for name, numbers in rows.items():
        layer.put(name, layer.stored(name)[numbers])
    for name, numbers in columns.items():
        layer.put(name, layer.stored(name)[:, numbers].contiguous())
    return keep.tolist()


def _largest(scores: torch.Tensor, count: int) -> torch.Tensor:
    return scores.topk(count).indices.sort().values.cpu()


def _spread(numbers: torch.Tensor, size: int) -> torch.Tensor:
    """The rows of some blocks of `size` rows."""
    return (numbers[:, None] * size + torch.arange(size)).flatten()


def _kept(method: str, sparsity: float, shape: Architecture) -> int:
    """Layers, channels or key and value heads that stay. Raises RecipeError where none or all would."""
    if method in UNSTRUCTURED:
        return 0
    possible = {
        "layers": range(1, shape.layers),
        "channels": range(CHANNELS, shape.intermediate, CHANNELS),
        # transformers' Llama wants a hidden size that its heads divide
        "heads": [n for n in range(1, shape.kv_heads) if shape.hidden % (shape.heads // shape.kv_heads * n) == 0],
    }[method]
    whole = {"layers": shape.layers, "channels": shape.intermediate, "heads": shape.kv_heads}[method]
    step = CHANNELS if method == "channels" else 1
    kept = round((1 - sparsity) * whole / step) * step
    if kept not in possible:
        shares = [f"{1 - n / whole:.3g}" for n in reversed(possible)]
        raise RecipeError(
            f"sparsity = {sparsity:g} is not possible for {method}",
            f"of {whole} {kept} would stay" + (f", which the hidden size {shape.hidden} rules out" if kept else ""),
            f"sparsity = {' or '.join(shares if len(shares) < 9 else [shares[0], '...', shares[-1]])}"
            if shares
            else "another method",
        )
    return kept


def require_share(name: str, value: float) -> None:
    """Raises RecipeError for what is not between 0 and 1."""
    if not isinstance(value, int | float) or not 0 < value < 1:
        why = "it is a share: at one end nothing would change, at the other nothing be left"
        raise RecipeError(f"{name} = {value!r} is not possible", why, f"{name} = 0.5, or another between 0 and 1")


def _require_pattern(method: str, sparsity: float, pattern: str | None, shape: Architecture) -> None:
    if method not in METHODS:
        raise RecipeError(f"method = {method!r}", "no such way to prune", f"one of {', '.join(METHODS)}")
    if pattern is None:
        return
    if pattern != "2:4" or sparsity != 0.5 or method not in ("magnitude", "wanda"):
        raise RecipeError(
            f"pattern = {pattern!r} with method = {method!r} and sparsity = {sparsity:g}",
            "the pattern is 2:4, which leaves half of each four weights in a row",
            "pattern = '2:4', sparsity = 0.5, and method = 'magnitude' or 'wanda'",
        )
    for name in LINEAR_LAYERS:
        if (width := shape.linear(name)[0]) % 4:
            raise RecipeError(
                f"pattern = '2:4' is not possible for {shape.name}",
                f"{name} is {width} wide, and its rows are no whole number of fours",
                "pattern = None: the same sparsity without a pattern",
            )
