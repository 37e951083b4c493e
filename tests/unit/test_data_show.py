"""The view of a row's tokens: complete, true to the labels, and nothing in it but text."""

import html
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamanb import Recipe, load_data
from llamanb.data import first_rows
from llamanb.data.encode import IGNORE, Encoded, Encoder
from llamanb.data.formats import Example
from llamanb.data.show import MOST_TOKENS, Tokens
from llamanb.errors import DataError
from llamanb.html import marked

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "' onload='x",
    "$x$ and $$y$$ and \\(z\\)",
    "a\x00b\x1b[31mc\u202ed",
    "/home/somebody/<b>.jsonl",
    "</u></span></div><script>",
]


@pytest.fixture(scope="module")
def show(tokenizer):
    def made(question: str, answer: str) -> Tokens:
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return Tokens(tokenizer, Encoder(tokenizer, 100_000).encode(Example("row 1", "messages", messages)))

    return made


def text_of(page: str, tag: str) -> str:
    """What stands in the elements of one kind, as a reader sees it."""
    found = re.findall(rf"<{tag} style='background[^>]*>(.*?)</{tag}>", page.replace("<span>$</span>", "$"), re.DOTALL)
    return html.unescape("".join(found))


def test_learned_tokens_are_underlined_and_the_others_are_not(show):
    shown = show("Why?", "So it is.")
    page = shown._repr_html_()
    assert text_of(page, "u") == "learned: green, underlined\n" + "So·it·is.<|eot_id|>"
    assert "user<|end_header_id|>↵\n↵\nWhy?<|eot_id|>" in text_of(page, "span")
    assert "So" not in text_of(page, "span")
    for form in (page, str(shown)):
        assert "10 of " in form  # nine letters and the end
        assert "tokens are learned" in form
        assert "· is a space, ↵ a new line, ⇥ a tab" in form
    assert "«So·it·is.<|eot_id|>»" in str(shown)


def test_spaces_lines_and_tabs_are_seen(show):
    assert "«a··b⇥c↵\nd<|eot_id|>»" in str(show("x", "a  b\tc\nd"))


@pytest.mark.parametrize("hostile", HOSTILE)
def test_text_of_a_row_is_text_only(show, hostile):
    shown = show(f"say {hostile}", f"{hostile}!")
    page = shown._repr_html_()
    assert {*re.findall(r"</?(\w+)", page)} == {"div", "span", "u"}
    assert not re.search(r"[\x00-\x08\x0b-\x1f\u202e]", page + str(shown))
    assert "$$" not in page
    assert "\\(" not in page
    without = re.sub(r"<(div|span|u) style='[^'<>]*'>|<span>|</(div|span|u)>", "", page)
    assert not re.search("[<>'\"]", without), "every other mark is escaped"


@pytest.mark.parametrize("word", ["日本語", "🦙🦙", "naïve", "नमस्ते"])
def test_a_letter_of_several_tokens_is_one_piece(show, word):
    shown = show(word, word)
    assert "\ufffd" not in str(shown)
    assert f"«{word}<|eot_id|>»" in str(shown)


def test_the_middle_of_a_long_row_is_left_out_and_counted(show):
    shown = show("x" * 500, "y" * 600)
    total = int(re.search(r"of ([\d,]+) tokens", str(shown))[1].replace(",", ""))
    assert len(shown.head) + len(shown.tail) == MOST_TOKENS
    left_out, learned = map(int, re.search(r"… (\d+) tokens are not shown, (\d+) of them", shown.gap).groups())
    assert left_out == total - MOST_TOKENS
    assert learned == 601 - len(shown.tail)
    assert shown.gap in shown._repr_html_()
    assert str(shown).endswith("y<|eot_id|>»")
    assert show("x", "y").gap == ""


@given(st.text(max_size=40), st.integers(0, 40))
def test_the_pieces_are_the_text_whatever_it_is(tokenizer, text, learned_from):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    labels = [i if n >= learned_from else IGNORE for n, i in enumerate(ids)]
    shown = Tokens(tokenizer, Encoded(ids, labels))
    assert str(shown)
    assert len(shown.head) <= len(ids)
    if text.isalnum():
        assert "".join(piece for piece, _ in shown.head) == text


def test_marked_pieces_keep_their_order():
    assert re.sub("<[^>]*>", "", marked([("a", True), ("b", False), (3, True)])) == "ab3"


def test_data_shows_its_rows_and_their_lengths(mini, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,completion\none,1\ntwo,22\n")
    data = load_data(Recipe(model=str(mini), dataset=str(path), eval_rows=0))
    assert data.lengths == [len(row.input_ids) for row in data.train]
    assert data.lengths[1] - data.lengths[0] == 1
    assert "«1<|eot_id|>»" in str(data.tokens())
    assert "«22<|eot_id|>»" in str(data.tokens(1))


def test_first_rows_say_who_says_what(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "Once"}\n{"text": null}\n' + '{"text": "more"}\n' * 9)
    caption, _head, _line, *rows = str(first_rows(str(path))).splitlines()
    assert caption == f"{path}: plain text"
    assert rows[0].split() == ["row", "1", "text", "Once"]
    assert rows[1].split() == ["row", "3", "text", "more"]
    assert len(rows) == 5


def test_first_rows_show_calls_and_refuse_what_is_no_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    call = '{"role": "assistant", "tool_calls": [{"function": {"name": "weather", "arguments": {}}}]}'
    path.write_text('{"messages": [{"role": "user", "content": "Rain?"}, ' + call + "]}")
    assert "weather" in str(first_rows(str(path)))
    path.write_text('{"text": ""}')
    with pytest.raises(DataError, match="column 'text': is empty"):
        first_rows(str(path))
