import pytest

from llamanb.errors import LlamanbError
from llamanb.html import Table, escape_text


@pytest.mark.parametrize(
    "hostile",
    ["<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "</td><script>", "' onload='x", '"><svg/onload=x>'],
)
def test_markup_shows_as_text(hostile):
    for html in (escape_text(hostile), Table(["a"], [[hostile]], hostile)._repr_html_()):
        assert "<script" not in html
        assert "<img" not in html
        assert "<svg" not in html


def test_quotes_cannot_end_an_attribute():
    assert "'" not in escape_text("'")
    assert '"' not in escape_text('"')


def test_mathjax_sees_no_delimiter():
    assert "$$" not in escape_text("$$x$$")
    assert "\\(" not in escape_text("\\(x\\)")


def test_control_characters_are_seen():
    assert escape_text("a\x00b\x1bc\u202ed") == "a\ufffdb\ufffdc\ufffdd"
    assert escape_text("a\tb\nc") == "a\tb\nc"


def test_table_lines_up_as_text():
    lines = str(Table(["name", "n"], [["a", 1], ["long name", 22]], "caption")).splitlines()
    assert lines[0] == "caption"
    assert [line.index(n) for line, n in zip(lines[3:], ("1", "22"), strict=True)] == [11, 11]


def test_an_error_says_what_why_and_how_to_fix():
    error = LlamanbError("it broke", "it was old", "buy a new one")
    assert str(error) == "it broke\n  why: it was old\n  fix: buy a new one"
    assert error._render_traceback_() == ["LlamanbError: it broke", "  why: it was old", "  fix: buy a new one"]
