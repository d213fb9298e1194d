"""What the tests of the notebooks in benchmarks/studies share."""

import json
import re
from pathlib import Path


def code_cells(notebook) -> list:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def printed(cell) -> str:
    return "".join("".join(out["text"]) for out in cell["outputs"] if out["output_type"] == "stream")


def check_committed(path: Path, most_bytes: int) -> str:
    """It ran to its end, is small, and shows no path of a machine. Returns what it printed."""
    text = path.read_text()
    cells = code_cells(json.loads(text))
    outputs = [out for cell in cells for out in cell["outputs"]]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert {out["output_type"] for out in outputs} == {"stream", "display_data"}  # no error among them
    assert {out["name"] for out in outputs if out["output_type"] == "stream"} == {"stdout"}  # and no warning
    assert len(text.encode()) < most_bytes
    said = "".join(printed(cell) for cell in cells)
    assert not re.search(r"(^|\s)(/|~|[A-Z]:\\)\w", said) and "/home/" not in text and "/tmp/" not in text
    return said


def run_again(path: Path, facts: str, timeout: int) -> tuple[list, list, dict]:
    """Its code cells as committed and as they come out now, and what the code `facts` behind them prints as json."""
    import nbformat
    from nbclient import NotebookClient

    committed, notebook = (nbformat.read(path, as_version=4) for _ in range(2))
    notebook.cells.append(nbformat.v4.new_code_cell(facts))
    NotebookClient(notebook, timeout=timeout, resources={"metadata": {"path": str(path.parent)}}).execute()
    *cells, last = code_cells(notebook)
    return code_cells(committed), cells, json.loads(printed(last))
