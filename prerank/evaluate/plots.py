"""The pictures of a report, each as SVG text; the same comparison gives the same bytes.

Nothing here touches matplotlib's global state: `Figure` objects without pyplot, settings for one picture at a time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any, TypeVar

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator, NullLocator

from prerank.evaluate.compare import TEACHER, Comparison
from prerank.evaluate.consistency import KS, TOPS, survival_name
from prerank.evaluate.distributions import log_odds
from prerank.evaluate.estimates import ALL, Estimate, Where

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

_Cell = TypeVar("_Cell")
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#8c6d31")
TEACHER_COLOUR = "#444444"
_PER_ROW = 3
_WIDTH, _HEIGHT = 11.2, 3.1  # inches of the page's width and of one row of panels
_STYLE: dict[RcKeyType, Any] = {
    "svg.hashsalt": "prerank",
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a8f98",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.grid": True,
    "grid.color": "#e6e8eb",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.h_pad": 0.08,
}
_PROBS = (0.0001, 0.001, 0.01, 0.03, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 0.999)


def colours(models: Sequence[str]) -> dict[str, str]:
    """A colour a model; more than eight begin again."""
    others = [name for name in models if name != TEACHER]
    found = {name: COLOURS[place % len(COLOURS)] for place, name in enumerate(others)}
    return {TEACHER: TEACHER_COLOUR, **found}


def calibration(told: Comparison) -> str:
    """Observed against predicted rate by decile, a panel a task, with intervals over users; both axes in log-odds."""

    def draw(axes: Axes, task: str) -> None:
        found = [curve for curve in told.curves if curve.task == task]
        for curve in found:
            x, y, low, high = (
                log_odds(np.array(c)) for c in (curve.mean_prob, curve.mean_label, curve.low, curve.high)
            )
            colour = colours(told.models)[curve.model]
            axes.errorbar(x, y, [y - low, high - y], color=colour, lw=1.3, elinewidth=0.8, marker="o", ms=3.5)
        seen = [p for curve in found for p in (*curve.mean_prob, *(r for r in curve.mean_label if r > 0))]
        least, most = log_odds(np.array([min(seen), max(seen)]))
        ends = (float(least) - 0.2, float(most) + 0.2)
        axes.plot(ends, ends, color="#8a8f98", lw=0.9, ls="--", zorder=1)
        axes.set(title=task, xlabel="predicted", ylabel="observed", xlim=ends, ylim=ends)
        _probability_ticks(axes, "xy")

    there = {curve.task for curve in told.curves}
    return _panels([task for task in told.tasks if task in there], draw)


def distributions(told: Comparison, where: Where) -> str:
    """How each model's probabilities are spread, a panel a task; probabilities in log-odds."""

    def draw(axes: Axes, task: str) -> None:
        mine = [one for one in told.histograms if (one.task, one.where) == (task, where)]
        for one in mine:
            edges = log_odds(np.array(one.edges))
            axes.stairs(np.array(one.share), edges, color=colours(told.models)[one.model], lw=1.3)
        axes.set(title=task, xlabel="probability", ylabel=f"share of {where}")
        spread = [one for one in mine if sum(share > 0 for share in one.share) > 2]  # a flat model would dwarf them
        axes.set_ylim(0, 1.1 * max(max(one.share) for one in spread or mine))
        _probability_ticks(axes, "x")

    there = {one.task for one in told.histograms if one.where == where}
    return _panels([task for task in told.tasks if task in there], draw)


def by_model(told: Comparison) -> str:
    """KL on winners and candidates and overlap of the tops, by model with intervals, a row of panels a task."""
    wanted: list[tuple[Where, str, str]] = [("winners", "kl", "KL, winners"), ("candidates", "kl", "KL, candidates")]
    wanted += [("candidates", f"overlap@{top}", f"overlap@{top}") for top in TOPS]
    models = [name for name in told.models if name != TEACHER]
    shown = [w for w in wanted if any(_number(told, model, w, task) for model in models for task in told.tasks)]
    height = 0.7 + 0.26 * len(models)

    def draw(axes: Axes, cell: tuple[str, tuple[Where, str, str]]) -> None:
        task, one = cell
        for place, model in enumerate(models):
            e = _number(told, model, one, task)
            if e is not None:
                value, low, high = _spread(e)
                axes.errorbar([value], [place], xerr=[[value - low], [high - value]], fmt="o", ms=5, elinewidth=1.6,
                              color=colours(told.models)[model])  # fmt: skip
        axes.set(title=f"{task}: {one[2]}", ylim=(len(models) - 0.5, -0.5))
        axes.set_yticks(range(len(models)), models if one == shown[0] else [])
        axes.xaxis.set_major_locator(MaxNLocator(3) if one[1] == "kl" else FixedLocator([0, 0.5, 1]))
        axes.set_xlim(left=0) if one[1] == "kl" else axes.set_xlim(0, 1.02)

    return _panels([(task, one) for task in told.tasks for one in shown], draw, len(shown), height)


def survival(told: Comparison) -> str:
    """The share of the teacher's top m among the first k of a model, against k, with intervals; m = 100 dashed."""

    def draw(axes: Axes, task: str) -> None:
        for model in told.models:
            found = told.metrics(model, "candidates", task)
            for top, style in zip(TOPS, ("-", "--"), strict=True):
                points = {k: found.get(survival_name(top, k)) for k in KS if k >= top}
                spreads = {k: _spread(e) for k, e in points.items() if e is not None and e.value is not None}
                if spreads and model != TEACHER:
                    value, low, high = np.array(list(spreads.values())).T
                    colour = colours(told.models)[model]
                    axes.errorbar(list(spreads), value, [value - low, high - value], color=colour, ls=style, lw=1.3,
                                  elinewidth=0.8, marker="o", ms=3.5)  # fmt: skip
        axes.set(title=task, xlabel="k, let through by the model", ylabel="share of the teacher's top", ylim=(0, 1.03))
        axes.set_xscale("log")
        ks = [k for k in KS if k < told.num_candidates]
        axes.xaxis.set_major_locator(FixedLocator(ks))
        axes.xaxis.set_major_formatter(FixedFormatter([str(k) for k in ks]))
        axes.xaxis.set_minor_locator(NullLocator())

    return _panels(list(told.tasks), draw)


def _number(told: Comparison, model: str, wanted: tuple[Where, str, str], task: str) -> Estimate | None:
    found = told.metrics(model, wanted[0], task, ALL).get(wanted[1])
    return found if found is not None and found.value is not None else None


def _spread(e: Estimate) -> tuple[float, float, float]:
    """value, low, high with the interval around the value, which a skew number's percentiles may not be."""
    assert e.value is not None
    assert e.low is not None
    assert e.high is not None
    return e.value, min(e.low, e.value), max(e.high, e.value)


def _probability_ticks(axes: Axes, which: str) -> None:
    for name, axis, ends in (("x", axes.xaxis, axes.get_xlim()), ("y", axes.yaxis, axes.get_ylim())):
        if name in which:
            places = log_odds(np.array(_PROBS))
            inside = [(at, p) for at, p in zip(places, _PROBS, strict=True) if ends[0] <= at <= ends[1]]
            axis.set_major_locator(FixedLocator([at for at, _ in inside]))
            axis.set_major_formatter(FixedFormatter([f"{p:g}" for _, p in inside]))


def _panels(
    cells: Sequence[_Cell], draw: Callable[[Axes, _Cell], None], per_row: int = _PER_ROW, height: float = _HEIGHT
) -> str:
    """One panel a cell, `per_row` beside each other, as one SVG; nothing where there is no cell."""
    if not cells:
        return ""
    num_rows = -(-len(cells) // per_row)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, height * num_rows))
        grid = figure.subplots(num_rows, per_row, squeeze=False)
        for axes, cell in zip(grid.flat, cells, strict=False):
            draw(axes, cell)
        for axes in grid.flat[len(cells) :]:
            axes.set_visible(False)
        out = BytesIO()
        figure.savefig(out, format="svg", metadata={"Date": None}, transparent=True)
    return _inline(out.getvalue().decode())


def _inline(svg: str) -> str:
    """Only the element itself, without fixed sizes; names of groups go, for several pictures share one page."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r' (width|height)="[0-9.]+pt"', "", body, count=2)
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    return re.sub(r'<g id="[a-zA-Z]+[._a-zA-Z]*_[0-9]+">', "<g>", body)
