"""The notebook for a log without a simulator: is it committed as it came out, and does its story still hold?

After a change: jupyter execute --inplace benchmarks/studies/from_a_log.ipynb (requirements-tools.txt).
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from algos import td3_bc
from benchmarks.model_measures import ensemble_of
from common.dataset import load_dataset
from tests.notebooks import check_committed, printed, run_again

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "benchmarks" / "studies" / "from_a_log.ipynb"
FACTS = """
facts = {"work": str(work), "choice": choice["take"], "truth": truth}
facts["files"] = [path.name for path in (work / "robot").iterdir()]
for name, (plant, control, set_points) in {**days, "PID": (Plant, PID(), usual)}.items():
    obs, action, error = day(plant(seed=1), control, set_points)
    facts[name.replace(taken, "taken")] = [-error.sum(axis=1).mean(), robot.alarm(obs, action).mean()]
print(json.dumps(facts, default=float))
"""


def doctor_said(cells):
    """Its findings on the log and on what was made wrong in it, without the numbers."""
    said = [printed(cell) for cell in cells if "benchmarks/doctor.py" in cell["source"]]
    return re.sub(r"[\d.,%]+", "", "".join(said)).split()


def test_the_committed_notebook_ran_to_its_end_and_shows_no_path_of_a_machine():
    said = check_committed(NOTEBOOK, 200_000)
    assert len(json.loads(NOTEBOOK.read_text())["cells"]) <= 25
    assert "warning" not in said and "error:" not in said
    assert said.count("exit status 1") == 3  # the doctor, of three of four mistakes that were made on purpose


def test_its_numbers_of_the_bench_are_those_of_the_results():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    text = " ".join("".join(line for cell in cells for line in cell["source"]).split())
    results = ROOT / "benchmarks" / "results"
    for folder, script, words in (
        ("bench-short-fit", "mopo", "20 epochs **MOPO scores {}"),
        ("bench", "mopo", "MOPO scores {},"),
        ("bench", "bc", "BC, {}**"),
    ):
        scores = (results / folder / "report.md").read_text()
        score = re.search(rf"\| pendulum/narrow-v0 \| {script} \| 0: (-?[\d.]+)", scores)[1]
        assert words.format(score) in text, script
    report, export = ((results / name).read_text() for name in ("model-report.md", "export.md"))
    report, short = report.split("## What a short fit costs")
    error, last = re.search(r"pendulum/narrow-v0 \| \d+ \| ([\d.]+) → .* \| ([\d.]+) → [\d.]+ \|\n", short).groups()
    times, halted = re.search(r"error ([\d.]+)\s+times as large after 20 epochs, and ([\d.]+) %", short).groups()
    rings = re.search(r"pendulum/narrow-v0 \| MOPO \| -?\d+ \| ([\d.]+) %", export)[1]
    for number in (f"{error} of the squared", f"off by {last} ", f"{times} times", f"{halted} %", f"{rings} %"):
        assert number in text, number


def test_the_alarm_of_a_model_free_run_has_the_ensemble_that_mopo_would_fit_to_these_data(tmp_path, monkeypatch):
    monkeypatch.setenv("OFFLINE_MBRL_CACHE", str(tmp_path))
    rng = np.random.default_rng(0)
    obs, action = rng.normal(size=(201, 2)), rng.uniform(-1, 1, (200, 1))
    rows = dict(observations=obs[:-1], next_observations=obs[1:], actions=action, rewards=obs[1:, 0])
    flags = dict(terminals=np.zeros(200, bool), timeouts=np.arange(200) % 50 == 49)
    np.savez(tmp_path / "mine.npz", **rows, **flags)
    settings = vars(td3_bc.Args(dataset=str(tmp_path / "mine.npz"), compile=False))
    dynamics = ensemble_of(settings, load_dataset(settings["dataset"]))
    assert dynamics.layers[0].bias.shape[-1] == 128  # the small preset of other data, not the paper's 200


@pytest.mark.slow
def test_run_again_its_policy_beats_the_pid_and_the_alarm_rings_where_the_log_says_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # where it puts its own folder
    committed, cells, facts = run_again(NOTEBOOK, FACTS, timeout=900)
    assert doctor_said(cells) == doctor_said(committed)
    assert "".join(map(printed, cells)).count("exit status") == 3
    assert Path(facts["work"]).parent == tmp_path
    assert {"policy.py", "policy.npz", "alarm.npz"} <= set(facts["files"])
    truth, (pid, _) = facts["truth"], facts["PID"]
    assert len(truth) == 6 and truth[facts["choice"]] > 0.75 * pid  # both below 0
    assert max(truth.values()) - truth[facts["choice"]] < 0.5 * np.ptp(list(truth.values()))
    assert facts["taken"][1] < 0.03 and facts["taken, absurd"][1] > 0.5
    assert facts["taken, worn motor"][1] < 0.1  # of what the log does not show but the machine has
