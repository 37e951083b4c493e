"""What each way of making a model smaller saves and costs, measured on what was written: bytes, memory, speed, scores;
before and after a recovery by LoRA. `python -m benchmarks.shrink` runs the long grid."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from llamanb import __version__, hub
from llamanb.card import Card
from llamanb.data import TrainingData
from llamanb.errors import LlamanbError, RecipeError
from llamanb.evaluate import evaluate
from llamanb.export import merge, stored
from llamanb.model import load_adapter, load_model
from llamanb.model.load import DTYPES
from llamanb.planner import plan
from llamanb.quiet import quiet_libraries
from llamanb.recipe import Recipe
from llamanb.shrink.factored import KIND, absorb, load_factored, write_products
from llamanb.shrink.low_rank import write_factored
from llamanb.shrink.prune import UNSTRUCTURED, write_pruned
from llamanb.shrink.speed import tokens_per_s
from llamanb.shrink.summary import DENSE, Row, Shrunken, State
from llamanb.shrink.walk import CALIBRATION_ROWS
from llamanb.shrink.write import facts_of
from llamanb.training import train

SVDS = {"SVD": False, "whitened SVD": True}
"""Whether it is whitened."""
METHODS = ("magnitude", "magnitude-global", "wanda", "magnitude 2:4", "wanda 2:4", "layers", "channels", "heads", *SVDS)
GRID = "magnitude 0.5, wanda 0.5 0.7, layers 0.25 0.5, channels 0.5 0.75, heads 0.5, whitened SVD 0.5 0.3"
"""What `measure` measures unless it is told otherwise: sparsities, and for the SVDs budgets."""


def parse_grid(text: str) -> dict[str, tuple[float, ...]]:
    """Shares by method. Raises RecipeError for text that is not as GRID is, or names what is no method."""
    grid: dict[str, tuple[float, ...]] = {}
    for part in text.split(","):
        words = part.split()
        shares = [word for word in words if word.replace(".", "", 1).isdigit()]
        method = " ".join(words[: len(words) - len(shares)])
        if method not in METHODS or not shares:
            why = "a method and the shares to try are wanted, with commas between methods; methods are " + ", ".join(
                METHODS
            )
            raise RecipeError(f"{part.strip()!r} cannot be measured", why, f"{GRID!r}, or some of it")
        grid[method] = tuple(map(float, shares))
    return grid


def measure(
    recipe: Recipe,
    data: TrainingData,
    grid: str = GRID,
    *,
    folder: str | Path = "runs/shrink",
    recover: bool = True,
    card: str | None = "T4",
    calibration_rows: int = CALIBRATION_ROWS,
) -> Shrunken:
    """Writes each variant, scores it on the held-out rows, recovers it, and scores what came of that.

    Args:
        recipe: whose `model` is made smaller; a recovery trains as it says, on the same rows.
        data: from `load_data(recipe)`, with rows held out.
        grid: what to measure, as GRID has it. For pruning a share goes, for the SVDs it stays.
        folder: where variants, runs and figures are kept. What was measured there before counts.
        recover: train adapters over each variant, and over the dense model to compare with.
        card: whose memory a training is planned for, beside what is measured here; None: the card at hand.
        calibration_rows: for the methods that need them.

    Returns all of it; a variant that fails is a row with its reason.

    Raises RecipeError for a grid that cannot be read, or without held-out rows.
    """
    asked = [(method, share) for method, shares in parse_grid(grid).items() for share in shares]
    if not data.held_out:
        raise RecipeError("no row is held out", "what is left of a model is measured on them", "eval_rows = 64")
    planned_for = Card.known(card) if card else Card.here()
    job = _Job(recipe, data, Path(folder), recover, planned_for, calibration_rows)
    rows: list[Row] = []
    for method, share in [(DENSE, 1.0), *asked]:
        rows.append(job.row(Row(method, share)))
        print(f"{len(rows)} of {len(asked) + 1}  {rows[-1]}", flush=True)
    return Shrunken(rows, planned_for.name)


@dataclasses.dataclass
class _Job:
    recipe: Recipe
    data: TrainingData
    folder: Path
    recover: bool
    card: Card
    calibration_rows: int

    def row(self, row: Row) -> Row:
        """The row with all that is measured of it, or as it was measured before."""
        place = self.folder / row.name.replace(" ", "-").replace(":", "-").replace("%", "")
        key = self._key(row)
        if known := _known(place, key):
            return known
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        with _silence():
            for measured in self._measured(row, place):
                row = measured
        text = json.dumps({"key": key, "row": dataclasses.asdict(row)}, indent=1)
        (place / "row.json").write_text(text, encoding="utf-8")
        return row

    def _measured(self, row: Row, place: Path) -> Iterator[Row]:
        """The row as it fills; whatever fails becomes its last word."""
        try:
            folder = self._write(row, place / "model")
            row = dataclasses.replace(row, before=self._state(folder))
            yield row
            factored, recipe = row.method in SVDS, self.recipe.replace(model=str(folder))
            # Adapters of a factored model are trained on its products, which are as large as the dense model
            planned = plan(self.recipe if factored else recipe, self.card, self.data, force=True).needs_gib
            row = dataclasses.replace(row, planned_gib=planned)
            yield row
            if self.recover:
                if factored:
                    recipe = recipe.replace(model=str(write_products(folder, place / "products")))
                yield dataclasses.replace(row, **self._recovered(row, recipe, folder, place))
        except LlamanbError as error:
            yield dataclasses.replace(row, failed=f"{error.what}: {error.why}")
        finally:
            shutil.rmtree(place / "products", ignore_errors=True)

    def _write(self, row: Row, to: Path) -> Path:
        if row.method == DENSE:
            return hub.checkpoint_folder(self.recipe.model, self.recipe.revision)
        given = {"data": self.data, "calibration_rows": self.calibration_rows}
        if row.method in SVDS:
            return write_factored(self.recipe, to, budget=row.share, whiten=SVDS[row.method], **given)
        name, _, pattern = row.method.partition(" ")
        return write_pruned(self.recipe, to, method=name, sparsity=row.share, pattern=pattern or None, **given)

    def _recovered(self, row: Row, recipe: Recipe, folder: Path, place: Path) -> dict:
        """Trains adapters over a variant and makes them part of it, where that leaves it what it is."""
        unscored = dataclasses.replace(self.data, held_out=[], held_out_examples=[])
        run = train(plan(recipe, None, unscored, force=True), unscored, name="recovery", runs=place, resume=False)
        peaks = run.timeline.peaks_gib
        took = {"trained_gib": max(peaks.values()) if peaks else sum(run.buckets_gib.values())}
        if row.method.split()[0] in UNSTRUCTURED:  # a merge would fill the zeros
            return {**took, "after": self._state(folder, run.folder)}
        if row.method in SVDS:
            made = absorb(run, folder, place / "recovered")
        else:
            kinds = {tensor.dtype for tensor in stored.tensors(folder).values()}
            made = merge(run, place / "recovered", dtype="bf16" if "BF16" in kinds else "fp16")
        return {**took, "after": self._state(made)}

    def _state(self, folder: Path, run: Path | None = None) -> State:
        """Loads what lies in a folder, with a run's adapter on it where one is given, and measures it."""
        made, ranked = plan(self.recipe, force=True), is_factored(folder)
        begin_s = time.monotonic()
        if run:
            model, _ = load_adapter(run)
        elif ranked:
            model = load_factored(folder, DTYPES[made.dtype], "cuda" if made.card.is_gpu else "cpu")
        else:
            recipe = self.recipe.replace(model=str(folder))
            recipe = recipe if recipe.adapters else recipe.replace(method="lora")
            model = load_model(plan(recipe, force=True), self.data.tokenizer).eval()
        loaded_s = time.monotonic() - begin_s
        storages = {weight.untyped_storage().data_ptr(): weight.untyped_storage() for weight in model.parameters()}
        scores, speed = evaluate(model, self.data), tokens_per_s(model, self.data)
        files = [*folder.glob("*.safetensors"), *((run / "adapter").glob("*.safetensors") if run else ())]
        state = State(
            folder=str(folder),
            adapter=str(run / "adapter") if run else None,
            disk=sum(path.stat().st_size for path in files),
            loaded=sum(storage.nbytes() for storage in storages.values()),
            loaded_s=loaded_s,
            tokens_per_s=speed,
            loss=scores.loss,
            exact_match=scores.exact_match,
            kept=facts_of(folder)["kept"] if ranked else None,
        )
        del model, storages
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return state

    def _key(self, row: Row) -> str:
        """All that decides a row."""
        ids = [[one.input_ids for one in rows] for rows in (self.data.train, self.data.held_out)]
        facts = [self.recipe.to_json(), ids, row.method, row.share, self.recover, self.card.name]
        facts += [self.calibration_rows, __version__, torch.__version__, torch.cuda.is_available()]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def is_factored(folder: Path) -> bool:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"] == KIND


def _known(place: Path, key: str) -> Row | None:
    """A row that was measured before; failures are tried again."""
    try:
        saved: Mapping = json.loads((place / "row.json").read_text(encoding="utf-8"))
        row = Row.from_dict(saved["row"]) if saved["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return row if row and not row.failed else None


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Many trainings in a row: what each would print and draw is left out; warnings are not."""
    from IPython.utils.capture import capture_output

    with capture_output(stderr=False), quiet_libraries():
        yield
