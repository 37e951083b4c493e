import json
import re

import pytest

from llamanb.data.read import read_rows
from llamanb.errors import DataError, NoNetworkError


def _write(tmp_path, name: str, content: str | bytes):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


ROWS = [{"text": "one"}, {"text": "two"}]


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    sources = [
        _write(tmp_path, "a.json", json.dumps(ROWS)),
        _write(tmp_path, "b.json", json.dumps({"version": 1, "data": ROWS})),
        _write(tmp_path, "a.jsonl", "\n".join(map(json.dumps, ROWS))),
        _write(tmp_path, "lines.json", "\n".join(map(json.dumps, ROWS)) + "\n"),
        _write(tmp_path, "a.csv", "text\none\ntwo\n"),
        _write(tmp_path, "bom.csv", b"\xef\xbb\xbftext\r\none\r\ntwo\r\n"),
        str(tmp_path / "a.parquet"),
    ]
    for source in sources:
        rows, bad = read_rows(source)
        assert [row.values for row in rows] == ROWS, source
        assert [row.place.split(" (")[0] for row in rows] == ["row 1", "row 2"]
        assert bad == []


def test_rows_are_numbered_as_an_editor_shows_them(tmp_path):
    rows, _ = read_rows(_write(tmp_path, "a.jsonl", '{"text": "one"}\n\n{"text": "two"}\n'))
    assert rows[1].place == "row 2 (line 3)"
    rows, _ = read_rows(_write(tmp_path, "a.csv", 'text\n"one\nand a half"\ntwo\n'))
    assert rows[1].place == "row 2 (line 4)"


def test_rows_that_are_no_objects_are_told_not_dropped(tmp_path):
    rows, bad = read_rows(_write(tmp_path, "a.json", '[{"text": "one"}, 3, null]'))
    assert len(rows) == 1
    assert bad == [
        "row 2: is a int, not an object with named fields",
        "row 3: is a NoneType, not an object with named fields",
    ]


def test_squads_own_layout_is_unfolded(tmp_path):
    qas = [{"question": "q1", "answers": []}, {"question": "q2", "answers": []}]
    content = {"version": "v2.0", "data": [{"title": "t", "paragraphs": [{"context": "c", "qas": qas}]}]}
    rows, bad = read_rows(_write(tmp_path, "squad.json", json.dumps(content)))
    assert [(r.place, r.values["context"], r.values["question"]) for r in rows] == [
        ("data[0].paragraphs[0].qas[0]", "c", "q1"),
        ("data[0].paragraphs[0].qas[1]", "c", "q2"),
    ]
    assert bad == []


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.json", "", "no rows"),
        ("a.jsonl", " \n\n", "no rows"),
        ("a.csv", "", "no rows"),
        ("a.json", "[]", "no rows"),
        ("a.json", '[{"text": "one"}, {"te', "line 1, column 20: not JSON"),
        ("a.jsonl", '{"text": "one"}\n{"text": "tw', "row 2, column 10: not JSON"),
        ("a.json", '{"a": 1}', "not a list of rows"),
        ("a.json", '"text"', "not a list of rows"),
        ("a.json", "[" * 100_000, "nested too deeply"),
        ("a.json", '[{"text": "a", "text": "b"}]', "column 'text' stands twice"),
        ("a.jsonl", '{"text": "a", "text": "b"}', "column 'text' stands twice"),
        ("a.csv", "text,text\n1,2\n", "column 'text' stands twice"),
        ("a.csv", 'text\n"never closed\n', "not CSV"),
        ("a.json", b'[{"text": "\xff"}]', "line 1: not UTF-8"),
        ("a.csv", b"text\none\n\xe9t\xe9\n", "line 3: not UTF-8"),
        ("a.parquet", b"PAR1 not really", "not a parquet file"),
        ("a.txt", "text", "not a kind of file"),
    ],
)
def test_unreadable_files_are_one_error(tmp_path, name, content, told):
    with pytest.raises(DataError, match=re.escape(told)):
        read_rows(_write(tmp_path, name, content))


def test_missing_file_names_what_is_there(tmp_path):
    _write(tmp_path, "rows.jsonl", "{}")
    with pytest.raises(DataError, match=re.escape("there is: rows.jsonl")):
        read_rows(str(tmp_path / "row.jsonl"))


def test_folder_names_its_files(tmp_path):
    _write(tmp_path, "rows.jsonl", "{}")
    with pytest.raises(DataError, match=r"name one of its files: rows\.jsonl"):
        read_rows(str(tmp_path))


def test_neither_file_nor_name():
    with pytest.raises(DataError, match="neither a file nor a dataset"):
        read_rows("three/part/name")


def test_address_without_a_network_is_named():
    with pytest.raises(NoNetworkError, match="cannot be reached"):
        read_rows("http://127.0.0.1:9/rows.jsonl")


def test_address_is_read(tmp_path):
    import http.server
    import threading

    _write(tmp_path, "rows.jsonl", '{"text": "one"}')
    handler = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *a: None})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), lambda *a: handler(*a, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        rows, _ = read_rows(f"http://127.0.0.1:{server.server_port}/rows.jsonl")
        assert rows[0].values == {"text": "one"}
        with pytest.raises(DataError, match="404"):
            read_rows(f"http://127.0.0.1:{server.server_port}/other.jsonl")
    finally:
        server.shutdown()


def test_a_parquet_file_gives_no_object_what_another_one_has(tmp_path):
    """Arrow's objects have the fields of all."""
    import pyarrow
    import pyarrow.parquet

    def row(name, **arguments):
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        return {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "tool_calls": [call]}], "id": None}

    rows = [row("weather", city="Oslo"), row("free", day="Friday", hours=[{"at": 9}, {"to": 10}])]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "calls.parquet")
    read, bad = read_rows(str(tmp_path / "calls.parquet"))
    assert bad == []
    assert [one.values for one in read] == rows, "a column that is null is still there"
