"""What is a visit to an advertiser's site worth, and can a dot product know it?

The simulated market, rankers of about equal weights outside the tables, three seeds, trained on clicks as part a of
`ranking_market` trains them. Each of Q users visited the site of an advertiser of his own before the log; one ad of
each of these advertisers makes Q columns. The truth adds a surface's number where the user visited the advertiser and
nothing elsewhere: nearly a diagonal. A ranker's answer is what it says of the pairs less what it says of them when it
is told of no visits; of one that counts matches also less what it says where visits are told and match nothing. Of two
towers the difference is a product of as many numbers as theirs, and what such a product leaves at least of a table
Eckart and Young (1936) tell, whatever it was trained on; biases are taken out with the means of rows and columns.
Fifteen in a hundred of the true visits are in no table that a ranker reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context

import numpy as np
import torch
from torch import Tensor

from benchmarks.machine import REPOSITORY, say
from benchmarks.market import _law, _Log
from benchmarks.market_truth import log_order, logit_of, pair_error, seed_rows, taken
from benchmarks.ranking_market import BASE, FULL, PLAIN, QUICK, Sizes, World, models, one_thread
from benchmarks.ranking_world import home_of_trainings
from benchmarks.result import Row
from benchmarks.run import Measured, Options, run
from prerank.config import Config, load_config
from prerank.kernels.program import Program
from prerank.market.generate import MarketTruth, best_rank_error
from prerank.market.hash import rows_of_ids
from prerank.models.ranker import Ranker
from prerank.train.candidates import candidate_probs, one_event_a_user
from prerank.train.prepare import Prepared
from prerank.train.ranking import Impressions, train_ranker
from prerank.types import Array, Features

VISITS, MATCHES = "visited_advertisers", "codes_visited_advertisers"
RANKERS = (FULL, PLAIN, BASE, "mtmd", "two_tower")
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

    def told(self, ranker: Ranker, impressions: Impressions) -> dict[str, Array]:
        """What they add to a ranker's logits of the first task, float64 [Q, Q]: `VISITS`, and of `MATCHES` alone."""
        user, [day] = impressions.users.at(self.events), np.unique(np.asarray(impressions.day[self.events]))
        items, rows = impressions.items.on(int(day)), np.tile(self.items, (len(self.events), 1))

        def logits(of: Ranker, user: Features) -> Array:
            return logit_of(candidate_probs(of, user, items, rows)[..., 0])

        known = logits(ranker, user)
        found = {VISITS: known - logits(ranker, user | {VISITS: torch.full_like(user[VISITS], -1)})}
        if MATCHES in ranker.user_side(user):
            found[MATCHES] = known - logits(_Unmatched(ranker), user)
        return found


class _Unmatched:
    """A ranker as it is, for which no visit matches any candidate."""

    def __init__(self, ranker: Ranker) -> None:
        self._ranker, self.tasks = ranker, ranker.tasks

    def item_side(self, items: Features) -> dict[str, Tensor]:
        """As the ranker's."""
        return self._ranker.item_side(items)

    def user_side(self, user: Features) -> dict[str, Tensor]:
        """As the ranker's, without the codes that its matches are counted by."""
        side = self._ranker.user_side(user)
        return side | {MATCHES: torch.full_like(side[MATCHES], -1)}

    def __call__(self, user_side: Features, item_side: Features) -> Tensor:
        return self._ranker(user_side, item_side)

    def program(self) -> Program:
        """Nobody asks."""
        raise NotImplementedError


def visit_rows(worth: Array, told: Mapping[str, Sequence[Array]], dim: int) -> Iterator[Row]:
    """What a dot product of `dim` numbers leaves at least of `worth` [Q, Q], and what the seeds of each ranker do."""
    bound = best_rank_error(worth, dim)
    yield Row.of(f"best rank error, d = {dim}", bound, UNIT, worth.size)
    for name, seeds in told.items():
        yield from seed_rows(f"{name}, error of the pairs", [pair_error(worth, one) for one in seeds], UNIT, worth.size)


def answered(world: World, sizes: Sizes, name: str, seed: int) -> dict[str, Array]:
    """What one ranker says that visits add; see `Visitors.told`."""
    say(f"market_visits: {name}, {seed}")
    config, prepared = replace(models(world.config)[name], seed=seed), world.prepared()
    ranker, _ = train_ranker(prepared, config, *world.work(config.to_dict()))
    visitors = Visitors.of(MarketTruth.load(world.folder), prepared, world.config, sizes.questions)
    test = Impressions(prepared, config, np.flatnonzero(prepared.of_days(config.data.days("test"))))
    return visitors.told(ranker, test)


def measure(options: Options, ceilings: Mapping[str, float]) -> Measured:
    sizes = QUICK if options.quick else Sizes()
    sizes = replace(sizes, seeds=options.seeds or sizes.seeds)
    config = load_config(REPOSITORY / "funnel.toml")
    with home_of_trainings(options) as home, ProcessPoolExecutor(2, get_context("spawn"), one_thread) as pool:
        say(f"market_visits: a market of {sizes.impressions:,} impressions")
        world = World.make(config, home, sizes.num_ads, sizes.impressions)
        asked = {name: [pool.submit(answered, world, sizes, name, seed) for seed in sizes.seeds] for name in RANKERS}
        each = {name: [one.result() for one in seeds] for name, seeds in asked.items()}
        prepared, truth = world.prepared(), MarketTruth.load(world.folder)
        log = taken(_Log.read(truth, world.folder), log_order(world.folder, prepared))
        worth = Visitors.of(truth, prepared, config, sizes.questions).worth(truth, log, prepared)
        told = {name: [one[VISITS] for one in seeds] for name, seeds in each.items()}
        told[f"{FULL}, its matches alone"] = [one[MATCHES] for one in each[FULL]]
        rows = list(visit_rows(worth, told, config.ranker.dim))
    said = {name: one.to_dict()["ranker"] for name, one in models(config).items() if name in RANKERS}
    return Measured(rows, {**asdict(sizes), "seed": config.seed, "rankers": said})


if __name__ == "__main__":
    run("market_visits", __doc__ or "", measure, keeps=True)
