"""What happened in the simulated market: hour by hour, who came, which ads won, what was clicked and what it cost.

It does not know which ads should have been shown: the policy of `auction` chooses.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Final

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from prerank.market import marginals as m
from prerank.market.auction import SLOTS, Inventory, Requests, Shown, Visits, hourly_traffic
from prerank.market.hash import Doubles, Ints, stream
from prerank.market.population import HOUR_MS, bids_on_day
from prerank.market.spec import MarketSpec
from prerank.market.truth import MarketTruth

_SPARE: Final = 1.05  # more requests than needed; the rows over the hour's share are dropped


@dataclass(frozen=True, slots=True)
class LoggedRows:
    """Impressions as columns, in order of time. Rows of users and ads, not ids."""

    request: Ints
    user: Ints
    ad: Ints
    time_ms: Ints
    surface: Ints
    hour: Ints  # local
    position: Ints
    bid_micros: Ints
    views: Ints  # of this advertiser by this user, before this clock hour
    clicks: Ints
    click_prob: Doubles
    conversion_prob: Doubles
    is_click: NDArray[np.bool_]
    is_conversion: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.user)

    def take(self, keep: NDArray[np.bool_] | slice) -> "LoggedRows":
        """The rows kept, in the same order."""
        return LoggedRows(*(getattr(self, field.name)[keep] for field in fields(self)))


class MetCounts:
    """How often each user saw and clicked each advertiser so far; two sorted runs, so an hour costs little to add."""

    def __init__(self) -> None:
        self._runs = [_Run.empty(), _Run.empty()]  # settled, recent

    def look_up(self, keys: Ints) -> tuple[Ints, Ints]:
        """int64 [n] views and clicks so far."""
        found = [run.look_up(keys) for run in self._runs]
        return found[0][0] + found[1][0], found[0][1] + found[1][1]

    def add(self, keys: Ints, clicks: NDArray[np.bool_]) -> None:
        """Count one view a key, and a click where there was one."""
        settled, recent = self._runs
        recent = recent.merged(keys, np.ones(len(keys), np.int64), clicks.astype(np.int64))
        if len(recent.keys) * 8 > len(settled.keys):
            settled, recent = settled.merged(recent.keys, recent.views, recent.clicks), _Run.empty()
        self._runs = [settled, recent]


@dataclass(frozen=True, slots=True)
class _Run:
    keys: Ints  # sorted, distinct
    views: Ints
    clicks: Ints

    @staticmethod
    def empty() -> "_Run":
        return _Run(*(np.empty(0, np.int64) for _ in range(3)))

    def look_up(self, keys: Ints) -> tuple[Ints, Ints]:
        if not len(self.keys):
            return np.zeros(len(keys), np.int64), np.zeros(len(keys), np.int64)
        at = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        hit = self.keys[at] == keys
        return np.where(hit, self.views[at], 0), np.where(hit, self.clicks[at], 0)

    def merged(self, keys: Ints, views: Ints, clicks: Ints) -> "_Run":
        every = np.concatenate([self.keys, keys])
        order = np.argsort(every, kind="stable")
        every = every[order]
        first = np.flatnonzero(np.r_[True, every[1:] != every[:-1]][: len(every)])
        if not len(first):
            return self
        return _Run(
            every[first],
            np.add.reduceat(np.concatenate([self.views, views])[order], first),
            np.add.reduceat(np.concatenate([self.clicks, clicks])[order], first),
        )


class MarketLog:
    """The hours of one market, in order; `hours()` may be walked once."""

    def __init__(self, truth: MarketTruth) -> None:
        self._truth = truth
        self._spec: MarketSpec = truth.spec
        self._met = MetCounts()
        self._spent = np.zeros(len(truth.ads.campaigns.log_bid), np.int64)
        self.exhausted_campaign_days = 0
        self.active_campaign_days = 0
        self.num_requests = 0
        self._visits = Visits(truth)
        self._inventory = Inventory(truth)
        self._rows_a_request = float(np.dot(SLOTS, [law.share for law in m.SURFACE_LAWS]))

    def hours(self) -> Iterator[LoggedRows]:
        """One LoggedRows an hour, `spec.days * 24` of them; together `spec.num_impressions` rows if ads suffice."""
        traffic = hourly_traffic(self._spec)  # [hours, countries], sums to 1
        until = np.rint(np.cumsum(traffic.sum(axis=1)) * self._spec.num_impressions).astype(np.int64)
        logged = 0
        bids = np.empty(0, np.int64)
        for hour in range(self._spec.days * 24):
            if hour % 24 == 0:
                self._close_day()
                campaigns = self._truth.ads.campaigns
                bids = bids_on_day(self._spec, campaigns, hour // 24, np.arange(len(campaigns.log_bid)))
            rows = self._one_hour(hour, int(until[hour]) - logged, traffic[hour], bids)
            logged += len(rows)
            yield rows
        self._close_day()

    def _one_hour(self, hour: int, wanted: int, traffic: Doubles, bids: Ints) -> LoggedRows:
        rng = np.random.Generator(np.random.Philox(key=[stream(self._spec.seed, "log"), hour]))
        num_requests = int(np.ceil(wanted / self._rows_a_request * _SPARE)) if wanted > 0 else 0
        request = self._visits.draw(rng, num_requests, traffic, self._spec.first_ms + hour * HOUR_MS)
        shown = self._inventory.auction(rng, request, bids, self._spent)
        if len(shown.ad):
            self._rows_a_request = max(0.25, len(shown.ad) / num_requests)
        rows = self._outcomes(rng, request, shown, bids)
        kept = rows.take(self._within_budget(rows)).take(slice(0, max(wanted, 0)))
        self._count(kept)
        return kept

    def _outcomes(self, rng: Generator, request: Requests, shown: Shown, bids: Ints) -> LoggedRows:
        user, surface, time_ms = (a[shown.request] for a in (request.user, request.surface, request.time_ms))
        offset = np.array(m.UTC_OFFSET_HOURS)[self._truth.users.country[user]]
        hour = (time_ms // HOUR_MS + offset) % 24
        views, clicks = self._met.look_up(self._pair_keys(user, shown.ad))
        logit = self._truth.click_logit(user, shown.ad, surface, hour, shown.position, views, clicks)
        click_prob = 1.0 / (1.0 + np.exp(-logit))
        conversion_prob = 1.0 / (1.0 + np.exp(-self._truth.conversion_logit(user, shown.ad, surface)))
        is_click = rng.random(len(user)) < click_prob
        return LoggedRows(
            request=shown.request + self.num_requests,
            user=user,
            ad=shown.ad,
            time_ms=time_ms,
            surface=surface,
            hour=hour,
            position=shown.position,
            bid_micros=bids[self._truth.ads.campaign[shown.ad]],
            views=views,
            clicks=clicks,
            click_prob=click_prob,
            conversion_prob=conversion_prob,
            is_click=is_click,
            is_conversion=is_click & (rng.random(len(user)) < conversion_prob),
        )

    def _within_budget(self, rows: LoggedRows) -> NDArray[np.bool_]:
        """Which rows were shown before their campaign's daily budget was spent."""
        campaign = self._truth.ads.campaign[rows.ad]
        order = np.argsort(campaign, kind="stable")
        cost = (rows.bid_micros * rows.is_click)[order]
        before = np.cumsum(cost) - cost
        first = np.r_[True, campaign[order][1:] != campaign[order][:-1]][: len(order)]
        before -= np.maximum.accumulate(np.where(first, before, 0)) if len(order) else 0
        before += self._spent[campaign[order]]
        keep = np.empty(len(order), np.bool_)
        keep[order] = before < self._truth.ads.campaigns.daily_budget_micros[campaign[order]]
        return keep

    def _count(self, rows: LoggedRows) -> None:
        cost = rows.bid_micros * rows.is_click
        np.add.at(self._spent, self._truth.ads.campaign[rows.ad], cost)
        self._met.add(self._pair_keys(rows.user, rows.ad), rows.is_click)
        if len(rows):
            self.num_requests = int(rows.request[-1]) + 1

    def _close_day(self) -> None:
        self.active_campaign_days += int((self._spent > 0).sum())
        self.exhausted_campaign_days += int((self._spent >= self._truth.ads.campaigns.daily_budget_micros).sum())
        self._spent[:] = 0

    def _pair_keys(self, user: Ints, ad: Ints) -> Ints:
        return user * self._spec.num_advertisers + self._truth.ads.advertiser[ad]
