"""Hostile strings through everything that shows HTML, in a browser that would do what they ask for."""

import pytest

from tests.unit.hostile import STRINGS
from tests.unit.test_hostile import SINKS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
EVENTS = """document.querySelectorAll('*').forEach(e =>
    ['load', 'error', 'click', 'focus', 'mouseover', 'toggle'].forEach(name => e.dispatchEvent(new Event(name))));"""
FOREIGN = """[...new Set([...document.body.querySelectorAll('*')].flatMap(e => [
    ...['SCRIPT', 'STYLE', 'LINK', 'META', 'BASE', 'A', 'IFRAME', 'OBJECT', 'EMBED', 'FORM', 'INPUT', 'SVG', 'MATH',
        'VIDEO', 'DETAILS', 'TEMPLATE'].filter(name => name === e.tagName.toUpperCase()),
    ...e.getAttributeNames().filter(name => name.startsWith('on') || name === 'href' || name === 'srcdoc'
        || (name === 'src' && !e.getAttribute(name).startsWith('data:image/png;')))]))]"""
"""Elements and attributes that the package writes nowhere."""


@pytest.mark.parametrize("strings", [STRINGS[at::4] for at in range(4)], ids=range(4))
def test_nothing_of_it_runs_and_no_request_leaves(browser, strings):
    shown = [sink(text)._repr_html_() for name, sink in SINKS.items() if name != "report" for text in strings]
    reports = [SINKS["report"](text)._repr_html_() for text in strings[::10]]  # each a page of its own
    told = []
    page = browser.new_page()
    try:
        page.route("**/*", lambda route: (told.append(route.request.url), route.abort()))
        page.on("dialog", lambda dialog: (told.append(dialog.message), dialog.dismiss()))
        page.on("popup", lambda popup: told.append(popup.url))
        for document in ("<!doctype html>" + "".join(shown), *reports):
            page.set_content(document)
            for insert in ("", "document.body.innerHTML = document.body.innerHTML;"):  # as a notebook puts it in
                page.evaluate(f"() => {{ {insert}{EVENTS} }}")
                page.wait_for_timeout(20)
                assert page.evaluate("window.pwned") is None
                assert page.evaluate(FOREIGN) == []
        assert told == []
        page.set_content("<img src='https://evil.test/x.png' onerror='window.pwned=1'>")  # what that would look like
        page.wait_for_function("window.pwned === 1")
        assert told == ["https://evil.test/x.png"]
    finally:
        page.close()
