import pytest

from llamanb.html import Bar, Table, alert, escape_text, join, paragraph


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


HIDING = (
    "\x00",
    "\x1b",
    "\x9b",
    "\r",
    "\x85",
    "\u202e",
    "\u2066",
    "\u200b",
    "\u2028",
    "\ufeff",
    "\U000e0041",
    "\udfff",
)


@pytest.mark.parametrize("character", HIDING, ids=ascii)
def test_what_hides_reorders_or_breaks_text_is_seen(character):
    hostile = f"a{character}b"
    table, bar = Table([hostile], [[hostile]], hostile), Bar({hostile: 1.0}, 2.0, hostile, hostile)
    assert escape_text(hostile) == "a\ufffdb"
    for text in (str(table), str(bar), join(table, bar)):
        assert character not in text
        assert "a\ufffdb" in text
        text.encode()


@pytest.mark.parametrize(
    "text", ["a\tb\nc", "a\u00a0b", "\u06cc\u200c\u06cc", "\U0001f469\u200d\U0001f52c", "é", "\ue000"]
)
def test_what_is_written_with_such_characters_stays_as_it_is(text):
    assert escape_text(text) == text


def test_a_windows_line_break_is_one():
    assert escape_text("a\r\nb") == "a\nb"


def test_tooltips_and_names_for_screen_readers_hold_no_markup():
    html = Bar({"$a": 1.0}, 2.0, "$", "")._repr_html_()
    assert "title='$a: 1.00 $'" in html
    assert "aria-label='1.00 of 2.00 $: 1.00 $ left'" in html


def test_table_lines_up_as_text():
    lines = str(Table(["name", "n"], [["a", 1], ["long name", 22]], "caption")).splitlines()
    assert lines[0] == "caption"
    assert [line.index(n) for line, n in zip(lines[3:], ("1", "22"), strict=True)] == [11, 11]


def test_a_card_says_what_it_is_without_its_colour():
    html = alert("DataError", "it broke", {"why": "it was <old>"}, "<hr>")
    assert html.startswith("<div role='alert'")
    assert "role='heading' aria-level='3'" in html
    assert html.index("DataError") < html.index("it broke") < html.index("<b>why</b>") < html.index("&lt;old&gt;")
    assert html.endswith("<hr></div>")


def test_a_long_word_breaks_where_the_page_ends():
    assert "overflow-wrap:anywhere" in paragraph("a" * 1000)


HOSTILE = ("<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "' onload='x", '"><svg/onload=x>')


def test_a_bar_shows_its_parts_to_scale_and_what_is_left():
    text = str(Bar({"weights": 4.0, "activations": 2.0}, 8.0, "GiB", "memory"))
    caption, row, summary, *names = text.splitlines()
    assert caption == "memory"
    assert row == "a" * 30 + "b" * 15 + "." * 15 + "|"
    assert summary == "6.00 of 8.00 GiB: 2.00 GiB left"
    assert [name.split() for name in names] == [["a", "4.00", "weights"], ["b", "2.00", "activations"]]


def test_what_goes_over_the_limit_is_marked():
    bar = Bar({"weights": 6.0, "activations": 6.0}, 8.0, "GiB")
    row, summary, *_ = str(bar).splitlines()
    assert row == "a" * 45 + "b" * 15 + "|" + "b" * 30
    assert summary == "12.00 of 8.00 GiB: 4.00 GiB too much"
    html = bar._repr_html_()
    assert "4.00 GiB too much" in html
    assert "left:66.67%" in html  # the limit's line, and the bar goes on behind it
    assert html.count("width:50.00%") == 2


def test_a_bar_far_over_its_limit_ends_somewhere():
    row = str(Bar({"weights": 1e6}, 1.0, "GiB")).splitlines()[0]
    assert len(row) == 2 * Bar.WIDTH + 1


def test_the_colours_of_a_bar_fill_it_up_to_the_limit():
    html = Bar({"weights": 4.0, "activations": 2.0}, 8.0, "GiB", "memory")._repr_html_()
    assert ("width:50.00%" in html, "width:25.00%" in html, "left:100.00%" in html) == (True, True, True)
    assert "aria-label='6.00 of 8.00 GiB: 2.00 GiB left'" in html
    assert "weights: 4.00 GiB" in html


@pytest.mark.parametrize("parts", [{}, {"nothing": 0.0}, {"weights": 1.0}])
def test_a_limit_of_zero_divides_nothing(parts):
    bar = Bar(parts, 0.0, "GiB")
    assert "of 0.00 GiB" in str(bar)
    assert "nan" not in bar._repr_html_()


def test_many_parts_have_colours_again():
    bar = Bar({f"part {i}": 1.0 for i in range(15)}, 15.0, "GiB")
    assert bar._repr_html_().count(Bar.COLORS[0]) == 4  # two parts, a piece and a name each
    assert "part 14" in str(bar)


@pytest.mark.parametrize("hostile", HOSTILE)
def test_names_and_captions_of_a_bar_show_as_text(hostile):
    html = Bar({hostile: 1.0}, 2.0, hostile, hostile)._repr_html_()
    assert "<script" not in html
    assert "<img" not in html
    assert "<svg" not in html
    assert "onload='" not in html


def test_pieces_are_joined_in_order_and_none_is_left_out():
    table, bar = Table(["a"], [["1"]]), Bar({"b": 1.0}, 1.0, "GiB")
    assert join(table, None, bar) == table._repr_html_() + bar._repr_html_()
    assert join(None) == ""
