"""The notebook: is it committed as it came out, and does it still come out like that?

After a change: jupyter execute --inplace benchmarks/studies/tour.ipynb (requirements-tools.txt).
"""

import json
import re
from pathlib import Path

import pytest

from tests.notebooks import check_committed, code_cells, printed, run_again

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


def words(cell):
    text = printed(cell).replace("reused", "fitted in 9 s")
    return re.sub(r"[\d.,%-]+", "", text).split()


def test_the_committed_notebook_ran_to_its_end_and_shows_no_path_of_a_machine():
    check_committed(NOTEBOOK, 400_000)
    cells = code_cells(json.loads(NOTEBOOK.read_text()))
    outputs = [out for cell in cells for out in cell["outputs"]]
    assert sum("image/png" in out.get("data", {}) for out in outputs) >= 4 and printed(cells[-1])


@pytest.mark.slow
def test_run_again_it_prints_the_same_words_and_doubt_grows_where_the_error_does():
    committed, cells, facts = run_again(NOTEBOOK, FACTS, timeout=180)
    assert [words(cell) for cell in cells] == [words(cell) for cell in committed]
    for on, off in zip(facts["on"], facts["off"], strict=True):  # MOPO's doubt, MOReL's, the true error
        assert off > 4 * on
    assert 0.1 < facts["hidden"] < 0.6  # the policy leaves the data
    for name in ("error", "penalty", "halted"):
        lower, hidden = facts[name]
        assert hidden > 3 * lower, name
    logged, simulated = facts["lowered"]
    assert simulated > logged + 1  # COMBO's push-down and push-up
