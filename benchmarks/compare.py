"""Two scripts side by side, as a web page that needs neither a network nor a script to be read.

Run: python benchmarks/compare.py mopo combo     one page
     python benchmarks/compare.py                all steps of the reading order, the matrix and an index, into pages/
     python benchmarks/compare.py --markdown     algos/diffs.md
     python benchmarks/compare.py --screenshot   the README's picture, by chromium
Equations are set by equations.toml, the matrix by matrix.toml.
"""

import difflib
import html
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from string import Template
from tempfile import TemporaryDirectory

import tyro
from latex2mathml.converter import convert
from PIL import Image
from pygments import token
from pygments.lexers import PythonLexer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.blocks import (  # noqa: E402
    FACTS,
    block_lines,
    blocks,
    equation,
    equations,
    header,
    latex,
    lines,
    marks,
    matrix,
    rows,
    settings,
    steps,
)  # fmt: skip
from benchmarks.files import HomePaths, start, write_text  # noqa: E402
from benchmarks.lines import READING_ORDER, changed_lines, source  # noqa: E402
from common import InputError  # noqa: E402

EDGES = [(before, script) for script, before in READING_ORDER.items() if before]
FOLDED = {"header", "imports", "TUNED"}  # what these say stands elsewhere on the page, or decides no method
TOGETHER = r"-&gt;|(?<!\S)# \S{1,15}(?=\s|$)"  # in code: no line breaks inside an arrow or behind a #
PICTURE = ROOT / "benchmarks" / "results" / "compare-mopo-combo.png"
COLOURED = {  # the class of the first that holds a token
    token.Comment: "c", token.String: "s", token.Keyword: "k", token.Operator.Word: "k", token.Number: "n",
    token.Name.Function: "f", token.Name.Class: "f", token.Name.Decorator: "d",
}  # fmt: skip
GREEK = dict(zip("alpha beta gamma delta eta kappa lambda rho sigma tau".split(), "αβγδηκλρστ"))
SET_BETTER = [  # so that a formula looks alike with and without a font made for mathematics
    (r"<msubsup>(<mi>.</mi>)(.*?)<mi>′</mi></msubsup>", r"<msub><mrow>\1<mo lspace=0 rspace=0>′</mo></mrow>\2</msub>"),
    (r"<msup>(<mi>.</mi>)<mi>′</mi></msup>", r"<mrow>\1<mo lspace=0 rspace=0>′</mo></mrow>"),
    (r"<m[io]>([A-Za-z]{2,})</m[io]>", r"<mo lspace=.17em rspace=.17em>\1</mo>"),
    (r"<mi>~</mi>", r"<mo lspace=.28em rspace=.28em>∼</mo>"),
    (r'<mo(?: stretchy="false")?>([|‖])</mo>', r"<mo stretchy=false lspace=.06em rspace=.06em>\1</mo>"),
]


@dataclass
class Args(HomePaths):
    scripts: tyro.conf.Positional[tuple[str, ...]] = ()  # two of algos/, as mopo combo; by default all steps
    out: Path = ROOT / "pages"  # folder of the pages
    markdown: bool = False  # write algos/diffs.md in place of pages
    screenshot: bool = False  # make the README's picture anew, by chromium


def escape(text: str) -> str:
    return html.escape(text, quote=False)


def link(a: str, b: str) -> str:
    return f"{a}-{b}.html"


def fold(summary: str, inner: str) -> str:
    return f"<details><summary>{summary}</summary>{inner}</details>"


def names_of(names: list[str]) -> str:
    return ", ".join(f"<b>{name}</b>" for name in names)


# --- Equations and prose ---
@cache
def mathml(formula: str) -> str:
    r"""Each part between two \\ on its own, so that a long equation wraps on a phone."""
    parts = []
    for part in re.split(r"\s*\\\\\s*", formula.strip()):
        if words := re.fullmatch(r"\\text\{([^{}]*)\}", part):
            parts.append(escape(words[1]))
            continue
        math = re.sub(r' (xmlns|display)="[^"]*"', "", convert(part))
        math = re.sub(r"&#x(?!0003[CE]|00026)(\w+);", lambda found: chr(int(found[1], 16)), math)
        for pattern, better in SET_BETTER:
            math = re.sub(pattern, better, math)
        parts.append(math)
    return " ".join(parts).replace("</math> '", "</math>'")


def formula(key: str) -> str:
    if key not in latex():
        sys.exit(f"benchmarks/equations.toml has no entry for this equation, add one:\n{key}")
    return mathml(latex()[key])


def prose(text: str) -> str:
    """[departure] and --flag stand out."""
    return re.sub(r"\[([a-z][\w-]*)\]|(--[a-z][\w-]*)", r"<em>\1\2</em>", escape(text))


def idea(script: str) -> str:
    """The head of a script: what it is called, what it does, its equations."""
    title, text, _ = header(script)
    name, paper = re.fullmatch(r"(.*) \((.*)\)", title).groups()
    short, _, long = name.partition(": ")
    where = re.sub(r"arXiv:([\d.]+)", r'<a href="https://arxiv.org/abs/\1">arXiv:\1</a>', escape(paper))
    where = re.sub(r"((?:openreview\.net|doi\.org)/\S+)", r'<a href="https://\1">\1</a>', where)
    out = f"<h2>{escape(short)}</h2><p class=paper>{escape(long)} <span>{where}</span></p>"
    for is_equation, group in groupby(text, key=lambda line: equation(line) is not None):
        if is_equation:
            out += "".join(f"<p class=eq>{formula(equation(line))}</p>" for line in group)
        else:
            paragraphs = "\n".join(group).split("\n\n")
            out += "".join(f"<p>{prose(' '.join(p.split()))}</p>" for p in paragraphs if p.strip())
    return out


# --- Code ---
@cache
def coloured(script: str) -> list[list[tuple[str, str]]]:
    """Of each line: its text in pieces, each with the class of its colour."""
    found = [[]]
    for kind, text in PythonLexer(stripnl=False, ensurenl=False).get_tokens(source(script)):
        colour = next((colour for group, colour in COLOURED.items() if kind in group), "")
        for piece in text.splitlines(keepends=True):
            found[-1].append((colour, piece))
            if piece.endswith("\n"):
                found.append([])
    return found


def code_line(script: str, number: int, marked: list[bool] | None = None, left_out: int = 0) -> str:
    """marked: of each character; left_out: of the indentation."""
    characters = [(colour, c) for colour, text in coloured(script)[number] for c in text][left_out:]
    out = ""
    for mark, group in groupby(zip(marked or [False] * len(characters), characters), key=lambda item: item[0]):
        inner = ""
        for colour, run in groupby(group, key=lambda item: item[1][0]):
            text = re.sub(TOGETHER, r"<b>\g<0></b>", escape("".join(c for _, (_, c) in run)))
            inner += f"<i class={colour}>{text}</i>" if colour else text
        out += f"<mark>{inner}</mark>" if mark else inner
    indent = (indentation(lines(script)[number]) - left_out) // 4
    return f"<span class={f'i{indent}' if lines(script)[number].strip() else 'e'}>{out}</span>"


def indentation(line: str) -> int:
    return len(line) - len(line.lstrip(" "))


def code(side: str, script: str, numbers, marked: list[bool] | None = None, left_out: int = 0) -> str:
    text = "".join(code_line(script, number, marked, left_out) for number in numbers)
    return f"<code class={side}>{text}</code>"


def changed_code(a: str, b: str, name: str) -> str:
    out, span_a, span_b = "", blocks(a)[name], blocks(b)[name]
    for kind, left, right in rows(block_lines(a, name), block_lines(b, name)):
        left, right = [span_a[i] for i in left], [span_b[i] for i in right]
        mark_a = mark_b = None
        if kind == "changed":
            line_a, line_b = lines(a)[left[0]], lines(b)[right[0]]
            mark_a, mark_b = marks(line_a, line_b), marks(line_b, line_a)
        out += f"<div class='row {kind}'>{code('a', a, left, mark_a)}{code('b', b, right, mark_b)}</div>"
    return f"<div class=code>{out}</div>"


# --- A page ---
def equation_row(a: list[str], b: list[str]) -> str:
    """The equations of both sides, those that the other side does not have marked."""
    columns = (
        "".join(f"<p{'' if key in other else ' class=new'}>{formula(key)}</p>" for key in own)
        for own, other in ((a, b), (b, a))
    )
    cells = "".join(f"<div class={side}>{column}</div>" for side, column in zip("ab", columns))
    return f"<div class='row math{' same' if a == b else ''}'>{cells}</div>" if a or b else ""


def three_columns(head: list[str], body: list[tuple[str, str, str]]) -> str:
    titles = "".join(f"<th>{title}</th>" for title in head)
    out = ""
    for name, x, y in body:
        cells = f"<td colspan=2>{x}</td>" if x == y else f"<td class=a>{x}</td><td class=b>{y}</td>"
        out += f"<tr><th>{name}</th>{cells}</tr>"
    return f"<table class=three><thead><tr>{titles}</tr></thead><tbody>{out}</tbody></table>"


def setting_tables(a: str, b: str) -> str:
    of_a, of_b = settings(a), settings(b)
    common = [name for name in of_a if name in of_b]
    same = [name for name in common if of_a[name][0] == of_b[name][0]]
    differ = [name for name in [*common, *of_a, *of_b] if name not in same]

    def shown(setting: tuple[str, str] | None) -> str:
        return f"<code>{escape(setting[0])}</code> <small>{escape(setting[1])}</small>" if setting else ""

    def with_symbol(name: str) -> str:
        """The comment of a setting begins with its symbol in the paper, if it has one."""
        first = [re.match(r"\w+(?=,| \[| in Eq)", of[name][1]) for of in (of_a, of_b) if name in of]
        symbols = {GREEK.get(word[0], word[0]) for word in first if word and (word[0] in GREEK or len(word[0]) == 1)}
        return " ".join([name, *(f"<i>{symbol}</i>" for symbol in sorted(symbols | {GREEK.get(name, "")} - {""}))])

    tables = [
        three_columns(
            ["", f"{a}.py", f"{b}.py"], [(with_symbol(n), shown(of_a.get(n)), shown(of_b.get(n))) for n in names]
        )
        for names in (list(dict.fromkeys(differ)), same)
    ]
    return tables[0] + fold(f"{len(same)} settings have the same default", tables[1])


def definitions(a: str, b: str, kind: str, left: list[str], right: list[str]) -> str:
    """A definition that differs, or those that only one of the scripts has at this place."""
    title = names_of(list(dict.fromkeys(left + right)))
    if kind == "changed":
        inner = changed_code(a, b, left[0])
    else:
        columns = [[number for name in names for number in blocks(s)[name]] for s, names in ((a, left), (b, right))]
        inner = (
            f"<div class=code><div class='row apart'>{code('a', a, columns[0])}{code('b', b, columns[1])}</div></div>"
        )
        title += "" if left and right else f" <small>only in {a if left else b}.py</small>"
    if left == ["Args"]:
        return f"<section id=Args><h3>Settings</h3>{setting_tables(a, b)}{fold('<b>Args</b> as code', inner)}</section>"
    if kind == "changed" and left[0] in FOLDED:
        return fold(f"{title} differ{'' if left == ['imports'] else 's'}", inner)
    math = equation_row(*([key for n in names for key in equations(s, n)] for s, names in ((a, left), (b, right))))
    return f"<section>{anchors(left + right)}<h3>{title}</h3>{math}{inner}</section>"


def anchors(names: list[str]) -> str:
    return "".join(f"<a id={name}></a>" for name in dict.fromkeys(names))


def page(title: str, body: str) -> str:
    parts = {name: (ROOT / "benchmarks" / f"compare.{name}").read_text() for name in ("css", "js")}
    template = Template((ROOT / "benchmarks" / "compare.html").read_text())
    return template.substitute(parts, title=title, body=body)


def compare(a: str, b: str, alone: bool = False) -> str:
    """alone: index and matrix do not lie beside the page."""
    heads = "".join(f"<div class={side}>{idea(script)}</div>" for side, script in zip("ab", (a, b)))
    facts = [header(script)[2] for script in (a, b)]
    table = [(label, *(prose(fact.get(label, "")) for fact in facts)) for label in (*FACTS, "Departures")]
    glance = three_columns(["", f"{a}.py", f"{b}.py"], table)
    out = ""
    for kind, left, right in steps(a, b):
        if kind == "same":
            verb = "definition is" if len(left) == 1 else "definitions are"
            whole = code("b", b, [number for name in right for number in blocks(b)[name]])
            title = f"{len(left)} {verb} the same: {names_of(left)}"
            out += anchors(right) + fold(title, f"<div class='code one'>{whole}</div>")
        else:
            out += definitions(a, b, kind, left, right)
    count = f"{changed_lines(a, b)} lines differ, of {len(lines(a))} and {len(lines(b))}"
    links = "" if alone else "<a href=index.html>All comparisons</a><a href=matrix.html>Matrix</a>"
    nav = f"<nav>{links}<span>{count}</span></nav>"
    bar = f"<div class='bar row'><span class=a>{a}.py</span><span class=b>{b}.py</span></div>"
    return page(f"{a} | {b}", f"{nav}<header class=row>{heads}</header><section>{glance}</section>{bar}{out}")


# --- The matrix ---
def edge_of(script: str) -> str:
    return link(READING_ORDER[script] or script, script if READING_ORDER[script] else EDGES[0][1])


def text_of(script: str, cell: dict) -> str:
    return "".join(lines(script)[number] for span in cell["code"] for number in span)


def matrix_row(place: str, cells: dict[str, dict]) -> str:
    out, before = f"<th>{place}</th>", None
    for script in READING_ORDER:
        now = cells.get(script) and (cells[script]["brief"], text_of(script, cells[script]))
        kind = "none" if now is None else "as" if now == before else "own"
        where = "" if now is None else "#" + matrix_anchor(cells[script], script)
        inner = mathml(cells[script]["brief"]) if now else "–"
        out += f"<td class={kind} data-of={script}><a href={edge_of(script)}{where}>{inner}</a></td>"
        before = now
    return f"<tr>{out}</tr>"


def matrix_anchor(cell: dict, script: str) -> str:
    return next(name for name, span in blocks(script).items() if cell["code"][0].start in span)


def matrix_cards(place: str, cells: dict[str, dict]) -> str:
    alike = {}  # scripts with the same equations and code
    for script, cell in cells.items():
        alike.setdefault((*(cell["equations"] or [cell["brief"]]), text_of(script, cell)), []).append(script)
    cards = ""
    for scripts in alike.values():
        cell = cells[scripts[0]]
        title = " ".join(f"<a href={edge_of(s)}#{matrix_anchor(cells[s], s)}>{s}</a>" for s in scripts)
        math = "".join(f"<p>{formula(key)}</p>" for key in cell["equations"]) or f"<p>{mathml(cell['brief'])}</p>"
        inner = "<hr>".join(
            code("b", scripts[0], span, left_out=indentation(lines(scripts[0])[span[0]])) for span in cell["code"]
        )
        cards += f"<article><h4>{title}</h4><div class=math>{math}</div><div class='code one'>{inner}</div></article>"
    return f"<section><h3>{place}</h3><div class=cards>{cards}</div></section>"


def matrix_page() -> str:
    head = "".join(
        f"<th><a href={edge_of(script)}>{script.replace('_', '_<wbr>')}</a></th>" for script in READING_ORDER
    )
    table = "".join(matrix_row(place, cells) for place, cells in matrix())
    cards = "".join(matrix_cards(place, cells) for place, cells in matrix())
    nav = "<nav><a href=index.html>All comparisons</a></nav><h1>Where methods differ</h1>"
    text = "<p>Shaded: as its left neighbour, letter by letter. Below: equations, and the lines that compute them.</p>"
    table = f"<table class=matrix><thead><tr><th></th>{head}</tr></thead><tbody>{table}</tbody></table>"
    return page("Where methods differ", f"{nav}{text}{table}{cards}")


# --- The index, GitHub's page, and the command line ---
def tree(script: str) -> str:
    before, (title, _, _) = READING_ORDER[script], header(script)
    math = "".join(f"<p class=eq>{formula(key)}</p>" for key in equations(script, "header"))
    step = f"<a href={link(before, script)}>{before} | {script}</a>" if before else f"<b>{script}</b>"
    count = f" <small>{changed_lines(before, script)} lines</small>" if before else ""
    after = "".join(tree(other) for other, one in READING_ORDER.items() if one == script)
    return f"<li><div>{step}{count}<p>{escape(title)}</p>{math}</div>{f'<ul>{after}</ul>' if after else ''}</li>"


def index() -> str:
    text = "<p>Each method is read after the one above it. A page shows what separates them, in equations and code.</p>"
    first = next(script for script, before in READING_ORDER.items() if before is None)
    nav = "<nav><a href=matrix.html>The matrix: all methods in one table</a></nav>"
    return page("Methods side by side", f"{nav}<h1>Methods side by side</h1>{text}<ul class=tree>{tree(first)}</ul>")


def diff(a: str, b: str, left: list[str], right: list[str]) -> str:
    """Of definitions: the lines that differ, with three around them; @@ stands where some are left out."""
    sides = ((a, left), (b, right))
    texts = [[line.rstrip("\n") for name in names for line in block_lines(s, name)] for s, names in sides]
    found = [line if line[:2] != "@@" else "@@" for line in difflib.unified_diff(*texts, lineterm="")][3:]
    while not found[0][1:].strip():  # blank lines above a definition
        found.pop(0)
    return "\n".join(line.rstrip() for line in found)


def markdown() -> str:
    """Every step of the reading order as diffs, changed definitions only."""
    out = [
        "# What each script changes",
        "The steps of the [reading order](README.md), definition by definition; those that are not named are the same\n"
        "in both scripts. `python benchmarks/compare.py` writes web pages of the same, with equations;\n"
        "`python benchmarks/compare.py --markdown` writes this file.",
        "\n".join(f"- [{a} to {b}](#{a}-to-{b})" for a, b in EDGES),
    ]
    for a, b in EDGES:
        out.append(f"## {a} to {b}\n\n`diff algos/{a}.py algos/{b}.py`: {changed_lines(a, b)} lines.")
        for kind, left, right in steps(a, b):
            if kind != "same" and not (left and left[0] in FOLDED):
                title = ", ".join(f"`{name}`" for name in dict.fromkeys(left + right))
                out.append(f"{title}\n\n```diff\n{diff(a, b, left, right)}\n```")
    return "\n\n".join(out) + "\n"


def screenshot(page: str) -> None:
    """The critic's loss in a page, alone: chromium takes no picture of a page that is scrolled."""
    if not (chromium := shutil.which("chromium")):
        raise InputError("--screenshot needs a browser: apt-get install chromium")
    flags = "--headless --no-sandbox --hide-scrollbars --window-size=1240,798 --force-device-scale-factor=1.5".split()
    with TemporaryDirectory() as folder:
        file = Path(folder, "page.html")
        file.write_text(page + "<style>body > :not(.bar, :has(#critic_loss)) { display: none }</style>")
        flags += [f"--user-data-dir={folder}", f"--screenshot={PICTURE}"]
        subprocess.run([chromium, *flags, file.as_uri()], check=True, stderr=subprocess.DEVNULL)
    Image.open(PICTURE).convert("RGB").quantize(64, dither=0).save(PICTURE, optimize=True)  # a third of the size


def main(args: Args) -> None:
    if args.markdown:
        write_text(ROOT / "algos" / "diffs.md", markdown())
        return
    if args.screenshot:
        screenshot(compare("mopo", "combo"))
        return
    if len(args.scripts) not in (0, 2) or not set(args.scripts) <= set(READING_ORDER):
        raise InputError(f"give two of {', '.join(READING_ORDER)}, or nothing for all steps of the reading order")
    alone = bool(args.scripts) and not all((args.out / name).exists() for name in ("index.html", "matrix.html"))
    pages = {link(a, b): compare(a, b, alone) for a, b in ([args.scripts] if args.scripts else EDGES)}
    if not args.scripts:
        pages |= {"index.html": index(), "matrix.html": matrix_page()}
    for name, text in pages.items():
        write_text(args.out / name, text)
    print(f"{len(pages)} pages in {args.out}, the largest of {max(map(len, pages.values())) // 1_000} kB")


if __name__ == "__main__":
    start(main, Args)
