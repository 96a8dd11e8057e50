"""Who comes to the simulated market, which ads may be shown to them, and which of those win the slots.

The policy is mildly relevance-aware and bid-aware. It does not know the segment x advertiser affinity, nor how a user
met an advertiser before.
"""

from dataclasses import dataclass
from datetime import date
from typing import Final

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from prerank.market import marginals as m
from prerank.market.hash import Doubles, Floats, Ints, normals, pick, stream
from prerank.market.population import HOUR_MS, NO_CODE
from prerank.market.spec import MarketSpec
from prerank.market.truth import MarketTruth

_CANDIDATES: Final = {"interest": 12, "audience": 10, "anywhere": 10}  # drawn a request, before eligibility
_MAX_SLOTS: Final = max(law.slots for law in m.SURFACE_LAWS)
_REQUEST_BLOCK: Final = 8_192
SLOTS: Final = np.array([law.slots for law in m.SURFACE_LAWS], np.int64)
_SURFACE_SHARES: Final = tuple(law.share for law in m.SURFACE_LAWS)


@dataclass(frozen=True, slots=True)
class Requests:
    """Requests of one hour as columns: rows of users, codes of surfaces."""

    user: Ints
    surface: Ints
    time_ms: Ints  # rising


@dataclass(frozen=True, slots=True)
class Shown:
    """What won, as columns: rows of ads, by request and position."""

    request: Ints  # place in the requests of the hour, rising
    ad: Ints
    position: Ints


class Visits:
    """Who comes: a country by its local hour, then a user of it by activity."""

    def __init__(self, truth: MarketTruth) -> None:
        users = truth.users
        self._users_by_country = [np.flatnonzero(users.country == c) for c in range(len(m.COUNTRIES))]
        self._activity = [np.cumsum(users.activity[u].astype(np.float64)) for u in self._users_by_country]
        self._inhabited = np.array([len(u) > 0 for u in self._users_by_country])

    def draw(self, rng: Generator, num: int, traffic: Doubles, hour_ms: int) -> Requests:
        """`num` requests within the hour that starts at `hour_ms`; `traffic` [countries] are any positive shares."""
        traffic = traffic * self._inhabited
        counts = rng.multinomial(num, traffic / traffic.sum())
        drawn = [
            users[np.searchsorted(activity, rng.random(count) * activity[-1], side="right")]
            for users, activity, count in zip(self._users_by_country, self._activity, counts, strict=True)
            if count
        ]
        user = rng.permutation(np.concatenate(drawn)) if drawn else np.empty(0, np.int64)
        surface = pick(_SURFACE_SHARES, rng.random(num))
        return Requests(user, surface, hour_ms + np.sort(rng.integers(0, HOUR_MS, num)))


class Inventory:
    """Which ads a request may draw, and which of them win its slots."""

    def __init__(self, truth: MarketTruth) -> None:
        self._truth = truth
        ads, seed = truth.ads, truth.spec.seed
        rows = np.arange(truth.spec.num_ads, dtype=np.int64)
        category = ads.campaigns.category[ads.campaign]
        # Within a category by a hidden reach: drawing low places more often makes some ads popular.
        reach = np.float32(0.6) * normals(stream(seed, "ad.reach"), rows)
        reach += normals(stream(seed, "advertiser.reach"), ads.advertiser.astype(np.int64))
        self._by_category = np.lexsort((reach, category)).astype(np.int32)
        self._first_of_category = np.searchsorted(category[self._by_category], np.arange(m.NUM_CATEGORIES + 1))

    def auction(self, rng: Generator, request: Requests, bids: Ints, spent: Ints) -> Shown:
        """The winners of each request's slots among its eligible candidates, best first."""
        blocks = []
        for at in range(0, len(request.user), _REQUEST_BLOCK):
            part = slice(at, at + _REQUEST_BLOCK)
            block = Requests(request.user[part], request.surface[part], request.time_ms[part])
            shown = self._auction_block(rng, block, bids, spent)
            blocks.append((shown.request + at, shown.ad, shown.position))
        if not blocks:
            return Shown(*(np.empty(0, np.int64) for _ in range(3)))
        return Shown(*(np.concatenate(column) for column in zip(*blocks, strict=True)))

    def _auction_block(self, rng: Generator, request: Requests, bids: Ints, spent: Ints) -> Shown:
        ad = np.sort(self._candidates(rng, request.user), axis=1)
        may = self._eligible(request, ad, spent)
        may[:, 1:] &= ad[:, 1:] != ad[:, :-1]
        value = self._believed_value(rng, request, ad, bids)
        value[~may] = -np.inf
        place = np.argsort(-value, axis=1, kind="stable")[:, :_MAX_SLOTS]
        wins = np.take_along_axis(may, place, axis=1)
        wins &= np.arange(_MAX_SLOTS) < SLOTS[request.surface][:, None]
        row, position = np.nonzero(wins)
        return Shown(row, ad[row, place[row, position]], position)

    def _candidates(self, rng: Generator, user: Ints) -> Ints:
        """int64 [n, N]: from the user's interests, from advertisers the user visited, and from anywhere."""
        n, users, ads = len(user), self._truth.users, self._truth.ads
        shape = (n, _CANDIDATES["interest"])
        which = (rng.random(shape, np.float32) * users.num_interests[user][:, None]).astype(np.int64)
        category = users.interests[user[:, None], which]
        first = self._first_of_category[category]
        size = self._first_of_category[category + 1] - first
        place = first + (size * rng.random(shape) ** 3).astype(np.int64)
        interest = self._by_category[np.minimum(place, self._truth.spec.num_ads - 1)]

        shape = (n, _CANDIDATES["audience"])
        advertiser = users.visited[user[:, None], rng.integers(0, m.MAX_VISITED, shape)]
        advertiser = np.where(advertiser < 0, users.visited[user, :1], advertiser)  # everyone visited one
        first = ads.first_ad[advertiser]
        audience = first + ((ads.first_ad[advertiser + 1] - first) * rng.random(shape) ** 2).astype(np.int64)

        anywhere = rng.integers(0, self._truth.spec.num_ads, (n, _CANDIDATES["anywhere"]))
        return np.concatenate([interest.astype(np.int64), audience, anywhere], axis=1)

    def _eligible(self, request: Requests, ad: Ints, spent: Ints) -> NDArray[np.bool_]:
        users, campaigns = self._truth.users, self._truth.ads.campaigns
        campaign = self._truth.ads.campaign[ad]
        may = campaigns.start_ms[campaign] <= request.time_ms[:, None]
        may &= spent[campaign] < campaigns.daily_budget_micros[campaign]
        for masks, codes, size in (
            (campaigns.countries, users.country, len(m.COUNTRIES)),
            (campaigns.age_bands, users.age_band, len(m.AGE_BANDS)),
            (campaigns.devices, users.device, len(m.DEVICES)),
        ):
            code = codes[request.user]
            # A user whose value is unknown is eligible only where everyone is meant.
            need = np.where(code == NO_CODE, (1 << size) - 1, 1 << (code.astype(np.int64) % 64))[:, None]
            may &= (masks[campaign] & need) == need
        return may

    def _believed_value(self, rng: Generator, request: Requests, ad: Ints, bids: Ints) -> Floats:
        """float32 [n, N] log of bid times the policy's rough idea of the click rate."""
        truth = self._truth
        content = truth.ads.content[ad]  # [n, N, D]
        match = np.einsum("nd,nkd->nk", truth.users.taste[request.user], content)
        value = np.log(bids[truth.ads.campaign[ad]]).astype(np.float32)
        value += np.float32(0.6) * match + np.float32(0.3) * truth.ads.quality[ad]
        value += np.float32(0.9) * rng.standard_normal(ad.shape, np.float32)
        return value


def hourly_traffic(spec: MarketSpec) -> Doubles:
    """float64 [days * 24, countries] shares of all visits a UTC hour and country; they sum to 1."""
    first = date.fromisoformat(spec.first_day).weekday()
    hour = np.arange(spec.days * 24)[:, None] + np.array(m.UTC_OFFSET_HOURS)[None, :]
    weekday = (first + hour // 24) % 7
    shape = np.array([m.HOUR_SHAPE_WEEKDAY, m.HOUR_SHAPE_WEEKEND])[(weekday >= 5).astype(np.int64), hour % 24]
    traffic = np.asarray(m.DAY_SHAPE)[weekday] * shape * np.asarray(m.COUNTRY_SHARES)
    return np.asarray(traffic / traffic.sum(), np.float64)
