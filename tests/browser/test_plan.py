"""Notebook 03 in JupyterLab: Run All, every widget moved by keyboard, a bar that follows at once."""

import re

import pytest
from playwright.sync_api import Locator, expect

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SLIDERS = {"Rank": "16", "Length": "1024"}
MENUS = {"Train": "qlora-nf4", "Adapters on": "all-linear", "Micro-batch": "0", "Card": "T4"}


def row(lab, label: str) -> Locator:
    """A widget and its hint."""
    return lab.output("form").locator(".widget-hbox").filter(has=lab.page.get_by_text(label, exact=True))


def bar(lab) -> Locator:
    """The memory bar under the widgets: its name says the sum."""
    return lab.output("form").get_by_role("img")


def moved(lab, act) -> str:
    """The bar's words after `act`, which must change what is drawn."""
    before = bar(lab).evaluate("bar => bar.outerHTML")
    act()
    lab.page.wait_for_function(
        "([cell, before]) => cell.querySelector('[role=img]')?.outerHTML !== before",
        arg=[lab.cell("form").element_handle(), before],
    )
    return bar(lab).get_attribute("aria-label")


def press(lab, label: str, *keys: str):
    """Presses keys on a slider's handle, or in a menu's open list: the keys of a closed one go to JupyterLab
    (ipywidgets issue 3912)."""
    slider = label in SLIDERS
    row(lab, label).locator(".noUi-handle" if slider else "select").focus()
    for key in keys if slider else ("Space", *keys, "Enter"):
        lab.page.keyboard.press(key)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_run_all(open_lab, theme):
    lab = open_lab("03_plan", theme)
    lab.run_all()
    lab.wait_for_the_end()
    expect(bar(lab)).to_have_attribute("aria-label", re.compile(r"^[\d.]+ of 13\.\d+ GiB: [\d.]+ GiB left$"))
    for cell in ("form", "plan", "bar", "others", "trainable", "too-much", "rehearse", "result"):
        lab.save_picture(f"03-{cell}-{theme}", cell)
    assert lab.noise() == []
    assert lab.cut_off() == []
    assert "cannot be rehearsed here" in lab.output("rehearse").first.inner_text()

    press(lab, "Train", "l")  # the letter that "lora" begins with
    expect(lab.output("form")).to_contain_text("GiB too much")
    expect(lab.output("form")).to_contain_text("what would fit")
    lab.save_picture(f"03-does-not-fit-{theme}", "form")
    assert lab.noise() == []
    assert lab.cut_off() == []


def test_every_widget_moved_by_keyboard_changes_the_bar(open_lab):
    lab = open_lab("03_plan")
    for cell in ("setup", "parameters", "form"):
        lab.run_cell(cell)
    for label, value in MENUS.items():
        expect(row(lab, label).locator("option:checked")).to_have_text("the plan chooses" if value == "0" else value)
    for label, value in SLIDERS.items():
        expect(row(lab, label).locator(".widget-readout")).to_have_text(value)

    moved(lab, lambda: press(lab, "Length", "ArrowRight"))
    expect(row(lab, "Length").locator(".widget-readout")).to_have_text("2048")
    moved(lab, lambda: press(lab, "Rank", "ArrowRight"))
    expect(row(lab, "Rank")).to_contain_text("2 times that of rank 16")
    moved(lab, lambda: press(lab, "Adapters on", "ArrowDown"))
    expect(row(lab, "Adapters on")).to_contain_text("4 of the 7 matrices")
    moved(lab, lambda: press(lab, "Micro-batch", "ArrowDown", "ArrowDown"))
    moved(lab, lambda: press(lab, "Train", "l"))
    expect(lab.output("form")).to_contain_text("what would fit")
    assert " of 13." in bar(lab).get_attribute("aria-label")
    words = moved(lab, lambda: press(lab, "Card", "H"))
    assert re.fullmatch(r"[\d.]+ of 7[1-6]\.\d+ GiB: [\d.]+ GiB left", words)
    lab.save_picture("03-form-moved", "form")

    # Later cells read the form
    lab.run_cell("plan")
    expect(lab.output("plan")).to_contain_text("lora, on H100")
    expect(lab.output("plan")).to_contain_text("8 × 2 rows of up to 2048 tokens")
    assert lab.noise() == []
    assert lab.cut_off() == []
