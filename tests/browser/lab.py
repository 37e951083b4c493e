"""What a person does in JupyterLab, by menu and keyboard, and what they see."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from playwright.sync_api import Locator, Page, expect

START_MS = 60_000
"""For a page, a kernel or a quick cell."""
RUN_MS = 400_000
"""For a notebook to run to its end, on a machine that has other things to do."""
THEMES = {"light": "JupyterLab Light", "dark": "JupyterLab Dark"}
CHANGE_THEME = "theme => jupyterapp.commands.execute('apputils:change-theme', {theme})"
HAS_THEME = "light => document.body.dataset.jpThemeLight === light"
PROMPTS = "[...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].map(e => e.textContent.trim())"
STARTED = f"{PROMPTS}.some(prompt => prompt !== '[ ]:')"
ENDED = f"!{PROMPTS}.includes('[*]:')"  # an error leaves the cells below it at [ ]
WATCH_PICTURES = """cell => {
    window.pictures = new Set();
    const look = () => cell.querySelectorAll('.jp-OutputArea-output img').forEach(e => window.pictures.add(e.src));
    new MutationObserver(look).observe(cell, {subtree: true, childList: true, attributes: true});
}"""
CUT_OFF = """() => [...document.querySelectorAll('.jp-Notebook .jp-OutputArea-output, .widget-label, .widget-readout')]
    .filter(e => e.offsetParent !== null && e.scrollWidth > e.clientWidth + 1)
    .map(e => `${e.textContent.slice(0, 80)} (${e.scrollWidth} in ${e.clientWidth} pixels)`)"""


class Lab:
    """A notebook open in JupyterLab."""

    def __init__(self, page: Page, notebook: Path, pictures: Path):
        self.page, self._pictures = page, pictures
        self._ids = [cell["id"] for cell in json.loads(notebook.read_text())["cells"]]
        pictures.mkdir(parents=True, exist_ok=True)
        page.set_default_timeout(START_MS)
        expect.set_options(timeout=START_MS)

    def open(self, url: str) -> None:
        """Goes to the notebook at `url` and waits for its kernel."""
        self.page.goto(url)
        self.page.locator("#jp-main-statusbar").get_by_text(re.compile(r"^Python 3.*Idle$")).wait_for()
        self.cell(self._ids[-1]).wait_for()
        if self.page.locator("#filebrowser").is_visible():  # it takes the room that tables and figures need
            self.page.keyboard.press("Control+b")

    def cell(self, cell_id: str) -> Locator:
        """The cell of that id; the page has all of them, in order."""
        return self.page.locator(".jp-Notebook .jp-Cell").nth(self._ids.index(cell_id))

    def output(self, cell_id: str) -> Locator:
        """What the cell has put out."""
        return self.cell(cell_id).locator(".jp-OutputArea-output")

    def run_all(self) -> None:
        """Run > Run All Cells."""
        self.page.get_by_role("menuitem", name="Run", exact=True).click()
        self.page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        self.page.wait_for_function(STARTED)

    def run_cell(self, cell_id: str) -> None:
        """Clicks into a code cell, presses Shift+Enter and waits until it has run."""
        cell = self.cell(cell_id)
        cell.locator(".cm-content").click()
        self.page.keyboard.press("Shift+Enter")
        expect(cell.locator(".jp-InputPrompt")).to_have_text(re.compile(r"\[\d+\]:"))

    def wait_for_the_end(self) -> None:
        """Returns once the last cell has run, or one has failed."""
        self.page.wait_for_function(ENDED, timeout=RUN_MS)

    def watch_pictures(self, cell_id: str) -> None:
        """From now on every different picture that the cell shows is counted."""
        self.cell(cell_id).evaluate(WATCH_PICTURES)

    def wait_for_pictures(self, count: int) -> None:
        self.page.wait_for_function("count => window.pictures.size >= count", arg=count, timeout=RUN_MS)

    def themes(self) -> Iterator[str]:
        """Names of the themes; while one's turn lasts, the page has it."""
        for name, title in THEMES.items():
            self.page.evaluate(CHANGE_THEME, title)
            self.page.wait_for_function(HAS_THEME, arg=str(name == "light").lower())
            expect(self.page.locator("#jupyterlab-splash")).to_have_count(0)  # it covers the page for a moment
            yield name

    def noise(self) -> list[str]:
        """What stands in outputs on red: errors, and lines on stderr."""
        return self.page.locator('[data-mime-type="application/vnd.jupyter.stderr"]').all_inner_texts()

    def cut_off(self) -> list[str]:
        """Outputs, labels and readouts whose text is wider than they are, in any theme."""
        return [text for _ in self.themes() for text in self.page.evaluate(CUT_OFF)]

    def save_pictures(self, **cells: str) -> None:
        """The window, with the output of each cell in sight, as artifacts/browser/NAME-light.png and -dark.png."""
        self.page.mouse.move(0, 0)
        for theme in self.themes():
            for name, cell_id in cells.items():
                self.output(cell_id).first.scroll_into_view_if_needed()
                self.cell(cell_id).evaluate("cell => cell.previousElementSibling.scrollIntoView({block: 'start'})")
                self.page.screenshot(path=self._pictures / f"{name}-{theme}.png")

    def save_picture(self, name: str, cell_id: str) -> None:
        self.save_pictures(**{name: cell_id})
