"""Notebook 04 in JupyterLab: a long training that a person interrupts, and what is there afterwards."""

import re

import pytest
from playwright.sync_api import expect

from llamanb import show_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_an_interrupt_keeps_what_was_learned_and_the_notebook_goes_on(open_lab, server):
    runs = {path.name for path in server.folder.glob("runs/*")}
    lab = open_lab("04_train", "dark", model="tiny", dataset="tiny", steps=2000)
    lab.watch_pictures("train")
    lab.run_all()
    lab.wait_for_pictures(2)
    lab.save_picture("04-training-dark", "train")
    lab.page.get_by_role("menuitem", name="Kernel", exact=True).click()
    lab.page.get_by_role("menuitem", name=re.compile("^Interrupt Kernel")).click()
    expect(lab.output("train").filter(has_text="interrupted: ending after this step")).to_have_count(1)
    lab.wait_for_the_end()
    for cell in ("train", "memory", "compare", "report", "result"):
        lab.save_picture(f"04-{cell}-dark", cell)
    assert lab.noise() == []
    assert lab.cut_off() == []
    expect(lab.output("result").last).to_contain_text("(interrupted)")
    (folder,) = {path for path in server.folder.glob("runs/*") if path.name not in runs}
    run = show_run(folder)
    assert 0 < len(run.losses) < 2000
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    assert (folder / "report.html").is_file()
