"""Notebook 04 in JupyterLab: a long training that a person interrupts, looks at, and picks up again by Run All."""

import re

import pytest
from playwright.sync_api import expect

from llamanb import show_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
STEPS = 2000
LATER = "([cell, step]) => [...cell.innerText.matchAll(/step (\\d+) of/g)].some(found => Number(found[1]) > step)"


def interrupt(lab) -> None:
    """Kernel > Interrupt Kernel, while the training runs, and waits until all cells have."""
    lab.page.get_by_role("menuitem", name="Kernel", exact=True).click()
    lab.page.get_by_role("menuitem", name=re.compile("^Interrupt Kernel")).click()
    expect(lab.output("train").filter(has_text="interrupted: ending after this step")).to_have_count(1)
    lab.wait_for_the_end()


def test_an_interrupt_keeps_what_was_learned_and_run_all_picks_it_up(open_lab, server):
    runs = {path.name for path in server.folder.glob("runs/*")}
    lab = open_lab("04_train", model="tiny", dataset="tiny", steps=STEPS)
    lab.watch_pictures("train")
    lab.run_all()
    lab.wait_for_pictures(2)
    lab.save_picture("04-training", "train")
    interrupt(lab)
    lab.save_pictures(**{f"04-{cell}": cell for cell in ("train", "memory", "compare", "report", "result")})
    assert lab.noise() == []
    assert lab.cut_off() == []
    expect(lab.output("result").last).to_contain_text("(interrupted)")
    (folder,) = {path for path in server.folder.glob("runs/*") if path.name not in runs}
    run = show_run(folder)
    made = len(run.losses)
    assert 0 < made < STEPS
    expect(lab.output("train").filter(has_text=f"interrupted, at step {made}: run this again")).to_have_count(1)
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    assert (folder / "report.html").is_file()

    lab.run_all()
    expect(lab.output("train").filter(has_text=f"at step {made} of {STEPS}")).to_have_count(1)
    lab.page.wait_for_function(LATER, arg=[lab.cell("train").element_handle(), made + 20], timeout=120_000)
    lab.save_picture("04-picked-up", "train")
    interrupt(lab)
    lab.save_picture("04-picked-up-and-stopped", "train")
    lab.save_picture("04-picked-up-memory", "memory")
    assert lab.noise() == []
    assert lab.cut_off() == []
    assert "before training" not in lab.output("train").first.inner_text(), "it is scored once"
    after = show_run(folder)
    assert after.losses[:made] == run.losses
    assert [step.step for step in after.timeline.steps] == list(range(1, len(after.losses) + 1))
    assert len(after.losses) > made + 20
    assert {path.name for path in server.folder.glob("runs/*")} - runs == {folder.name}
