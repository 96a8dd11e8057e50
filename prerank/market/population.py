"""Who is in the simulated market: users, advertisers, campaigns and ads as arrays, each value a hash of its place.

A market of ten million ads is so rebuilt from its arguments in seconds. It does not know what happens between a user
and an ad.
"""

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from prerank.market import marginals as m
from prerank.market.hash import (
    HASH_BLOCK,
    Doubles,
    Floats,
    Ints,
    hashes,
    normal_rows,
    normals,
    pick,
    stream,
    uniforms,
)
from prerank.market.spec import MarketSpec

DAY_MS: Final = 86_400_000
HOUR_MS: Final = 3_600_000
NO_CODE: Final = 255  # a null, in the uint8 code columns


@dataclass(frozen=True, slots=True)
class Users:
    """U users as columns. Codes index the tuples of `marginals`; NO_CODE is null."""

    country: NDArray[np.uint8]
    age_band: NDArray[np.uint8]
    gender: NDArray[np.uint8]
    device: NDArray[np.uint8]
    language_known: NDArray[np.bool_]
    segment: NDArray[np.int32]
    interests: NDArray[np.int32]  # [U, MAX_INTERESTS]
    num_interests: NDArray[np.int32]
    visited: Ints  # [U, MAX_VISITED] advertisers, -1 where there is none
    taste: Floats  # [U, LATENT_DIM], hidden
    propensity: Floats  # [U] logit, hidden
    activity: Floats  # [U], mean near 1


@dataclass(frozen=True, slots=True)
class Campaigns:
    """Campaigns as columns; a mask holds one bit a code and is all ones where everyone is meant."""

    advertiser: NDArray[np.int32]
    category: NDArray[np.int32]
    countries: NDArray[np.uint16]
    age_bands: NDArray[np.uint8]
    devices: NDArray[np.uint8]
    start_ms: Ints
    log_bid: Doubles  # of the bid in micros, before the daily drift
    daily_budget_micros: Ints


@dataclass(frozen=True, slots=True)
class Ads:
    """I ads as columns, contiguous by campaign and campaigns contiguous by advertiser."""

    campaigns: Campaigns
    campaign: NDArray[np.int32]  # [I]
    advertiser: NDArray[np.int32]  # [I]
    first_ad: Ints  # [V + 1] ads of advertiser v are first_ad[v] .. first_ad[v + 1]
    content: Floats  # [I, LATENT_DIM], hidden
    quality: Floats  # [I], hidden
    price_z: Floats  # [I] log price within its category, in deviations
    format: NDArray[np.uint8]


def make_users(spec: MarketSpec) -> Users:
    """The users of a market."""
    rows = np.arange(spec.num_users, dtype=np.int64)

    def u(name: str) -> Doubles:
        return uniforms(stream(spec.seed, "user." + name), rows)

    def z(name: str) -> Floats:
        return normals(stream(spec.seed, "user." + name), rows)

    interests, num_interests = _interests(spec.seed, rows)
    return Users(
        country=pick(m.COUNTRY_SHARES, u("country")).astype(np.uint8),
        age_band=_with_nulls(pick(m.AGE_SHARES, u("age")), u("age_null"), m.NULL_SHARE["age_band"]),
        gender=_with_nulls(pick(m.GENDER_SHARES, u("gender")), u("gender_null"), m.NULL_SHARE["gender"]),
        device=pick(m.DEVICE_SHARES, u("device")).astype(np.uint8),
        language_known=u("language_null") >= m.NULL_SHARE["language"],
        segment=pick(_segment_shares(spec.seed), u("segment")).astype(np.int32),
        interests=interests,
        num_interests=num_interests,
        visited=_visited(spec, rows, interests, num_interests),
        taste=_tastes(spec.seed, rows, interests, num_interests),
        propensity=z("propensity") * np.float32(m.PROPENSITY_SIGMA),
        activity=np.exp(m.ACTIVITY_SIGMA * z("activity") - m.ACTIVITY_SIGMA**2 / 2).astype(np.float32),
    )


def make_ads(spec: MarketSpec) -> Ads:
    """The ads of a market, with their campaigns and advertisers."""
    first_ad = _first_ads(spec)
    advertiser = np.repeat(np.arange(spec.num_advertisers, dtype=np.int32), np.diff(first_ad))
    campaign, campaign_advertiser = _campaigns_of_ads(spec, first_ad, advertiser)
    rows = np.arange(spec.num_ads, dtype=np.int64)
    ads_a_campaign = np.bincount(campaign)
    campaigns = make_campaigns(spec, campaign_advertiser, ads_a_campaign)
    return Ads(
        campaigns=campaigns,
        campaign=campaign,
        advertiser=advertiser,
        first_ad=first_ad,
        content=_contents(spec.seed, rows, advertiser, campaigns.category[campaign]),
        quality=normals(stream(spec.seed, "ad.quality"), rows),
        price_z=normals(stream(spec.seed, "ad.price"), rows),
        format=pick(m.FORMAT_SHARES, uniforms(stream(spec.seed, "ad.format"), rows)).astype(np.uint8),
    )


def make_campaigns(spec: MarketSpec, advertiser: NDArray[np.int32], num_ads: Ints) -> Campaigns:
    """Campaigns of the given advertisers, `num_ads` ads each."""
    rows = np.arange(len(advertiser), dtype=np.int64)

    def u(name: str) -> Doubles:
        return uniforms(stream(spec.seed, "campaign." + name), rows)

    category = _categories(spec, advertiser, u("category_own"), u("category"))
    log_bid = (
        math.log(m.BID_MEDIAN_MICROS)
        + m.BID_SIGMA_CATEGORY * normals(stream(spec.seed, "category.bid"), category.astype(np.int64))
        + m.BID_SIGMA_ADVERTISER * normals(stream(spec.seed, "advertiser.bid"), advertiser.astype(np.int64))
        + m.BID_SIGMA_CAMPAIGN * normals(stream(spec.seed, "campaign.bid"), rows)
    ).astype(np.float64)
    noise = normals(stream(spec.seed, "campaign.budget"), rows)
    return Campaigns(
        advertiser=advertiser,
        category=category,
        countries=_country_masks(spec, advertiser, u("countries"), rows),
        age_bands=_age_masks(u("ages"), u("age_first"), u("age_width")),
        devices=_device_masks(u("devices"), u("device_kind")),
        start_ms=_starts(spec, u("started"), u("start")),
        log_bid=log_bid,
        daily_budget_micros=_budgets(spec, log_bid, num_ads, noise),
    )


def bids_on_day(spec: MarketSpec, campaigns: Campaigns, day: int, rows: Ints) -> Ints:
    """int64 [n] bids in micros of these campaigns on day 0..days-1: a daily log-normal drift around each one's own."""
    drift = normals(stream(spec.seed, f"campaign.bid.{day}"), rows).astype(np.float64)
    return np.maximum(np.rint(np.exp(campaigns.log_bid[rows] + m.BID_SIGMA_DAY * drift)), 1_000.0).astype(np.int64)


def category_centroids(seed: int) -> Floats:
    """[NUM_CATEGORIES, LATENT_DIM]: where each category lies in the hidden space."""
    return normal_rows(stream(seed, "category.centroid"), np.arange(m.NUM_CATEGORIES, dtype=np.int64), m.LATENT_DIM)


def _with_nulls(codes: Ints, u: Doubles, null_share: float) -> NDArray[np.uint8]:
    return np.where(u < null_share, NO_CODE, codes).astype(np.uint8)


def _segment_shares(seed: int) -> Doubles:
    z = normals(stream(seed, "segment.size"), np.arange(m.NUM_SEGMENTS, dtype=np.int64))
    return np.exp(m.SEGMENT_SIGMA * z.astype(np.float64))


def _category_shares(seed: int) -> Doubles:
    z = normals(stream(seed, "category.size"), np.arange(m.NUM_CATEGORIES, dtype=np.int64))
    return np.exp(0.8 * z.astype(np.float64))


def _interests(seed: int, rows: Ints) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    first = pick(_category_shares(seed), uniforms(stream(seed, "user.interest"), rows))
    # Steps from disjoint ranges keep the interests of one user distinct.
    width = (m.NUM_CATEGORIES - 1) // (m.MAX_INTERESTS - 1)
    step = hashes(stream(seed, "user.interest.step"), rows[:, None] * 4 + np.arange(m.MAX_INTERESTS - 1))
    steps = (step % np.uint64(width)).astype(np.int64) + 1 + width * np.arange(m.MAX_INTERESTS - 1)
    interests = np.concatenate([first[:, None], (first[:, None] + steps) % m.NUM_CATEGORIES], axis=1)
    count = pick((0.25, 0.35, 0.25, 0.15), uniforms(stream(seed, "user.interest.count"), rows)) + 1
    return interests.astype(np.int32), count.astype(np.int32)


def _visited(spec: MarketSpec, rows: Ints, interests: NDArray[np.int32], num_interests: NDArray[np.int32]) -> Ints:
    """[U, MAX_VISITED]: half by the advertiser's size, half evenly from the user's interests; -1 in unused places."""
    places = np.arange(m.MAX_VISITED)
    u = uniforms(stream(spec.seed, "user.visited"), rows[:, None] * m.MAX_VISITED + places)
    main = _main_categories(spec)
    by_category = np.argsort(main, kind="stable")
    bounds = np.searchsorted(main[by_category], np.arange(m.NUM_CATEGORIES + 1))
    category = np.take_along_axis(interests, places % num_interests[:, None], axis=1)
    size = bounds[category + 1] - bounds[category]
    place = bounds[category] + (u * 2 % 1 * size).astype(np.int64)
    of_interest = by_category[np.minimum(place, len(main) - 1)]
    by_size = np.searchsorted(_first_ads(spec), (u * 2 % 1 * spec.num_ads).astype(np.int64), side="right") - 1
    count = 1 + (uniforms(stream(spec.seed, "user.visited.count"), rows) * m.MAX_VISITED).astype(np.int64)
    visited = np.where((u < 0.5) & (size > 0), of_interest, by_size)
    visited[places >= count[:, None]] = -1
    for j in range(1, m.MAX_VISITED):  # the same one again is no second visit
        visited[:, j][(visited[:, :j] == visited[:, j : j + 1]).any(axis=1)] = -1
    return visited


def _tastes(seed: int, rows: Ints, interests: NDArray[np.int32], count: NDArray[np.int32]) -> Floats:
    centroids = category_centroids(seed)
    taste = normal_rows(stream(seed, "user.taste"), rows, m.LATENT_DIM) * np.float32(0.7)
    for j in range(m.MAX_INTERESTS):
        has = (j < count)[:, None] / count[:, None]
        taste += centroids[interests[:, j]] * has.astype(np.float32)
    return taste


def _contents(seed: int, rows: Ints, advertiser: NDArray[np.int32], category: NDArray[np.int32]) -> Floats:
    # Divided by 5 so that taste . content has deviation near 1 over random pairs.
    by_category = category_centroids(seed) / np.float32(5)
    v = np.arange(int(advertiser[-1]) + 1, dtype=np.int64)
    by_advertiser = normal_rows(stream(seed, "advertiser.content"), v, m.LATENT_DIM) * np.float32(0.5 / 5)
    start = stream(seed, "ad.content")
    content = np.empty((len(rows), m.LATENT_DIM), np.float32)
    for at in range(0, len(rows), HASH_BLOCK):
        part = slice(at, at + HASH_BLOCK)
        block = normal_rows(start, rows[part], m.LATENT_DIM) * np.float32(0.6 / 5)
        block += by_category[category[part]]
        block += by_advertiser[advertiser[part]]
        content[part] = block
    return content


def _first_ads(spec: MarketSpec) -> Ints:
    rank = np.arange(spec.num_advertisers, dtype=np.float64)
    weight = (rank + 1 + m.ADVERTISER_ZIPF_SHIFT) ** -m.ADVERTISER_ZIPF
    spare = spec.num_ads - spec.num_advertisers
    counts = 1 + np.floor(weight / weight.sum() * spare).astype(np.int64)
    counts[: spec.num_ads - int(counts.sum())] += 1
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def _campaigns_of_ads(
    spec: MarketSpec, first_ad: Ints, advertiser: NDArray[np.int32]
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    v = np.arange(spec.num_advertisers, dtype=np.int64)
    size = 4 + (hashes(stream(spec.seed, "advertiser.campaign_size"), v) % np.uint64(13)).astype(np.int64)
    num_campaigns = -(-np.diff(first_ad) // size)
    first_campaign = np.concatenate([[0], np.cumsum(num_campaigns)])
    place = np.arange(spec.num_ads, dtype=np.int64) - first_ad[advertiser]
    campaign = (first_campaign[advertiser] + place // size[advertiser]).astype(np.int32)
    return campaign, np.repeat(v, num_campaigns).astype(np.int32)


def _categories(spec: MarketSpec, advertiser: NDArray[np.int32], u_own: Doubles, u: Doubles) -> NDArray[np.int32]:
    other = pick(_category_shares(spec.seed), u)
    return np.where(u_own < 0.8, _main_categories(spec)[advertiser], other).astype(np.int32)


def _main_categories(spec: MarketSpec) -> Ints:
    v = np.arange(spec.num_advertisers, dtype=np.int64)
    return pick(_category_shares(spec.seed), uniforms(stream(spec.seed, "advertiser.category"), v))


def _country_masks(spec: MarketSpec, advertiser: NDArray[np.int32], u: Doubles, rows: Ints) -> NDArray[np.uint16]:
    v = np.arange(spec.num_advertisers, dtype=np.int64)
    home = pick(m.COUNTRY_SHARES, uniforms(stream(spec.seed, "advertiser.home"), v))[advertiser]
    mask = np.int64(1) << home
    for j in (1, 2):  # up to two more countries
        also = pick(m.COUNTRY_SHARES, uniforms(stream(spec.seed, f"campaign.country.{j}"), rows))
        mask = np.where(u > 0.5 + 0.2 * j, mask | (np.int64(1) << also), mask)
    return np.where(u < 0.5, (1 << len(m.COUNTRIES)) - 1, mask).astype(np.uint16)


def _age_masks(u: Doubles, u_first: Doubles, u_width: Doubles) -> NDArray[np.uint8]:
    width = 2 + (u_width * 2).astype(np.int64)  # two or three neighbouring bands
    first = (u_first * (len(m.AGE_BANDS) - width + 1)).astype(np.int64)
    mask = ((np.int64(1) << width) - 1) << first
    return np.where(u < 0.7, (1 << len(m.AGE_BANDS)) - 1, mask).astype(np.uint8)


def _device_masks(u: Doubles, u_kind: Doubles) -> NDArray[np.uint8]:
    kinds = np.array([0b0011, 0b0001, 0b0010, 0b0100], np.uint8)  # mobile, android, ios, desktop
    return np.where(u < 0.8, (1 << len(m.DEVICES)) - 1, kinds[(u_kind * 4).astype(np.int64)]).astype(np.uint8)


def _starts(spec: MarketSpec, u_before: Doubles, u: Doubles) -> Ints:
    before = -u * m.STARTED_BEFORE_DAYS * DAY_MS
    within = u * spec.days * DAY_MS
    offset = np.where(u_before < m.STARTED_BEFORE_SHARE, before, within)
    return spec.first_ms + np.floor(offset / HOUR_MS).astype(np.int64) * HOUR_MS


def _budgets(spec: MarketSpec, log_bid: Doubles, num_ads: Ints, noise: Floats) -> Ints:
    # In clicks a day, from the traffic a campaign of its size can expect: so that at every size of market
    # some campaigns run out and most do not.
    clicks_a_day = spec.num_impressions / spec.days * m.EXPECTED_CLICK_RATE * num_ads / spec.num_ads
    allowed = 2.0 + 3.0 * clicks_a_day * np.exp(m.BUDGET_SIGMA * noise.astype(np.float64))
    return np.ceil(np.exp(log_bid) * allowed / 10_000).astype(np.int64) * 10_000
