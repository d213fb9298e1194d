"""The page of benchmarks/doctor.py: findings, plots in the page's own colours, a table of the columns."""

import html
import io
import re
import sys
from collections.abc import Callable
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

import matplotlib
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.files import one_line  # noqa: E402
from common.dataset import OfflineDataset  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

if TYPE_CHECKING:
    from benchmarks.doctor import Finding, Log

INK, FIRST, SECOND = "#0a0a01", "#0a0a02", "#0a0a03"  # stand for the page's colours, which know light and dark
COLOURS = {INK: "currentColor", FIRST: "var(--b)", SECOND: "var(--a)"}
STYLE = {
    "svg.fonttype": "path", "text.parse_math": True, "font.size": 9,
    "axes.spines.top": False, "axes.spines.right": False,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
}  # fmt: skip


def figure(title: str, draw: Callable) -> str:
    """draw(fig, ax) as <figure>, in the page's colours. Letters are outlines: no font makes a label too wide."""
    with plt.rc_context(STYLE | {"svg.hashsalt": title}):
        fig, ax = plt.subplots(figsize=(3.7, 2.5), layout="constrained")
        draw(fig, ax)
        fig.savefig(text := io.StringIO(), format="svg", transparent=True, dpi=200, metadata={"Date": None})
        plt.close(fig)
    svg = text.getvalue()[text.getvalue().index("<svg") :]
    for stand_in, colour in COLOURS.items():
        svg = svg.replace(stand_in, colour)
    name = re.sub("[^a-z]", "", title.lower())
    svg = re.sub(r'( id="|url\(#|href="#)', rf"\1{name}-", svg)  # two figures would share ids
    # the page decides how large it is
    svg = re.sub(
        r'<svg| (width|height)="[\d.]+pt"', lambda m: "" if m[1] else f"<svg role=img aria-label='{title}'", svg
    )
    return f"<figure><figcaption>{title}</figcaption>{svg}</figure>"


def bars(x: np.ndarray, label: str, what: str, least: float | None = None) -> Callable:
    """least: where the axis begins; None: where `x` does."""

    def draw(fig, ax):
        low, high = x.min() if least is None else least, x.max()
        ax.hist(x, bins=40, range=(low, high + (high == low)), color=FIRST)
        ax.set(xlabel=label, ylabel=what)

    return draw


def coverage(fig, ax, log: "Log") -> None:
    """Two principal components of observations in standard deviations."""
    at, dim = log.sample[:: len(log.sample) // 6000 + 1], log.obs.shape[1]
    share, axes = np.linalg.eigh(log.obs[log.sample].T @ log.obs[log.sample])
    where, colour = log.obs[at] @ axes[:, ::-1], log.reward[at]
    if log.data.ordered:
        returns = np.add.reduceat(log.reward, np.r_[0, np.flatnonzero(log.end)[:-1] + 1])
        colour = returns[(np.cumsum(log.end) - log.end)[at]]
    y = where[:, 1] if dim > 1 else np.zeros(len(at))
    dots = ax.scatter(where[:, 0], y, c=colour, s=3, linewidths=0, cmap="viridis", rasterized=True)
    fig.colorbar(dots, label="return of the episode" if log.data.ordered else "reward")
    first, second = [*share[::-1] / max(share.sum(), 1e-30), 0][:2]
    ax.set(xlabel=f"first component, {first:.0%} of the variance", ylabel=f"second, {second:.0%}")


def action_ranges(fig, ax, log: "Log") -> None:
    low, first, middle, third, high = np.quantile(log.action, [0, 0.25, 0.5, 0.75, 1], axis=0)
    x = np.arange(len(low))
    ax.vlines(x, low, high, color=FIRST, linewidth=1)
    ax.vlines(x, first, third, color=FIRST, linewidth=5)
    ax.plot(x, middle, "o", color=SECOND, markersize=4)
    ax.set(xlabel="component; thick: the middle half", ylabel="share of the box", ylim=(-1.05, 1.05))
    ax.xaxis.get_major_locator().set_params(integer=True)


def prediction(fig, ax, errors: tuple[np.ndarray, ...], jump: float) -> None:
    unit = np.median(errors[1])
    bins = np.geomspace(1e-4, 10, 60)
    for error, colour, label in zip(errors, (FIRST, SECOND), ("as recorded", "successors mixed up")):
        ax.hist(np.clip(error / unit, *bins[[0, -1]]), bins=bins, color=colour, alpha=0.7, label=label)
    ax.axvline(jump, color=INK, linewidth=1, linestyle=":")
    ax.set(xscale="log", yscale="log", xlabel="error of one-step prediction; dotted: a jump", ylabel="rows")
    fig.legend(frameon=False, fontsize=8, loc="outside upper right", ncols=2, columnspacing=1)


def figures(log: "Log", jump: float) -> str:
    out = figure("Where the log has been", lambda fig, ax: coverage(fig, ax, log))
    if log.data.ordered:
        out += figure("Lengths", bars(log.length, "steps of an episode", "episodes", 0))
        out += figure("Returns", bars(log.data.episode_returns, "return of an episode", "episodes"))
    out += figure("Rewards", bars(log.reward, "reward of a step", "steps"))
    out += figure("Actions", lambda fig, ax: action_ranges(fig, ax, log))
    if log.errors is not None:
        out += figure("Does a step lead to its successor?", lambda fig, ax: prediction(fig, ax, log.errors, jump))
    return f"<div class=figures>{out}</div>"


def column_table(log: "Log") -> str:
    data, head = log.data, ("column", "mean", "deviation", "least", "most", "usual step")
    obs, steps = data.obs.numpy(), (log.next_obs - log.obs)[log.sample] * data.obs_std
    step = np.sqrt((steps**2).mean(axis=0)) if len(steps) else np.full(obs.shape[1], np.nan)
    numbers = np.stack([data.obs_mean, data.obs_std, obs.min(axis=0), obs.max(axis=0), step], axis=1)
    rows = "".join(f"<tr><th>{i}</th>{''.join(f'<td>{x:.3g}</td>' for x in row)}</tr>" for i, row in enumerate(numbers))
    titles = "".join(f"<th>{title}</th>" for title in head)
    return f"<section><h2>Observations</h2><table class=numbers><tr>{titles}</tr>{rows}</table></section>"


def page(name: str, verdict: str, found: list["Finding"], log: "Log | None", jump: float) -> str:
    """jump: from this error on a row is one."""
    rest = figures(log, jump) + column_table(log) if log else ""
    return page_of("Doctor", name, f"<p>{verdict}</p>", found, log and log.data, rest)


def page_of(title: str, name: str, lead: str, found: list["Finding"], data: OfflineDataset | None, rest: str) -> str:
    """One file that needs no network. lead, rest: HTML before and behind the findings."""
    folder = ROOT / "benchmarks"
    css = (folder / "compare.css").read_text() + (folder / "doctor.css").read_text()
    lines = "".join(
        f"<li class={f.level.split()[0].lower()}><b>{f.level}</b> <span>{f.check}</span>"
        f"<p>{html.escape(one_line(f.text))}</p>"
        for f in found
    )
    about = data.summary().splitlines() if data else []
    head = f"<h1>{html.escape(one_line(name))}</h1>{lead}"
    head += "".join(f"<p><small>{html.escape(line)}</small></p>" for line in about)
    body = f"{head}<ul class=findings>{lines}</ul>{rest}"
    return Template((folder / "compare.html").read_text()).substitute(title=title, css=css, js="", body=body)
