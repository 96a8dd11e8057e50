"""The laws of the simulated market, read from the tables it wrote as a user would read them."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from prerank.errors import DataError
from prerank.market import marginals as m
from prerank.market.auction import hourly_traffic
from prerank.market.generate import MarketTruth, best_rank_error, generate_market
from prerank.market.hash import normals, rows_of_ids, stream, world_ids
from prerank.market.spec import resolve_spec

DAY_MS = 86_400_000
FIRST_MS = 1_767_571_200_000  # 2026-01-05 00:00 UTC
TABLES = ("users.parquet", "items.parquet", "impressions.parquet", "truth.parquet")
SMALL = {"num_ads": 3_000, "num_users": 800, "num_impressions": 30_000, "days": 3}


class World:
    """A small market and its tables as plain Python columns."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.summary = generate_market(folder, **SMALL)
        self.users, self.items, self.log, self.truth = (pq.read_table(folder / name) for name in TABLES)
        self.user_at = {u: k for k, u in enumerate(self.users["user_id"].to_pylist())}
        self.item_at = {i: k for k, i in enumerate(self.items["item_id"].to_pylist())}
        self.row_item = np.array([self.item_at[i] for i in self.log["item_id"].to_pylist()])
        self.row_user = np.array([self.user_at[u] for u in self.log["user_id"].to_pylist()])

    def column(self, table: str, name: str) -> np.ndarray:
        return getattr(self, table)[name].to_numpy()

    def click_prob(self, truth: MarketTruth, keep: slice = slice(None)) -> np.ndarray:
        return truth.click_prob(
            self.column("log", "user_id")[keep],
            self.column("log", "item_id")[keep],
            self.log["surface"].to_numpy()[keep].astype(str),
            self.column("log", "hour")[keep],
            position=self.column("log", "position")[keep],
            advertiser_views=self.column("truth", "advertiser_views")[keep],
            advertiser_clicks=self.column("truth", "advertiser_clicks")[keep],
        )


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("market"))


@pytest.fixture(scope="module")
def truth(world) -> MarketTruth:
    return MarketTruth.load(world.folder)


def test_the_same_arguments_give_the_same_bytes(world, tmp_path):
    generate_market(tmp_path, **SMALL)
    for name in (*TABLES, "market.json"):
        assert (tmp_path / name).read_bytes() == (world.folder / name).read_bytes(), name


def test_another_seed_gives_another_market(world, tmp_path):
    generate_market(tmp_path, **SMALL, seed=8)
    for name in ("country", "segment"):
        assert pq.read_table(tmp_path / "users.parquet")[name] != world.users[name]
    assert pq.read_table(tmp_path / "items.parquet")["bid_micros"] != world.items["bid_micros"]
    assert pq.read_table(tmp_path / "impressions.parquet")["is_click"] != world.log["is_click"]


def test_sizes_are_those_asked_for_and_those_reported(world):
    s = world.summary
    assert (len(world.users), len(world.items), len(world.log)) == (800, 3_000, 30_000)
    assert (s.num_users, s.num_ads, s.num_impressions) == (800, 3_000, 30_000)
    assert s.num_clicks == world.column("log", "is_click").sum()
    assert s.num_conversions == world.column("log", "is_conversion").sum()
    assert s.num_requests == world.column("log", "request_id").max()
    assert s.num_campaigns == len(set(world.items["campaign_id"].to_pylist()))
    assert s.num_advertisers == len(set(world.items["advertiser_id"].to_pylist()))
    clicked = world.column("log", "is_click") == 1
    assert s.spend_micros == world.column("log", "bid_micros")[clicked].sum()


def test_no_row_group_is_larger_than_100k(tmp_path):
    generate_market(tmp_path, num_ads=100_500, num_impressions=120_000, num_users=2_000, days=2)
    for name, rows in (("items.parquet", 100_500), ("impressions.parquet", 120_000), ("truth.parquet", 120_000)):
        meta = pq.ParquetFile(tmp_path / name).metadata
        sizes = [meta.row_group(k).num_rows for k in range(meta.num_row_groups)]
        assert sizes == [100_000, rows - 100_000]


def test_defaults_grow_with_the_number_of_ads():
    at = {n: resolve_spec(n, 7, None, None, 10, "2026-01-05") for n in (1_000, 100_000, 1_000_000)}
    assert (at[100_000].num_impressions, at[100_000].num_users) == (600_000, 20_000)
    assert at[1_000_000].num_impressions == 1_067_000
    assert at[1_000].num_impressions < at[100_000].num_impressions < at[1_000_000].num_impressions


def test_ids_are_distinct_and_every_id_in_the_log_exists(world):
    for table, name in (("users", "user_id"), ("items", "item_id"), ("log", "impression_id")):
        ids = world.column(table, name)
        assert len(np.unique(ids)) == len(ids)
        assert ids.min() > 0
    # World() has already looked up every user and item of the log; the truth is aligned with it.
    assert world.truth["impression_id"] == world.log["impression_id"]
    users = world.column("users", "user_id")
    assert not np.array_equal(np.sort(users), np.arange(users.min(), users.min() + len(users)))


def test_an_id_is_decoded_to_its_row():
    rows = np.arange(100_000)
    for kind in ("user", "item", "campaign", "advertiser"):
        assert np.array_equal(rows_of_ids(kind, world_ids(kind, rows)), rows)
    assert rows_of_ids("user", np.array([-5, 1 << 50])).tolist() == [-1, -1]


def test_targeting_is_respected(world):
    for column, target in (("country", "countries"), ("age_band", "age_bands"), ("device", "devices")):
        value, allowed = world.users[column].to_pylist(), world.items[target].to_pylist()
        assert any(allowed)
        for user, item in zip(world.row_user, world.row_item, strict=True):
            assert not allowed[item] or value[user] in allowed[item]


def test_nothing_is_shown_before_its_campaign_starts(world):
    start = world.column("items", "start_ms")
    assert (start > FIRST_MS).any()
    assert (start[world.row_item] <= world.column("log", "time_ms")).all()


def test_a_campaign_spends_its_daily_budget_up_to_one_click_more(world):
    spent: dict[tuple[int, int], int] = {}
    campaign, budget = world.items["campaign_id"].to_pylist(), world.items["daily_budget_micros"].to_pylist()
    columns = [world.log[c].to_pylist() for c in ("time_ms", "bid_micros", "is_click")]
    for item, time_ms, bid, is_click in zip(world.row_item, *columns, strict=True):
        key = (campaign[item], time_ms // DAY_MS)
        assert spent.get(key, 0) < budget[item]
        spent[key] = spent.get(key, 0) + bid * is_click
    assert world.summary.active_campaign_days == sum(v > 0 for v in spent.values())
    assert 0 < world.summary.exhausted_campaign_days < world.summary.active_campaign_days / 2


def test_the_ads_of_a_campaign_share_advertiser_budget_and_targeting(world):
    seen: dict[int, tuple] = {}
    names = ("campaign_id", "advertiser_id", "daily_budget_micros", "start_ms", "countries", "age_bands", "devices")
    for campaign, *rest in zip(*(world.items[name].to_pylist() for name in names), strict=True):
        assert seen.setdefault(campaign, rest) == rest


def test_times_rise_and_lie_in_the_days_and_hours_are_local(world):
    time_ms = world.column("log", "time_ms")
    assert (np.diff(time_ms) >= 0).all()
    assert time_ms.min() >= FIRST_MS
    assert time_ms.max() < FIRST_MS + 3 * DAY_MS
    offset = dict(zip(m.COUNTRIES, m.UTC_OFFSET_HOURS, strict=True))
    shift = np.array([offset[c] for c in world.users["country"].to_pylist()])[world.row_user]
    assert np.array_equal(world.column("log", "hour"), (time_ms // 3_600_000 + shift) % 24)


def test_a_request_is_one_user_one_moment_distinct_ads_and_distinct_positions(world):
    request = world.column("log", "request_id")
    assert (np.diff(request) >= 0).all()
    first = np.r_[True, np.diff(request) > 0]
    start = np.flatnonzero(first)[np.cumsum(first) - 1]
    for name in ("user_id", "time_ms", "surface"):
        values = world.log[name].to_numpy()
        assert (values == values[start]).all()
    for name in ("item_id", "position"):
        assert len(set(zip(request, world.column("log", name), strict=True))) == len(request)
    slots = {law.name: law.slots for law in m.SURFACE_LAWS}
    assert (world.column("log", "position") < [slots[s] for s in world.log["surface"].to_pylist()]).all()


def test_traffic_has_the_shape_of_the_hour_and_of_the_day():
    spec = resolve_spec(1_000, 7, None, None, 7, "2026-01-05")
    traffic = hourly_traffic(spec)
    assert traffic.sum() == pytest.approx(1.0)
    britain = traffic[:, m.COUNTRIES.index("GB")].reshape(7, 24)  # its clock is UTC
    assert np.allclose(britain[0] / britain[0].mean(), m.HOUR_SHAPE_WEEKDAY, atol=1e-3)
    assert np.allclose(britain[6] / britain[6].mean(), m.HOUR_SHAPE_WEEKEND, atol=1e-3)
    days = britain.sum(axis=1)
    assert np.allclose(days / days.mean(), m.DAY_SHAPE, atol=5e-3)


def test_the_log_follows_the_traffic(world):
    hour = (world.column("log", "time_ms") - FIRST_MS) // 3_600_000
    spec = resolve_spec(3_000, 7, 800, 30_000, 3, "2026-01-05")
    expected = hourly_traffic(spec).sum(axis=1) * 30_000
    # A few rows an hour may be made up in the next when budgets leave a gap.
    assert np.abs(np.bincount(hour, minlength=72) - expected).max() < 20


def test_the_truth_function_gives_the_logged_probabilities(world, truth):
    assert np.allclose(world.click_prob(truth), world.column("truth", "click_prob"), rtol=1e-9)
    conversion = truth.conversion_prob(
        world.column("log", "user_id"), world.column("log", "item_id"), world.log["surface"]
    )
    assert np.allclose(conversion, world.column("truth", "conversion_prob"), rtol=1e-9)


def test_the_truth_of_one_pair_does_not_depend_on_its_neighbours(world, truth):
    every = world.click_prob(truth)
    assert np.allclose(world.click_prob(truth, slice(123, 124)), every[123:124], rtol=1e-9)


def test_recorded_meetings_are_the_rows_of_the_log_before_the_clock_hour(world):
    hour = world.column("log", "time_ms") // 3_600_000
    advertiser = world.items["advertiser_id"].to_numpy()[world.row_item]
    views, clicks = world.column("truth", "advertiser_views"), world.column("truth", "advertiser_clicks")
    is_click = world.column("log", "is_click")
    met: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for k in range(8_000):
        before = [c for h, c in met.setdefault((world.row_user[k], advertiser[k]), []) if h < hour[k]]
        assert (views[k], clicks[k]) == (len(before), sum(before))
        met[world.row_user[k], advertiser[k]].append((hour[k], is_click[k]))
    assert clicks.max() > 0


def test_clicks_and_conversions_come_out_as_the_truth_says(world):
    for label, prob in (("is_click", "click_prob"), ("is_conversion", "conversion_prob")):
        p = world.column("truth", prob)
        if label == "is_conversion":
            p = p * world.column("truth", "click_prob")
        error = world.column("log", label).sum() - p.sum()
        assert abs(error) < 4.5 * np.sqrt((p * (1 - p)).sum())
    deciles = np.array_split(np.argsort(world.column("truth", "click_prob")), 10)
    p, y = world.column("truth", "click_prob"), world.column("log", "is_click")
    for rows in deciles:
        assert abs(y[rows].sum() - p[rows].sum()) < 4.5 * np.sqrt((p[rows] * (1 - p[rows])).sum()) + 1
    assert not (world.column("log", "is_conversion") > y).any()


def test_click_rates_are_of_the_order_of_one_to_ten_percent(world):
    for surface, rate in world.summary.click_rate.items():
        assert 0.004 < rate < 0.12, surface
    assert world.summary.click_rate["search"] > world.summary.click_rate["partner"]


def test_fatigue_lowers_and_earlier_clicks_and_visits_raise_the_probability(world, truth):
    user, item = world.column("log", "user_id")[:500], world.column("log", "item_id")[:500]
    new = truth.click_prob(user, item, "feed", np.array([12]))
    assert (truth.click_prob(user, item, "feed", np.array([12]), advertiser_views=5) < new).all()
    assert (truth.click_prob(user, item, "feed", np.array([12]), advertiser_views=5, advertiser_clicks=5) > new).all()
    assert (truth.click_prob(user, item, "feed", np.array([12]), position=3) < new).all()


def test_surfaces_differ_in_what_drives_a_click(world, truth):
    user, item = world.column("log", "user_id")[:5_000], world.column("log", "item_id")[:5_000]
    prob = {s: truth.click_prob(user, item, s, np.array([12])) for s in m.SURFACES}
    logit = np.array([np.log(p / (1 - p)) for p in prob.values()])
    off_diagonal = np.corrcoef(logit)[np.triu_indices(4, 1)]
    assert off_diagonal.max() < 0.97
    assert off_diagonal.min() > 0.1  # but they are the same users and ads


def test_known_visits_raise_the_true_probability_beyond_chance(world):
    visited = world.users["visited_advertisers"].to_pylist()
    assert {len(v) for v in visited} <= set(range(m.MAX_VISITED + 1))
    advertiser = world.items["advertiser_id"].to_numpy()[world.row_item]
    has = np.array([a in visited[u] for u, a in zip(world.row_user, advertiser, strict=True)])
    p = world.column("truth", "click_prob")
    assert 0.03 < has.mean() < 0.5
    assert p[has].mean() > 1.5 * p[~has].mean()


def test_no_product_of_low_rank_holds_the_segment_by_advertiser_affinity(truth):
    affinity = truth.affinity_logits("feed")
    assert affinity.shape == (m.NUM_SEGMENTS, 3_000 // m.ADS_PER_ADVERTISER)
    assert np.linalg.matrix_rank(affinity) == min(affinity.shape)
    assert affinity.std() == pytest.approx(m.SURFACE_LAWS[0].affinity, rel=0.02)
    for rank, left in ((16, 0.7), (32, 0.55), (64, 0.3)):
        assert best_rank_error(affinity, rank) > left


def test_no_product_of_low_rank_holds_the_whole_logit(truth):
    ads = truth.ads.first_ad[:-1]  # one ad an advertiser
    users, n = np.arange(400), len(truth.ads.first_ad) - 1
    zero = np.zeros(400 * n, np.int64)
    logit = truth.click_logit(np.repeat(users, n), np.tile(ads, 400), zero, zero, zero, zero, zero).reshape(400, n)
    assert best_rank_error(logit, m.LATENT_DIM) > 0.2
    assert best_rank_error(logit, 64) > 0.05


def test_best_rank_error_is_zero_for_a_matrix_of_that_rank_and_biases():
    rng = np.random.default_rng(3)
    low = rng.normal(size=(50, 4)) @ rng.normal(size=(4, 60)) + rng.normal(size=(50, 1)) + rng.normal(size=60)
    assert best_rank_error(low, 4) == pytest.approx(0.0, abs=1e-12)
    assert best_rank_error(low, 3) > 0.01
    assert best_rank_error(low, 0) == pytest.approx(1.0)
    assert best_rank_error(np.zeros((3, 3)), 1) == 0.0


def test_observed_columns_show_the_latents_with_noise(world, truth):
    quality = world.items["quality"].to_numpy(zero_copy_only=False)
    seen = ~np.isnan(quality)
    assert 0.6 < np.corrcoef(quality[seen], truth.ads.quality[seen])[0, 1] < 0.97
    embedding = np.stack(world.items["embedding"].to_numpy())
    assert embedding.shape == (3_000, m.LATENT_DIM)
    assert embedding.dtype == np.float32
    fitted = embedding @ np.linalg.lstsq(embedding, truth.ads.content, rcond=None)[0]
    explained = 1 - ((truth.ads.content - fitted) ** 2).sum() / (truth.ads.content**2).sum()
    assert 0.6 < explained < 0.97


def test_marginals_are_those_documented(world):
    ads = np.sort(np.unique(world.items["advertiser_id"].to_numpy(), return_counts=True)[1])[::-1]
    assert ads.mean() == pytest.approx(m.ADS_PER_ADVERTISER, rel=0.01)
    assert np.median(ads) < 0.6 * ads.mean()
    assert ads[: len(ads) // 10].sum() > 0.4 * ads.sum()
    log_bid = np.log(world.items["bid_micros"].to_numpy())
    assert log_bid.mean() == pytest.approx(np.log(m.BID_MEDIAN_MICROS), abs=0.5)
    nulls = {name: world.users[name].null_count / 800 for name in ("age_band", "gender", "language")}
    for name, share in nulls.items():
        assert share == pytest.approx(m.NULL_SHARE[name], abs=0.03)
    assert world.users["country"].null_count == world.users["device"].null_count == 0
    assert all(
        url.startswith("https://shop") and ".example.com/" in url for url in world.items["landing_url"].to_pylist()
    )


def test_hashed_normals_have_mean_zero_and_deviation_one_and_independent_streams():
    index = np.arange(200_000)
    a, b = normals(stream(1, "a"), index), normals(stream(1, "b"), index)
    assert abs(a.mean()) < 0.01
    assert abs(a.std() - 1) < 0.01
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.01
    assert abs(np.corrcoef(a[1:], a[:-1])[0, 1]) < 0.01
    assert np.array_equal(normals(stream(1, "a"), index[5:9]), a[5:9])


def test_progress_is_told_and_ends_at_one(tmp_path):
    told: list[tuple[str, float]] = []
    generate_market(tmp_path, num_ads=500, num_impressions=2_000, days=1, progress=lambda *call: told.append(call))
    assert dict(told) == {"users": 1.0, "items": 1.0, "impressions": 1.0}


def test_a_failure_leaves_no_new_file_and_the_old_market_whole(world, tmp_path):
    generate_market(tmp_path, num_ads=500, num_impressions=2_000, days=1)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}

    def stop(table: str, fraction: float) -> None:
        if table == "impressions":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate_market(tmp_path, num_ads=600, num_impressions=2_000, days=1, progress=stop)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before
    assert set(before) == {*TABLES, "market.json"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_ads": 99}, "num_ads must be an integer from 100 to 20000000, got 99"),
        ({"num_ads": True}, "num_ads must be an integer"),
        ({"num_ads": 1_000, "seed": -1}, "seed must be an integer from 0"),
        ({"num_ads": 1_000, "days": 0}, "days must be an integer from 1 to 366, got 0"),
        ({"num_ads": 1_000, "num_users": 1}, "num_users must be an integer from 10"),
        ({"num_ads": 1_000, "num_impressions": 0}, "num_impressions must be an integer from 1"),
        ({"num_ads": 1_000, "first_day": "05.01.2026"}, "first_day must be a day such as 2026-01-05, got '05.01.2026'"),
    ],
)
def test_a_bad_argument_is_refused_by_name(tmp_path, arguments, message):
    with pytest.raises(DataError, match=message):
        generate_market(tmp_path / "new", **arguments)
    assert not (tmp_path / "new").exists()


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(DataError, match="must be a folder to write a market into"):
        generate_market(tmp_path / "taken", num_ads=1_000)


def test_bad_questions_to_the_truth_are_refused_by_name(world, truth):
    user, item, noon = world.column("log", "user_id")[:2], world.column("log", "item_id")[:2], np.array([12])
    with pytest.raises(DataError, match=r"user_id 17 is not one of this market's 800 users; 1 of 2 are unknown"):
        truth.click_prob(np.array([17, user[0]]), item, "feed", noon)
    with pytest.raises(DataError, match=r"item_id -1 is not one of this market's 3000 items"):
        truth.click_prob(user, np.array([-1, item[0]]), "feed", noon)
    with pytest.raises(DataError, match="item_id must be a one-dimensional array of integers, got float64"):
        truth.click_prob(user, item.astype(float), "feed", noon)
    with pytest.raises(DataError, match="unknown surface 'radio': expected one of feed, search, story, partner"):
        truth.click_prob(user, item, ["feed", "radio"], noon)
    with pytest.raises(DataError, match=r"hour must lie in 0..23, got values from 24 to 24"):
        truth.click_prob(user, item, "feed", np.array([24]))
    with pytest.raises(DataError, match="hour must be 2 integers or one"):
        truth.click_prob(user, item, "feed", np.array([1, 2, 3]))
    with pytest.raises(DataError, match=r"advertiser_views must lie in 0.., got values from -1"):
        truth.click_prob(user, item, "feed", noon, advertiser_views=-1)
    with pytest.raises(DataError, match="best_rank_error needs a matrix and a rank of at least 0"):
        best_rank_error(np.zeros(3), 1)


def test_a_folder_without_a_whole_market_is_refused(world, tmp_path):
    with pytest.raises(DataError, match="is not a complete simulated market"):
        MarketTruth.load(tmp_path)
    (tmp_path / "market.json").write_text("{}")
    with pytest.raises(DataError, match="is not the record of a market"):
        MarketTruth.load(tmp_path)
    record = json.loads((world.folder / "market.json").read_text())
    (tmp_path / "market.json").write_text(json.dumps({**record, "generator_version": 0}))
    with pytest.raises(DataError, match="was written by market generator 0"):
        MarketTruth.load(tmp_path)
    changed = [p * 1.01 for p in record["probes"]]
    (tmp_path / "market.json").write_text(json.dumps({**record, "probes": changed}))
    with pytest.raises(DataError, match="was written by other code"):
        MarketTruth.load(tmp_path)
