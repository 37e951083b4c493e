"""What every notebook has in common, so that each reads like the others and runs wherever they do."""

import ast
import json
import re
import statistics
from pathlib import Path

import pytest

from llamanb import REPOSITORY, __version__
from llamanb.setup.loaded import SETUP_CELL

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
COLAB = "https://colab.research.google.com"
MOST_LINES, MEDIAN_LINES = 120, 4


class Notebook:
    """A notebook as it lies on disk."""

    def __init__(self, path: Path):
        self.path, self.json = path, json.loads(path.read_text(encoding="utf-8"))
        self.cells = self.json["cells"]
        self.code = [cell for cell in self.cells if cell["cell_type"] == "code"]

    def tagged(self, tag: str) -> str:
        """The source of the one cell with that tag."""
        (cell,) = (cell for cell in self.cells if tag in cell["metadata"].get("tags", ()))
        return source(cell)


def source(cell: dict) -> str:
    return "".join(cell["source"])


def code_lines(cell: dict) -> int:
    return sum(bool(line.strip()) and not line.lstrip().startswith("#") for line in source(cell).splitlines())


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request) -> Notebook:
    return Notebook(request.param)


def test_there_are_notebooks_and_their_names_count_up():
    numbers = [path.stem[:2] for path in NOTEBOOKS]
    assert numbers[:2] == ["00", "01"]
    assert len(set(numbers)) == len(numbers)


def test_it_opens_with_title_badge_one_sentence_and_what_it_needs(notebook):
    title, badge, sentence, needs = source(notebook.cells[0]).split("\n\n")
    assert re.fullmatch(r"# [A-Z].*[^.]", title)
    slug = REPOSITORY.removeprefix("https://github.com/")
    page = f"{COLAB}/github/{slug}/blob/v{__version__}/notebooks/{notebook.path.name}"
    assert badge == f"[![Open in Colab]({COLAB}/assets/colab-badge.svg)]({page})"
    assert "\n" not in sentence
    assert sentence.endswith(".")
    assert re.fullmatch(r"\*\*Needs\*\* .+ · \*\*takes\*\* .+ · \*\*gives\*\* .+", needs)


def test_its_first_code_is_the_setup_cell(notebook):
    assert notebook.tagged("setup") == source(notebook.code[0]) == SETUP_CELL


def test_its_parameters_are_flat_literals(notebook):
    body = ast.parse(notebook.tagged("parameters")).body
    assert body
    names = []
    for statement in body:
        assert isinstance(statement, ast.Assign), ast.unparse(statement)
        (target,) = statement.targets
        assert isinstance(target, ast.Name), ast.unparse(statement)
        value = ast.literal_eval(statement.value)
        assert value is None or isinstance(value, bool | int | float | str), ast.unparse(statement)
        names.append(target.id)
    assert len(set(names)) == len(names)
    assert not [name for name in names if "token" in name or "secret" in name or "key" in name], "papermill stores them"


def test_the_parameters_come_before_all_other_code(notebook):
    assert notebook.tagged("parameters") == source(notebook.code[1])


def test_prose_stands_before_each_code_cell(notebook):
    before = dict(zip((cell["id"] for cell in notebook.cells[1:]), notebook.cells, strict=False))
    for cell in notebook.code:
        assert before[cell["id"]]["cell_type"] == "markdown", source(cell)
        assert source(before[cell["id"]]).strip()


def test_it_is_short_and_its_cells_are(notebook):
    lines = [code_lines(cell) for cell in notebook.code]
    assert sum(lines) <= MOST_LINES
    assert statistics.median(lines) <= MEDIAN_LINES


def test_it_ends_with_what_next_and_every_link_leads_somewhere(notebook):
    last = source(notebook.cells[-1])
    assert last.startswith("## What next\n\n")
    text = "\n".join(source(cell) for cell in notebook.cells if cell["cell_type"] == "markdown")
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert [link for link in re.findall(r"\]\(([^)\s]+)\)", last) if link.endswith(".ipynb")], "to another notebook"
    for link in links:
        if link.startswith(REPOSITORY):
            page, _, heading = link.removeprefix(REPOSITORY).partition("#")
            assert page in ("", "/"), link
            assert not heading or heading in headings(ROOT / "README.md"), link
        elif not link.startswith("https://"):
            assert (notebook.path.parent / link).is_file(), link


def headings(page: Path) -> list[str]:
    """The anchors that GitHub makes of a page's headings."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]


def test_it_carries_no_outputs_and_no_widget_state(notebook):
    for cell in notebook.code:
        assert cell["outputs"] == []
        assert cell["execution_count"] is None
    assert "widgets" not in notebook.json["metadata"]
    assert all(set(cell["metadata"]) <= {"tags"} for cell in notebook.cells)


def test_every_cell_has_an_id_of_its_own_that_says_what_it_is(notebook):
    ids = [cell["id"] for cell in notebook.cells]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[a-z][a-z-]*", name) for name in ids), "words, not numbers: tests find cells by them"
    assert (notebook.json["nbformat"], notebook.json["nbformat_minor"]) == (4, 5)


def test_its_metadata_asks_for_python3_and_a_t4(notebook):
    metadata = notebook.json["metadata"]
    assert metadata["kernelspec"] == {"display_name": "Python 3", "language": "python", "name": "python3"}
    assert metadata["accelerator"] == "GPU"
    assert metadata["colab"]["gpuType"] == "T4"


def test_badge_setup_cell_and_model_card_carry_the_one_address(notebook):
    from llamanb.model.save import training_card
    from llamanb.planner import plan
    from llamanb.recipe import Recipe

    recipe = Recipe(max_length=128)
    card = training_card(recipe, plan(recipe), "")
    wanted = REPOSITORY.removeprefix("https://")
    for text in (source(notebook.cells[0]).replace("com/github/", "github.com/"), notebook.tagged("setup"), card):
        found = {match.rstrip(".") for match in re.findall(r"github\.com/[\w.-]+/[\w.-]+", text)}
        assert found == {wanted}
