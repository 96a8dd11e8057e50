"""What does a simulated market cost, and what is there to win on it?

Generation in a process of its own at every size; the truth's speed; the tables of docs/market.md: what a model that
knew some terms of the truth exactly would reach, and what no product of low rank can hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from benchmarks.machine import in_own_process, say, times_ms
from benchmarks.result import Row
from benchmarks.run import Measured, Options, run
from prerank.market import marginals as m
from prerank.market.generate import MarketTruth, best_rank_error, generate_market
from prerank.market.hash import rows_of_ids, world_ids
from prerank.market.truth import surface_codes

SIZES = (1_000, 100_000, 1_000_000, 10_000_000)
QUICK_SIZES = SIZES[:3]
ORACLE_ADS, TEST_DAYS = 100_000, 2
NUM_PAIRS = 1_000_000
RANKS = (16, 32, 64, 128, 255)
DAY_MS = 86_400_000

Doubles = NDArray[np.float64]

EVERYTHING = "everything"
KNOWS: dict[str, tuple[str, ...]] = {
    EVERYTHING: ("context", "taste", "affinity", "visits", "history"),
    "all but G": ("context", "taste", "visits", "history"),
    "all but history": ("context", "taste", "affinity", "visits"),
    "all but visits": ("context", "taste", "affinity", "history"),
    "all but G and history": ("context", "taste", "visits"),
    "context, biases and taste": ("context", "taste"),
    "all but taste": ("context", "affinity", "visits", "history"),
    "context and biases": ("context",),
}


def measure(options: Options, ceilings: Mapping[str, float]) -> Measured:
    rows: list[Row] = []
    sizes = QUICK_SIZES if options.quick else SIZES
    with TemporaryDirectory() as folder:
        for num_ads in sizes:
            say(f"market: generating {num_ads:,} ads")
            rows += _generation(num_ads, Path(folder) / str(num_ads), keep=num_ads == ORACLE_ADS)
        market = Path(folder) / str(ORACLE_ADS)
        truth = MarketTruth.load(market)
        say("market: the truth's speed, the oracles and the ranks")
        rows += [_truth_speed(truth), *_oracles(truth, market), *_ranks(truth)]
    config = {"sizes": list(sizes), "oracle_ads": ORACLE_ADS, "test_days": TEST_DAYS, "seed": truth.spec.seed}
    return Measured(rows, config)


def _generation(num_ads: int, out: Path, keep: bool) -> Iterator[Row]:
    spent = in_own_process(_generate, out, num_ads)
    files = list(out.iterdir())
    size = sum(file.stat().st_size for file in files)
    users = pq.ParquetFile(out / "users.parquet").metadata.num_rows
    yield Row.of(f"generate {num_ads:,} ads", spent.seconds, "s", num_ads)
    yield Row.of(f"generate {num_ads:,} ads: peak memory", spent.peak_gib, "GiB", num_ads)
    yield Row.of(f"generate {num_ads:,} ads: on disk", size / 1e6, "MB", num_ads)
    yield Row.of(f"generate {num_ads:,} ads: impressions", spent.made, "rows", num_ads)
    yield Row.of(f"generate {num_ads:,} ads: users", users, "rows", num_ads)
    if not keep:
        for file in files:
            file.unlink()


def _generate(out: Path, num_ads: int) -> int:
    return generate_market(out, num_ads=num_ads).num_impressions


def _truth_speed(truth: MarketTruth) -> Row:
    draw = np.random.default_rng(truth.spec.seed)
    user = world_ids("user", draw.integers(truth.spec.num_users, size=NUM_PAIRS))
    item = world_ids("item", draw.integers(truth.spec.num_ads, size=NUM_PAIRS))
    hour = draw.integers(24, size=NUM_PAIRS)
    times = times_ms(lambda: truth.click_prob(user, item, "feed", hour), 5)
    return Row.of("true click probabilities", NUM_PAIRS / float(np.median(times)) / 1000, "million pairs/s", NUM_PAIRS)


def _oracles(truth: MarketTruth, market: Path) -> Iterator[Row]:
    """AUC and log loss on the last days of models that know some terms; one scale and one offset fitted before."""
    # here and not above: it brings torch, which the processes whose memory is measured should not hold
    from prerank.metrics.classification import auc, log_loss

    log = _Log.read(truth, market)
    terms = _terms(truth, log)
    test = log.time_ms >= truth.spec.first_ms + (truth.spec.days - TEST_DAYS) * DAY_MS
    reached: dict[str, tuple[float, float]] = {}
    for name, known in KNOWS.items():
        logit = np.sum([terms[term] for term in known], axis=0)
        scale, offset = _fit(logit[~test], log.label[~test])
        prob = 1 / (1 + np.exp(-(scale * logit[test] + offset)))
        reached[name] = auc(log.label[test], prob), log_loss(log.label[test], prob)
    n, (best_auc, best_loss) = int(test.sum()), reached[EVERYTHING]
    for name, (area, loss) in reached.items():
        against = EVERYTHING if name != EVERYTHING else ""
        yield Row.of(f"AUC, knows {name}", area, "AUC", n, against, area / best_auc if against else None)
        yield Row.of(f"log loss, knows {name}", loss, "nats", n, against, loss / best_loss if against else None)


@dataclass(frozen=True, slots=True)
class _Log:
    """The logged rows as rows of the truth: what `MarketTruth.click_logit` asks for, and the label, each [R]."""

    user: NDArray[np.int64]
    ad: NDArray[np.int64]
    surface: NDArray[np.int64]
    hour: NDArray[np.int64]
    position: NDArray[np.int64]
    views: NDArray[np.int64]
    clicks: NDArray[np.int64]
    time_ms: NDArray[np.int64]
    label: NDArray[np.int64]

    @classmethod
    def read(cls, truth: MarketTruth, market: Path) -> _Log:
        """From the log and, row by row, its truth."""
        log, known = (pq.read_table(market / f"{name}.parquet") for name in ("impressions", "truth"))
        hour, position, time_ms, label = (
            log[c].to_numpy().astype(np.int64) for c in ("hour", "position", "time_ms", "is_click")
        )
        views, clicks = (known[f"advertiser_{c}"].to_numpy().astype(np.int64) for c in ("views", "clicks"))
        user, ad = (rows_of_ids(kind, log[f"{kind}_id"].to_numpy()) for kind in ("user", "item"))
        return cls(user, ad, surface_codes(log["surface"]), hour, position, views, clicks, time_ms, label)


def _terms(truth: MarketTruth, log: _Log) -> dict[str, Doubles]:
    """The logit of every row in five parts that add up to it; biases are with the context."""
    pairs = (log.user, log.ad, log.surface, log.hour, log.position)
    never = np.zeros(len(log.user), np.int64)
    without = truth.click_logit(*pairs, never, never)
    taste = _law("taste")[log.surface] * truth.taste_match(log.user, log.ad, log.surface)
    segment, advertiser = truth.users.segment[log.user], truth.ads.advertiser[log.ad]
    affinity = np.empty(len(never))
    for code, surface in enumerate(m.SURFACES):
        mine = log.surface == code
        affinity[mine] = truth.affinity_logits(surface)[segment[mine], advertiser[mine]]
    visits = _law("visited")[log.surface] * (truth.users.visited[log.user] == advertiser[:, None]).any(axis=1)
    return {
        "context": without - taste - affinity - visits,
        "taste": taste,
        "affinity": affinity,
        "visits": visits,
        "history": truth.click_logit(*pairs, log.views, log.clicks) - without,
    }


def _law(name: str) -> Doubles:
    """One coefficient of the truth by surface, float64 [S]."""
    return np.array([getattr(law, name) for law in m.SURFACE_LAWS], np.float64)


def _fit(logit: Doubles, label: NDArray[np.int64]) -> Doubles:
    """The scale and the offset of a logistic regression on one number, by Newton's method."""
    design = np.stack([logit, np.ones_like(logit)])
    weights = np.array([1.0, 0.0])
    for _ in range(20):
        prob = 1 / (1 + np.exp(-weights @ design))
        step = np.linalg.solve((design * (prob * (1 - prob))) @ design.T, design @ (prob - label))
        weights = weights - step
        if np.abs(step).max() < 1e-9:
            break
    return weights


def _ranks(truth: MarketTruth) -> Iterator[Row]:
    """What the best product of rank d leaves, on feed, of the affinity and of random users' and advertisers' logits."""
    segments = truth.affinity_logits("feed", num_advertisers=2000)
    num = 1000
    draw = np.random.default_rng(truth.spec.seed)
    users = draw.choice(truth.spec.num_users, num, replace=False)
    ads = truth.ads.first_ad[draw.choice(truth.spec.num_advertisers, num, replace=False)]
    zero = np.zeros(num * num, np.int64)
    logit = truth.click_logit(np.repeat(users, num), np.tile(ads, num), zero, zero, zero, zero, zero)
    matrices = {"G": segments, "L": logit.reshape(num, num)}
    for name, matrix in matrices.items():
        for rank in RANKS:
            left = best_rank_error(matrix, rank)
            yield Row.of(f"best rank error of {name}, d = {rank}", left, "of squared error", matrix.size)


if __name__ == "__main__":
    run("market", __doc__, measure)
