"""The page of benchmarks/model_report.py: findings, plots, a table of the columns."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.doctor_page import FIRST, INK, SECOND, figure, page_of  # noqa: E402

if TYPE_CHECKING:
    from benchmarks.doctor import Finding
    from benchmarks.model_report import Case

GAUSS = (0.6827, 0.9545, 0.9973)  # within 1, 2, 3 deviations
DOTS = 400  # of a colour


def whole_numbers(ax) -> None:
    ax.xaxis.get_major_locator().set_params(integer=True)


def legend(fig, num: int) -> None:
    """Above the plot, where nothing else is."""
    fig.legend(frameon=False, fontsize=8, loc="outside upper right", ncols=num, markerscale=1.5, columnspacing=1)


def few_labels(axis) -> None:
    """Of a logarithmic axis: else those of less than two decades run into each other."""
    low, high = axis.get_view_interval()
    axis.set_minor_formatter(NullFormatter())
    if high < 100 * low:
        axis.set_major_locator(LogLocator(subs=(1, 3)))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))


def unexplained(fig, ax, columns: dict) -> None:
    share = columns["of no change"]
    x, low = np.arange(len(share)), min(np.nanmin(share), 1e-2) / 3
    ax.vlines(x, low, np.nan_to_num(share, nan=low), color=FIRST, linewidth=min(12, 150 / len(x)))
    ax.axhline(1, color=INK, linewidth=1, linestyle=":")
    ax.set(yscale="log", ylim=(low, max(2, 1.5 * np.nanmax(share))))
    ax.set(xlabel="column, last the reward; dotted: no change", ylabel="squared error")
    whole_numbers(ax)


def calibration(fig, ax, columns: dict) -> None:
    x = np.arange(len(columns["error"]))
    for k, marker in ((1, "o"), (2, "s"), (3, "^")):
        ax.plot(x, columns[f"within {k}"], marker, color=FIRST, markersize=3.5, label=f"within {k}")
        ax.axhline(GAUSS[k - 1], color=SECOND, linewidth=1, linestyle=":")
    ax.set(ylim=(-0.02, 1.05), xlabel="column, last the reward; dotted: a Gaussian", ylabel="share of numbers")
    legend(fig, 3)
    whole_numbers(ax)


def open_loop(fig, ax, errors: dict) -> None:
    steps = np.arange(1, len(errors["error"]) + 1)
    ax.fill_between(steps, errors["low"], errors["high"], color=FIRST, alpha=0.25, linewidth=0)
    ax.plot(steps, errors["error"], color=FIRST, label="ensemble (band: 80 %)")
    ax.plot(steps, errors["no change"], color=SECOND, label="no change")
    ax.set(yscale="log", xlabel="step by recorded actions", ylabel="error, deviations of obs")
    legend(fig, 2)


def doubt(fig, ax, places: dict, name: str) -> None:
    for (place, said), colour in zip(places.items(), (FIRST, SECOND)):
        doubts, error = (x[:DOTS] for x in said[name])
        ax.plot(doubts, error, ".", color=colour, markersize=3, alpha=0.6, label=place)
    ax.set(xscale="log", yscale="log", xlabel=name, ylabel="true error")
    few_labels(ax.xaxis)
    few_labels(ax.yaxis)
    legend(fig, 2)


def halts(fig, ax, numbers: dict) -> None:
    for kind, colour in (("recorded", FIRST), ("random", SECOND)):
        share = numbers[kind]["halted by step"]
        ax.plot(np.arange(1, len(share) + 1), share, "o-", color=colour, markersize=4, label=f"{kind} actions")
    ax.set(ylim=(-0.02, 1.02), xlabel="step of a rollout", ylabel="share halted so far")
    legend(fig, 2)
    whole_numbers(ax)


def costs(fig, ax, numbers: dict) -> None:
    kinds = ("recorded", "random")
    for offset, name, colour in ((-0.2, "reward", FIRST), (0.2, "penalty", SECOND)):
        ax.bar(np.arange(2) + offset, [numbers[kind][name] for kind in kinds], 0.38, color=colour, label=name)
    ax.axhline(0, color=INK, linewidth=1)
    ax.set(xticks=(0, 1), xticklabels=[f"{kind} actions" for kind in kinds], ylabel="mean of a step")
    legend(fig, 2)


def figures(case: "Case") -> str:
    numbers = case.numbers
    out = figure("Error on held-out rows", lambda fig, ax: unexplained(fig, ax, numbers["columns"]))
    out += figure("Calibration", lambda fig, ax: calibration(fig, ax, numbers["columns"]))
    if "open loop" in numbers:
        out += figure("Error along recorded actions", lambda fig, ax: open_loop(fig, ax, numbers["open loop"]))
    for name, title in (
        ("MOPO's deviation", "Error by doubt, MOPO"),
        ("MOReL's distance", "Error by doubt, MOReL"),
    ):
        out += figure(title, lambda fig, ax: doubt(fig, ax, case.rows, name))
    out += figure("Halts, MOReL", lambda fig, ax: halts(fig, ax, numbers))
    out += figure("Reward and penalty, MOPO", lambda fig, ax: costs(fig, ax, numbers))
    return f"<div class=figures>{out}</div>"


def column_table(columns: dict) -> str:
    names, size = ("error", "usual change", "of no change", "within 1", "within 2", "within 3"), len(columns["error"])
    head = "".join(f"<th>{name}</th>" for name in ("", *names))
    rows = ""
    for i in range(size):
        cells = "".join(f"<td>{columns[name][i]:.3g}</td>".replace("nan", "-") for name in names)
        rows += f"<tr><th>{i if i < size - 1 else 'reward'}</th>{cells}</tr>"
    text = "Error, usual change: root mean squares. Of no change: the error's square in that of predicting no change."
    table = f"<table class=numbers><tr>{head}</tr>{rows}</table>"
    return f"<section><h2>Columns</h2><p><small>{text}</small></p>{table}</section>"


def page(name: str, found: list["Finding"], case: "Case") -> str:
    rest = figures(case) + column_table(case.numbers["columns"])
    return page_of("Model report", name, "", found, case.data, rest)
