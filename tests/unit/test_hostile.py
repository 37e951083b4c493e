"""Text stays text: hostile strings through everything of the package that shows text, as HTML, Markdown and plain.

pytestmark = pytest.mark.whole

And a lint: no module but html.py writes markup, so that there is one place to check.
"""

import ast
import dataclasses
import functools
import os
import re
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import ipywidgets
import mistune
import pytest
import yaml

from llamanb import REPOSITORY, Card, Recipe, gpu_check, hub, plan
from llamanb import html as pieces
from llamanb.chat import Chat
from llamanb.data.show import Tokens
from llamanb.errors import LlamanbError, RecipeError
from llamanb.export.model_card import card_of
from llamanb.export.push import Push
from llamanb.html import Bar, Table, visible
from llamanb.planner import DoesNotFitError
from llamanb.plots import Picture
from llamanb.report import report
from llamanb.run import Run, new_folder
from llamanb.scores import Comparison, RowScore, Scores, Verdict
from llamanb.timeline import Sample, Step, Timeline
from llamanb.trials import Attention
from llamanb.ui import form as form_module
from llamanb.ui import recipe_form
from tests.unit.fake_gpu import FakeNvml, FakeTorch, t4
from tests.unit.hostile import STRINGS

PACKAGE = Path(__file__).parents[2] / "llamanb"
HARMLESS = "harmless"
LLAMA = Recipe(model="meta-llama/Llama-3.2-1B-Instruct")
REACHES_OUT = {"open", "os.listdir", "os.scandir", "os.system", "subprocess.Popen", "socket.connect", "webbrowser.open"}


# What shows text


@functools.cache
def a_plan():
    return plan(LLAMA, "T4")


def hostile_plan(text):
    made = a_plan()
    others = tuple(dataclasses.replace(other, verdict=text) for other in made.alternatives)
    reasons = dict.fromkeys(made.reasons, text)
    recipe = dataclasses.replace(made.recipe)
    for name in ("model", "dataset"):
        object.__setattr__(recipe, name, text)  # past its checks
    card = dataclasses.replace(made.card, name=text, source=text)
    return made.replace(recipe=recipe, card=card, reasons=reasons, basis=text, alternatives=others, kernel=text)


def error(text):
    return LlamanbError(text, text, text)


def does_not_fit(text):
    return DoesNotFitError(text, text, text, hostile_plan(text), Table([text], [[text]], text))


def comparison(text):
    scores = Scores((RowScore(1.0, 1, text, True, True, 0.5),) * 2)
    return Comparison(scores, scores, (text, text), (text, text))


def run(text):
    timeline = Timeline(text, peaks_gib={"forward": 1.0})
    made = Run(Path("runs/x"), hostile_plan(text), timeline, comparison(text), status=text, versions={text: text})
    picture = SimpleNamespace(png=b"", words=text)
    vars(made).update(dict.fromkeys(("loss_plot", "memory_plot", "peaks_plot"), picture))
    return made


class Shown:
    """HTML that is a function's, not an object's."""

    def __init__(self, *markup):
        self._repr_html_ = lambda: "".join(markup)


def gpu_memory(text):
    return gpu_check.memory_views(FakeTorch.without_gpu(), None, FakeNvml(t4(name=text)), None, "")


def gpu_report(text):
    section = gpu_check.Section(Table([text], [[text]], text), (text, gpu_check.one_line(error(text))))
    return gpu_check.GpuCheck(None, *[section] * 7)


def tokens(text):
    row = SimpleNamespace(input_ids=[0, 1], labels=[-100, 1], trained_tokens=1)
    return Tokens(SimpleNamespace(decode=lambda ids: text * len(ids)), row)


def conversation(text):
    chat = Chat(SimpleNamespace(), None)
    chat.messages = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
    chat._answered_by = [text]
    return chat


SINKS = {
    "table": lambda text: Table([text, text], [[text, text]], text),
    "bar": lambda text: Bar({text: 1.0, text + "2": 2.0}, 2.0, text, text),
    "text": lambda text: Shown(pieces.paragraph(text), pieces.heading(text), pieces.escape_text(text)),
    "picture": lambda text: Shown(pieces.image(b"", text)),
    "progress": lambda text: Shown(pieces.progress(0.5, text)),
    "marked": lambda text: Shown(pieces.marked([(text, True), (text, False)])),
    "error": error,
    "error of a plan": does_not_fit,
    "plan": hostile_plan,
    "card": lambda text: Card(name=text, capability=None, source=text),
    "comparison": comparison,
    "run": run,
    "report": lambda text: Shown(report(run(text))),
    "push": lambda text: Push(
        "me/x", True, text, {"README.md": text.encode("utf-8", "replace"), text: b""}, (text,), text or "x"
    ),
    "files": lambda text: Run(Path("runs") / text[:80], a_plan(), Timeline("")).files(),
    "attention": lambda text: gpu_check.kernels(Attention(text, text, {text: text}, {text: text})),
    "memory of GPUs": gpu_memory,
    "report of a GPU": gpu_report,
    "tokens": tokens,
    "verdict": lambda text: Verdict(text, text, f"{text}."),
    "conversation": conversation,
}


CHANGED = {
    "picture": "its words are an attribute",
    "files": "cut to what a file system takes",
    "memory of GPUs": "a name that is empty is told as `a GPU`",
    "tokens": "spaces are told by a sign",
}
"""Sinks whose text does not stand in the page letter by letter, and why."""


# What is looked for in them


class Skeleton(HTMLParser):
    """A document's elements and attributes, without its text: what a browser would be told to do."""

    WORDS = ("title", "aria-label", "alt")
    """Attributes that hold text."""

    def __init__(self, markup: str):
        super().__init__()
        self.elements, self.texts, self._bare = [], [], []
        self.feed(markup)
        self.close()

    def handle_starttag(self, tag, attributes):
        bare = tag == "span" and not attributes  # what a MathJax delimiter is wrapped in
        if tag == "span":
            self._bare.append(bare)
        if not bare:
            self.elements.append((tag, [(name, None if name in self.WORDS else value) for name, value in attributes]))

    def handle_endtag(self, tag):
        if not (tag == "span" and self._bare.pop()):
            self.elements.append(("/" + tag, []))

    def handle_data(self, data):
        if self.elements[-1:] != [("title", [])]:  # nothing typesets a page's title
            self.texts.append(data)

    def handle_comment(self, data):
        self.elements.append(("comment", []))

    handle_decl = handle_pi = unknown_decl = handle_comment


@pytest.fixture(scope="module")
def watched():
    """Switches on and off a list of what Python does to files, processes and sockets."""
    seen, state = [], SimpleNamespace(on=False)
    sys.addaudithook(lambda event, args: state.on and event in REACHES_OUT and seen.append((event, args[0])))
    return state, seen


def test_there_are_300_of_them():
    assert len(set(STRINGS)) >= 300
    assert Counter(STRINGS).most_common(1)[0][1] == 1


@pytest.mark.parametrize("name", SINKS)
def test_html_keeps_its_elements_and_shows_the_text(name, watched):
    sink, (state, seen) = SINKS[name], watched
    wanted = Skeleton(sink(HARMLESS)._repr_html_()).elements
    state.on = True
    try:
        shown = [(text, Skeleton(sink(text)._repr_html_())) for text in STRINGS]
    finally:
        state.on = False
    assert seen == []
    assert [text for text, skeleton in shown if skeleton.elements != wanted and not is_empty(name, text)] == []
    lost = [t for t, s in shown if words(t) not in words("".join(s.texts))]
    assert lost == [] or name in CHANGED
    delimiters = [part for _, skeleton in shown for part in skeleton.texts if {"$", "\\"} & {*part} and len(part) > 1]
    assert delimiters == [], "a delimiter stands alone in its element: MathJax finds none"


def is_empty(name, text):
    """A caption or a source that is empty is left out."""
    return text == "" and name in ("table", "error of a plan", "plan", "report", "card", "report of a GPU", "run")


def words(text):
    return "".join(visible(text).split())


@pytest.mark.parametrize("name", [name for name, sink in SINKS.items() if not isinstance(sink(HARMLESS), Shown)])
def test_plain_text_holds_nothing_that_a_terminal_obeys(name):
    for text in STRINGS:
        plain = str(SINKS[name](text))
        plain.encode()
        assert visible(plain) == plain


def test_a_traceback_holds_nothing_that_a_terminal_obeys():
    for text in STRINGS:
        lines = error(text)._render_traceback_()
        assert [visible(line) for line in lines] == lines
        assert not any("\n" in line for line in lines)


def test_a_picture_says_its_words_in_plain_text():
    picture = Picture.__new__(Picture)
    for picture.words in STRINGS:
        assert visible(repr(picture)) == repr(picture)


def test_the_form_shows_what_is_typed_and_what_is_wrong_with_it_as_text(monkeypatch, watched):
    monkeypatch.setattr(form_module, "_needs_the_hub", lambda *asked: False)
    form = recipe_form(LLAMA, "T4")
    state, seen = watched

    def markup():
        inside = [form._box]
        for box in inside:
            inside += getattr(box, "children", ())
        return [Skeleton(widget.value).elements for widget in inside if isinstance(widget, ipywidgets.HTML)]

    wanted = []
    for harmless in ("no such model", "~no-such-user/x"):  # the second is refused in other words
        form.widgets["model"].value = harmless
        wanted.append(markup())
    assert all(map(any, wanted))
    state.on = True
    try:
        for text in STRINGS:
            form.widgets["model"].value = text
            if text.strip() and not hub.is_name(text) and not os.path.isdir(text.strip()):
                assert markup() in wanted, text
    finally:
        state.on = False
    assert [event for event in seen if "passwd" in str(event)] == []


def a_run(recipe, text):
    """One of whose words each is `text`."""
    made = a_plan().replace(recipe=recipe, card=dataclasses.replace(a_plan().card, name=text))
    watched = Timeline(
        text, 1.0, None, [Sample(0.0, text, 1.0, None, None)], [Step(1, 1.0, 1.0, 1.0, 1.0, 9)], {text: 1.0}
    )
    scores = SimpleNamespace(tables=lambda: [text], verdict=text)
    return Run(Path("runs/x"), made, watched, scores, status=text, versions={text: text}, rows={"held out": 2})


def test_the_model_card_keeps_its_headings_links_and_fields():
    def read(recipe, text):
        _, header, body = card_of(a_run(recipe, text)).split("---\n", 2)
        return yaml.safe_load(header), Skeleton(mistune.html(body)).elements

    def without(elements, *tags):
        return [e for e in elements if e[0].strip("/") not in tags]

    known, unknown = (LLAMA.replace(model=name, dataset="owner/rows") for name in (LLAMA.model, "owner/model"))
    fields, wanted = read(known, HARMLESS)
    assert fields["license"] == "llama3.2"
    assert len([e for e in wanted if e[0] == "a"]) == 3, "the base, llamanb and the licence"
    _, plain = read(unknown, HARMLESS)
    for text in STRINGS:
        assert read(known, text) == (fields, wanted)
        try:
            recipe = LLAMA.replace(model=text, dataset=text, revision=text, dataset_split=text)
        except RecipeError:
            continue  # nothing of that name is ever trained
        header, elements = read(recipe, HARMLESS)
        assert header.keys() <= fields.keys()
        assert header["tags"] == fields["tags"]
        assert without(elements, "a", "code") == without(plain, "a", "code")
        links = [value for _, attributes in elements for name, value in attributes if name == "href"]
        assert all(link.startswith(("https://huggingface.co/", REPOSITORY)) for link in links)


def test_a_run_stays_in_its_folder_whatever_its_name(tmp_path):
    runs = tmp_path / "runs"
    for text in STRINGS:
        try:
            assert new_folder(runs, text).parent == runs.resolve()
        except RecipeError as refused:
            str(refused).encode()
    assert [path for path in tmp_path.iterdir() if path != runs] == []


# Markup is written in one place


ALLOWED = {
    ("html.py", "markup"): "the place",
    ("rehearsal.py", "<pad>"): "a token of a tokenizer",
    ("data/encode.py", "<pad>"): "a token too",
    ("data/encode.py", "</s>"): "a token too",
    ("ui/form.py", "HTML"): "a widget; its value is html.py's (the test of the form above)",
    ("ui/chat_form.py", "HTML"): "the same (test_chat.py)",
}
READERS = {"HTML", "HTMLMath", "Markdown", "Javascript", "Latex", "Math", "SVG", "IFrame", "VegaLite"}
"""Of IPython.display and ipywidgets: what takes a string for something else than text."""
WRITERS = {"_repr_markdown_", "_repr_latex_", "_repr_javascript_", "_repr_svg_"}


def markup_in(path):
    """Strings that look like markup, docstrings left out, and whatever else would be read as such."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documents = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documents:
            yield from re.findall(r"</?[a-zA-Z!?][^|>]*>?|</", node.value)
        elif isinstance(node, ast.Attribute) and node.attr in READERS:
            yield node.attr
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(("IPython", "ipywidgets")):
            yield from READERS & {alias.name for alias in node.names}
        elif isinstance(node, ast.FunctionDef) and node.name in WRITERS:
            yield node.name


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_markup_outside_html_py(path):
    name = str(path.relative_to(PACKAGE))
    if (name, "markup") not in ALLOWED:
        assert [found for found in markup_in(path) if (name, found) not in ALLOWED] == []


def test_the_lint_sees_markup(tmp_path):
    source = (
        '"""<b>"""\nx = f"<b>{1}</b>"\nfrom IPython.display import HTML\nimport ipywidgets\nipywidgets.HTMLMath()\n'
    )
    (tmp_path / "x.py").write_text(source)
    assert sorted(markup_in(tmp_path / "x.py")) == ["</b>", "<b>", "HTML", "HTMLMath"]
    assert {name for name, _ in ALLOWED} <= {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py")}
