"""The quickstart in JupyterLab: Run All, a form moved by keyboard, a picture that moves while training."""

import re

import pytest
from playwright.sync_api import expect

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
BEFORE_THE_FORM = ("setup", "parameters")


def test_run_all(open_lab, server):
    runs = {path.name for path in server.folder.glob("runs/*")}
    lab = open_lab("01_quickstart")
    lab.watch_pictures("train")
    lab.run_all()
    expect(lab.output("form").locator("input")).to_have_count(8)
    expect(lab.output("form").get_by_label("Train", exact=True)).to_have_value("qlora-nf4")
    expect(lab.output("form")).to_contain_text("no memory is predicted for a CPU")
    lab.save_picture("form", "form")

    lab.wait_for_pictures(3)
    assert "[*]" in lab.cell("train").locator(".jp-InputPrompt").inner_text(), "pictures come while training runs"
    lab.save_picture("training", "train")

    lab.wait_for_the_end()
    cells = {name: name for name in ("data", "plan", "result", "loss", "memory", "files")}
    lab.save_pictures(trained="train", **cells)
    assert lab.noise() == []
    assert lab.cut_off() == []
    result = lab.output("result").inner_text()
    assert re.search(r"held-out rows\s+before\s+after", result)
    assert re.search(r"exact match\s+\d+%\s+\d+%", result)
    for cell in ("loss", "memory"):
        assert lab.output(cell).locator("img").evaluate("image => image.complete && image.naturalWidth > 300")
    (run,) = {path for path in server.folder.glob("runs/*") if path.name not in runs}
    assert (run / "adapter" / "adapter_model.safetensors").is_file()


def test_the_form_moved_by_keyboard_decides_what_runs(open_lab):
    lab = open_lab("01_quickstart", model="tiny", dataset="tiny", effective_batch_size=16, max_length=128)
    for cell in (*BEFORE_THE_FORM, "form"):
        lab.run_cell(cell)
    form = lab.output("form")
    expect(form).to_contain_text("rows a step, up to 2,048 tokens")
    batch = form.get_by_label("Batch", exact=True)
    batch.focus()
    lab.page.keyboard.press("Control+a")
    lab.page.keyboard.type("8")
    expect(form).to_contain_text("rows a step, up to 2,048 tokens")  # a field counts when it is left
    lab.page.keyboard.press("Tab")
    expect(form).to_contain_text("rows a step, up to 1,024 tokens")
    lab.save_picture("form-moved", "form")

    lab.run_cell("data")
    lab.run_cell("plan")
    expect(lab.output("plan")).to_contain_text("1 × 8 rows of up to 128 tokens")
    assert lab.noise() == []


def test_a_recipe_that_cannot_work_says_what_why_and_how_to_fix(open_lab):
    lab = open_lab("01_quickstart", model="tiny", dataset="no-such-file.jsonl")
    lab.run_all()
    lab.wait_for_the_end()
    lab.save_picture("error", "data")
    card = lab.output("data").get_by_role("alert")
    expect(card.get_by_role("heading")).to_contain_text("no-such-file.jsonl")
    expect(card).to_contain_text("how to fix it")
    assert lab.noise() == ["DataError: " + card.get_by_role("heading").inner_text()]
    expect(lab.cell("plan").locator(".jp-InputPrompt")).to_have_text("[ ]:")
