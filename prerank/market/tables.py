"""The columns of the simulated market as Arrow batches, the way a user's own tables look.

It does not know the true probabilities: it copies what the log says, and shows of the hidden latents only a noisy,
turned view.
"""

from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from prerank.market import marginals as m
from prerank.market.hash import Floats, Ints, hashes, normal_rows, normals, stream, uniforms, world_ids
from prerank.market.log import LoggedRows
from prerank.market.population import NO_CODE, bids_on_day
from prerank.market.truth import MarketTruth

ROW_GROUP: Final = 100_000

USERS_SCHEMA: Final = pa.schema([
    ("user_id", pa.int64()),
    ("country", pa.string()),
    ("age_band", pa.string()),
    ("gender", pa.string()),
    ("device", pa.string()),
    ("language", pa.string()),
    ("segment", pa.int32()),
    ("interests", pa.list_(pa.int32())),
    ("visited_advertisers", pa.list_(pa.int64())),
    ("activity", pa.float32()),
    ("account_age_days", pa.int32()),
])  # fmt: skip
ITEMS_SCHEMA: Final = pa.schema([
    ("item_id", pa.int64()),
    ("campaign_id", pa.int64()),
    ("advertiser_id", pa.int64()),
    ("category", pa.int32()),
    ("format", pa.string()),
    ("product_price_micros", pa.int64()),
    ("bid_micros", pa.int64()),
    ("daily_budget_micros", pa.int64()),
    ("start_ms", pa.int64()),
    ("countries", pa.list_(pa.string())),
    ("age_bands", pa.list_(pa.string())),
    ("devices", pa.list_(pa.string())),
    ("quality", pa.float32()),
    ("embedding", pa.list_(pa.float32(), m.LATENT_DIM)),
    ("title", pa.string()),
    ("landing_url", pa.string()),
])  # fmt: skip
IMPRESSIONS_SCHEMA: Final = pa.schema([
    ("impression_id", pa.int64()),
    ("request_id", pa.int64()),
    ("user_id", pa.int64()),
    ("item_id", pa.int64()),
    ("time_ms", pa.int64()),
    ("surface", pa.string()),
    ("hour", pa.int8()),
    ("position", pa.int8()),
    ("bid_micros", pa.int64()),
    ("is_click", pa.int8()),
    ("is_conversion", pa.int8()),
])  # fmt: skip
TRUTH_SCHEMA: Final = pa.schema([
    ("impression_id", pa.int64()),
    ("click_prob", pa.float64()),
    ("conversion_prob", pa.float64()),
    ("advertiser_views", pa.int32()),
    ("advertiser_clicks", pa.int32()),
])  # fmt: skip

_ADJECTIVES: Final = (
    "Everyday", "Fresh", "Classic", "Smart", "Light", "Premium", "Compact", "Handmade", "New", "Quiet", "Bright",
    "Travel", "Family", "Original", "Winter", "Simple",
)  # fmt: skip
_NOUNS: Final = (
    "coffee", "shoes", "phone", "sofa", "lamp", "bicycle", "backpack", "insurance", "headphones", "jacket", "course",
    "game", "watch", "garden set", "skin care", "meal kit", "holiday", "toy", "camera", "kettle", "notebook", "desk",
    "credit card", "ticket", "perfume", "dress", "drill", "puzzle", "snack box", "mattress", "tyre", "streaming plan",
)  # fmt: skip


def user_batch(truth: MarketTruth, rows: Ints) -> pa.RecordBatch:
    """The rows of `users.parquet` for these users."""
    users, seed = truth.users, truth.spec.seed
    country = users.country[rows]
    # A visit count over some past month: what a user's own table would know of how active they are.
    visits = users.activity[rows] * np.exp(0.3 * normals(stream(seed, "user.activity_seen"), rows))
    age = np.floor(2000 * uniforms(stream(seed, "user.account_age"), rows) ** 2).astype(np.int32)
    language = np.where(users.language_known[rows], country, NO_CODE).astype(np.uint8)
    columns = [
        pa.array(world_ids("user", rows)),
        _words(m.COUNTRIES, country),
        _words(m.AGE_BANDS, users.age_band[rows]),
        _words(m.GENDERS, users.gender[rows]),
        _words(m.DEVICES, users.device[rows]),
        _words(m.LANGUAGES, language),
        pa.array(users.segment[rows]),
        _lists(pa.array(users.interests[rows].reshape(-1)), _leading(users.num_interests[rows])),
        _known_visits(truth, rows),
        pa.array(visits.astype(np.float32)),
        pa.array(age),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=USERS_SCHEMA)


def item_batch(truth: MarketTruth, rows: Ints) -> pa.RecordBatch:
    """The rows of `items.parquet` for these ads, with their bids as of the last day."""
    ads, spec = truth.ads, truth.spec
    campaign = ads.campaign[rows].astype(np.int64)
    campaigns = ads.campaigns
    columns = [
        pa.array(world_ids("item", rows)),
        pa.array(world_ids("campaign", campaign)),
        pa.array(world_ids("advertiser", ads.advertiser[rows].astype(np.int64))),
        pa.array(campaigns.category[campaign]),
        _words(m.FORMATS, ads.format[rows]),
        pa.array(_prices(truth, rows, campaigns.category[campaign])),
        pa.array(bids_on_day(spec, campaigns, spec.days - 1, campaign)),
        pa.array(campaigns.daily_budget_micros[campaign]),
        pa.array(campaigns.start_ms[campaign]),
        _allowed(m.COUNTRIES, campaigns.countries[campaign]),
        _allowed(m.AGE_BANDS, campaigns.age_bands[campaign]),
        _allowed(m.DEVICES, campaigns.devices[campaign]),
        _noisy_quality(truth, rows),
        pa.FixedSizeListArray.from_arrays(pa.array(embeddings(truth, rows).reshape(-1)), m.LATENT_DIM),
        *_texts(truth, rows, campaign),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=ITEMS_SCHEMA)


def impression_batch(rows: LoggedRows, first_id: int) -> pa.RecordBatch:
    """The rows of `impressions.parquet`; ids go on from `first_id`."""
    columns = [
        pa.array(first_id + 1 + np.arange(len(rows), dtype=np.int64)),
        pa.array(rows.request + 1),
        pa.array(world_ids("user", rows.user)),
        pa.array(world_ids("item", rows.ad)),
        pa.array(rows.time_ms),
        _words(m.SURFACES, rows.surface.astype(np.uint8)),
        pa.array(rows.hour.astype(np.int8)),
        pa.array(rows.position.astype(np.int8)),
        pa.array(rows.bid_micros),
        pa.array(rows.is_click.astype(np.int8)),
        pa.array(rows.is_conversion.astype(np.int8)),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=IMPRESSIONS_SCHEMA)


def truth_batch(rows: LoggedRows, first_id: int) -> pa.RecordBatch:
    """The rows of `truth.parquet`, one an impression and in the same order."""
    columns = [
        pa.array(first_id + 1 + np.arange(len(rows), dtype=np.int64)),
        pa.array(rows.click_prob),
        pa.array(rows.conversion_prob),
        pa.array(rows.views.astype(np.int32)),
        pa.array(rows.clicks.astype(np.int32)),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=TRUTH_SCHEMA)


def embeddings(truth: MarketTruth, rows: Ints) -> Floats:
    """float32 [n, LATENT_DIM]: what a vision or text model would say of a creative: its content turned, plus noise."""
    content = truth.ads.content[rows] * np.float32(5)
    axis = normals(stream(truth.spec.seed, "embedding.axis"), np.arange(m.LATENT_DIM, dtype=np.int64))
    axis /= np.sqrt((axis**2).sum())
    content -= 2 * (content * axis).sum(axis=1, keepdims=True) * axis  # a Householder reflection
    content += np.float32(0.5) * normal_rows(stream(truth.spec.seed, "embedding.noise"), rows, m.LATENT_DIM)
    return content


def _known_visits(truth: MarketTruth, rows: Ints) -> pa.Array:
    visited = truth.users.visited[rows]
    place = rows[:, None] * m.MAX_VISITED + np.arange(m.MAX_VISITED)
    known = uniforms(stream(truth.spec.seed, "user.visit_known"), place) < m.VISIT_KNOWN_SHARE
    return _lists(pa.array(world_ids("advertiser", visited.reshape(-1))), known & (visited >= 0))


def _prices(truth: MarketTruth, rows: Ints, category: NDArray[np.int32]) -> Ints:
    low, high = np.log(m.PRICE_MEDIAN_RANGE_USD)
    median = low + (high - low) * uniforms(stream(truth.spec.seed, "category.price"), category.astype(np.int64))
    usd = np.exp(median + m.PRICE_SIGMA * truth.ads.price_z[rows])
    return np.asarray(np.maximum(np.rint(usd * 100), 1) * 10_000, np.int64)  # whole cents


def _noisy_quality(truth: MarketTruth, rows: Ints) -> pa.Array:
    seen = truth.ads.quality[rows] + 0.6 * normals(stream(truth.spec.seed, "ad.quality_seen"), rows)
    missing = uniforms(stream(truth.spec.seed, "ad.quality_null"), rows) < m.NULL_SHARE["quality"]
    return pa.array(seen.astype(np.float32), mask=missing)


def _texts(truth: MarketTruth, rows: Ints, campaign: Ints) -> tuple[pa.Array, pa.Array]:
    h = hashes(stream(truth.spec.seed, "ad.title"), rows)
    category = truth.ads.campaigns.category[campaign]
    adjective = _words(_ADJECTIVES, (h % np.uint64(len(_ADJECTIVES))).astype(np.uint8))
    noun = _words(_NOUNS, (category % len(_NOUNS)).astype(np.uint8))
    number = pa.array((h >> np.uint64(32)).astype(np.int64) % 1000).cast(pa.string())
    title = pc.binary_join_element_wise(adjective, noun, number, " ")
    advertiser = pa.array(truth.ads.advertiser[rows]).cast(pa.string())
    item = pa.array(world_ids("item", rows)).cast(pa.string())
    shop = pc.binary_join_element_wise("https://shop", advertiser, ".example.com/ad/", item, "")
    return title, shop


def _words(names: tuple[str, ...], codes: NDArray[np.uint8]) -> pa.Array:
    known = pa.array(codes, mask=codes == NO_CODE)
    return pc.take(pa.array(names, pa.string()), known)


def _allowed(names: tuple[str, ...], masks: NDArray[np.integer]) -> pa.Array:
    """list<string> of the names whose bit is set; empty where all are."""
    codes = np.arange(len(names))
    has = (masks[:, None].astype(np.int64) >> codes & 1).astype(np.bool_)
    has &= ~has.all(axis=1, keepdims=True)
    flat = np.broadcast_to(codes.astype(np.uint8), has.shape).reshape(-1)
    return _lists(_words(names, flat), has)


def _leading(counts: NDArray[np.int32]) -> NDArray[np.bool_]:
    return np.arange(m.MAX_INTERESTS) < counts[:, None]


def _lists(flat: pa.Array, has: NDArray[np.bool_]) -> pa.Array:
    """One list a row of `has` [n, width], holding the elements of `flat` [n * width] that are marked."""
    offsets = np.concatenate([[0], np.cumsum(has.sum(axis=1))]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), flat.filter(pa.array(has.reshape(-1))))
