"""Notebook 03 in JupyterLab: Run All, every widget moved by keyboard, a bar that follows at once."""

import re

import pytest
from playwright.sync_api import Locator, expect

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
FIELDS = {"Model": "meta-llama/Llama-3.1-8B-Instruct", "Data": "tiny", "Rank": "16", "Batch": "16", "Micro-batch": "0"}
FIELDS |= {"Length": "1024", "Epochs": "1", "Steps": "0"}
MENUS = {"Train": "qlora-nf4", "Adapters on": "all-linear", "Card": "T4"}


def row(lab, label: str) -> Locator:
    """A widget and its hint."""
    return lab.output("form").locator(".widget-hbox").filter(has=lab.page.get_by_text(label, exact=True))


def field(lab, label: str) -> Locator:
    """A widget by the name that a screen reader has for it."""
    return lab.output("form").get_by_label(label, exact=True)


def bar(lab) -> Locator:
    """The memory bar under the widgets: its name says the sum."""
    return lab.output("form").get_by_role("img")


def moved(lab, act) -> str:
    """The bar's words after `act`, which must change what is drawn."""
    before = bar(lab).evaluate("bar => bar.outerHTML")
    act()
    lab.page.wait_for_function(
        "([cell, before]) => (cell.querySelector('[role=img]')?.outerHTML ?? before) !== before",
        arg=[lab.cell("form").element_handle(), before],
    )
    return bar(lab).get_attribute("aria-label")


def press(lab, label: str, *keys: str):
    """Presses keys in a menu's open list: the keys of a closed one go to JupyterLab (ipywidgets issue 3912)."""
    field(lab, label).focus()
    for key in ("Space", *keys, "Enter"):
        lab.page.keyboard.press(key)


def write(lab, label: str, text: str, leave: str = "Tab"):
    """Writes over what stands in a field, and leaves it."""
    field(lab, label).focus()
    lab.page.keyboard.press("Control+a")
    lab.page.keyboard.type(text)
    lab.page.keyboard.press(leave)


def test_run_all(open_lab):
    lab = open_lab("03_plan")
    lab.run_all()
    lab.wait_for_the_end()
    expect(bar(lab)).to_have_attribute("aria-label", re.compile(r"^[\d.]+ of 13\.\d+ GiB: [\d.]+ GiB left$"))
    cells = ("form", "plan", "bar", "others", "trainable", "too-much", "rehearse", "result")
    lab.save_pictures(**{f"03-{cell}": cell for cell in cells})
    assert lab.noise() == []
    assert lab.cut_off() == []
    assert "cannot be rehearsed here" in lab.output("rehearse").first.inner_text()

    press(lab, "Train", "l")  # the letter that "lora" begins with
    expect(lab.output("form")).to_contain_text("GiB too much")
    expect(lab.output("form")).to_contain_text("what would fit")
    lab.save_picture("03-does-not-fit", "form")
    assert lab.noise() == []
    assert lab.cut_off() == []


def test_every_widget_moved_by_keyboard_changes_the_bar(open_lab):
    lab = open_lab("03_plan")
    for cell in ("setup", "parameters", "form"):
        lab.run_cell(cell)
    for label, value in MENUS.items():
        expect(field(lab, label).locator("option:checked")).to_have_text(value)
    for label, value in FIELDS.items():
        expect(field(lab, label)).to_have_value(value)
    lab.save_picture("03-form-first", "form")

    field(lab, "Length").focus()
    moved(lab, lambda: lab.page.keyboard.press("ArrowUp"))
    expect(field(lab, "Length")).to_have_value("1152")
    moved(lab, lambda: write(lab, "Length", "4096"))
    expect(lab.output("form")).to_contain_text(
        re.compile(r"the last change: .*, \d+ more layers recomputed, .* more a step")
    )
    expect(lab.page.locator(":focus")).to_have_attribute("id", field(lab, "Epochs").get_attribute("id"))
    moved(lab, lambda: write(lab, "Rank", "32", "Enter"))
    expect(row(lab, "Rank")).to_contain_text("2 times rank 16")
    moved(lab, lambda: press(lab, "Adapters on", "ArrowDown"))
    expect(row(lab, "Adapters on")).to_contain_text("4 of the 7 matrices")
    moved(lab, lambda: write(lab, "Micro-batch", "2"))
    write(lab, "Batch", "6")
    expect(lab.output("form")).to_contain_text("3 × 2 rows of up to 4096 tokens")
    write(lab, "Epochs", "2")
    expect(lab.output("form")).to_contain_text("the last change: no more memory, no less")
    write(lab, "Steps", "10")
    expect(row(lab, "Epochs")).to_contain_text("not used")
    expect(lab.output("form")).to_contain_text("for 10 steps")
    write(lab, "Data", "no-such-rows.csv", "Enter")
    expect(row(lab, "Data")).to_contain_text("no such file here")
    moved(lab, lambda: press(lab, "Train", "l"))
    expect(lab.output("form")).to_contain_text("what would fit")
    assert " of 13." in bar(lab).get_attribute("aria-label")
    words = moved(lab, lambda: press(lab, "Card", "H"))
    assert re.fullmatch(r"[\d.]+ of 7[1-6]\.\d+ GiB: [\d.]+ GiB left", words)
    lab.save_picture("03-form-moved", "form")
    moved(lab, lambda: write(lab, "Model", "meta-llama/Llama-3.2-1B-Instruct"))

    lab.run_cell("plan")
    expect(lab.output("plan")).to_contain_text("meta-llama/Llama-3.2-1B-Instruct, lora, on H100")
    expect(lab.output("plan")).to_contain_text("3 × 2 rows of up to 4096 tokens")
    assert lab.noise() == []
    assert lab.cut_off() == []


def test_what_cannot_be_is_said_in_the_form_which_goes_on(open_lab):
    lab = open_lab("03_plan")
    for cell in ("setup", "parameters", "form"):
        lab.run_cell(cell)
    write(lab, "Micro-batch", "3")
    expect(lab.output("form").get_by_role("alert")).to_contain_text("does not divide effective_batch_size = 16")
    lab.save_picture("03-refused", "form")
    write(lab, "Micro-batch", "0")
    write(lab, "Model", "nobody/knows<b>this")
    expect(lab.output("form").get_by_role("alert")).to_contain_text("'nobody/knows<b>this' does not exist")
    write(lab, "Model", "nobody-of-this-name/llama")  # the Hub's answer, or that there is none, comes by itself
    expect(lab.output("form").get_by_role("alert")).to_contain_text(re.compile("is not on the Hub|is out of reach"))
    write(lab, "Model", "unsloth/Meta-Llama-3.1-8B-Instruct-bnb-4bit")
    expect(bar(lab)).to_be_visible()
    press(lab, "Train", "l")
    expect(row(lab, "Train")).to_contain_text("not possible: this checkpoint is nf4 already")
    expect(lab.output("form").get_by_role("alert")).to_contain_text("is already quantized (nf4)")
    lab.save_picture("03-quantized", "form")
    press(lab, "Train", "q")
    expect(bar(lab)).to_be_visible()
    lab.page.set_viewport_size({"width": 720, "height": 1000})
    lab.save_picture("03-narrow", "form")
    assert lab.noise() == []
    assert lab.cut_off() == []
