"""Low rank: each weight W as a product of two thinner ones, in the rank that a budget over the whole model gives it.

Of all products of rank r, the one whose outputs are nearest to those of W on the calibration rows, whose inputs have
products G = mean of x xᵀ, projects the outputs onto the r main directions U of their own products W G Wᵀ: up = U,
down = Uᵀ W. That is the truncated singular value decomposition of the whitened weight W L, L Lᵀ = G (Wang et al. 2024,
SVD-LLM), with L⁻¹ multiplied out: where G is singular nothing is divided by zero. Without calibration G is the
identity, and it is the plain truncated decomposition of W.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from llamanb.architecture import Architecture
from llamanb.card import Card
from llamanb.data import TrainingData
from llamanb.errors import RecipeError
from llamanb.recipe import LINEAR_LAYERS, Recipe
from llamanb.shrink.factored import KIND, RANKS, kept, key, put_factors
from llamanb.shrink.prune import require_share
from llamanb.shrink.walk import CALIBRATION_ROWS, Checkpoint, Walk, calibration
from llamanb.shrink.write import require_free, written

DAMPING = 1e-6
"""Share of their mean that is added to the diagonal of the inputs' products before they are decomposed."""


def write_factored(
    recipe: Recipe,
    to: str | Path,
    *,
    budget: float = 0.5,
    rank: int | None = None,
    whiten: bool = True,
    data: TrainingData | None = None,
    calibration_rows: int = CALIBRATION_ROWS,
    card: Card | None = None,
) -> Path:
    """Factors the linear layers of the recipe's checkpoint, a layer at a time; `load_factored` loads the result.

    Args:
        recipe: whose `model` is factored, in its `precision`.
        to: the folder to make.
        budget: share of the linear layers' parameters that stays; between 0 and 1. Each direction goes to the matrix
            where a parameter keeps most of the outputs' energy; a matrix that would be no smaller as a product stays.
        rank: one rank for all instead of a budget.
        whiten: weighs what is lost by the calibration rows' inputs.
        data: from `load_data(recipe)`; needed to whiten.
        calibration_rows: how many of its rows to train on.
        card: to compute on; None: the one at hand.

    Returns the folder, whose shrink.json has the ranks.

    Raises:
        RecipeError: a budget or rank that cannot be, or the folder is taken.
        DataError: calibration rows are missing.
        ModelError: the checkpoint is quantized, or not complete.
        DiskFullError: there is too little room.
    """
    checkpoint = Checkpoint.open(recipe.model, recipe.revision)
    if rank is None:
        require_share("budget", budget)
        require_room(budget, checkpoint.shape)
    else:
        _require_rank(rank, checkpoint.shape)
    rows = calibration(data, calibration_rows) if whiten else []
    require_free(to)
    shape = checkpoint.shape
    if rank is None:
        ranks = choose_ranks(_energies(Walk(checkpoint, recipe, rows, card)), shape, budget)
    else:
        ranks = {
            key(i, name): _saving(rank, *shape.linear(name)) for i in range(shape.layers) for name in LINEAR_LAYERS
        }
    share = kept(ranks, shape)
    with written(checkpoint, to, shape.layers, share=min(1.0, share + 0.2)) as output:
        walk = Walk(checkpoint, recipe, rows, card)
        for number in range(shape.layers):
            layer = walk.layer(number)
            inputs = walk.measure(layer, products=True) if whiten else {}
            for name in LINEAR_LAYERS:
                if r := ranks[key(number, name)]:
                    _, directions = outputs(layer.weight(name), inputs.get(name), r)
                    put_factors(layer, name, directions, checkpoint.dtype)
            if rows:
                walk.advance(layer)
            output.layer(layer.state)
        facts = {"method": "whitened SVD" if whiten else "SVD", "budget": None if rank else budget, "kept": share}
        facts |= {RANKS: ranks, "calibration_rows": len(rows), "calibration_tokens": sum(map(len, rows))}
        words = f"linear layers as products of two factors, with {share:.0%} of their parameters"
        output.finish({"model_type": KIND, "architectures": [], RANKS: ranks}, facts, words)
    return Path(to)


def outputs(weight: torch.Tensor, inputs: torch.Tensor | None, rank: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """The energy of a layer's outputs in each of their main directions, largest first, and the first `rank` of these.

    Args:
        weight: (out, in), fp32.
        inputs: (in, in), mean products of the inputs; None: as if they were white.

    Returns (min(out, in),) and (out, rank) with orthonormal columns.
    """
    exact = weight.double() if weight.device.type == "cpu" else weight
    out, width = exact.shape
    if out <= width:
        seen = exact if inputs is None else exact @ inputs.to(exact.dtype)
        energies, directions = _main(seen @ exact.T, rank)
    else:  # the narrower side, and from there to the outputs
        seen = exact
        if inputs is not None:
            products = inputs.to(exact.dtype)
            products = products + DAMPING * products.diagonal().mean() * torch.eye(width).to(products)
            seen = exact @ torch.linalg.cholesky(products)
        energies, vectors = _main(seen.T @ seen, rank)
        directions = torch.linalg.qr(seen @ vectors).Q
    return energies.clamp(min=0).float(), directions.float()


def _main(products: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues, largest first, and the first `rank` eigenvectors."""
    if not rank:  # much quicker
        return torch.linalg.eigvalsh(products).flip(0), products[:, :0]
    energies, vectors = torch.linalg.eigh(products)
    return energies.flip(0), vectors.flip(1)[:, :rank]


def choose_ranks(energies: Mapping[str, torch.Tensor], shape: Architecture, budget: float) -> dict[str, int]:
    """The rank of each matrix, by its key; 0 for one that stays whole.

    All directions of all matrices compete with the share of their own matrix's energy that a parameter of theirs
    keeps. The last direction that a product can have without being larger than the matrix buys the matrix itself.

    Args:
        energies: of the outputs, by key, largest first.
        shape: gives (in, out) of each.
        budget: share of the parameters.
    """
    keys = list(energies)
    sizes = {k: shape.linear(k.rpartition(".")[2]) for k in keys}
    most = {k: max(1, m * n // (m + n)) for k, (m, n) in sizes.items()}
    gains, costs, owners = [], [], []
    for i, k in enumerate(keys):
        m, n = sizes[k]
        cost = torch.full((most[k],), m + n, dtype=torch.float64)
        cost[-1] = m * n - (most[k] - 1) * (m + n)
        share = energies[k].double() / energies[k].double().sum().clamp(min=1e-300)
        gain = share[: most[k]] / (m + n)
        gain[0] = float("inf")  # one each
        gains.append(gain), costs.append(cost), owners.append(torch.full((most[k],), i))
    order = torch.cat(gains).argsort(descending=True, stable=True)
    spent = torch.cat(costs)[order].cumsum(0)
    total = sum(m * n for m, n in sizes.values())
    bought = torch.cat(owners)[order][spent <= budget * total]
    counts = torch.bincount(bought, minlength=len(keys)).tolist()
    return {k: 0 if count == most[k] else count for k, count in zip(keys, counts, strict=True)}


def _energies(walk: Walk) -> dict[str, torch.Tensor]:
    found = {}
    for number in range(walk.checkpoint.shape.layers):
        layer = walk.layer(number)
        inputs = walk.measure(layer, products=True) if walk.has_rows else {}
        for name in LINEAR_LAYERS:
            found[key(number, name)] = outputs(layer.weight(name), inputs.get(name))[0].cpu()
        if walk.has_rows:
            walk.advance(layer)
    return found


def _saving(rank: int, m: int, n: int) -> int:
    """The rank, or 0 where a product of it would be no smaller than the matrix."""
    return rank if rank * (m + n) < m * n else 0


def require_room(budget: float, shape: Architecture) -> None:
    """Raises RecipeError where a budget leaves no room for one direction of each matrix."""
    sizes = [shape.linear(name) for name in LINEAR_LAYERS]
    least = sum(m + n for m, n in sizes) / sum(m * n for m, n in sizes)
    if budget <= least:
        why = f"rank 1 for every matrix takes {least:.3g} of {shape.name}"
        raise RecipeError(f"budget = {budget:g} is too small", why, f"budget = {max(0.2, 2 * least):.2g}")


def _require_rank(rank: int, shape: Architecture) -> None:
    full = {name: min(shape.linear(name)) for name in LINEAR_LAYERS}
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= min(full.values()):
        narrowest = min(full, key=full.get)
        raise RecipeError(
            f"rank = {rank!r} is not possible",
            f"the full rank of {narrowest} is {full[narrowest]} in {shape.name}",
            f"a whole number from 1 to {full[narrowest]}, or budget = 0.5 to have ranks chosen",
        )
    if not any(_saving(rank, *shape.linear(name)) for name in LINEAR_LAYERS):
        most = max((m * n - 1) // (m + n) for m, n in map(shape.linear, LINEAR_LAYERS))
        raise RecipeError(
            f"rank = {rank} makes nothing smaller",
            "two factors of that rank have as many numbers as the matrix itself",
            f"rank = {most} at most, or budget = 0.5 to have ranks chosen",
        )
