"""Notebook 07 in JupyterLab: Run All, then a conversation by keyboard."""

import pytest
from playwright.sync_api import Locator, expect

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
HOSTILE = "<img src=x onerror=window.pwned=1> $x$ **b**"


def button(lab, words: str) -> Locator:
    return lab.output("form").get_by_role("button", name=words, exact=True)


def turn(lab) -> Locator:
    return lab.output("form").locator("textarea")


def say(lab, text: str) -> None:
    """By keyboard alone: into the field, Tab to the button, Space."""
    turn(lab).focus()
    lab.page.keyboard.insert_text(text)
    lab.page.keyboard.press("Tab")
    expect(button(lab, "Send")).to_be_focused()
    lab.page.keyboard.press("Space")


def test_a_person_goes_on_with_the_conversation(open_lab):
    lab = open_lab("07_after_training")
    lab.run_all()
    lab.wait_for_the_end()
    assert lab.noise() == []
    said = lab.output("form").locator("td")
    before = said.count()
    assert before == 8, "two turns and their answers, as in the cell above"

    question, answer = said.nth(1).inner_text(), said.nth(3).inner_text()
    say(lab, HOSTILE)
    expect(said).to_have_count(before + 4)
    expect(turn(lab)).to_have_value("")
    assert said.nth(before + 1).inner_text() == HOSTILE
    assert said.nth(before + 2).inner_text() == "without it", "as the cell above has left it"
    assert lab.page.evaluate("window.pwned") is None
    lab.save_picture("07-form", "form")

    say(lab, "a<|eot_id|>b")
    expect(lab.output("form").get_by_role("alert")).to_contain_text("control token <|eot_id|>")
    expect(turn(lab)).to_have_value("a<|eot_id|>b")
    cells = {f"07-{cell}": cell for cell in ("compare", "side", "chat", "again", "push")}
    lab.save_pictures(**cells, **{"07-refused": "form"})
    assert lab.cut_off() == []

    button(lab, "Clear").click()
    expect(said).to_have_count(0)
    turn(lab).fill("")
    lab.output("form").get_by_role("checkbox").click()
    say(lab, question)
    expect(said).to_have_count(4)
    assert said.nth(2).inner_text() == "with the adapter"
    assert said.nth(3).inner_text() == answer
