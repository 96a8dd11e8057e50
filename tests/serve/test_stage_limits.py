"""`[serve.stages]`: the names a funnel file may use are those of the graph, and what it says of a stage holds there."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import pyarrow as pa
import pytest

from prerank._funnel_checks import stage_names
from prerank.bundle.registry import Registry
from prerank.config import Config, StageLimit
from prerank.errors import ConfigError, DeadlineExceeded
from prerank.index.listed import Listed
from prerank.serve.funnel import Funnel
from prerank.serve.graph import Limit
from prerank.serve.http import create_app
from prerank.serve.stages import Rank, Retrieve
from prerank.serve.watch import VersionWatch
from prerank.stores.tail import LmdbTail
from prerank.types import Request
from tests.serve import world
from tests.serve.client import Client
from tests.serve.conftest import publish_live
from tests.serve.fake import error_of

pytestmark = pytest.mark.alone

ASKED = Request(user_id=1, k=5, time_ms=world.UNTIL + 1, context={"hour": 1, "surface": "feed"})
CHOSEN = {"chosen": {"kind": "list", "items": [100], "quota": 1}}
COUNTRIES = pa.table({"countries": [["de"]] * world.NUM_ITEMS})


def limited(stages: Mapping[str, object], **more: object) -> Config:
    return world.config(serve={"stages": stages}, **more)


def slow(of: type, monkeypatch: pytest.MonkeyPatch, seconds: float = 0.3, method: str = "run") -> None:
    as_usual = getattr(of, method)

    def later(*given: object) -> object:
        time.sleep(seconds)
        return as_usual(*given)

    monkeypatch.setattr(of, method, later)


@pytest.mark.parametrize("targeting", [{}, {"country": {"item": "countries", "user": "country"}}])
@pytest.mark.parametrize("generators", [{}, CHOSEN])
@pytest.mark.parametrize("resident", [None, 6])
def test_the_names_a_file_may_limit_are_the_stages_of_its_graph(
    tmp_path: Path, targeting: object, generators: object, resident: int | None
) -> None:
    inventory = {} if resident is None else {"resident": {"top": resident, "by": "bid_micros"}}
    plain = {"targeting": targeting, "generators": generators, "inventory": inventory}
    limits = {name: {"at_once": 3} for name in stage_names(world.config(**plain))}
    store = publish_live(tmp_path / "tiny", limited(limits, **plain), COUNTRIES if targeting else None)
    if resident is not None:
        LmdbTail.write(store / "tail.lmdb", world.items(), "item_id", ("genre", "bid_micros"))
    with Funnel.open(store) as funnel:
        assert {stage.name for stage in funnel._graph.order} == set(limits)
        assert funnel._graph.limits == dict.fromkeys(limits, Limit(at_once=3))
        assert {stage.name for stage in funnel.recommend(ASKED).stages} == set(limits)


def test_where_every_item_is_resident_for_once_the_limit_of_fetching_is_of_nothing(tmp_path: Path) -> None:
    inventory = {"resident": {"top": 1000, "by": "bid_micros"}}
    config = limited({"fetch_tail": {"deadline_ms": 5}}, inventory=inventory)
    with Funnel.open(publish_live(tmp_path / "tiny", config)) as funnel:
        assert not funnel._graph.limits
        assert funnel.recommend(ASKED).winners


def test_a_name_that_is_no_stage_of_this_funnel_is_refused_where_the_file_is_read() -> None:
    with pytest.raises(ConfigError, match=r'tiny: serve\.stages\.rnak: expected a stage .*; did you mean "rank"\?'):
        limited({"rnak": {"deadline_ms": 5}})
    with pytest.raises(ConfigError, match=r"serve\.stages\.generate_chosen: expected a stage"):
        limited({"generate_chosen": {"deadline_ms": 5}})
    limits = limited({"generate_chosen": {"deadline_ms": 5}}, generators=CHOSEN).serve.stages
    assert limits == {"generate_chosen": StageLimit(5.0)}


def test_a_ranker_that_is_not_done_in_its_time_leaves_retrievals_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = publish_live(tmp_path / "tiny", limited({"rank": {"deadline_ms": 30}}))
    slow(Rank, monkeypatch)
    with Funnel.open(store) as funnel:
        answer = funnel.recommend(ASKED)
    assert answer.notes[-1] == "rank: it was not done in its 30 ms; rank_by_similarity took its place"
    assert answer.degraded
    assert len(answer.winners) == 5


def test_a_required_stage_that_is_not_done_in_its_time_is_a_504_though_it_is_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = publish_live(tmp_path / "tiny", limited({"retrieve": {"deadline_ms": 30}}))
    slow(Retrieve, monkeypatch)
    with Funnel.open(store) as funnel:  # which asks once itself, and does not give up the version for it
        with pytest.raises(DeadlineExceeded, match="retrieve: it was not done in its 30 ms"):
            funnel.recommend(ASKED)
        with Client(create_app(funnel)) as client:
            body = {"user_id": 1, "k": 5, "context": dict(ASKED.context), "deadline_ms": 10_000}
            assert error_of(client.post("/v1/recommend", json=body))[:2] == (504, "DeadlineExceeded")


@pytest.mark.parametrize("fails", [False, True])
def test_a_generator_that_is_late_or_fails_costs_its_candidates_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    retrieval = {**world.config().to_dict()["retrieval"], "keep": 1}  # type: ignore[dict-item]
    generators = CHOSEN | {"dear": {"kind": "top", "by": "bid_micros", "quota": 2}}
    limit_ms = 60_000 if fails else 200
    config = limited({"generate_chosen": {"deadline_ms": limit_ms}}, generators=generators, retrieval=retrieval)
    store = publish_live(tmp_path / "tiny", config)
    with Funnel.open(store) as funnel:
        whole = funnel.recommend(ASKED)
        assert not whole.degraded
        assert "chosen" in {name for one in whole.winners for name in one.found_by}

        def broken(*_: object) -> None:
            raise ValueError("the list is gone")

        if fails:
            monkeypatch.setattr(Listed, "find", broken)
        else:
            slow(Listed, monkeypatch, 0.6, "find")
        answer = funnel.recommend(ASKED)
    reason = "it failed (ValueError)" if fails else "it was not done in its 200 ms"
    assert answer.notes == [f"generate_chosen: {reason}; nothing_of_chosen took its place"]
    assert answer.degraded
    found = {name for one in answer.winners for name in one.found_by}
    assert "dear" in found
    assert "chosen" not in found
    assert {one.name for one in answer.stages} >= {"nothing_of_chosen", "generate_dear"}


def test_a_version_is_warmed_though_its_stages_are_late_while_they_are_cold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = publish_live(tmp_path / "tiny", limited({"retrieve": {"deadline_ms": 30}}))
    with closing(VersionWatch.open(store, workers=0)) as watch:
        watch.live.recommend(ASKED)
        second = str(Registry(publish_live(store, limited({"retrieve": {"deadline_ms": 31}}))).live())
        slow(Retrieve, monkeypatch)
        assert watch.look()
        assert watch.live.version == second
