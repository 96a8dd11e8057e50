"""The truth of a prepared market beside its events: true probabilities, oracles, and how far a prediction is from it.

Used by `ranking_market`. Arrays are in the order of prepared events (by user, then time), not in the log's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from benchmarks.market import KNOWS, _fit, _law, _Log, _ranks, _terms
from benchmarks.result import Row
from prerank.evaluate.ranking import item_rates
from prerank.market.generate import MarketTruth, best_rank_error
from prerank.market.hash import rows_of_ids
from prerank.market.marginals import SURFACES
from prerank.metrics.bootstrap import Interval, Resamples, mean_interval
from prerank.metrics.classification import SortedLabels, auc
from prerank.metrics.divergence import bernoulli_kl
from prerank.train.candidates import Retrieved
from prerank.train.prepare import Prepared
from prerank.types import Array

WHOLE = ("impressions", "candidates")  # the parts of which everything is told
HOUR_MS, POSITIONS = 3_600_000, 4
_EPS = float(np.finfo(np.float64).eps)


@dataclass(frozen=True, slots=True)
class View:
    """R pairs to judge on: true probability [R], user [R], rows by part; a label [R] where they were shown."""

    truth: Array
    user: Array
    parts: Mapping[str, Array]
    label: Array | None = None

    def divergence(self, prob: Array) -> Array:
        """KL(truth || prob) of prob [S, R], mean over seeds -> [R]."""
        found: Array = bernoulli_kl(np.broadcast_to(self.truth, prob.shape), prob).mean(0)
        return found

    def loss(self, prob: Array) -> Array:
        """The log loss of prob [S, R], mean over seeds -> [R]."""
        kept = prob.astype(np.float64).clip(_EPS, 1 - _EPS)
        assert self.label is not None
        found: Array = -np.where(self.label > 0, np.log(kept), np.log1p(-kept)).mean(0)
        return found

    def areas(self, prob: Array, draws: int) -> Array:
        """The AUC of prob [S, R], mean over seeds, then the same on each resample of users -> float64 [D + 1]."""
        assert self.label is not None
        each = [SortedLabels.of(self.label, one) for one in prob]
        weights = Resamples.of(self.user, 0, draws).weights()
        return np.array([np.mean([one.auc(weight) for one in each]) for weight in weights])


def log_order(market: Path, prepared: Prepared) -> Array:
    """The row of the log, and of truth.parquet, that each prepared event is -> int64 [E]."""
    log = pq.read_table(market / "impressions.parquet", columns=["user_id", "item_id", "time_ms"])
    user, item, time_ms = (column.to_numpy() for column in log.columns)
    order: Array = np.lexsort((time_ms, user))
    events = prepared.events
    assert np.array_equal(prepared.user_ids[events["user"]], user[order])
    assert np.array_equal(prepared.item_ids[events["item"]], item[order])
    assert np.array_equal(events["time_ms"], time_ms[order])
    return order


def taken(log: _Log, rows: Array) -> _Log:
    """Some rows of it."""
    return _Log(*(getattr(log, f.name)[rows] for f in fields(log)))


def met(prepared: Prepared, advertiser: Array, asked: Retrieved) -> tuple[Array, Array]:
    """Views and clicks each user of `asked` gave each candidate's advertiser before that clock hour, int64 [Q, N].

    advertiser int64 [I] is every item's; the users are distinct. So the truth counts them.
    """
    log, num = prepared.events, len(asked.events)
    place = np.full(len(prepared.user_ids), -1)
    place[log["user"][asked.events]] = np.arange(num)
    until = log["time_ms"][asked.events] // HOUR_MS * HOUR_MS
    rows = np.flatnonzero(place[log["user"]] >= 0)
    rows = rows[log["time_ms"][rows] < until[place[log["user"][rows]]]]
    width = int(advertiser.max()) + 1
    key = place[log["user"][rows]] * width + advertiser[log["item"][rows]]
    names, member = np.unique(np.append(key, -1), return_inverse=True)  # never empty
    clicked = np.append(prepared.happened("is_click")[rows], False)
    wanted = np.arange(num)[:, None] * width + advertiser[asked.rows]
    at = np.searchsorted(names, wanted).clip(max=len(names) - 1)
    views, clicks = (np.bincount(member, weight)[at].astype(np.int64) for weight in (None, clicked))
    known = names[at] == wanted
    return views * known, clicks * known


def pairs(truth: MarketTruth, prepared: Prepared, log: _Log, asked: Retrieved) -> _Log:
    """The candidates, question by question, as rows of the truth at position 0; `log` is of all prepared events."""
    ad = rows_of_ids("item", prepared.item_ids)
    views, clicks = met(prepared, truth.ads.advertiser[ad].astype(np.int64), asked)
    each = taken(log, np.repeat(asked.events, asked.rows.shape[1]))
    top = np.zeros_like(each.position)
    return _Log(
        each.user,
        ad[asked.rows.ravel()],
        each.surface,
        each.hour,
        top,
        views.ravel(),
        clicks.ravel(),
        each.time_ms,
        top,
    )


def over_positions(top: Array, surface: Array, train: _Log, scale: float = 1.0, offset: float = 0.0) -> Array:
    """sigmoid(scale logit + offset) of logits [R] at position 0, at a position drawn as the log of training has it.

    No model is told the position, so on candidates, who have none, its probability is of one drawn so.
    """
    counts = np.bincount(train.surface * POSITIONS + train.position, minlength=len(SURFACES) * POSITIONS)
    shares = counts.reshape(-1, POSITIONS) / np.maximum(counts.reshape(-1, POSITIONS).sum(1, keepdims=True), 1)
    fall = np.outer(_law("position"), np.log1p(np.arange(POSITIONS)))
    prob: Array = (shares[surface] * _sigmoid(scale * (top[:, None] - fall[surface]) + offset)).sum(1)
    return prob


def references(truth: MarketTruth, train: _Log, test: _Log, asked: _Log) -> dict[str, list[Array]]:
    """Probabilities of impressions [P] and of candidates [Q N]: "truth", the floors, and oracles as `market` has them.

    An oracle knows some terms exactly; its scale and offset are fitted to the clicks of training.
    """
    terms = [_terms(truth, log) for log in (train, test, asked)]
    shown, top = (np.sum(list(one.values()), axis=0) for one in terms[1:])
    rate, by_ad = train.label.mean(), item_rates(train.label, train.ad, truth.spec.num_ads)
    unplaced = shown + _law("position")[test.surface] * np.log1p(test.position)
    found = {
        "truth": [_sigmoid(shown), over_positions(top, asked.surface, train)],
        "the training rate": [np.full(len(log.ad), rate) for log in (test, asked)],
        "each item's rate": [by_ad[log.ad] for log in (test, asked)],
        "knows everything but the position": [over_positions(unplaced, test.surface, train)],
    }
    for name, wanted in KNOWS.items():
        learnt, shown, top = (np.sum([one[term] for term in wanted], axis=0) for one in terms)
        scale, offset = _fit(learnt, train.label)
        on_candidates = over_positions(top, asked.surface, train, scale, offset)
        found[f"knows {name}"] = [_sigmoid(scale * shown + offset), on_candidates]
    return found


def parts(truth: MarketTruth, log: _Log) -> dict[str, Array]:
    """Rows int64 by part: all, a surface's, those whose advertiser the user met (visited or saw in the log), others."""
    visited = (truth.users.visited[log.user] == truth.ads.advertiser[log.ad][:, None]).any(axis=1)
    known = visited | (log.views > 0)
    found = {"impressions": np.ones(len(known), dtype=bool)}
    found |= {f"impressions of {name}": log.surface == code for code, name in enumerate(SURFACES)}
    found |= {"impressions of advertisers met": known, "impressions of advertisers not met": ~known}
    return {name: np.flatnonzero(rows) for name, rows in found.items()}


def pair_error(logit: Array, told: Array) -> float:
    """The squared error of logits [Q, N] once row and column means are out, over the logits' own; 0 is the truth.

    That of a dot product of dim d and two biases is at least `best_rank_error(logit, d)`.
    """
    own, wrong = (m - m.mean(0) - m.mean(1, keepdims=True) + m.mean() for m in (logit, told - logit))
    return float((wrong**2).sum() / (own**2).sum())


def logit_of(prob: Array) -> Array:
    """log(p / (1 - p)) in float64."""
    kept = prob.astype(np.float64).clip(_EPS, 1 - _EPS)
    logit: Array = np.log(kept) - np.log1p(-kept)
    return logit


def rank_rows(truth: MarketTruth, dim: int, logit: Array, probs: Mapping[str, Sequence[Array]]) -> Iterator[Row]:
    """What no dot product of the rankers' width can hold, and what each ranker and oracle leaves, of [Q, N] logits."""
    unit = "of squared error"
    yield from (row for row in _ranks(truth) if row.name.endswith(f", d = {dim}"))
    yield Row.of(f"best rank error of the candidates, d = {dim}", best_rank_error(logit, dim), unit, logit.size)
    for name, both in probs.items():
        if len(both) > 1:
            errors = [pair_error(logit, logit_of(prob).reshape(logit.shape)) for prob in both[1]]
            yield from seed_rows(f"{name}, candidates, error of the pairs", errors, unit, logit.size)


def judged_rows(name: str, prob: Array, view: View, in_full: bool) -> Iterator[Row]:
    """How near prob [S, R] of S seeds is to the truth, by part: KL, and AUC and log loss of labels.

    Not `in_full`, the last two are told of the whole alone.
    """
    for part, rows in view.parts.items():
        mine = [one[None, rows] for one in prob]
        here = View(view.truth[rows], view.user[rows], {}, None if view.label is None else view.label[rows])
        yield from seed_rows(f"{name}, {part}, KL", [here.divergence(one).mean() for one in mine], "nats", len(rows))
        if here.label is None or not (in_full or part in WHOLE):
            continue
        label = here.label
        yield from seed_rows(f"{name}, {part}, AUC", [auc(label, one[0]) for one in mine], "AUC", len(rows))
        yield from seed_rows(f"{name}, {part}, log loss", [here.loss(one).mean() for one in mine], "nats", len(rows))


def seed_rows(name: str, values: list[float], unit: str, n: int) -> Iterator[Row]:
    """The mean over seeds, and their deviation where there are several."""
    yield Row.of(name, float(np.mean(values)), unit, n)
    if len(values) > 1:
        yield Row.of(f"{name}: deviation over seeds", float(np.std(values, ddof=1)), unit, len(values))


def paired_rows(name: str, ours: Array, theirs: Array, view: View, draws: int) -> Iterator[Row]:
    """What ours [S, R] is more than theirs, means over seeds, with the interval over users, 95 %."""
    kl = view.divergence(ours) - view.divergence(theirs)
    for part, rows in view.parts.items():
        found = mean_interval(kl[rows], view.user[rows], 0, draws)
        yield from interval_rows(f"{name}, {part}, KL", found, "nats", len(rows))
    if view.label is not None:
        found = mean_interval(view.loss(ours) - view.loss(theirs), view.user, 0, draws)
        yield from interval_rows(f"{name}, impressions, log loss", found, "nats", len(view.user))


def interval_rows(name: str, found: Interval, unit: str, n: int) -> Iterator[Row]:
    """A difference and the ends of its interval."""
    yield Row.of(name, found.mean, unit, n)
    yield Row.of(f"{name}: low", found.low, unit)
    yield Row.of(f"{name}: high", found.high, unit)


def _sigmoid(logit: Array) -> Array:
    prob: Array = 1 / (1 + np.exp(-logit))
    return prob
