"""What a log of requests tells: its requests asked again, and its features beside those of training."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from prerank.data.logs import Tables
from prerank.evaluate.replay import Replayed, replay
from prerank.evaluate.skew import Skew, audit_skew
from prerank.stores.request_files import read_requests, request_files
from prerank.train.prepare import Prepared, prepare
from prerank.types import Report

_FEW = 12  # item_ids of a list that are shown


def replay_log(
    folder: Path, store: Path, version: str | None, tail: str | None, users: str | None, limit: int, report: Report
) -> Replayed:
    """The first `limit` requests of the log in `folder`, asked of `version` (None: the live one) of a funnel."""
    from prerank.serve.funnel import Funnel  # as heavy as a server
    from prerank.serve.replaying import Replaying

    files = request_files(folder)
    with Funnel.open(store, version, tail=tail, users=users) as funnel:
        return replay(islice(read_requests(files), limit), Replaying(funnel), report)


def skew_of(folder: Path, tables: Tables, work: Path, limit: int, report: Report) -> Skew:
    """The first `limit` requests of the log in `folder` beside what training makes of `tables`, prepared in `work`."""
    files = request_files(folder)
    return audit_skew(islice(read_requests(files), limit), prepare(tables.config, tables, work, report), report)


def skew(told: Skew) -> RenderableType:
    """As a person reads it: what agrees least comes first."""
    words = [
        f"{told.num_compared:,} of {told.num_requests:,} requests compared, {told.num_joined:,} with an impression"
    ]
    words += [f"not {num:,}: {why}" for why, num in told.skipped.items()]
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("feature", "of", "agree", "differ", "fewer", "more"):
        table.add_column(name, justify="left" if name in ("feature", "of") else "right")
    for one in told.features:
        agree = "-" if one.agreement is None else _share(one.agreement)
        counts = [f"{one.num_fewer:,}", f"{one.num_more:,}"] if one.owner in ("history", "counter") else ["", ""]
        differ = one.num_compared - one.num_same
        table.add_row(one.name, one.owner, agree, f"{differ:,}", *counts, style="yellow" if differ else None)
    examples = [
        Text(
            f"{one.name}, request {each.request_id} of user {each.user_id} at {each.time_ms}\n  served   {each.served}"
            f"\n  training {each.trained}"
        )
        for one in told.features
        for each in one.worst
    ]
    worst = [Text("the worst of each", style="bold"), *examples] if examples else []
    return Group(Text("\n".join(words)), table, *worst)


def served(prepared: Prepared) -> RenderableType:
    """How much of what is trained on is as it was served."""
    num = int(prepared.events["logged"].sum())
    words = [f"features as served: {prepared.num_served:,} of {num:,} impressions"]
    if not prepared.num_served:
        words.append("none is of a logged request: is [data].time the moment of the request? If not, [data].request_id")
    words += [f"not {num:,} logged requests: {why}" for why, num in prepared.unserved.items()]
    return Text("\n".join(words))


def replayed(told: Replayed) -> RenderableType:
    """As a person reads it."""
    table = Table(show_header=False, box=None, pad_edge=False)
    by = ", ".join(f"{num:,} by {version}" for version, num in told.logged_by.items()) or "none"
    table.add_row("logged", f"{told.num_requests:,} requests: {by}")
    others = set(told.logged_by) - {told.version}
    table.add_row("asked", f"{told.version}{', which is another version than served them' if others else ''}")
    table.add_row("compared", f"{told.num_compared:,} requests")
    for why, num in told.skipped.items():
        table.add_row("", f"not {num:,}: {why}", style="yellow")
    if told.same_winners is not None:
        table.add_row("same winners", _share(told.same_winners))
    if told.same_features is not None:
        table.add_row("same features", f"{_share(told.same_features)} of those that this version had served")
    for k, share in told.overlap.items():
        table.add_row(f"overlap@{k}", _share(share))
    if told.rank_correlation is not None:
        table.add_row("rank correlation", f"{told.rank_correlation:.4f}")
    if told.utility_change is not None:
        table.add_row("mean utility", f"{told.utility_change:+.2%}")
    table.add_row(
        "winners of then",
        f"{told.num_winners:,}: {told.num_gone:,} gone, {told.num_off:,} off, {told.num_changed:,} with another bid "
        "or pacing now",
    )
    for what, times in (("ms now", told.ms), ("ms as logged", told.logged_ms)):
        if times:
            table.add_row(what, "  ".join(f"{name} {ms:.2f}" for name, ms in times.items()))
    worst = [
        Text(
            f"request {one.request_id} of user {one.user_id} at {one.time_ms}: overlap {one.overlap:.0%}, differs from "
            f"place {one.first} on\n  then {_few(one.then)}\n  now  {_few(one.now)}"
            + (f"\n  gone or off {_few(one.gone)}" if one.gone else "")
        )
        for one in told.worst
    ]
    return Group(table, *([Text("the most different", style="bold"), *worst] if worst else []))


def _share(share: float) -> str:
    return f"{share:.2%}"


def _few(item_ids: tuple[int, ...]) -> str:
    return " ".join(map(str, item_ids[:_FEW])) + (" ..." if len(item_ids) > _FEW else "")
