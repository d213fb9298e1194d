"""A script of algos/ cut into blocks, its equations, and which lines of two texts belong together: for compare.py."""

import ast
import difflib
import re
import tomllib
from collections import Counter
from functools import cache
from itertools import groupby
from pathlib import Path

from benchmarks.lines import READING_ORDER, source

HERE = Path(__file__).resolve().parent
FACTS = ("Rollouts end", "Gradient stops at", "Normalised", "Elites")  # the four fixed lines of a header


# --- A script in blocks ---
def name_of(node: ast.stmt) -> str:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return node.name
    if isinstance(node, ast.Assign):
        return ast.unparse(node.targets[0])
    return "start" if isinstance(node, ast.If) else "imports"


@cache
def blocks(script: str) -> dict[str, range]:
    """Name -> line numbers, from 0. What stands above a definition belongs to it, so that blocks make up the file."""
    nodes = ast.parse(source(script)).body
    named = [("header", nodes[0]), *((name_of(node), node) for node in nodes[1:])]
    found, begin = {}, 0
    for name, group in groupby(named, key=lambda item: item[0]):
        end = max(node.end_lineno for _, node in group)
        found[name], begin = range(begin, end), end
    return found


@cache
def lines(script: str) -> list[str]:
    return source(script).splitlines(keepends=True)


def block_lines(script: str, name: str) -> list[str]:
    return [lines(script)[number] for number in blocks(script)[name]]


@cache
def header(script: str) -> tuple[str, list[str], dict[str, str]]:
    """Title, lines of the idea, and what the four fixed lines and the departures say."""
    title, rest = ast.get_docstring(ast.parse(source(script)), clean=False).split("\n", 1)
    idea, rest = rest.split(f"\n{FACTS[0]}:")
    facts, label = {}, ""
    for line in f"{FACTS[0]}:{rest}".split("\nRun:")[0].splitlines():
        if found := re.match(rf"({'|'.join(FACTS)}): +", line):
            label, line = found[1], line[found.end() :]
        elif not line.startswith(" "):
            label = "Departures"
        facts[label] = f"{facts.get(label, '')} {line.strip()}".strip()
    facts["Departures"] = facts["Departures"].removeprefix("Departures: ")
    return title, idea.strip("\n").splitlines(), facts


def settings(script: str) -> dict[str, tuple[str, str]]:
    """Name -> default and comment of each field of Args."""
    fields = re.findall(r"^    (\w+): .+? = (.+?)  # (.+)$", "".join(block_lines(script, "Args")), flags=re.MULTILINE)
    return {name: (default, comment) for name, default, comment in fields}


# --- Equations ---
def equation(line: str) -> str | None:
    """What a line of a script is called in equations.toml, if it is one: above a function, or in the header."""
    if found := re.match(r"(?:#     |    (?! ))(.*?)(?:   +(?:\w+\(\)|[A-Z]\w+))?$", line.rstrip()):
        return " ".join(found[1].split()).rstrip(",")
    return None


def equations(script: str, name: str) -> list[str]:
    text = header(script)[1] if name == "header" else [line for line in block_lines(script, name) if line[0] == "#"]
    return [key for line in text if (key := equation(line))]


@cache
def latex() -> dict[str, str]:
    entries = tomllib.loads((HERE / "equations.toml").read_text())["equation"]
    return {entry["text"]: entry["latex"] for entry in entries}


# --- Two texts, line by line ---
def words(line: str) -> list[str]:
    return re.findall(r"\w+|\s+|[^\w\s]", line)


def likeness(one: str, other: str) -> float:
    """0 to 1: the share of words in common."""
    a, b = (Counter(word for word in words(line) if not word.isspace()) for line in (one, other))
    return 2 * (a & b).total() / max(a.total() + b.total(), 1)


def versions(a: list[str], b: list[str]) -> list[tuple[int, int]]:
    """Which lines of two changed stretches are versions of each other: the pairs, in order, that are most alike."""
    best = [[(0.0, [])] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, j in ((i, j) for i in range(len(a)) for j in range(len(b))):
        alike = likeness(a[i], b[j])
        score, pairs = best[i][j]
        choices = [best[i][j + 1], best[i + 1][j], (score + alike, [*pairs, (i, j)] if alike > 0.5 else [])]
        best[i + 1][j + 1] = max(choices if alike > 0.5 else choices[:2], key=lambda choice: choice[0])
    return best[-1][-1][1]


def rows(a: list[str], b: list[str]) -> list[tuple[str, range, range]]:
    """Kind, lines of a, lines of b: `same` stretches, `changed` pairs of lines, `apart` what only one side has."""
    found = []
    for kind, a0, a1, b0, b1 in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        if kind == "equal":
            found.append(("same", range(a0, a1), range(b0, b1)))
            continue
        i, j = a0, b0
        for x, y in [*((a0 + x, b0 + y) for x, y in versions(a[a0:a1], b[b0:b1])), (a1, b1)]:
            if i < x or j < y:
                found.append(("apart", range(i, x), range(j, y)))
            if x < a1 and y < b1:
                found.append(("changed", range(x, x + 1), range(y, y + 1)))
            i, j = x + 1, y + 1
    return found


def marks(line: str, other: str) -> list[bool]:
    """Of each character of a line: does it stand in a word that `other` does not have there?"""
    own, theirs, marked = words(line), words(other), []
    for kind, i, j, _, _ in difflib.SequenceMatcher(None, own, theirs, autojunk=False).get_opcodes():
        marked += [kind != "equal"] * len("".join(own[i:j]))
    indent = len(line) - len(line.lstrip())
    return [False] * indent + marked[indent:]


# --- Two scripts, block by block ---
def steps(a: str, b: str) -> list[tuple[str, list[str], list[str]]]:
    """Kind, names in a, names in b: runs of definitions that are the `same`, one that is `changed`, those `apart`."""
    names, found = (list(blocks(a)), list(blocks(b))), []
    for kind, a0, a1, b0, b1 in difflib.SequenceMatcher(None, *names, autojunk=False).get_opcodes():
        if kind != "equal":
            found.append(("apart", names[0][a0:a1], names[1][b0:b1]))
            continue
        for same, group in groupby(names[0][a0:a1], key=lambda name: block_lines(a, name) == block_lines(b, name)):
            group = list(group)
            found += [("same", group, group)] if same else [("changed", [name], [name]) for name in group]
    return found


# --- Places in a script ---
def excerpt(script: str, where: str) -> range:
    """Line numbers of a `definition` without what stands above it, or, in it, of `definition: first .. last`."""
    name, _, texts = where.partition(": ")
    first, _, last = texts.partition(" .. ")
    span, text = blocks(script).get(name, range(0)), lines(script)
    begin = next((n for n in span if (first in text[n] if first else re.match(r"[^#\s]", text[n]))), span.stop)
    rest = range(begin + bool(last), span.stop)
    end = next((n for n in rest if last in text[n]), -1) if texts else span.stop - 1
    if end < begin:
        raise LookupError(f"benchmarks/matrix.toml: {script}.py has no {where!r}")
    return range(begin, end + 1)


@cache
def matrix() -> list[tuple[str, dict[str, dict]]]:
    """Of each place where methods differ: its name, and script -> brief, code and equations."""
    places = []
    for place in tomllib.loads((HERE / "matrix.toml").read_text())["place"]:
        cells = {}
        for cell in place["cell"]:
            for script in cell["of"].split():
                keys = [key for where in cell["code"] for key in equations(script, where.partition(":")[0])]
                keys = [key for key in keys if key.startswith(tuple(cell.get("equations", [""])))]
                code = [excerpt(script, where) for where in cell["code"]]
                cells[script] = {"brief": cell["brief"], "code": code, "equations": list(dict.fromkeys(keys))}
        places.append((place["name"], {script: cells[script] for script in READING_ORDER if script in cells}))
    return places
