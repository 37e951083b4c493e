"""Forty ways in which rows are wrong: what each file holds, and what its one error must name. `tests/unit` checks the
errors; `benchmarks/malformed.py` how soon a user sees them."""

from __future__ import annotations

import io
import json
from pathlib import Path

GOOD = {"instruction": "Say it", "output": "It"}


def _jsonl(*rows) -> str:
    return "\n".join(json.dumps(row) for row in rows)


def _rows(bad: dict, count: int = 4) -> str:
    """Good rows and, as the third, a bad one."""
    rows = [{"instruction": f"Say {i}", "output": f"{i}"} for i in range(count)]
    return _jsonl(*rows[:2], bad, *rows[2:])


def _turns(*turns) -> str:
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    return _jsonl(good, {"messages": list(turns)})


def _squad(article: dict) -> str:
    return json.dumps({"version": "v2.0", "data": [article]})


def _parquet() -> bytes:
    import pyarrow
    import pyarrow.parquet

    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"instruction": ["a", "b"], "output": ["c", None]}), buffer)
    return buffer.getvalue()


USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
LONG = "x" * 5000
CASES: dict[str, tuple[str, str | bytes | None, tuple[str, ...]]] = {
    # name: (file, content, what the error names)
    "wrong columns": ("a.jsonl", _jsonl({"colour": "red", "size": 3}), ("row 1", "'colour'", "instruction, output")),
    "columns in the wrong case": ("a.jsonl", _jsonl({"Instruction": "a", "Output": "b"}), ("row 1", "'Instruction'")),
    "null": ("a.jsonl", _rows({"instruction": "a", "output": None}), ("row 3", "'output'", "null")),
    "empty answer": ("a.jsonl", _rows({"instruction": "a", "output": ""}), ("row 3", "'output'", "empty")),
    "blank prompt": ("a.jsonl", _rows({"instruction": " \n", "output": "b"}), ("row 3", "'instruction'", "empty")),
    "column missing": ("a.jsonl", _rows({"instruction": "a"}), ("row 3", "'output'", "missing")),
    "number for text": ("a.jsonl", _rows({"instruction": 7, "output": "b"}), ("row 3", "'instruction'", "int")),
    "list for text": ("a.jsonl", _rows({"instruction": ["a"], "output": "b"}), ("row 3", "'instruction'", "list")),
    "NaN for text": ("a.jsonl", '{"text": "a"}\n{"text": NaN}', ("row 2", "'text'", "float")),
    "not UTF-8": ("a.jsonl", b'{"text": "caf\xe9"}', ("line 1", "UTF-8")),
    "UTF-16": ("a.csv", "text\none".encode("utf-16"), ("line 1", "UTF-8")),
    "truncated JSON": ("a.json", '[{"text": "a"}, {"text": "b', ("line 1, column", "ends early")),
    "truncated line": ("a.jsonl", '{"text": "a"}\n{"text": "b', ("row 2, column", "ends early")),
    "single quotes": ("a.jsonl", "{'text': 'a'}", ("row 1, column 2", "not JSON")),
    "trailing comma": ("a.json", '[{"text": "a"},]', ("line 1, column", "not JSON")),
    "one object": ("a.json", '{"instruction": "a", "output": "b"}', ("not a list of rows", "instruction, output")),
    "a string": ("a.json", '"hello"', ("not a list of rows",)),
    "rows are lists": ("a.json", '[["a", "b"]]', ("row 1", "list")),
    "rows are strings": ("a.jsonl", '"a"\n"b"', ("row 1", "str")),
    "nested too deeply": ("a.json", "[" * 50_000, ("nested too deeply",)),
    "duplicate columns, JSON": ("a.jsonl", '{"text": "a", "text": "b"}', ("row 1", "'text'", "twice")),
    "duplicate columns, CSV": ("a.csv", "text,text\na,b\n", ("'text'", "twice")),
    "too many cells": ("a.csv", "text\na\nb,c\n", ("row 2 (line 3)", "2 cells")),
    "quote never closed": ("a.csv", 'text\n"a\nb\n', ("line", "not CSV")),
    "empty file": ("a.jsonl", "", ("no rows",)),
    "empty list": ("a.json", "[]", ("no rows",)),
    "header only": ("a.csv", "instruction,output\n", ("no rows",)),
    "one row only": ("a.jsonl", _jsonl(GOOD), ("1 usable row", "eval_rows = 0")),
    "all rows ask the same": ("a.jsonl", _jsonl(GOOD, GOOD, GOOD), ("one question",)),
    "all prompt, no answer": ("a.jsonl", _turns(USER), ("row 2", "'messages'", "no assistant turn")),
    "answer first": ("a.jsonl", _turns(ASSISTANT, USER), ("row 2", "'messages'", "turn 1")),
    "empty assistant turn": ("a.jsonl", _turns(USER, {**ASSISTANT, "content": ""}), ("row 2", "turn 2")),
    "unknown role": ("a.jsonl", _turns({"role": "robot", "content": "a"}), ("row 2", "'robot'")),
    "messages nested wrongly": ("a.jsonl", _turns([USER, ASSISTANT]), ("row 2", "'messages'", "turn 1 is a list")),
    "picture in a turn": ("a.jsonl", _turns({"role": "user", "content": [{"type": "image"}]}), ("row 2", "turn 1")),
    "control token": ("a.jsonl", _rows({"instruction": "a<|eot_id|>", "output": "b"}), ("row 3", "<|eot_id|>")),
    "longer than max_length": ("a.jsonl", _rows({"instruction": "a", "output": LONG}), ("row 3", "max_length =")),
    "SQuAD nested wrongly": ("a.json", _squad({"paragraphs": {}}), ("data[0]", "'paragraphs'")),
    "SQuAD answers as text": (
        "a.json",
        _squad({"paragraphs": [{"context": "c", "qas": [{"question": "q", "answers": "a"}]}]}),
        ("data[0].paragraphs[0].qas[0]", "'answers'"),
    ),
    "null in parquet": ("a.parquet", _parquet, ("row 2", "'output'", "null")),
    "not parquet": ("a.parquet", b"PAR1", ("not a parquet file",)),
    "text file": ("a.txt", "hello", (".txt", ".jsonl")),
    "a folder": ("", None, ("is a folder",)),
    "no such file": ("missing.jsonl", None, ("does not exist",)),
    "neither file nor name": ("a b/c d", None, ("neither a file nor",)),
    "address without a network": ("http://127.0.0.1:9/a.jsonl", None, ("cannot be reached",)),
    "Hub name without a network": ("owner/dataset", None, ("out of reach",)),
}


def source(name: str, folder: Path) -> str:
    """Writes the file of a case and returns the `dataset` to give."""
    file, content, _ = CASES[name]
    if content is None:
        local = file in ("", "missing.jsonl")
        return str(folder / file) if local else file
    content = content() if callable(content) else content
    (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(folder / file)
