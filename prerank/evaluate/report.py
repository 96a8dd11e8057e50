"""A comparison as one HTML file that needs nothing else, and the same numbers as JSON beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from prerank.errors import DataError
from prerank.evaluate import plots
from prerank.evaluate.compare import COMPARED, TEACHER, Comparison
from prerank.evaluate.estimates import ALL, Estimate, Where

PAGE, NUMBERS = "index.html", "quality.json"
KEY_METRICS: Sequence[tuple[Where, str]] = (
    ("winners", "auc"),
    ("winners", "user_auc"),
    ("winners", "log_loss"),
    ("winners", "normalised_entropy"),
    ("winners", "calibration_ratio"),
    ("winners", "kl"),
    ("candidates", "kl"),
    ("candidates", "overlap@10"),
    ("candidates", "top10_in_100"),
    ("candidates", "ndcg@10"),
)
"""The columns of a report's first tables; those nobody measured are left out."""
LESS_IS_BETTER = frozenset({"log_loss", "kl"})
_TOLD_BELOW = {("candidates", "log_loss"), ("candidates", "user_auc")}  # the first's difference is that of KL
_NAMES = {
    "auc": "AUC",
    "user_auc": "per-user AUC",
    "log_loss": "log loss",
    "normalised_entropy": "normalised entropy",
    "calibration_ratio": "calibration",
    "calibration_error": "calibration error",
    "kl": "KL to teacher",
    "mean_prob": "mean prediction",
    "mean_label": "mean label",
    "mean_teacher": "teacher's mean",
}


def write_report(told: Comparison, folder: Path) -> Path:
    """index.html and quality.json in `folder`, made if it is not there -> the page's path.

    Raises DataError where the folder cannot be written.
    """
    page, numbers = render_report(told), json.dumps(asdict(told), indent=1, allow_nan=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / NUMBERS).write_text(numbers + "\n", encoding="utf-8")
        (folder / PAGE).write_text(page, encoding="utf-8")
    except OSError as error:
        raise DataError(f"{folder}: expected a folder to write the report into: {error}") from None
    return folder / PAGE


def render_report(told: Comparison) -> str:
    """The page's HTML: what matters first, then pictures, then every number there is."""
    environment = Environment(
        loader=PackageLoader("prerank.evaluate", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "signed": signed, "name": name_of, "count": "{:,}".format}
    return environment.get_template("report.html").render(
        told=told,
        key_tables=[key_table(told, task) for task in told.tasks],
        difference_tables=[table for task in told.tasks if (table := difference_table(told, task)).rows],
        segment_tables=[segment_table(told, task) for task in told.tasks] if told.segments else [],
        pictures=_pictures(told),
        colours=plots.colours(told.models),
        teacher=TEACHER,
        level=f"{100 * told.how.level:g} %",
    )


@dataclass(frozen=True, slots=True)
class Cell:
    """One number of a table; `verdict` of a difference: better, worse, or unsure where its interval holds 0."""

    estimate: Estimate | None
    verdict: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """A task's table: columns (where, metric), and rows of labels and cells."""

    task: str
    columns: Sequence[tuple[Where, str]]
    rows: Sequence[tuple[Sequence[str], Sequence[Cell]]]


def key_table(told: Comparison, task: str) -> Table:
    """One row a model with its key numbers on all users."""
    found = {(where, m): told.metrics(m, where, task) for m in told.models for where in _WHERES}
    columns = [(w, metric) for w, metric in KEY_METRICS if any(metric in found[w, m] for m in told.models)]
    rows = [((m,), [Cell(found[w, m].get(metric)) for w, metric in columns]) for m in told.models]
    return Table(task, columns, rows)


def difference_table(told: Comparison, task: str) -> Table:
    """One row a model: what its numbers are more than those of the one it is compared with."""
    found: dict[str, dict[tuple[Where, str], Estimate]] = {}
    against = {}
    for one in told.differences:
        if (one.task, one.segment) == (task, ALL):
            found.setdefault(one.model, {}).update({(one.where, metric): e for metric, e in one.metrics.items()})
            against[one.model] = one.against
    told_of = [(w, m) for w in _WHERES for m in COMPARED if (w, m) not in _TOLD_BELOW]
    columns = [column for column in told_of if any(column in cells for cells in found.values())]
    rows = [
        ((f"{model} − {against[model]}",), [_difference_cell(cells.get(column), column[1]) for column in columns])
        for model, cells in found.items()
    ]
    return Table(task, columns, rows)


def segment_table(told: Comparison, task: str) -> Table:
    """Rows of a segment and a model, with the key numbers."""
    wanted = [(w, m) for w, m in KEY_METRICS if m not in ("user_auc", "ndcg@10")]
    found = {
        (where, model, segment): told.metrics(model, where, task, segment)
        for where in _WHERES
        for model in told.models
        for segment in told.segments
    }
    columns = [(w, m) for w, m in wanted if any(m in metrics for (at, *_), metrics in found.items() if at == w)]
    rows = [
        ((segment, model), [Cell(found[w, model, segment].get(metric)) for w, metric in columns])
        for segment in told.segments
        for model in told.models
    ]
    return Table(task, columns, rows)


_WHERES: Sequence[Where] = ("winners", "candidates")


def _difference_cell(estimate: Estimate | None, metric: str) -> Cell:
    if estimate is None or estimate.low is None or estimate.high is None:
        return Cell(estimate)
    if estimate.low <= 0 <= estimate.high:
        return Cell(estimate, "unsure")
    return Cell(estimate, "better" if (estimate.high < 0) == (metric in LESS_IS_BETTER) else "worse")


def _pictures(told: Comparison) -> Mapping[str, str]:
    """SVG by name, empty where there is nothing to draw; matplotlib escapes its text, so a page takes it as it is."""
    return {
        "calibration": plots.calibration(told),
        "winners": plots.distributions(told, "winners"),
        "candidates": plots.distributions(told, "candidates"),
        "by_model": plots.by_model(told) if told.has_teacher else "",
        "survival": plots.survival(told) if told.num_candidates else "",
    }


def number(value: float | int | None) -> str:
    """As the page tells it: whole numbers with commas, others with four decimals, tiny ones with three digits."""
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.2e}" if 0 < abs(value) < 0.001 else f"{value:.4f}"


def signed(value: float | None) -> str:
    """`number` of a difference, with its sign."""
    return number(value) if value is None or value < 0 else f"+{number(value)}"


def name_of(metric: str) -> str:
    """A metric in a reader's words."""
    if metric.startswith("top"):
        top, _, k = metric.removeprefix("top").partition("_in_")
        return f"top {top} in {k}"
    return _NAMES.get(metric, metric.replace("ndcg@", "NDCG@"))
