"""From a recipe's data to token ids and labels, checked row by row before any model is loaded.

The way: `read` (numbered rows) → `formats` (examples) → `encode` (ids and labels) → here: split, check, report.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, replace

from llamanb import hub, tiny
from llamanb.data.encode import Encoded, Encoder, TooLong, load_tokenizer
from llamanb.data.formats import Example, detect
from llamanb.data.read import BadRow, Row, read_rows
from llamanb.data.show import Tokens
from llamanb.errors import DataError
from llamanb.html import Table
from llamanb.recipe import Recipe

__all__ = ["TrainingData", "first_rows", "load_data"]
_SHOWN = 5


@dataclass(frozen=True)
class TrainingData:
    """Rows to train on and rows held out, with what was seen on the way. Prints as a small table."""

    source: str
    format: str
    tokenizer: object
    train: list[Encoded]
    held_out: list[Encoded]
    held_out_examples: list[Example]
    """The held-out rows before encoding, for generation and scoring; as long as `held_out`."""
    skipped: list[str]
    """A line for each row left out because the recipe says so, with place, column and reason."""

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row to train on."""
        return [len(row.input_ids) for row in self.train]

    def tokens(self, row: int = 0) -> Tokens:
        """The tokens of one of the rows to train on, with those that are learned marked."""
        return Tokens(self.tokenizer, self.train[row])

    def _table(self) -> Table:
        lengths = sorted(self.lengths)
        trained = sum(row.trained_tokens for row in self.train)
        rows = [
            ("format", self.format),
            ("rows to train on", len(self.train)),
            ("rows held out", len(self.held_out)),
            ("rows skipped", len(self.skipped)),
            ("tokens a row, middle and longest", f"{lengths[len(lengths) // 2]} and {lengths[-1]}"),
            ("tokens learned", f"{trained:,} of {sum(lengths):,}"),
            ("padding token", self.tokenizer.pad_token),
        ]
        rows += [("skipped", line) for line in self.skipped[:_SHOWN]]
        return Table(["data", self.source], rows)

    def __str__(self) -> str:
        return str(self._table())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return self._table()._repr_html_()


def load_data(recipe: Recipe) -> TrainingData:
    """Reads, checks, encodes and splits the recipe's rows. Loads neither torch nor a model.

    Raises DataError listing the rows (place, column, reason) that cannot be trained on, unless the recipe skips or
    truncates them; ModelError or a Hub error when the checkpoint's tokenizer cannot be had.
    """
    given, held_from, found, skipped = _examples(recipe)
    tokenizer = load_tokenizer(hub.checkpoint_folder(recipe.model, recipe.revision, weights=False))
    encoder = Encoder(tokenizer, recipe.max_length, everything=recipe.loss_on == "everything")
    encoded: list[tuple[int, Example, Encoded]] = []
    too_long, longest = [], 0
    for number, example in enumerate(given):
        try:
            encoded.append((number, example, encoder.encode(example)))
        except TooLong as error:
            longest = max(longest, error.tokens)
            if recipe.long_rows == "truncate" and error.truncated:
                encoded.append((number, replace(example, text=error.text), error.truncated))
            else:
                too_long.append(error.at(example.place))
        except BadRow as error:
            skipped.append(error.at(example.place))
    if skipped and recipe.bad_rows == "stop":
        raise _bad_rows(recipe.dataset, skipped, "correct them, or bad_rows = 'skip' to leave them out")
    if too_long and recipe.long_rows != "skip":
        fix = f"max_length = {longest} takes them all; or long_rows = 'skip'"
        fix += " or 'truncate'" if recipe.long_rows == "stop" else ": nothing learnable is left of them when cut"
        raise _bad_rows(recipe.dataset, too_long, fix)
    if not encoded:
        raise DataError(
            f"{recipe.dataset} leaves no row to train on",
            f"{len(skipped) + len(too_long)} rows were skipped: {(skipped + too_long)[0]}",
            "correct the rows, or set a larger max_length",
        )
    if held_from is None:
        held = _held_out([example for _, example, _ in encoded], recipe)
    else:
        held = {i for i, (number, _, _) in enumerate(encoded) if number >= held_from}
    return TrainingData(
        source=recipe.dataset,
        format=found,
        tokenizer=tokenizer,
        train=[row for i, (_, _, row) in enumerate(encoded) if i not in held],
        held_out=[encoded[i][2] for i in sorted(held)],
        held_out_examples=[encoded[i][1] for i in sorted(held)],
        skipped=skipped + too_long,
    )


def first_rows(dataset: str, split: str = "train") -> Table:
    """The first rows as who says what in them, and the format they are in; no model is needed for that.

    Raises DataError like load_data where no row can be trained on.
    """
    examples, _, found, _ = _examples(Recipe(dataset=dataset, dataset_split=split, bad_rows="skip"))
    said = [
        [example.place, turn["role"], turn["content"] or turn.get("tool_calls", "")]
        for example in examples[:_SHOWN]
        for turn in example.messages or [{"role": "text", "content": example.text}]
    ]
    return Table(["row", "who", "what"], said, f"{dataset}: {found}")


def _examples(recipe: Recipe) -> tuple[list[Example], int | None, str, list[str]]:
    """Examples, from which of them on they come held out (None: they are still to be split), the format's name, and a
    line for each row that is none."""
    if recipe.dataset == "tiny":  # its held-out rows are about people no training row names
        rows, bad = _numbered(tiny.rows("train")), []
        held_from = len(rows)
        rows += _numbered(tiny.rows("eval")[: recipe.eval_rows])
    else:
        (rows, bad), held_from = read_rows(recipe.dataset, recipe.dataset_split), None
    row_format = detect(rows, recipe.dataset) if rows else None
    examples: list[Example] = []
    for row in rows:
        try:
            examples += row_format.convert(row)
        except BadRow as error:
            bad.append(error.at(row.place))
    if bad and (recipe.bad_rows == "stop" or not examples):
        left_out = ", or bad_rows = 'skip' to leave them out" if examples else ": there is no other row"
        raise _bad_rows(recipe.dataset, bad, f"correct them{left_out}")
    return examples, held_from, row_format.name, bad


def _numbered(rows: list[dict]) -> list[Row]:
    return [Row(f"row {i}", values) for i, values in enumerate(rows, 1)]


def _held_out(examples: list[Example], recipe: Recipe) -> set[int]:
    """Which examples to hold out: at random by what they ask, so that no question stands on both sides; a fifth of
    the rows at most, unless the rarest question already has more."""
    if not recipe.eval_rows:
        return set()
    rows_of = Counter(example.prompt_key for example in examples)
    if len(rows_of) < 2:
        raise DataError(
            f"{recipe.dataset} has {len(examples)} usable row{'s' * (len(examples) != 1)}, with one question in all",
            "one row at least is trained on and another held out to score the result",
            "give more rows, or eval_rows = 0 to train without a score",
        )
    keys = sorted(rows_of)
    random.Random(recipe.seed).shuffle(keys)
    room = min(recipe.eval_rows, max(1, len(examples) // 5))
    held = set()
    for key in keys:
        if rows_of[key] <= room:
            held.add(key)
            room -= rows_of[key]
    held = held or {min(keys, key=rows_of.get)}
    return {i for i, example in enumerate(examples) if example.prompt_key in held}


def _bad_rows(source: str, lines: list[str], fix: str) -> DataError:
    more = f"; and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
    rows = "1 row cannot" if len(lines) == 1 else f"{len(lines)} rows cannot"
    return DataError(f"{source}: {rows} be trained on", "; ".join(lines[:_SHOWN]) + more, fix)
