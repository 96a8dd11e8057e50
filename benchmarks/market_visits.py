"""What a visit is worth, user by advertiser: a table no dot product can hold, and each ranker's own answer to it.

Each of Q users visited the site of an advertiser of his own before the log; one ad of each of these advertisers makes
Q columns. The truth adds a surface's number where the user visited the advertiser and nothing elsewhere: nearly a
diagonal. A ranker's answer is what it says of the pairs less what it says of them when it is told of no visits. Of two
towers that difference is a product of as many numbers as theirs, and what such a product leaves at least of a table
Eckart and Young (1936) tell, whatever it was trained on; biases are taken out with the means of rows and columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.market import _law, _Log
from benchmarks.market_truth import logit_of, pair_error, seed_rows
from benchmarks.result import Row
from prerank.config import Config
from prerank.market.generate import MarketTruth, best_rank_error
from prerank.market.hash import rows_of_ids
from prerank.models.ranker import Ranker
from prerank.train.candidates import candidate_probs, one_event_a_user
from prerank.train.prepare import Prepared
from prerank.train.ranking import Impressions
from prerank.types import Array

VISITS = "visited_advertisers"
UNIT = "of squared error"


@dataclass(frozen=True, slots=True)
class Visitors:
    """Moments of distinct users, events int64 [Q], and one ad of an advertiser of each, rows int64 [Q], all others'."""

    events: Array
    items: Array

    @classmethod
    def of(cls, truth: MarketTruth, prepared: Prepared, config: Config, most: int) -> Visitors:
        """Up to `most` users of the test day, each with the first advertiser he visited that nobody before him has."""
        advertiser = truth.ads.advertiser[rows_of_ids("item", prepared.item_ids)]
        known, first = np.unique(advertiser, return_index=True)
        ad_of = dict(zip(known.tolist(), first.tolist(), strict=True))
        events, items = [], []
        for event in one_event_a_user(prepared, config.data.days("test"), most, config.seed).tolist():
            user = rows_of_ids("user", prepared.user_ids[prepared.events["user"][[event]]])
            mine = next((one for one in truth.users.visited[user[0]].tolist() if one in ad_of), None)
            if mine is not None:
                events.append(event)
                items.append(ad_of.pop(mine))
        return cls(np.array(events), np.array(items))

    def worth(self, truth: MarketTruth, log: _Log, prepared: Prepared) -> Array:
        """What the visits add to the true logits, float64 [Q, Q]; `log` is of all prepared events."""
        advertiser = truth.ads.advertiser[rows_of_ids("item", prepared.item_ids[self.items])]
        visited = truth.users.visited[log.user[self.events]]
        met = (visited[:, None, :] == advertiser[None, :, None]).any(-1)
        found: Array = _law("visited")[log.surface[self.events]][:, None] * met
        return found

    def told(self, ranker: Ranker, impressions: Impressions) -> Array:
        """What they add to a ranker's logits of the first task, float64 [Q, Q]."""
        user, [day] = impressions.users.at(self.events), np.unique(np.asarray(impressions.day[self.events]))
        items, rows = impressions.items.on(int(day)), np.tile(self.items, (len(self.events), 1))
        without = user | {VISITS: torch.full_like(user[VISITS], -1)}
        known, unknown = (candidate_probs(ranker, one, items, rows)[..., 0] for one in (user, without))
        change: Array = logit_of(known) - logit_of(unknown)
        return change


def visit_rows(worth: Array, told: Mapping[str, Sequence[Array]], dim: int) -> Iterator[Row]:
    """What a dot product of `dim` numbers leaves at least of `worth` [Q, Q], and what the seeds of each ranker do."""
    bound = best_rank_error(worth, dim)
    yield Row.of(f"visits, best rank error, d = {dim}", bound, UNIT, worth.size)
    for name, seeds in told.items():
        yield from seed_rows(
            f"visits, {name}, error of the pairs", [pair_error(worth, one) for one in seeds], UNIT, worth.size
        )
