"""All scripts side by side: what has one name is one text, settings in common are the same, `--help` works.

Scripts are found by themselves. A name that a method must change goes on a list here, with the reason.
"""

import ast
import importlib
import re
import sys
from functools import cache
from itertools import combinations
from pathlib import Path

import pytest

from benchmarks.lines import changed_lines, with_table
from common.run import read_args

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(path.stem for path in (ROOT / "algos").glob("*.py"))
TEXTS = {script: (ROOT / "algos" / f"{script}.py").read_text() for script in SCRIPTS}
PAIRS = list(combinations(SCRIPTS, 2))

# functions, classes and constants whose text may depend on the method
MAY_DIFFER = {
    "Args": "settings of its own; those in common are compared one by one",
    "TUNED": "settings by dataset",
    "Agent": "networks of its own",
    "critic_loss": "where a method enters",
    "actor_loss": "where a method enters",
    "update": "stages and noise of its own",
    "draw_noise": "noise of its own",
    "constraint": "what holds the policy",
    "rollout": "where a method enters",
    "sample_batch": "with a model buffer or without",
    "main": "with a model or without",
}
# and yet the text of these is one
SAME_IN = {
    "Agent": ["combo cql", "mobile mopo morel sac_bc", "osr osr_v"],
    "critic_loss": ["mopo morel sac_bc", "osr sdc"],
    "actor_loss": ["combo cql mobile mopo morel osr_v"],
    "update": ["mopo morel"],
    "sample_batch": ["bc cql iql onestep osr osr_v sac_bc sdc td3_bc", "combo mobile mopo morel"],
}
# a line of `main` that four scripts have stands in all scripts, or in just those of one family
FAMILIES = {
    "a buffer of simulated rows": "combo mobile mopo morel sdm_gan",
    "none": "bc cql fqe iql morel_npg onestep osr osr_v sac_bc sdc td3_bc",
    "the actor is the policy": "bc combo cql iql mobile mopo morel morel_npg osr osr_v sac_bc sdc td3_bc",
    "rows as they are": "combo cql iql mobile mopo morel osr osr_v sac_bc sdc sdm_gan",
    "sizes of networks": "bc fqe onestep td3_bc",
    "a policy of its own": "bc combo cql iql mobile mopo morel morel_npg onestep osr osr_v sac_bc sdc sdm_gan td3_bc",
    "observations as they are": "combo cql fqe iql mobile mopo morel morel_npg onestep osr osr_v sac_bc sdc sdm_gan",
    "updates by rows": "bc combo cql fqe iql mobile mopo morel onestep osr osr_v sac_bc sdc sdm_gan td3_bc",
    "a schedule": "combo cql iql mobile mopo morel osr osr_v sac_bc sdc",
    "noise of actions alone": "combo cql mopo morel onestep sac_bc td3_bc",
    "an update of agent, rows and noise": "combo cql mopo morel",
    "logged rows and noise": "cql osr osr_v sac_bc sdc",
    "an ensemble": "combo mobile mopo morel morel_npg sdc sdm_gan",
    "ends of simulated episodes": "combo mobile mopo morel morel_npg sdm_gan",
    "a rollout now and then": "combo mobile mopo morel",
}
# scripts of another kind, and what may differ between kinds
KINDS = {
    "morel_npg": "on-policy", "td3_bc": "deterministic", "bc": "deterministic", "iql": "weighted",
    "sdm_gan": "implicit",
}  # fmt: skip
OTHER_KIND = {
    # an update is an iteration over whole episodes, and the policy is a Gaussian that is not squashed
    "on-policy": {
        "Actor", "Value", "value_lr", "hidden_sizes",
        "num_updates", "batch_size", "eval_interval", "score_evals", "compile", "checkpoint_interval", "gamma",
    },
    "deterministic": {"Actor"},
    "weighted": {"Actor"},  # a Gaussian that imitates: of logged actions it must know the log-density
    # a network of state and noise, with networks, batches and rollouts of the paper's sizes
    "implicit": {"Actor", "Critic", "batch_size", "rollout_interval", "rollout_batch_size", "rollout_retain", "q_coef"},
}  # fmt: skip
MAY_HAVE_OTHER_DEFAULTS = {
    "real_ratio", "hidden_sizes", "actor_lr", "normalise_q", "noise_scale", "min_std", "latent_coef",
}  # fmt: skip
LEARNERS = ["SAC", "TD3", "IQL", "SARSA", "FQE", "Natural policy gradient", "Actor and critic"]  # over settings
BANNERS = [
    "Dynamics", "Model rollouts", *LEARNERS, "The method", "Networks", "The method",
    "Losses", "Update", "Model rollouts", "Batches", "Pre-training", "Evaluation",
]  # fmt: skip


def excepted(one: str, other: str) -> set[str]:
    kinds = KINDS.get(one), KINDS.get(other)
    return set() if kinds[0] == kinds[1] else OTHER_KIND.get(kinds[0], set()) | OTHER_KIND.get(kinds[1], set())


@cache
def definitions(text: str) -> dict[str, str]:
    """Name -> source of the functions, classes and assignments of a module."""
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            start = min(item.lineno for item in [*node.decorator_list, node])
            found[node.name] = "\n".join(text.splitlines()[start - 1 : node.end_lineno])
        elif isinstance(node, ast.Assign):
            found[ast.unparse(node.targets[0])] = ast.get_source_segment(text, node)
    return found


@cache
def settings(text: str) -> dict[str, dict[str, str]]:
    """Name -> section, type, default and comment of the fields of Args; a source in brackets is left out."""
    found, section = {}, ""
    for line in definitions(text)["Args"].splitlines():
        if banner := re.fullmatch(r"    # --- (.+) ---", line):
            section = "the learner" if banner[1] in LEARNERS else banner[1]
        elif field := re.fullmatch(r"    (\w+): (.+?) = (.+?)  # (.+)", line):
            comment = re.sub(r" *\[.*?\]", "", field[4])
            found[field[1]] = {"section": section, "type": field[2], "default": field[3], "comment": comment}
    return found


def is_subsequence(names: list[str], of: list[str]) -> bool:
    rest = iter(of)
    return all(name in rest for name in names)


def test_scripts_are_found():
    assert {"mopo", "morel", "morel_npg", "combo", "cql", "bc", "td3_bc", "iql", "sac_bc", "onestep"} <= set(SCRIPTS)
    assert {"osr", "osr_v", "sdc", "sdm_gan", "mobile", "fqe"} <= set(SCRIPTS)


@pytest.mark.parametrize("one, other", PAIRS)
def test_what_has_the_same_name_has_the_same_text(one, other):
    first, second = definitions(TEXTS[one]), definitions(TEXTS[other])
    common = first.keys() & second.keys()
    assert {"Args", "TUNED", "main"} <= common
    different = {name for name in common if first[name] != second[name]}
    assert different - MAY_DIFFER.keys() - excepted(one, other) == set()


@pytest.mark.parametrize("one, other", PAIRS)
def test_definitions_in_common_stand_in_the_same_order(one, other):
    first, second = definitions(TEXTS[one]), definitions(TEXTS[other])
    assert [name for name in first if name in second] == [name for name in second if name in first]


def test_no_name_is_on_the_list_for_nothing():
    every = [definitions(text) for text in TEXTS.values()]
    assert [name for name in MAY_DIFFER if len({d[name] for d in every if name in d}) < 2] == []


def test_what_is_one_text_in_some_scripts_stays_so():
    for name, groups in SAME_IN.items():
        for group in groups:
            assert len({definitions(TEXTS[script])[name] for script in group.split()}) == 1, (name, group)


def test_a_line_of_main_that_many_have_stands_in_all_of_their_kind():
    scripts_with = {}
    for script in SCRIPTS:
        for line in definitions(TEXTS[script])["main"].splitlines():
            scripts_with.setdefault(re.sub(r" *#.*", "", line.strip()), set()).add(script)
    families = [set(SCRIPTS), *(set(family.split()) for family in FAMILIES.values())]
    assert [line for line, having in scripts_with.items() if len(having) >= 4 and having not in families] == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_setting_is_one_line_with_a_comment(script):
    module = importlib.import_module(f"algos.{script}")
    own = [name for name in module.Args.__annotations__]
    assert list(settings(TEXTS[script])) == own


@pytest.mark.parametrize("one, other", PAIRS)
def test_settings_in_common_are_the_same_in_the_same_order(one, other):
    first, second = settings(TEXTS[one]), settings(TEXTS[other])
    common = [name for name in first if name in second]
    assert common == [name for name in second if name in first]
    for name in [name for name in common if name not in excepted(one, other)]:
        a, b = first[name], second[name]
        ignored = {"default"} if name in MAY_HAVE_OTHER_DEFAULTS else set()
        if "The method" in (a["section"], b["section"]):
            ignored |= {"comment", "section"}  # in the words of its paper
        assert [(name, key) for key in a if a[key] != b[key] and key not in ignored] == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_setting_is_read(script):
    body = TEXTS[script].split("\nTUNED = ")[1] + (ROOT / "common" / "run.py").read_text()
    assert [name for name in settings(TEXTS[script]) if not re.search(rf"args\.{name}\b", body)] == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_sections_stand_in_the_same_order(script):
    banners = re.findall(r"^ *# --- ([^:\n]+?)(?:: .*)? ---$", TEXTS[script], flags=re.MULTILINE)
    assert is_subsequence(banners, BANNERS), banners
    assert {"Networks", "Losses", "Update"} <= set(banners)


@pytest.mark.parametrize("script", SCRIPTS)
def test_header_names_paper_and_command_and_its_departures_are_marked_below(script):
    header, body = TEXTS[script].split('"""', 2)[1:]
    source = r"(arXiv:\d{4}\.\d{5}|openreview\.net/forum\?id=\w+|doi\.org/[\w./]+)\)$"
    assert re.search(source, header.splitlines()[0])
    assert f"Run: python algos/{script}.py" in header
    for name in re.findall(r"(\w+)\(\)$", header, flags=re.MULTILINE):
        assert f"def {name}(" in body
    for line in ("Rollouts end:", "Gradient stops at:", "Normalised:", "Elites:"):
        assert f"\n{line} " in header
    # a departure has a name in brackets, in the header and at its line; [word] alone is one, [two words] is a source
    departures = set(re.findall(r"\[([a-z]\w*(?:-\w+)*)\]", header))
    marks = {name for comment in re.findall(r"#.*", body) for name in re.findall(r"\[([a-z]\w*(?:-\w+)*)\]", comment)}
    marks -= {"ours", "paper"}  # a setting's sources
    assert departures and departures <= marks, f"not marked at any line: {departures - marks}"
    assert marks <= departures, f"not in the header: {marks - departures}"
    assert not re.search(r"\[\d\]", header), "departures have names: numbers go stale"


@pytest.mark.parametrize("script", SCRIPTS)
def test_functions_take_six_things_at_most_and_nothing_by_star(script):
    for node in ast.walk(ast.parse(TEXTS[script])):
        if isinstance(node, ast.FunctionDef) and node.name != "__init__":
            names = [arg.arg for arg in node.args.posonlyargs + node.args.args + node.args.kwonlyargs]
            assert len([name for name in names if name != "self"]) <= 6, node.name
            assert node.args.vararg is None and node.args.kwarg is None, node.name


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_short_enough_to_be_read_in_a_sitting(script):
    longest = {"mopo": 350, "sdm_gan": 494}
    assert len(TEXTS[script].splitlines()) <= longest.get(script, 460)


def test_common_stays_small():
    lines = {path.stem: len(path.read_text().splitlines()) for path in (ROOT / "common").glob("*.py")}
    assert lines["run"] <= 430 and sum(lines.values()) <= 1_800


def test_the_table_of_lines_is_up_to_date():
    readme = (ROOT / "algos" / "README.md").read_text()
    assert with_table(readme) == readme, "run python benchmarks/lines.py"
    for one, other, most in (
        ("mopo", "combo", 92),
        ("mopo", "morel", 135),
        ("mopo", "mobile", 115),
        ("cql", "osr", 190),
    ):
        assert changed_lines(one, other) <= most, (one, other)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_every_flag(script, monkeypatch, capsys):
    module = importlib.import_module(f"algos.{script}")
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        read_args(module.Args, module.TUNED)
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert [name for name in settings(TEXTS[script]) if f"--{name.replace('_', '-')}" not in out] == []
