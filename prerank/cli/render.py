"""What commands print: tables and one picture, from the nouns of the other folders."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from prerank.bundle.load import Bundle
from prerank.bundle.registry import Gate, Registry
from prerank.cli.doctor import Findings
from prerank.config import Metadata
from prerank.data.check import Problem
from prerank.lifecycle.build import Quality
from prerank.lifecycle.training import Trained
from prerank.serve.answer import Answer
from prerank.stores.metadata import MetadataTable
from prerank.stores.reads import Reads
from prerank.types import Given


def plain(value: object) -> dict[str, Any]:
    """A dataclass as plain JSON types; paths as text."""
    assert is_dataclass(value)
    assert not isinstance(value, type)
    return dict(json.loads(json.dumps(asdict(value), default=str)))


def record(value: object) -> RenderableType:
    """A dataclass as two columns."""
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, one in plain(value).items():
        table.add_row(name, _number(one))
    return table


def findings(found: Findings) -> RenderableType:
    """What `prerank doctor` found: sections, then what is amiss."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for section in (found.machine, found.software, found.device, found.ceilings):
        for name, value in section.items():
            said = f"{value:,.1f}" if isinstance(value, float) else str(value)
            table.add_row(Text(name.replace("_s", "/s").replace("_", " ")), Text(said))
        if section:
            table.add_row("", "")
    if not found.faults:
        return Group(table, Text("nothing is amiss", style="green"))
    lines = [Text(f"{one.what}: {one.then}", style="red" if one.is_error else "yellow") for one in found.faults]
    return Group(table, *lines)


def problems(found: Sequence[Problem]) -> RenderableType:
    """What `prerank check` found, or that it found nothing."""
    if not found:
        return Text("no problem found", style="green")
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("", "where", "what", "expected", "found"):
        table.add_column(name, overflow="fold")
    for p in found:
        style = "red" if p.severity == "error" else "yellow"
        cells = (Text(text) for text in (p.where, p.what, p.expected, p.found))
        table.add_row(Text(p.severity, style=style), *cells)
    return _titled(f"{len(found)} problem{'s' if len(found) > 1 else ''}", table)


def reads(options: Metadata, table: MetadataTable, counts: Mapping[str, Reads]) -> RenderableType:
    """Each column of metadata: when it is sent, what it takes, and whether anybody reads it."""
    shown = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("column", "sent", "bytes an item", "asked for by name", "sent unasked", ""):
        shown.add_column(name, justify="left" if name in ("column", "sent", "") else "right")
    for column in table.columns:
        found = counts.get(column, Reads(0, 0))
        is_deferred = column in options.deferred
        advice = "" if found.asked else ("nobody asks: leave it out" if is_deferred else "nobody asks by name")
        shown.add_row(
            column,
            "when asked for" if is_deferred else "with answers",
            f"{table.num_bytes(column) / max(table.num_rows, 1):.1f}",
            f"{found.asked:,}",
            f"{found.unasked:,}",
            Text(advice, style="yellow"),
        )
    return _titled("metadata, by items that it was read of", shown)


def epochs(trained: Trained) -> RenderableType:
    """One row an epoch of each model."""
    tables = []
    named = [("two towers", trained.retrieval_epochs), ("heavy ranker", list(trained.heavy_epochs))]
    named += [(trained.config.ranker.model, trained.ranker_epochs)]
    for title, rows in (pair for pair in named if pair[1]):
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        for name in rows[0]:
            table.add_column(name, justify="right")
        for row in rows:
            table.add_row(*(_number(value) for value in row.values()))
        tables.append(_titled(f"{title}, measured on the validate days", table))
    return Group(*tables)


def quality(measured: Quality) -> RenderableType:
    """Both stages on the test days, the floors beside them."""
    retrieval = measured.retrieval
    recall = Table(box=SIMPLE_HEAD, pad_edge=False)
    recall.add_column("method")
    for k in retrieval.ks:
        recall.add_column(f"R@{k}", justify="right")
    for method, values in retrieval.recall.items():
        recall.add_row(method, *(f"{v:.4f}" for v in values), style="bold" if method == "two towers" else "dim")
    ranking = measured.ranking
    tasks = Table(box=SIMPLE_HEAD, pad_edge=False)
    tasks.add_column("task")
    names = ("auc", "item_rate_auc", "log_loss", "rate_log_loss", "normalised_entropy", "calibration_ratio")
    for name in names:
        tasks.add_column(name.replace("_", " "), justify="right", style="dim" if "rate_" in name else "")
    for task, numbers in ranking.tasks.items():
        tasks.add_row(task, *(f"{numbers[name]:.4f}" for name in names))
    return Group(
        _titled(f"retrieval from {retrieval.first_day}: recall, mean over {retrieval.num_questions:,} users", recall),
        _titled(f"ranking from {ranking.first_day}: {ranking.num_impressions:,} impressions; floors are dim", tasks),
    )


def gates(measured: Sequence[Gate]) -> RenderableType:
    """Each gate's bound, what was measured, and whether it holds."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("gate", "bound", "measured", "holds"):
        table.add_column(name, justify="right" if name == "measured" else "left")
    for gate in measured:
        holds = Text("yes", style="green") if gate.holds else Text("no", style="red")
        table.add_row(gate.name, Text(gate.bound), f"{gate.measured:.4f}", holds)
    return _titled("gates, on the validate days", table)


def failed(measured: Sequence[Gate]) -> list[str]:
    """A sentence for each gate that does not hold."""
    return [f"{g.name} is {g.measured:.4g}, expected {g.bound}" for g in measured if not g.holds]


def versions(registry: Registry) -> RenderableType:
    """Every version with the live one marked, then the history."""
    live = registry.live()
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("", "version", "gates"):
        table.add_column(name)
    for info in registry.versions():
        marks = info.gates
        held = "not validated" if marks is None else f"{sum(g.holds for g in marks)} of {len(marks)} hold"
        table.add_row("live" if info.version == live else "", info.version, held)
    events = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("time", "action", "from", "to", "by", "why"):
        events.add_column(name)
    for event in registry.history():
        events.add_row(*(Text(str(value or "")) for value in plain(event).values()))
    return Group(_titled("versions", table), _titled("history", events))


def bundle(loaded: Bundle) -> RenderableType:
    """A loaded version: where it came from and every file."""
    manifest = loaded.manifest
    head = Table(show_header=False, box=None, pad_edge=False)
    parents = manifest["parents"]
    assert isinstance(parents, Mapping)
    for name in ("created", "prerank", "torch", "format"):
        head.add_row(name, str(manifest.get(name, "")))
    for name, value in parents.items():
        head.add_row(f"parent {name}", str(value))
    head.add_row("items", f"{loaded.scorer.items.num_items:,}")
    files = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("file", "bytes", "sha256"):
        files.add_column(name, justify="right" if name == "bytes" else "left")
    listed = manifest["files"]
    assert isinstance(listed, Mapping)
    for name, about in listed.items():
        files.add_row(str(name), f"{about['bytes']:,}", f"{about['sha256'][:16]}..")
    return Group(_titled(loaded.version, head), Text(), _titled("files, each as it was published", files))


def answer(given: Answer) -> RenderableType:
    """One request's winners with their metadata, and its stages."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, expand=True)
    tasks = list(given.winners[0].prob) if given.winners else []
    for name in ("item_id", "micros", *tasks):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("metadata", no_wrap=True, overflow="ellipsis", ratio=1)
    for winner in given.winners:
        probs = ("-" if p is None else f"{p:.4f}" for p in winner.prob.values())
        utility = "-" if winner.utility_micros is None else f"{winner.utility_micros:,.0f}"
        about = "  ".join(f"{name}={value}" for name, value in winner.metadata.items())
        table.add_row(str(winner.item_id), utility, *probs, Text(about, style="dim"))
    stages = "  ".join(f"{s.name} {s.num_in:,}→{s.num_out:,} {s.ms:.2f} ms" for s in given.stages)
    notes = [Text(f"note: {note}", style="yellow") for note in given.notes]
    return Group(_titled(f"winners, expected micros an impression, by {given.version}", table), Text(stages), *notes)


def stage_medians(answers: Sequence[Answer]) -> list[dict[str, float | str]]:
    """Per stage, medians over answers of milliseconds and counts, the first tenth left out as warm-up."""
    warm = answers[len(answers) // 10 :]
    medians: list[dict[str, float | str]] = []
    for place, stage in enumerate(warm[0].stages):
        reports = [a.stages[place] for a in warm]
        ms, num_in, num_out = (
            float(np.median([getattr(r, name) for r in reports])) for name in ("ms", "num_in", "num_out")
        )
        medians.append({"name": stage.name, "ms": round(ms, 3), "in": num_in, "out": num_out})
    return medians


def funnel(told: Mapping[str, Any]) -> RenderableType:
    """The funnel narrowing: one bar a stage, as wide as the logarithm of what comes out of it."""
    widest = np.log10(told["sizes"]["items"] + 1)
    table = Table(show_header=False, box=None, pad_edge=False)
    rows = [("items", told["sizes"]["items"], None)]
    rows += [(s["name"], s["out"], s["ms"]) for s in told["stages"] if s["name"] != "expand_user"]
    for name, count, ms in rows:
        bar = Text("█" * max(1, round(36 * np.log10(count + 1) / widest)), style="cyan", justify="center")
        table.add_row(name, f"{count:,.0f}", bar, "" if ms is None else f"{ms:.2f} ms")
    expand = next(s["ms"] for s in told["stages"] if s["name"] == "expand_user")
    words = [f"before it, expand_user takes {expand:.2f} ms; medians of {told['num_requests']} requests"]
    for name, what in (("in_process_ms", "in process"), ("http_ms", "over HTTP")):
        times = told[name]
        words.append(f"{what}: p50 {times['p50']:.2f}, p90 {times['p90']:.2f}, p99 {times['p99']:.2f} ms")
    title = f"{told['funnel']}, version {told['version']}"
    return Panel(Group(table, Text("\n".join(words), style="dim")), title=title, title_align="left")


def next_steps(
    config: Path, data: Path, store: Path, funnel: str, user: int, context: Mapping[str, Given], told: Path
) -> RenderableType:
    """What to type next, with names that work here."""
    fields = " ".join(f"-x {name}={value}" for name, value in context.items())
    lines = [
        f"prerank serve     --store {store} --funnel {funnel}        then open http://127.0.0.1:8000/docs",
        f"prerank recommend --store {store} --funnel {funnel} --user {user} -k 20 {fields}",
        f"prerank versions  --store {store} --funnel {funnel}",
        f"prerank evaluate  --store {store} --config {config} --data {data}",
    ]
    return Panel("\n".join(lines), title=f"what to type next (all of this is in {told})", title_align="left")


def _titled(title: str, body: RenderableType) -> Group:
    return Group(Text(title, style="bold"), body)


def _number(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value == int(value) else f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
