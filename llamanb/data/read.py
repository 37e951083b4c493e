"""From a source (file, address, Hub name) to numbered rows; every failure names the file and the place in it.

Files are read with the standard library rather than `datasets`, because its errors do not say which row is wrong; the
Hub is left to `datasets`.
"""

from __future__ import annotations

import csv
import http.client
import io
import json
import sys
import urllib.error
import urllib.request
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from llamanb.errors import DataError, NoNetworkError

READABLE = (".json", ".jsonl", ".ndjson", ".csv", ".parquet")
_TIMEOUT_S = 4


class Row(NamedTuple):
    """One row as it came, and where it stood: `row 7`, `row 7 (line 9)`, `data[0].paragraphs[1].qas[2]`."""

    place: str
    values: dict


class BadRow(Exception):
    """Why one row cannot be used; collected, so that a person sees all of them at once."""

    def __init__(self, column: str | None, what: str):
        super().__init__(column, what)
        self.column, self.what = column, what

    def at(self, place: str) -> str:
        return f"{place}, column {self.column!r}: {self.what}" if self.column else f"{place}: {self.what}"


def read_rows(source: str, split: str = "train") -> tuple[list[Row], list[str]]:
    """Reads every row of a file, an http address or a Hub dataset.

    Returns the rows, and a line for each row that is not even an object (place, column and reason).
    Raises DataError or NoNetworkError with what is wrong and where.
    """
    if "://" in source:
        rows = _parse(_download(source), source)
    elif Path(source).is_dir():
        files = sorted(p.name for p in Path(source).iterdir() if p.suffix in READABLE)
        raise DataError(
            f"{source} is a folder",
            "one file of rows is read at a time",
            f"name one of its files: {', '.join(files[:5])}" if files else f"give a file ({', '.join(READABLE)})",
        )
    elif Path(source).exists() or Path(source).suffix.lower() in READABLE:
        rows = _parse(_file_bytes(Path(source)), source)
    else:
        rows = _hub_rows(source, split)
    if not rows:
        raise DataError(f"{source} has no rows", "the file is empty", "give a file with at least two rows")
    bad = [row.values.at(row.place) for row in rows if isinstance(row.values, BadRow)]
    return [row for row in rows if not isinstance(row.values, BadRow)], bad


def _file_bytes(path: Path) -> bytes:
    if path.suffix.lower() not in READABLE:
        raise DataError(
            f"{path} is not a kind of file that is read",
            f"its name ends in {path.suffix or 'nothing'}",
            f"save it as one of {', '.join(READABLE)}",
        )
    try:
        return path.read_bytes()
    except FileNotFoundError:
        near = sorted(p.name for p in path.parent.iterdir() if p.suffix in READABLE) if path.parent.is_dir() else []
        raise DataError(
            f"{path} does not exist",
            f"looked in {path.parent.resolve()}",
            f"there is: {', '.join(near[:5])}" if near else "check the path",
        ) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read", str(error), "check the file's permissions") from None


def _download(address: str) -> bytes:
    if not address.startswith(("http://", "https://")):
        raise DataError(f"{address} is not an address that is read", "only http and https are", "download the file")
    try:
        with urllib.request.urlopen(address, timeout=_TIMEOUT_S) as answer:
            return answer.read()
    except urllib.error.HTTPError as error:
        raise DataError(f"{address} gave no file", f"the server answered {error}", "check the address") from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise NoNetworkError(
            f"{address} cannot be reached",
            str(getattr(error, "reason", error)),
            "check the network, or download the file and give its path",
        ) from None


def _parse(content: bytes, source: str) -> list[Row]:
    suffix = Path(source.split("?")[0]).suffix.lower()
    if suffix == ".parquet":
        return _parquet(content, source)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{source}, line {line}: not UTF-8 text",
            f"byte {content[error.start]:#04x} at position {error.start} is no UTF-8",
            "save the file as UTF-8 (in a spreadsheet: 'CSV UTF-8')",
        ) from None
    if not text.strip():
        raise DataError(f"{source} has no rows", "the file is empty", "give a file with at least two rows")
    if suffix == ".csv":
        return _csv(text, source)
    if suffix == ".json":
        return _json(text, source)
    return _jsonl(text, source)


def _json(text: str, source: str) -> list[Row]:
    try:
        content = json.loads(text, object_pairs_hook=partial(_fields, source))
    except RecursionError:
        raise DataError(f"{source} is nested too deeply", "no row looks like that", "give a list of rows") from None
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # one object a line, under the wrong name
            return _jsonl(text, source)
        fix = "write the file again; if a download broke off, fetch it again"
        raise _not_json(f"{source}, line {error.lineno}", error, fix) from None
    if isinstance(content, dict):  # rows under one name, as in SQuAD's own files
        lists = [name for name, value in content.items() if isinstance(value, list)]
        if len(lists) != 1:
            raise _no_list(f"{source} is one object", f"its fields are: {', '.join(map(str, content)) or 'none'}")
        content = content[lists[0]]
        if content and isinstance(content[0], dict) and "paragraphs" in content[0]:
            articles = [_object(f"{lists[0]}[{i}]", article) for i, article in enumerate(content)]
            return [row for article in articles for row in _under(article, ("paragraphs", "qas"))]
    if not isinstance(content, list):
        raise _no_list(f"{source} is a JSON {type(content).__name__}", "a row is an object with named fields")
    return [_object(f"row {i}", value) for i, value in enumerate(content, 1)]


def _fields(where: str, pairs: list[tuple[str, object]]) -> dict:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        _require_once([name for name, _ in pairs], where)
    return fields


def _require_once(columns: list[str], where: str) -> None:
    for name in columns:
        if columns.count(name) > 1:
            what = f"{where}: column {name!r} stands twice"
            raise DataError(what, "it is not clear which of the two is meant", "rename or remove one of them")


def _not_json(where: str, error: json.JSONDecodeError, fix: str) -> DataError:
    at_end = error.pos >= len(error.doc.rstrip()) or error.msg.startswith("Unterminated")
    why = f"{error.msg} (it ends early)" if at_end else error.msg
    return DataError(f"{where}, column {error.colno}: not JSON", why, fix)


def _no_list(what: str, why: str) -> DataError:
    return DataError(f"{what}, not a list of rows", why, 'write [{"instruction": ..., "output": ...}, ...]')


def _object(place: str, value: object) -> Row:
    if isinstance(value, dict):
        return Row(place, value)
    return Row(place, BadRow(None, f"is a {type(value).__name__}, not an object with named fields"))


def _under(row: Row, names: tuple[str, ...]) -> Iterable[Row]:
    """What stands in the lists of these names, one within the other: in SQuAD's own files articles hold paragraphs, and
    paragraphs hold questions about one context."""
    if not names or isinstance(row.values, BadRow):
        yield row
        return
    entries = row.values.get(names[0])
    if not isinstance(entries, list):
        yield Row(row.place, BadRow(names[0], "is missing or not a list"))
        return
    for i, entry in enumerate(entries):
        if isinstance(entry, dict):
            entry = {"context": row.values.get("context"), **entry}
        yield from _under(_object(f"{row.place}.{names[0]}[{i}]", entry), names[1:])


def _jsonl(text: str, source: str) -> list[Row]:
    rows = []
    for line_number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        number = len(rows) + 1
        place = f"row {number}" if number == line_number else f"row {number} (line {line_number})"
        try:
            rows.append(_object(place, json.loads(line, object_pairs_hook=partial(_fields, f"{source}, {place}"))))
        except RecursionError:
            rows.append(Row(place, BadRow(None, "is nested too deeply")))
        except json.JSONDecodeError as error:
            raise _not_json(f"{source}, {place}", error, "write one complete JSON object a line") from None
    return rows


def _csv(text: str, source: str) -> list[Row]:
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[Row] = []
    try:
        header = next(reader)
        _require_once(header, source)
        for cells in reader:
            if not cells:
                continue
            place = f"row {len(rows) + 1} (line {reader.line_num})"
            wrong = BadRow(None, f"has {len(cells)} cells under {len(header)} column names")
            fits = len(cells) == len(header)
            rows.append(Row(place, dict(zip(header, cells, strict=True)) if fits else wrong))
    except csv.Error as error:
        raise DataError(
            f"{source}, line {reader.line_num}: not CSV",
            str(error),
            "put cells that hold commas, quotes or line breaks in double quotes, and close every quote",
        ) from None
    return rows


def _parquet(content: bytes, source: str) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(pyarrow.BufferReader(content))
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{source} is not a parquet file", str(error), "write or download it again") from None
    _require_once(table.column_names, source)
    rows = table.to_pylist()
    return [Row(f"row {i}", {k: _own(v) for k, v in values.items()}) for i, values in enumerate(rows, 1)]


def _hub_rows(source: str, split: str) -> list[Row]:
    from llamanb import hub

    name, _, config = source.partition(":")
    if not hub.is_name(name):
        raise DataError(
            f"{source!r} is neither a file nor a dataset on the Hub",
            f"no such file, and a Hub name is `name` or `owner/name` (files end in {', '.join(READABLE)})",
            "check the path, or the name on https://huggingface.co/datasets",
        )
    hub.require_network(f"dataset {name}")
    import datasets

    datasets.disable_progress_bars()
    try:
        rows = list(datasets.load_dataset(name, config or None, split=split))
    except Exception as error:  # its builders raise anything; what they say is passed on
        raise hub.explain(error, name, kind="dataset") from None
    return [Row(f"row {i}", {k: _own(v) for k, v in values.items()}) for i, values in enumerate(rows, 1)]


def _own(value: object) -> object:
    """Arrow gives every object the fields of all others, null; here without them."""
    if isinstance(value, dict):
        return {name: _own(inner) for name, inner in value.items() if inner is not None}
    return [_own(inner) for inner in value] if isinstance(value, list) else value
