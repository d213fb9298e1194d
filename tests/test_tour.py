"""The notebook: is it committed as it came out, and does it still come out like that?

After a change: jupyter execute --inplace benchmarks/studies/tour.ipynb (requirements-tools.txt).
"""

import json
import re
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).resolve().parents[1] / "benchmarks" / "studies" / "tour.ipynb"
FACTS = """
import json
facts = {"on": [x.mean().item() for x in on], "off": [x.mean().item() for x in off], "hidden": hidden.double().mean()}
facts["error"] = [error[half].mean() for half in (~hidden, hidden)]
facts["penalty"] = [penalty[half].mean() for half in (~hidden, hidden)]
facts["halted"] = [halted[half].double().mean() for half in (~hidden, hidden)]
facts["lowered"] = [lowered(data.obs, data.action).mean(), pushed.mean()]
print(json.dumps(facts, default=float))
"""


def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def printed(cell):
    return "".join("".join(out["text"]) for out in cell["outputs"] if out["output_type"] == "stream")


def words(cell):
    text = printed(cell).replace("reused", "fitted in 9 s")
    return re.sub(r"[\d.,%-]+", "", text).split()


def test_the_committed_notebook_ran_to_its_end_and_shows_no_path_of_a_machine():
    text = NOTEBOOK.read_text()
    cells = code_cells(json.loads(text))
    outputs = [out for cell in cells for out in cell["outputs"]]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert sum("image/png" in out.get("data", {}) for out in outputs) >= 4 and printed(cells[-1])
    assert {out["output_type"] for out in outputs} == {"stream", "display_data"}  # no error among them
    assert {out["name"] for out in outputs if out["output_type"] == "stream"} == {"stdout"}  # and no warning
    assert len(text.encode()) < 400_000
    said = "".join(printed(cell) for cell in cells)
    assert not re.search(r"(^|\s)(/|~|[A-Z]:\\)\w", said) and "/home/" not in text and "/tmp/" not in text


@pytest.mark.slow
def test_run_again_it_prints_the_same_words_and_doubt_grows_where_the_error_does():
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    committed = [words(cell) for cell in code_cells(notebook)]
    notebook.cells.append(nbformat.v4.new_code_cell(FACTS))
    NotebookClient(notebook, timeout=180, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    *cells, last = code_cells(notebook)
    assert [words(cell) for cell in cells] == committed
    facts = json.loads(printed(last))
    for on, off in zip(facts["on"], facts["off"], strict=True):  # MOPO's doubt, MOReL's, the true error
        assert off > 4 * on
    assert 0.1 < facts["hidden"] < 0.6  # the policy leaves the data
    for name in ("error", "penalty", "halted"):
        lower, hidden = facts[name]
        assert hidden > 3 * lower, name
    logged, simulated = facts["lowered"]
    assert simulated > logged + 1  # COMBO's push-down and push-up
