"""How an error shows: a card where somebody sits, plain text in a log, and itself whatever becomes of its card."""

import json
import sys
from types import SimpleNamespace

import IPython
import nbformat
import papermill
import pytest
from jupyter_client.manager import start_new_kernel

from llamanb import Recipe, errors, plan
from llamanb.errors import DataError, LlamanbError
from llamanb.html import Bar, Table
from llamanb.planner import DoesNotFitError

LINES = ["DataError: it broke", "  why: it was old", "  fix: buy a new one"]
TABLE, BAR = Table(["part", "age"], [["wheel", 99]]), Bar({"weights": 6.0}, 4.0, "GiB")
BROKEN = """\
from llamanb.errors import DataError
error = DataError("it broke", "it was old", "buy a new one")
"""


class Detailed(LlamanbError):
    details = (TABLE, BAR)


class Unreadable(LlamanbError):
    @property
    def details(self):
        raise ValueError("no details")


class HalfReadable(LlamanbError):
    details = (TABLE, object(), BAR)  # an object has no _repr_html_


def make(kind: type = DataError) -> LlamanbError:
    return kind("it broke", "it was old", "buy a new one")


def rendered(error: LlamanbError) -> list[str]:
    """What IPython is given while it handles the error."""
    try:
        raise error
    except LlamanbError:
        return error._render_traceback_()


@pytest.fixture
def seat(monkeypatch) -> SimpleNamespace:
    """A notebook where somebody sits, and the cards displayed in it."""
    seat = SimpleNamespace(kernel=SimpleNamespace(_allow_stdin=True), cards=[])
    monkeypatch.setattr(IPython, "get_ipython", lambda: seat)
    monkeypatch.setattr(IPython.display, "display", lambda card, raw: seat.cards.append(card))
    return seat


def test_it_says_what_why_and_how_to_fix():
    assert str(make()) == "it broke\n  why: it was old\n  fix: buy a new one"
    assert make()._render_traceback_() == LINES


def test_the_card_says_the_same_in_the_same_order():
    html = make(Detailed)._repr_html_()
    words = ("Detailed", "it broke", "why", "it was old", "how to fix", "buy a new one", "wheel", "2.00 GiB too much")
    assert sorted(words, key=html.index) == list(words)
    assert html.startswith("<div role='alert'")
    assert "role='heading'" in html


def test_somebody_gets_the_card_and_one_line(seat):
    assert rendered(make()) == LINES[:1]
    (card,) = seat.cards
    assert card == {"text/plain": "\n".join(LINES), "text/html": make()._repr_html_()}


def test_a_second_look_for_the_history_shows_nothing(seat):
    error = make()
    rendered(error)
    assert error._render_traceback_() == LINES
    assert len(seat.cards) == 1


def test_where_nobody_sits_all_lines_follow_the_card(seat):
    seat.kernel._allow_stdin = False
    assert rendered(make()) == LINES
    assert len(seat.cards) == 1


def test_a_terminal_gets_lines_and_no_card(seat):
    del seat.kernel
    assert rendered(make()) == LINES
    assert seat.cards == []


def test_details_stand_under_the_lines():
    lines = make(Detailed)._render_traceback_()
    assert lines[1:] == [*LINES[1:], "", *str(TABLE).splitlines(), "", *str(BAR).splitlines()]


def test_a_plan_that_does_not_fit_shows_what_would_and_where_the_memory_goes(seat):
    with pytest.raises(DoesNotFitError) as caught:
        plan(Recipe(model="meta-llama/Llama-3.3-70B-Instruct", weights="resident"), "T4")
    error = caught.value
    assert error._repr_html_().endswith(error.changes._repr_html_() + error.plan.bar()._repr_html_() + "</div>")
    lines = "\n".join(error._render_traceback_())
    assert str(error.changes) in lines
    assert str(error.plan.bar()) in lines
    error.changes.rows.clear()
    assert error.details[0].summary == error.plan.bar().summary, "no table without a row"


@pytest.mark.parametrize(("kind", "kept"), [(Unreadable, ()), (HalfReadable, (TABLE,))])
def test_what_cannot_be_drawn_is_left_out(seat, kind, kept):
    assert rendered(make(kind)) == [f"{kind.__name__}: it broke"]
    (card,) = seat.cards
    assert "buy a new one" in card["text/html"]
    assert all(piece._repr_html_() in card["text/html"] for piece in kept)


@pytest.mark.parametrize("broken", ["alert", "display", "kernel", "IPython"])
def test_an_error_in_drawing_the_card_never_hides_the_error(seat, monkeypatch, broken):
    def fail(*args, **kwargs):
        raise RuntimeError("cannot draw")

    if broken == "alert":
        monkeypatch.setattr(errors, "alert", fail)
    elif broken == "display":
        monkeypatch.setattr(IPython.display, "display", fail)
    elif broken == "kernel":
        seat.kernel = object()  # not ipykernel's
    else:
        monkeypatch.setitem(sys.modules, "IPython", None)
    assert rendered(make()) == LINES


def test_terminal_escapes_and_lone_surrogates_do_not_reach_a_log():
    error = DataError("row \x1b[31m3", "\u202ereversed", "\ud800\r\nnext")
    assert str(error) == "row \ufffd[31m3\n  why: \ufffdreversed\n  fix: \ufffd\nnext"
    assert error.what == "row \x1b[31m3", "the parts are as they were given"
    str(error).encode()


@pytest.fixture
def kernel(tmp_path, monkeypatch) -> str:
    """The name of a kernel of this interpreter."""
    folder = tmp_path / "jupyter" / "kernels" / "this-python"
    folder.mkdir(parents=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": argv, "display_name": "the interpreter of the tests", "language": "python"}
    (folder / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    return folder.name


def test_a_kernel_shows_one_card_and_one_line(kernel):
    manager, client = start_new_kernel(kernel_name=kernel)
    told = []
    try:
        client.execute_interactive(BROKEN + "raise error", allow_stdin=True, output_hook=told.append, timeout=60)
        client.execute_interactive("error", output_hook=told.append, timeout=60)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    shows = ("display_data", "error", "execute_result", "stream")
    raised, failed, caught = (m["content"] for m in told if m["msg_type"] in shows)
    assert raised["data"] == caught["data"] == {"text/plain": "\n".join(LINES), "text/html": make()._repr_html_()}
    assert failed["traceback"] == LINES[:1]
    assert failed["evalue"] == str(make())


def test_papermill_fails_with_what_why_and_fix_in_its_exception_and_in_its_log(kernel, tmp_path, caplog):
    cells = [nbformat.v4.new_code_cell(BROKEN + "raise error"), nbformat.v4.new_code_cell("print('went on')")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "broken.ipynb")
    caplog.set_level("INFO", logger="papermill")
    with pytest.raises(papermill.PapermillExecutionError) as caught:
        papermill.execute_notebook(
            tmp_path / "broken.ipynb", tmp_path / "ran.ipynb", kernel_name=kernel, progress_bar=False, log_output=True
        )
    assert "\n".join(LINES) in str(caught.value)
    assert (caught.value.ename, caught.value.evalue) == ("DataError", str(make()))
    assert "\n".join(LINES) in caplog.text
    assert "went on" not in caplog.text
    outputs = [output for cell in nbformat.read(tmp_path / "ran.ipynb", 4).cells for output in cell.get("outputs", ())]
    assert [output.output_type for output in outputs] == ["display_data", "error"]
    assert outputs[0].data["text/html"] == make()._repr_html_()
