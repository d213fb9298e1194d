"""Pages that show two scripts side by side: what they say is what the files say, and a browser can show it."""

import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from benchmarks import blocks, compare
from benchmarks.lines import READING_ORDER, source
from common import InputError

REGENERATE = "run python benchmarks/compare.py --markdown"


class Columns(HTMLParser):
    """The text of both columns of code, in the order of the page; what is the same stands in one column for both."""

    def __init__(self):
        super().__init__()
        self.text, self.into, self.same = {"a": "", "b": ""}, "", False

    def handle_starttag(self, tag, attrs):
        kind = dict(attrs).get("class", "")
        self.same = kind == "code one" if tag == "div" else self.same
        if tag == "code" and kind in ("a", "b"):
            self.into = "ab" if self.same else kind

    def handle_endtag(self, tag):
        self.into = "" if tag == "code" else self.into

    def handle_data(self, data):
        for side in self.into:
            self.text[side] += data


@pytest.fixture(scope="module")
def pages():
    return {f"{a}-{b}": compare.compare(a, b) for a, b in compare.EDGES} | {
        "matrix": compare.matrix_page(),
        "index": compare.index(),
    }


@pytest.mark.parametrize("script", READING_ORDER)
def test_blocks_make_up_the_file(script):
    assert "".join("".join(blocks.block_lines(script, name)) for name in blocks.blocks(script)) == source(script)
    assert list(blocks.blocks(script))[:4] == ["header", "imports", "Args", "TUNED"]


def test_every_equation_has_its_latex_and_every_latex_its_equation():
    places = [(script, name) for script in READING_ORDER for name in blocks.blocks(script)]
    written = {key for script, name in places for key in blocks.equations(script, name)}
    assert sorted(written - blocks.latex().keys()) == [], "add these to benchmarks/equations.toml"
    assert sorted(blocks.latex().keys() - written) == [], "no script has these lines of benchmarks/equations.toml"


def test_latex_becomes_mathml_whole():
    formulas = list(blocks.latex().values()) + [c["brief"] for _, cells in compare.matrix() for c in cells.values()]
    assert [formula for formula in formulas if re.search(r"\\|\$|merror", compare.mathml(formula))] == []


def test_both_columns_of_a_page_are_the_files(pages):
    for a, b in compare.EDGES:
        columns = Columns()
        columns.feed(pages[f"{a}-{b}"])
        assert columns.text == {"a": source(a), "b": source(b)}, (a, b)


def test_pages_need_no_network_and_are_small(pages):
    for name, page in pages.items():
        assert len(page.encode()) < 400_000
        assert not re.search(r"<link|<img|src=|@import|url\(", page), name


def test_links_lead_to_pages_that_exist(pages):
    for page in pages.values():
        for name, at in re.findall(r"href=([\w.-]+)\.html(?:#(\w+))?", page):
            assert name in pages and (not at or re.search(rf"id={at}\b", pages[name])), (name, at)


def test_a_lone_page_leads_nowhere_until_index_and_matrix_lie_beside_it(tmp_path):
    args = compare.Args(("osr", "sac_bc"), out=tmp_path)
    compare.main(args)
    assert "href=index.html" not in (tmp_path / "osr-sac_bc.html").read_text()
    for name in ("index", "matrix"):
        (tmp_path / f"{name}.html").touch()
    compare.main(args)
    assert "href=index.html" in (tmp_path / "osr-sac_bc.html").read_text()


def test_a_script_beside_itself_folds_into_one_line():
    assert blocks.steps("mopo", "mopo") == [("same", list(blocks.blocks("mopo")), list(blocks.blocks("mopo")))]


def test_changed_words_are_marked_and_nothing_else():
    one, other = "    q = critic(obs, action)\n", "    q = critic(obs, samples)\n"
    marked = "".join(c for c, mark in zip(other, blocks.marks(other, one)) if mark)
    assert marked == "samples"
    assert blocks.rows(["x\n", one], ["x\n", "y = f(z)\n", other]) == [
        ("same", range(0, 1), range(0, 1)),
        ("apart", range(1, 1), range(1, 2)),
        ("changed", range(1, 2), range(2, 3)),
    ]


def test_settings_that_differ_come_first():
    tables = compare.setting_tables("mopo", "combo")
    first, folded = tables.split("<details>")
    assert "penalty_coef" in first and "real_ratio" in first and "gamma" not in first
    assert "gamma" in folded and "real_ratio" not in folded


def test_a_place_of_the_matrix_is_a_few_lines():
    for place, cells in compare.matrix():
        assert len(cells) >= 5
        for script, cell in cells.items():
            assert 1 <= sum(map(len, cell["code"])) <= 14, (place, script)


@pytest.mark.parametrize("where", ["no_such_function", "actor_loss: no such text", "actor_loss: q = .. no such text"])
def test_a_renamed_function_is_missed_by_the_matrix(where):
    with pytest.raises(LookupError, match=r"mopo\.py has no"):
        blocks.excerpt("mopo", where)


def test_the_diffs_for_github_are_up_to_date():
    text = (compare.ROOT / "algos" / "diffs.md").read_text()
    assert compare.markdown() == text, REGENERATE
    assert text.count("```") == 2 * text.count("```diff") and len(text) < 400_000


def test_an_unknown_script_and_a_folder_that_is_a_file_are_one_clear_sentence(tmp_path):
    with pytest.raises(InputError, match="^give two of mopo, mobile, .*, or nothing for all steps"):
        compare.main(compare.Args(("mopo", "dreamer")))
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write"):
        compare.main(compare.Args(("bc", "td3_bc"), out=tmp_path / "file"))


class Browser:
    """Headless chromium, spoken to over its debugging pipe: file descriptors 3 and 4, messages that end with a zero."""

    def __init__(self, folder):
        command = shutil.which("chromium")
        assert command, "install chromium: apt-get install chromium"
        read, self.commands = os.pipe()
        self.answers, write = os.pipe()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={folder}"]
        shell = ["bash", "-c", f'exec "$@" 3<&{read} 4>&{write}', "bash", command, *flags]
        self.process = subprocess.Popen(shell, pass_fds=(read, write), stderr=subprocess.DEVNULL)
        os.close(read)
        os.close(write)
        self.received, self.number, self.session = b"", 0, {}
        page = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]}

    def call(self, method, **params):
        self.number += 1
        message = {"id": self.number, "method": method, "params": params, **self.session}
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.received:
                part = os.read(self.answers, 1 << 20)
                assert part, "chromium has ended"
                self.received += part
            message, self.received = self.received.split(b"\0", 1)
            answer = json.loads(message)
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]

    def run(self, script):
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def open(self, path, width, height=1000):
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Page.navigate", url=path.as_uri())
        loaded = f"location.href == {json.dumps(path.as_uri())} && document.readyState == 'complete'"
        self.run(f"new Promise(r => {{ const wait = () => {loaded} ? r() : setTimeout(wait, 20); wait() }})")

    def press(self, key, text=""):
        for kind in ("keyDown", "keyUp"):
            code = {"Tab": 9, "Enter": 13}[key]
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, text=text, windowsVirtualKeyCode=code)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.process.terminate()
    browser.process.wait()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, pages):
    folder = tmp_path_factory.mktemp("pages")
    for name, page in pages.items():
        (folder / f"{name}.html").write_text(page)
    return folder


TOO_WIDE = """[...document.querySelectorAll("body *")].filter(
  e => e.clientWidth && e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).display != "inline"
).map(e => e.textContent.slice(0, 80))"""
UNFOLD = "document.querySelectorAll('details').forEach(fold => fold.open = true)"


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 390, 1440, 3840])
@pytest.mark.parametrize("name", ["index", "matrix", *(f"{a}-{b}" for a, b in compare.EDGES)])
def test_nothing_scrolls_sideways_in_a_browser(browser, folder, name, width):
    browser.open(folder / f"{name}.html", width)
    for script in ("", UNFOLD):
        browser.run(script)
        assert browser.run("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
        assert browser.run(TOO_WIDE) == []


@pytest.mark.slow
def test_folds_open_with_the_keyboard(browser, folder):
    browser.open(folder / "mopo-combo.html", 1440)
    for _ in range(20):
        browser.press("Tab")
        if browser.run("document.activeElement.tagName") == "SUMMARY":
            break
    for is_open in (True, False):
        browser.press("Enter", "\r")
        assert browser.run("document.activeElement.parentElement.open") is is_open


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("a, b", [("mopo", "combo"), ("osr", "sdc"), ("combo", "sdm_gan")])
def test_the_right_column_unfolded_is_the_file(browser, folder, a, b, width):
    browser.open(folder / f"{a}-{b}.html", width)
    browser.run(UNFOLD)
    visible = "[...document.querySelectorAll('code.b > span')].filter(e => e.getClientRects().length)"
    assert browser.run(f"{visible}.map(e => e.textContent).join('')") == source(b)


@pytest.mark.slow
def test_a_click_on_a_setting_lights_up_its_symbol_and_its_uses(browser, folder):
    browser.open(folder / "mopo-combo.html", 1440)
    row = "[...document.querySelectorAll('.three tbody th')].find(th => th.textContent.startsWith('penalty_coef'))"
    box = browser.run(f"(r => [r.x + 20, r.y + 8])(({row}.scrollIntoView(), {row}.getBoundingClientRect()))")
    for kind in ("mousePressed", "mouseReleased"):
        click = {"x": box[0], "y": box[1], "button": "left", "clickCount": 1}
        browser.call("Input.dispatchMouseEvent", type=kind, **click)
    lit = browser.run(
        "[...CSS.highlights.get('hit')].map(r => r.startContainer.data.slice(r.startOffset, r.endOffset))"
    )
    assert set(lit) == {"penalty_coef", "λ"} and lit.count("λ") >= 3
