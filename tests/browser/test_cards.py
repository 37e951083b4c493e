"""Errors in JupyterLab: what went wrong as a card, once, on light and on dark."""

import re

import pytest
from playwright.sync_api import Locator, expect

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
CONTRASTS = """card => {
    const shade = ([r, g, b]) => [r, g, b].map(v => v / 255)
        .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const parse = color => color.match(/[\\d.]+/g).map(Number);
    const behind = e => {
        for (; e; e = e.parentElement) {
            const [r, g, b, a = 1] = parse(getComputedStyle(e).backgroundColor);
            if (a === 1) return [r, g, b];
        }
        return [255, 255, 255];
    };
    const opacity = e => e ? getComputedStyle(e).opacity * opacity(e.parentElement) : 1;
    return [...card.querySelectorAll('*')].filter(e => [...e.childNodes].some(n => n.nodeType === 3)).map(e => {
        const back = behind(e), share = opacity(e);
        const ink = parse(getComputedStyle(e).color).slice(0, 3).map((v, i) => v * share + back[i] * (1 - share));
        const [low, high] = [shade(ink), shade(back)].sort((a, b) => a - b);
        return (high + 0.05) / (low + 0.05);
    });
}"""
"""Of each text in an element against what is behind it, as WCAG 2.2 counts it."""


def card_of(lab, cell_id: str) -> Locator:
    """The one card of a cell that failed, with the one line under it."""
    card = lab.output(cell_id).get_by_role("alert")
    expect(card).to_have_count(1)
    expect(lab.output(cell_id)).to_have_count(2)
    return card


def test_rows_that_are_not_there(open_lab):
    lab = open_lab("01_quickstart", model="tiny", dataset="no-such-file.jsonl")
    lab.run_all()
    lab.wait_for_the_end()
    card = card_of(lab, "data")
    lab.save_picture("card-no-such-file", "data")
    what = card.get_by_role("heading").inner_text()
    assert "no-such-file.jsonl" in what
    kind, *rest = [line for line in card.inner_text().splitlines() if line.strip()]
    assert kind == "DataError"
    assert rest[0] == what
    assert (rest[1], rest[3]) == ("why", "how to fix it")
    assert all(len(line) > 10 for line in (rest[2], rest[4]))
    assert lab.noise() == [f"DataError: {what}"], "the rest stands in the card, and only there"
    assert min(min(card.evaluate(CONTRASTS)) for _ in lab.themes()) > 4.5
    assert lab.cut_off() == []
    expect(lab.cell("plan").locator(".jp-InputPrompt")).to_have_text("[ ]:")


def test_a_plan_that_does_not_fit_shows_what_would_and_where_the_memory_goes(open_lab):
    lab = open_lab("03_plan", model="meta-llama/Llama-3.3-70B-Instruct", method="lora")
    lab.run_all()
    lab.wait_for_the_end()
    card = card_of(lab, "plan")
    lab.save_picture("card-does-not-fit", "plan")
    assert re.search(r"needs [\d.]+ GiB at the least", card.get_by_role("heading").inner_text())
    expect(card.get_by_role("table")).to_contain_text("a smaller model")
    expect(card.get_by_role("img")).to_have_attribute("aria-label", re.compile("GiB too much"))
    (line,) = lab.noise()
    assert line.count("\n") == 0
    assert min(min(card.evaluate(CONTRASTS)) for _ in lab.themes()) > 4.5
    assert lab.cut_off() == []


def test_a_name_that_would_rather_run_stands_in_its_card(open_lab):
    name = "$$\\href{javascript:window.pwned=1}{x}$$ \\(x\\)<img src=x onerror=window.pwned=1> [x](command:x)'\".jsonl"
    lab = open_lab("01_quickstart", model="tiny", dataset=name)
    lab.run_all()
    lab.wait_for_the_end()
    card = card_of(lab, "data")
    lab.save_picture("card-hostile", "data")
    expect(card.get_by_role("heading")).to_contain_text(name)
    expect(card.locator("a, img, mjx-container")).to_have_count(0)
    expect(lab.output("form").locator("a, img[src=x], mjx-container")).to_have_count(0)
    assert lab.page.evaluate("window.pwned") is None
