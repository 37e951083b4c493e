"""What an executed notebook shows."""


def cell(notebook, cell_id: str):
    (found,) = (cell for cell in notebook.cells if cell.get("id") == cell_id)
    return found


def text(notebook, cell_id: str) -> str:
    """What a cell says: printed lines, and each output's plain text."""
    said = ""
    for output in cell(notebook, cell_id).outputs:
        said += "\n" if said and not said.endswith("\n") else ""
        said += output.text if output.output_type == "stream" else output.data["text/plain"]
    return said


def noise(notebook) -> list[str]:
    """Everything on stderr: a lesson shows none, and hides no warning that matters."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return [output.text for output in outputs if output.output_type == "stream" and output.name == "stderr"]
