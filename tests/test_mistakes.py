"""Known mistakes: does the table fit the code and the outcome the table? Is one noticed, and what does it cost?"""

import csv
import re
import tomllib

import pytest

from benchmarks import mistakes
from benchmarks.mistakes import EXERCISES, RESULTS, ROOT, Args
from common import InputError

TABLE = ROOT / "benchmarks" / "mistakes.toml"
KEYS = ["name", "file", "old", "new", "mistake", "found", "test"]
TERMINATION = "tests/test_terminations.py::test_hopper_is_bounded_on_both_sides[-150.0-True]"
BOUND = "(o[:, 1:].abs() < 100).all(1)"


def write_table(path, **changes):
    row = dict(name="a-mistake", file="common/terminations.py", old=BOUND, new=BOUND, mistake="", found="")
    row |= {"test": TERMINATION} | changes
    path.write_text("[[mistake]]\n" + "".join(f"{key} = '''{value}'''\n" for key, value in row.items()))
    return path


# --- The table ---
def test_every_old_text_stands_once_and_every_test_exists():
    assert len(mistakes.read_table(TABLE)) > 40


def test_every_mistake_has_a_short_name_a_sentence_and_a_public_source():
    rows = tomllib.loads(TABLE.read_text())["mistake"]
    assert len({row["name"] for row in rows}) == len(rows)
    for row in rows:
        assert list(row) == KEYS and row["old"] != row["new"]
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)+", row["name"]) and len(row["name"]) < 40
        assert re.search(r"github\.com/|arXiv:|openreview\.net/", row["found"]), row["name"]
        assert row["mistake"].endswith(".") and ". " not in row["mistake"]


def test_the_committed_outcome_is_of_this_table_and_all_are_noticed():
    rows, text = tomllib.loads(TABLE.read_text())["mistake"], RESULTS.read_text()
    commit = re.search(r"Of commit (\S+):", text)[1]
    expected = mistakes.table_lines(rows, ["noticed"] * len(rows), commit)
    assert text.splitlines() == expected, "run python benchmarks/mistakes.py again"


@pytest.mark.parametrize("changes, words", [
    ({"old": "no such text"}, "old is 0 times in common/terminations.py"),
    ({"old": "return"}, "times in common/terminations.py"),
    ({"test": "tests/test_terminations.py::test_nothing"}, "no test test_nothing"),
])  # fmt: skip
def test_a_table_that_does_not_fit_the_code_is_refused(changes, words, tmp_path):
    with pytest.raises(InputError, match=words):
        mistakes.read_table(write_table(tmp_path / "table.toml", **changes))


# --- What the tests notice ---
@pytest.mark.slow
@pytest.mark.parametrize("new, expected", [
    ("(o[:, 1:] < 100).all(1)", "noticed"),
    ("(100 > o[:, 1:].abs()).all(1)", "not noticed"),
    ("(o[:, 1:].abs() < hundred).all(1)", "NameError: name 'hundred' is not defined"),
])  # fmt: skip
def test_a_mistake_is_noticed_where_its_test_fails_and_not_where_the_code_breaks(new, expected, tmp_path):
    assert mistakes.try_all(mistakes.read_table(write_table(tmp_path / "table.toml", new=new)), 1) == [expected]


@pytest.mark.slow
def test_a_test_that_fails_without_the_mistake_is_refused(tmp_path):
    table = write_table(tmp_path / "table.toml", test=TERMINATION.replace("150.0-True", "1e9"))  # no such parameters
    with pytest.raises(InputError, match="must pass before"):
        mistakes.try_all(mistakes.read_table(table), 1)


# --- Exercises ---
def test_the_page_describes_every_exercise_and_gives_none_away():
    names, rows = (tomllib.loads(TABLE.read_text())[key] for key in ("exercises", "mistake"))
    rows = [next(row for row in rows if row["name"] == name) for name in names]
    sections = re.split(r"(?m)^## ", EXERCISES.read_text())[1:]
    assert len(set(names)) == len(sections) == 12
    for number, (row, section) in enumerate(zip(rows, sections), 1):
        assert section.startswith(f"{number}. ") and f"\nRead `{row['file']}`.\n" in section
        assert f"mistakes.py --exercise {number}\n" in section and f"mistakes.py --check {number}\n" in section
        for secret in filter(None, (row[key].strip() for key in ("name", "mistake", "old", "new", "test"))):
            assert secret not in section
        # cached by the content of the data alone: running a copy would spoil the right one's runs
        assert row["file"] not in ("common/dataset.py", "common/dynamics.py", "common/pretrain.py")


def test_an_exercise_is_made_once_and_is_unsolved_until_it_is_mended(tmp_path, capsys):
    file, out = "common/terminations.py", tmp_path / "out"
    assert mistakes.main(Args(exercise=4, out=out)) == 0
    printed, copy = capsys.readouterr().out, out / "exercise-4"
    assert "4. Falling on one side only" in printed and "with a velocity of 150" in printed
    assert str(copy / file) in printed and "abs" not in printed  # of the hint
    assert not list(copy.rglob("mistakes.*"))  # the answers
    right, wrong = (ROOT / file).read_text(), (copy / file).read_text()
    assert right != wrong
    assert mistakes.main(Args(check=4, out=out)) == 1 and capsys.readouterr().out == "not mended yet\n"
    (copy / file).write_text(right.replace(BOUND, "((-100 < o[:, 1:]) & (o[:, 1:] < 100)).all(1)"))
    assert mistakes.main(Args(check=4, out=out)) == 0 and capsys.readouterr().out == "mended\n"
    with pytest.raises(InputError, match="exercise-4 is there already"):
        mistakes.main(Args(exercise=4, out=out))


@pytest.mark.parametrize("args, words", [
    ({"exercise": 13}, "there is no exercise 13: they are 1 to 12"),
    ({"check": -1}, "there is no exercise -1"),
    ({"check": 2}, r"no .*exercise-2.algos.mopo.py: make it with --exercise 2"),
])  # fmt: skip
def test_an_exercise_that_is_not_there_is_refused(args, words, tmp_path):
    with pytest.raises(InputError, match=words):
        mistakes.main(Args(**args, out=tmp_path))


@pytest.mark.slow
def test_a_copy_that_does_not_run_is_called_that(tmp_path, capsys):
    mistakes.main(Args(exercise=4, out=tmp_path))
    (tmp_path / "exercise-4" / "common" / "terminations.py").write_text("def (")
    capsys.readouterr()
    assert mistakes.main(Args(check=4, out=tmp_path)) == 1
    assert re.search("terminations.py does not run: ", capsys.readouterr().out)


# --- What a mistake costs ---
FLAGS = "--no-compile --num-updates 20 --eval-interval 10 --eval-episodes 1 --score-evals 2 --hidden-sizes 8"
LOSS = "return (agent.actor(obs) - action).square().mean()"


def test_both_are_trained_once_and_the_difference_of_their_scores_is_the_cost(tmp_path, capsys):
    table = write_table(tmp_path / "table.toml", file="algos/bc.py", old=LOSS, new=LOSS.replace("n (", "n -("))
    args = Args(table=table, train="a-mistake", seeds=1, flags=FLAGS + " --trust", out=tmp_path / "out")
    assert mistakes.main(args) == 0
    printed, out = capsys.readouterr().out, tmp_path / "out" / "a-mistake" / "bc__pendulum-random-v0"
    commands = [line for line in printed.splitlines() if "/algos/bc.py" in line]
    assert len(commands) == 2 and all("--num-threads 1" in c and "--num-updates 20" in c for c in commands)
    score = {}
    for kind in ("right", "mistake"):
        with open(out / f"{kind}-0" / "progress.csv") as file:
            last = [float(row["normalised_score"]) for row in csv.DictReader(file)]
        score[kind] = sum(last) / len(last)
    assert len(last) == 2 and score["right"] != score["mistake"]
    cost = score["right"] - score["mistake"]
    assert f"| 0 | {score['right']:.1f} | {score['mistake']:.1f} | {cost:.1f} |" in printed
    assert printed.endswith(f"costs {cost:.1f} (95 % interval over seeds {cost:.1f} to {cost:.1f}).\n")
    assert (out / "cost.md").read_text() in printed
    with open(out / "cost.csv") as file:
        assert [float(row["mistake"]) for row in csv.DictReader(file)] == pytest.approx([score["mistake"]], rel=1e-5)
    assert mistakes.main(args) == 0
    again = capsys.readouterr().out
    assert "/algos/bc.py" not in again and again in printed  # nothing is left to train
    (out / "right-0" / "policy.pt").unlink()  # as if it had been killed
    assert mistakes.main(args) == 0
    again = capsys.readouterr().out
    assert "right-0 --trust\n" in again and again.count("/algos/bc.py") == 1 and again.endswith(printed[-80:])
    args.flags += " --actor-lr 0.01"
    with pytest.raises(InputError, match="choose another --out"):
        mistakes.main(args)


@pytest.mark.slow
def test_a_mistake_in_common_has_a_cache_of_its_own_and_needs_a_script(tmp_path, monkeypatch):
    monkeypatch.setenv("OFFLINE_MBRL_CACHE", str(tmp_path / "cache"))
    old = "obs = env.reset()[0] if timeout else next_obs"
    table = write_table(tmp_path / "table.toml", file="common/dataset.py", old=old, new="obs = env.reset()[0]")
    args = Args(table=table, train="a-mistake", seeds=1, flags=FLAGS, out=tmp_path / "out")
    with pytest.raises(InputError, match="--script"):
        mistakes.main(args)
    args.script = "bc"
    assert mistakes.main(args) == 0
    own = tmp_path / "out" / "a-mistake" / "bc__pendulum-random-v0" / "cache"
    usual, wrong = ([file.name for file in (folder / "datasets").glob("*.npz")] for folder in (tmp_path / "cache", own))
    assert len(usual) == 1 and usual == wrong  # under the same name, so that one cache would hide the mistake


@pytest.mark.slow
def test_the_first_run_that_fails_ends_it(tmp_path):
    table = write_table(tmp_path / "table.toml", file="algos/bc.py", old=LOSS, new="return nothing")
    args = Args(table=table, train="a-mistake", seeds=3, flags=FLAGS, out=tmp_path / "out", workers=1)
    with pytest.raises(InputError, match="(?s)mistake-0 failed.*'nothing' is not defined"):
        mistakes.main(args)
    assert not list((tmp_path / "out").rglob("right-1"))
    with pytest.raises(InputError, match="no mistake is called 'none'"):
        mistakes.main(Args(table=table, train="none"))
