"""A version with rules of targeting: who is answered with what, beside the same said in plain Python."""

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
import pytest

from prerank.bundle.load import load
from prerank.bundle.registry import Registry
from prerank.errors import BundleError, DataError, RequestError, SchemaMismatch, StoreFailed
from prerank.serve.answer import Answer
from prerank.serve.funnel import Funnel
from prerank.serve.http import create_app
from prerank.stores.events import LiveEvent
from prerank.stores.live import LiveUsers
from prerank.stores.users import UserStore
from prerank.types import Given, Request
from tests.bundle.world import sign_again
from tests.serve import world
from tests.serve.client import Client
from tests.serve.conftest import publish_live
from tests.serve.world import T0, UNTIL

RULES = {
    "country": {"user": "country", "item": "countries"},
    "blocked": {"user": "groups", "item": "blocked_groups", "excludes": True},
    "placement": {"context": "placement", "item": "placements"},
    "hours": {"schedule": "Europe/Berlin", "item": "hours"},
}
LISTS: dict[str, list[list[object] | None]] = {
    "countries": [["de"], ["fr", "de"], [], None, ["it"], ["de"], None, ["fr"]],
    "blocked_groups": [None, None, ["minor"], ["staff", "minor"], None, [], None, ["staff"]],
    "placements": [[1], [1, 2], None, [2], [], [1, 2], [3], None],
    "hours": [None, list(range(168)), None, None, list(range(24)), None, [], list(range(24, 168))],
}
GROUPS: dict[int, list[str] | None] = {1: ["staff"], 2: ["minor", "staff"], 3: None}
GROUPED: Mapping[str, Given] = {"country": "de", "groups": ["staff"]}
"""User 1."""
HOUR = 3_600_000


def users() -> pa.Table:
    return world.users().append_column("groups", pa.array(list(GROUPS.values()), pa.list_(pa.string())))


def lists() -> pa.Table:
    return pa.table(LISTS)


@pytest.fixture(scope="module")
def targeted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = publish_live(tmp_path_factory.mktemp("targeted") / "tiny", world.config(targeting=RULES), lists())
    UserStore.write(store / "users.lmdb", users(), world.events(), labels=["is_click", "is_like"])
    return store


@pytest.fixture
def funnel(targeted: Path) -> Iterator[Funnel]:
    with Funnel.open(targeted) as funnel:
        yield funnel


@pytest.fixture
def store(targeted: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(targeted, tmp_path / "store"))


def ask(user_id: int, placement: Given, time_ms: int = T0) -> Request:
    return Request(user_id, 5, time_ms, {"hour": 1, "surface": "feed", "placement": placement})


def eligible(request: Request) -> set[int]:
    """item_ids, by the rules as one would say them."""
    country = {1: "de", 2: "fr", 3: "de"}.get(request.user_id)
    groups = {*(GROUPS.get(request.user_id) or [])}
    berlin = datetime.fromtimestamp(request.time_ms / 1000, ZoneInfo("Europe/Berlin"))
    hour = berlin.weekday() * 24 + berlin.hour
    return {
        100 + n
        for n in range(world.NUM_ITEMS)
        if (not LISTS["countries"][n] or country in LISTS["countries"][n])
        and not groups & {*(LISTS["blocked_groups"][n] or [])}
        and (not LISTS["placements"][n] or request.context["placement"] in LISTS["placements"][n])
        and (not LISTS["hours"][n] or hour in LISTS["hours"][n])
    }


def live(store: Path) -> Path:
    return Registry(store).path(str(Registry(store).live()))


def ids(answer: Answer) -> set[int]:
    return {winner.item_id for winner in answer.winners}


@pytest.mark.parametrize("placement", [1, 2, 3, 4, None])
@pytest.mark.parametrize("user_id", [1, 2, 3, 9])
def test_every_winner_is_eligible_and_whoever_is_may_win(funnel: Funnel, user_id: int, placement: Given) -> None:
    for time_ms in range(T0, T0 + 8 * 24 * HOUR, 7 * HOUR):
        request = ask(user_id, placement, time_ms)
        answer, wanted = funnel.recommend(request), eligible(request)
        assert ids(answer) <= wanted
        assert len(answer.winners) == min(5, len(wanted))
        assert [(s.num_in, s.num_out) for s in answer.stages if s.name == "retrieve"] == [
            (len(wanted), min(6, len(wanted)))
        ]
        assert ("no item is eligible for this request" in answer.notes) == (not wanted)


def test_those_left_out_take_no_place_of_a_candidate(targeted: Path, funnel: Funnel) -> None:
    bundle = load(live(targeted))
    request = replace(ask(1, 1), k=1)
    features = next(s for s in funnel._graph.order if s.name == "expand_user").run({"request": request})["features"]
    similarity = (bundle.towers.user_side(features) @ bundle.index.vectors.T)[0]  # type: ignore[attr-defined]
    stage, target = (next(s for s in funnel._graph.order if s.name == name) for name in ("retrieve", "target"))
    found_by = target.run({"request": request, "profile": GROUPED})
    for keep in range(1, world.NUM_ITEMS + 1):
        found = replace(stage, keep=keep).run({"features": features, **found_by})
        rows = sorted((item_id - 100 for item_id in eligible(request)), key=lambda row: (-float(similarity[row]), row))
        candidates = found["candidates"]
        assert candidates.rows[candidates.valid].tolist() == rows[:keep]


def test_where_nothing_is_eligible_the_answer_is_empty_and_says_so(tmp_path: Path) -> None:
    only = pa.table({"countries": [["it"]] * world.NUM_ITEMS})
    rules = {"country": RULES["country"]}
    with Funnel.open(publish_live(tmp_path / "tiny", world.config(targeting=rules), only)) as funnel:
        answer = funnel.recommend(Request(1, 5, T0, {"hour": 1, "surface": "feed"}))
    assert answer.winners == []
    assert answer.notes == ["no item is eligible for this request"]
    assert not answer.degraded
    through = {s.name: (s.num_in, s.num_out) for s in answer.stages}
    assert through["target"] == (world.NUM_ITEMS, 0)
    assert through["retrieve"] == through["rank"] == through["describe"] == (0, 0)


def test_a_field_that_targeting_alone_reads_is_the_requests_and_an_events_too(funnel: Funnel) -> None:
    assert funnel.example_context == {"placement": "1", "hour": 1, "surface": "text"}
    assert funnel.recommend(ask(1, 1)).notes == []
    with pytest.raises(RequestError, match=r"context\.placement: missing; expected text, a whole number"):
        funnel.recommend(Request(1, 5, T0, {"hour": 1, "surface": "feed"}))
    with pytest.raises(RequestError, match=r"context\.placement: expected text, .*, got 1\.5"):
        funnel.recommend(ask(1, 1.5))
    assert funnel.record([LiveEvent(5, 106, "impression", UNTIL + 1, context={"placement": 1})]).accepted == 1


def test_over_http_the_example_is_answered_and_a_list_is_any_of_its_values(funnel: Funnel) -> None:
    with Client(create_app(funnel)) as client:
        body = {"user_id": 3, "k": 5, "context": dict(funnel.example_context)}
        assert client.post("/v1/recommend", json=body).status_code == 200
        either = client.post("/v1/recommend", json={**body, "context": {**body["context"], "placement": [1, "3"]}})
        assert either.status_code == 200
        assert {winner["item_id"] for winner in either.json()["winners"]} == {100, 101, 102, 105, 106}


def test_a_user_store_without_a_column_that_targeting_reads_is_refused(store: Path) -> None:
    world.write_users(store / "users.lmdb")
    with pytest.raises(SchemaMismatch, match=r"no column 'groups' that targeting\.blocked\.user reads; it has"):
        Funnel.open(store)


def test_a_profile_of_another_type_is_the_stores_error(store: Path) -> None:
    wrong = world.users().append_column("groups", pa.array([1.5, 1.5, 1.5]))
    UserStore.write(store / "users.lmdb", wrong, world.events(), labels=["is_click", "is_like"])
    with Funnel.open(store) as funnel, pytest.raises(DataError, match=r"user store: groups: expected .* got 1\.5"):
        funnel.recommend(ask(1, 1))


def test_without_a_profile_nobody_is_shown_what_he_may_not_see(
    funnel: Funnel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that fails is an error where a rule reads the profile, and where none does a degraded answer."""

    def down(*_: object) -> None:
        raise StoreFailed("redis://10.0.0.7: the user cannot be read: timed out")

    alone = {name: RULES[name] for name in ("placement", "hours")}
    publish_live(tmp_path / "tiny", world.config(targeting=alone), lists())
    with Funnel.open(tmp_path / "tiny") as other:
        monkeypatch.setattr(LiveUsers, "get", down)
        monkeypatch.setattr(LiveUsers, "profile", down)
        with pytest.raises(StoreFailed):
            funnel.recommend(ask(1, 1))
        with Client(create_app(funnel)) as client:
            refused = client.post("/v1/recommend", json={"user_id": 1, "k": 1, "context": dict(ask(1, 1).context)})
        assert (refused.status_code, refused.json()["error"]["type"]) == (503, "StoreFailed")
        assert "10.0.0.7" not in refused.text
        assert other.recommend(ask(1, 1)).degraded


@pytest.mark.parametrize("table", [None, lists().slice(1)])
def test_rules_are_not_published_without_the_items_columns(tmp_path: Path, table: pa.Table | None) -> None:
    says = r"\[targeting\] reads the columns \['countries', .*'hours'\] of 8 items, got (none|7 rows)"
    with pytest.raises(DataError, match=says):
        publish_live(tmp_path / "tiny", world.config(targeting=RULES), table)
    assert not list((tmp_path / "tiny" / "versions").iterdir())


def test_a_version_is_refused_whose_values_are_not_those_of_its_rules_and_bitmaps(store: Path) -> None:
    path = live(store)
    told = path / "targeting.json"
    plain = json.loads(told.read_text())
    assert plain["country"] == ["de", "fr", "it"]
    for wrong, says in (
        ({**plain, "country": ["de", "fr"]}, r"expected bitmaps int64 \[\d+, 1\] of 8 items"),
        ({**plain, "country": ["fr", "de", "it"]}, r"targeting\.country: expected a list of texts, ascending"),
        ({"country": plain["country"]}, "expected the values of the rules"),
        ("[", "Expecting value"),
    ):
        told.write_text(wrong if isinstance(wrong, str) else json.dumps(wrong))
        path = sign_again(path)
        told = path / "targeting.json"
        with pytest.raises(BundleError, match=rf"targeting\.json: .*{says}"):
            load(path)


def test_a_version_is_refused_that_has_rules_without_bitmaps_or_bitmaps_without_rules(
    store: Path, published: Path, tmp_path: Path
) -> None:
    with_rules, without = live(store), live(Path(shutil.copytree(published, tmp_path / "without")))
    for into, origin, says in ((with_rules, without, "has 0 rules"), (without, with_rules, "has 4 rules")):
        copy = Path(shutil.copytree(into, tmp_path / f"mixed {into.name}" / into.name))
        shutil.copy(origin / "funnel.toml", copy / "funnel.toml")
        with pytest.raises(BundleError, match=rf"targeting\.json: funnel\.toml {says} of \[targeting\], and there is"):
            load(sign_again(copy))


def test_a_missing_file_of_values_is_named(store: Path) -> None:
    path = live(store)
    (path / "targeting.json").unlink()
    with pytest.raises(BundleError, match=r"targeting\.json: the manifest lists it, and there is no such file"):
        load(path)


def test_bitmaps_are_of_the_scorers_items() -> None:
    from prerank.bundle.item_table import ItemTable
    from prerank.bundle.scorer import Scorer
    from prerank.business.targeting import Targeting
    from prerank.business.utility import Utility

    items = ItemTable.build(np.arange(3), {"genre": np.arange(3)})
    config = world.config(targeting={"country": RULES["country"]})
    targeting = Targeting.fit(config.targeting, {"countries": pa.chunked_array([pa.nulls(2)])}, 2)
    utility = Utility(["click"], {"click": 1.0})
    with pytest.raises(SchemaMismatch, match="the targeting is of 2 items, and there are 3"):
        Scorer(items, None, utility, {}, targeting=targeting)  # type: ignore[arg-type]
