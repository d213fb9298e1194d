"""What algos/README.md says: its functions, names in logs, scores, links and pictures are those of the scripts."""

import ast
import csv
import json
import re
import tomllib
from pathlib import Path

import matplotlib.image
import pytest
import torch

from benchmarks.lines import READING_ORDER
from benchmarks.report import source_hash
from benchmarks.studies import symptoms
from benchmarks.studies.symptoms import CELLS, Args, figures, import_runs, main
from common import InputError

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "algos"
README = (FOLDER / "README.md").read_text()
RESULTS = ROOT / "benchmarks" / "results"
MEASURED = [
    name for name in READING_ORDER if (RESULTS / "default" / "runs" / f"pendulum-random-v0__{name}__0.csv").exists()
]
SECTIONS = re.split(r"^(?=## )", README, flags=re.MULTILINE)
COMMON = SECTIONS[1]


def section(script: str) -> str:
    """The one that begins with a link to the script."""
    found = [text for text in SECTIONS if re.match(rf"## [^\n]+\n\n\[{script}\.py\]\({script}\.py\)", text)]
    assert len(found) == 1, script
    return found[0]


def definitions(path: Path) -> set[str]:
    """f, C and C.f of a file."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            inside = [n.name for n in node.body if isinstance(n, ast.FunctionDef)] if hasattr(node, "bases") else []
            names |= {node.name, *(f"{node.name}.{name}" for name in inside)}
    return names


def anchor(heading: str) -> str:
    """As GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_every_script_has_a_section_in_the_order_of_the_table_of_methods():
    cells = re.findall(r"^\| (\[\w+\.py\]\(algos/.*?) \| \[", (ROOT / "README.md").read_text(), re.MULTILINE)
    order = [name for cell in cells for name in re.findall(r"\[(\w+)\.py\]", cell)]
    assert len(order) >= 15 and all(section(script) for script in READING_ORDER)
    places = [README.index(section(script)) for script in order]
    assert places == sorted(places)


def test_every_function_that_is_named_stands_in_the_file_that_it_is_linked_to():
    named = re.findall(r"\[`([\w.]+)`\]\(([\w./]+\.py)\)", README)
    assert len(named) > 70
    assert [(name, file) for name, file in named if name not in definitions((FOLDER / file).resolve())] == []


@pytest.mark.parametrize("script", READING_ORDER)
def test_every_method_has_an_equation_a_function_a_knob_and_scores(script):
    text = section(script)
    assert "```math" in text and f"`]({script}.py)" in text
    assert re.search(r"- \*\*Knob\*\*: `--[\w-]+`", text)
    assert script not in MEASURED or "- **Scores**: " in text


@pytest.mark.parametrize("script", MEASURED)
def test_every_column_of_the_log_is_explained_in_the_methods_section_or_before(script):
    path = RESULTS / "default" / "runs" / f"pendulum-random-v0__{script}__0.csv"
    columns = path.read_text().splitlines()[1].split(",")
    said = section(script) + COMMON + (section("morel") if script == "morel_npg" else "")
    assert [name for name in columns if f"`{name}`" not in said] == []


@pytest.mark.parametrize("script", READING_ORDER)
def test_every_knob_is_a_flag_of_its_script(script):
    source = (FOLDER / f"{script}.py").read_text()
    flags = re.findall(r"`--([\w-]+)", re.search(r"- \*\*Knob\*\*.*?(?=\n- )", section(script), re.DOTALL)[0])
    assert [flag for flag in flags if f"\n    {flag.replace('-', '_')}: " not in source] == []


def test_every_score_is_one_of_the_report():
    rows = [row for path in RESULTS.glob("*/report.csv") for row in csv.DictReader(path.open(newline=""))]
    known = {
        (row["algo"], row["dataset"], f"{float(row['score']):.1f} ± {float(row['score_sd']):.1f}", row["seeds"])
        for row in rows
        if row["score_sd"]
    }
    said = set()
    for script in READING_ORDER:
        text = " ".join(section(script).split())
        said |= {
            (script, *found) for found in re.findall(r"([\w-]+/[\w-]+-v0) (-?[\d.]+ ± [\d.]+) \((\d) seeds\)", text)
        }
    assert len(said) > 25 and said - known == set()
    assert {(script, "pendulum/random-v0") for script in MEASURED} <= {claim[:2] for claim in said}


def test_every_mistake_that_is_named_is_in_the_list_of_mistakes():
    mistakes = tomllib.loads((ROOT / "benchmarks" / "mistakes.toml").read_text())["mistake"]
    said = set(re.findall(r"`([a-z0-9]+(?:-[a-z0-9]+){2,})`", README))
    assert len(said) > 30 and said <= {mistake["name"] for mistake in mistakes}


def test_every_link_leads_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", README):
        file, _, part = target.partition("#")
        path = (FOLDER / file).resolve() if file else FOLDER / "README.md"
        assert path.exists(), target
        if part:
            headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
            assert part in map(anchor, headings), target


def test_it_can_be_read_on_a_phone():
    tables = [line for line in README.splitlines() if line.startswith("|")]
    assert max(line.count("|") for line in tables) <= 5  # four columns
    inline = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    assert re.findall(r"\$[^$\n]*\\[^\w\s][^$\n]*\$", inline) == []  # Markdown takes the backslash away
    assert "operatorname" not in README  # GitHub's maths has no such macro


def test_the_pictures_are_those_of_the_csv_files_small_and_named_in_the_text():
    for name, (_, _, sources) in figures(RESULTS).items():
        path = RESULTS / name
        assert f"results/{name}" in README and path.stat().st_size < 80_000
        assert source_hash(sources).encode() in path.read_bytes(), "run python benchmarks/studies/symptoms.py"


def test_pictures_are_drawn_from_the_csv_files_alone(tmp_path):
    main(Args(out_dir=tmp_path))
    for name in figures(RESULTS):
        assert matplotlib.image.imread(tmp_path / name).shape[1] <= 460


def test_the_csv_has_a_row_per_evaluation_and_only_what_is_drawn(tmp_path, monkeypatch):
    size = type("Data", (), {"reward": torch.tensor([-1.0, 3.0])})
    monkeypatch.setattr(symptoms, "load_dataset", lambda name, device: size)
    for dataset, script in [*CELLS, ("pendulum/spin-v0", "mopo")]:
        folder = tmp_path / f"{dataset.replace('/', '-')}__{script}__7"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"algo": script, "args": {"dataset": dataset, "seed": 7}}))
        penalty = ",penalty_mean" * (script == "mopo"), ",0.5" * (script == "mopo")
        rows = [f"{update},-1.25,{2 * update},3{penalty[1]}" for update in (900, 1000)]
        text = "\n".join([f"update,q,return_mean,normalised_score{penalty[0]}", *rows])
        (folder / "progress.csv").write_text(text)
    rows = list(csv.DictReader(import_runs(tmp_path).splitlines()))
    assert len(rows) == 2 * len(CELLS) and {(row["dataset"], row["script"]) for row in rows} == set(CELLS)
    assert [row["update"] for row in rows[:2]] == ["900", "1000"]
    assert all(row["q"] == "-1.25" and row["reward_size"] == "2" for row in rows)
    assert all((row["penalty_mean"] == "0.5") == (row["script"] == "mopo") for row in rows)


def test_missing_runs_are_named_in_one_sentence(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps({"algo": "bc", "args": {"dataset": "x", "seed": 0}}))
    with pytest.raises(InputError, match="has no run of mopo on halfcheetah/medium-replay-v0, .* name the folder"):
        import_runs(tmp_path)
    with pytest.raises(InputError, match="symptoms.csv is not there: make it with --runs"):
        figures(tmp_path)
