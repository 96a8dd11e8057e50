import json
import math
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import lmdb
import numpy as np
import pytest
import structlog
import torch

from prerank.bundle.load import Bundle, load
from prerank.bundle.registry import Registry
from prerank.bundle.scorer import Scorer
from prerank.errors import (
    BundleError,
    DataError,
    DeadlineExceeded,
    PrerankError,
    RegistryError,
    RequestError,
    StoreFailed,
)
from prerank.index.exact import ExactIndex
from prerank.serve.answer import Answer
from prerank.serve.expand import ExpandUser
from prerank.serve.funnel import Funnel
from prerank.serve.wire import encode_answer
from prerank.stores.live import LiveUsers
from prerank.stores.metadata import MetadataTable
from prerank.stores.user_file import key_of
from prerank.stores.users import UserStore
from prerank.types import CandidateSet, Request, Scalar
from tests.serve import world
from tests.serve.world import T0

CONTEXT: Mapping[str, Scalar] = {"hour": 1, "surface": "feed"}
ALL = 5
NOW = T0 + 10_000


def ask(user_id: int = 1, k: int = ALL, **changes: object) -> Request:
    return replace(Request(user_id, k, NOW, CONTEXT, None, "r"), **changes)  # type: ignore[arg-type]


def ids(answer: Answer) -> list[int]:
    return [winner.item_id for winner in answer.winners]


def by_hand(store: Path, request: Request) -> list[tuple[int, float, list[float]]]:
    """The winners from the version's own parts and three lines of arithmetic over every item."""
    bundle = load(Registry(store).path(str(Registry(store).live())))
    items = bundle.scorer.items
    with UserStore.open(store / "users.lmdb") as users, torch.inference_mode():
        expand = ExpandUser(users, bundle.transforms, items)
        features, _ = expand.expand(users.get(request.user_id), request)
        similarity = (bundle.towers.user_side(features) @ bundle.index.vectors.T)[0]  # type: ignore[attr-defined]
        ranker = bundle.scorer.ranker
        item_side = ranker.item_side({n: c.long() for n, c in items.features().items()})
        of_one = {name: column[None] for name, column in item_side.items()}
        probs = torch.sigmoid(ranker(ranker.user_side(features), of_one))[0].numpy()
    kept = np.argsort(-similarity.numpy(), kind="stable")[: bundle.config.retrieval.keep]
    utility = probs[:, 0] * world.items()["bid_micros"].to_numpy() + probs[:, 1] * 10.0
    best = sorted(kept, key=lambda row: (-utility[row], row))[: request.k]
    return [(100 + int(row), float(utility[row]), probs[row].tolist()) for row in best]


@pytest.mark.parametrize("user_id", [1, 2, 3, 9])
@pytest.mark.parametrize("k", [1, ALL])
def test_winners_are_the_best_of_the_most_similar(published: Path, funnel: Funnel, user_id: int, k: int) -> None:
    request = ask(user_id, k)
    answer = funnel.recommend(request)
    expected = by_hand(published, request)
    assert ids(answer) == [item_id for item_id, _, _ in expected]
    for winner, (_, utility, probs) in zip(answer.winners, expected, strict=True):
        assert winner.utility_micros == pytest.approx(utility, rel=1e-5)
        assert list(winner.prob) == ["click", "like"]
        assert list(winner.prob.values()) == pytest.approx(probs, rel=1e-5)


def test_an_answer_says_its_version_its_stages_and_what_came_through_each(published: Path, funnel: Funnel) -> None:
    answer = funnel.recommend(ask(k=3))
    assert answer.version == funnel.version == Registry(published).live()
    assert answer.request_id == "r"
    assert sorted((s.name, s.num_in, s.num_out) for s in answer.stages) == [
        ("describe", 3, 3),
        ("expand_user", 1, 5),
        ("prepare_user", 5, 1),
        ("rank", 6, 3),
        ("retrieve", world.NUM_ITEMS, 6),
        ("target", world.NUM_ITEMS, world.NUM_ITEMS),
    ]
    starts = {s.name: s.start_ms for s in answer.stages}
    assert list(starts.values()) == sorted(starts.values())
    assert max(starts["expand_user"], starts["target"]) < starts["retrieve"] < starts["rank"] < starts["describe"]
    assert all(s.ms > 0 for s in answer.stages)
    assert not answer.degraded
    assert answer.notes == []


def test_each_winner_is_described_by_its_own_row(funnel: Funnel) -> None:
    for winner in funnel.recommend(ask()).winners:
        n = winner.item_id - 100
        assert winner.metadata == {"title": f"title {n}", "genre": f"genre {n % 3}"}


def test_an_answer_is_plain_json(funnel: Funnel) -> None:
    plain = json.loads(encode_answer(funnel.recommend(ask(k=2))))
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert set(plain) == {"request_id", "version", "winners", "stages", "degraded", "notes"}


def test_a_stranger_is_served_as_a_new_user_and_the_answer_says_so(funnel: Funnel) -> None:
    answer = funnel.recommend(ask(9))
    assert len(answer.winners) == ALL
    assert answer.notes == ["unknown user 9: served as a new user"]
    assert not answer.degraded


def test_an_item_of_the_history_that_is_no_longer_there_is_said(funnel: Funnel) -> None:
    assert funnel.recommend(ask(2)).notes == ["1 unknown items in history: each counts as the unknown item"]


def test_the_same_request_has_the_same_winners_from_every_thread(funnel: Funnel) -> None:
    requests = [ask(user_id) for user_id in (1, 2, 3, 9)] * 8
    alone = [funnel.recommend(request).winners for request in requests]
    with ThreadPoolExecutor(4) as threads:
        together = [answer.winners for answer in threads.map(funnel.recommend, requests)]
    assert alone == together


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"k": 0}, "k: expected 1 to 5, got 0"),
        ({"k": 1_000_000}, "k: expected 1 to 5, got 1000000"),
        ({"user_id": 2**63}, "user_id: expected an int64, got 9223372036854775808"),
        ({"time_ms": -1}, "time_ms: expected UTC milliseconds"),
        ({"deadline_ms": math.nan}, "deadline_ms: expected a finite number above 0, got nan"),
        ({"deadline_ms": math.inf}, "deadline_ms: expected a finite number above 0, got inf"),
        ({"context": {"hour": math.nan, "surface": "feed"}}, "context.hour: expected a finite number, got nan"),
        ({"context": {"hour": 1}}, "context.surface: missing"),
        ({"context": {"hour": "1", "surface": "feed"}}, "context.hour: expected an integer"),
        ({"context": {"hour": 2**64, "surface": "feed"}}, "context.hour: expected an integer of 64 bits"),
    ],
)
def test_a_request_that_is_wrong_is_refused_by_field(funnel: Funnel, changes: Mapping[str, object], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        funnel.recommend(ask(**changes))  # type: ignore[arg-type]


def test_the_example_context_works(funnel: Funnel) -> None:
    assert funnel.example_context == {"hour": 1, "surface": "text"}
    assert funnel.recommend(ask(context=funnel.example_context)).winners


def live_users(store: Path) -> LiveUsers:
    return LiveUsers.open(store / "users.lmdb", store / "events.lmdb")


def with_index(published: Path, index: ExactIndex) -> Funnel:
    path = Registry(published).path(str(Registry(published).live()))
    bundle: Bundle = replace(load(path), index=index)
    return Funnel(bundle, live_users(published), MetadataTable.open(path / "metadata.arrow"))


class SlowIndex(ExactIndex):
    """Takes 50 ms more than it needs."""

    def search(self, query: torch.Tensor, k: int, eligible: torch.Tensor | None) -> CandidateSet:
        time.sleep(0.05)
        return super().search(query, k, eligible)


def test_a_ranker_that_cannot_start_in_time_leaves_retrievals_order_described(published: Path) -> None:
    index = load(Registry(published).path(str(Registry(published).live()))).index
    with with_index(published, SlowIndex(index.vectors)) as slow:  # type: ignore[attr-defined]
        whole = slow.recommend(ask())
        late = slow.recommend(ask(deadline_ms=40.0))
    assert not whole.degraded
    assert late.degraded
    assert late.notes == ["rank: the deadline of 40 ms passed before it could start; rank_by_similarity took its place"]
    assert [s.name for s in late.stages][-2:] == ["rank_by_similarity", "describe"]
    assert set(ids(whole)) <= set(range(100, 108))
    assert all(w.utility_micros is None and w.prob == {"click": None, "like": None} for w in late.winners)
    assert all(w.metadata["title"] == f"title {w.item_id - 100}" for w in late.winners)


def test_a_ranker_that_breaks_leaves_retrievals_order(funnel: Funnel, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(Scorer, "rank", broken)
    with structlog.testing.capture_logs() as logs:
        answer = funnel.recommend(ask())
    assert answer.degraded
    assert answer.notes == ["rank: it failed (RuntimeError); rank_by_similarity took its place"]
    assert len(answer.winners) == ALL
    assert logs[0]["stage"] == "rank"


def test_a_user_store_that_fails_leaves_a_new_users_answer_and_says_so(
    funnel: Funnel, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_new = funnel.recommend(ask(9)).winners

    def down(*_: object) -> None:
        raise StoreFailed("redis://10.0.0.7: the user cannot be read: timed out")

    monkeypatch.setattr(LiveUsers, "get", down)
    answer = funnel.recommend(ask(1))
    assert answer.winners == as_new
    assert answer.degraded
    assert answer.notes == ["expand_user: it failed (StoreFailed); serve_as_new_user took its place"]
    assert "serve_as_new_user" in [stage.name for stage in answer.stages]
    with pytest.raises(RequestError, match=r"context\.surface: missing"):
        funnel.recommend(ask(1, context={"hour": 1}))


def test_a_damaged_record_is_one_users_and_degrades_his_answers_alone(store: Path) -> None:
    with lmdb.open(str(store / "users.lmdb"), subdir=False, lock=False) as env, env.begin(write=True) as turn:
        turn.put(key_of(1), b"abc")
    with Funnel.open(store) as funnel:
        assert funnel.recommend(ask(1)).notes == [
            "expand_user: it failed (DataError); serve_as_new_user took its place"
        ]
        assert not funnel.recommend(ask(2)).degraded


def test_time_spent_before_the_funnel_counts(funnel: Funnel) -> None:
    with pytest.raises(
        DeadlineExceeded, match=r"(expand_user|target): the deadline of 20 ms passed before it could start"
    ):
        funnel.recommend(ask(deadline_ms=20.0), arrived=time.perf_counter() - 1.0)


def test_a_store_with_no_live_version_is_a_clear_error(store: Path) -> None:
    (store / "live").unlink()
    with pytest.raises(RegistryError, match="no version is live"):
        Funnel.open(store)


def test_a_version_that_is_not_there_is_a_clear_error(published: Path) -> None:
    with pytest.raises(RegistryError):
        Funnel.open(published, "20200101T0000-000000000000")


def test_a_version_is_served_by_name_too(published: Path) -> None:
    version = str(Registry(published).live())
    with Funnel.open(published, version) as named:
        assert named.version == version


def files(store: Path) -> list[Path]:
    version = Registry(store).path(str(Registry(store).live()))
    return sorted(p for p in version.rglob("*") if p.is_file() and p.name != "validation.json")


@pytest.mark.parametrize("harm", ["cut", "flip", "gone"])
def test_a_version_with_any_file_damaged_is_never_half_loaded(store: Path, harm: str) -> None:
    assert len(files(store)) >= 7
    for path in files(store):
        content = path.read_bytes()
        if harm == "cut":
            path.write_bytes(content[: len(content) // 2])
        elif harm == "flip":
            path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        else:
            path.unlink()
        with pytest.raises(BundleError):
            Funnel.open(store)
        path.write_bytes(content)
    Funnel.open(store).close()


def test_metadata_of_other_items_is_refused(published: Path, tmp_path: Path) -> None:
    path = Registry(published).path(str(Registry(published).live()))
    other = MetadataTable(world.items().slice(0, 3), tmp_path)
    with live_users(published) as users, pytest.raises(BundleError, match="3 rows for 8 items"):
        Funnel(load(path), users, other)


@pytest.mark.parametrize("content", [None, b"", b"not a store"])
def test_a_user_store_that_is_missing_or_damaged_is_a_clear_error(store: Path, content: bytes | None) -> None:
    users = store / "users.lmdb"
    users.unlink()
    if content is not None:
        users.write_bytes(content)
    with pytest.raises(DataError, match=r"users\.lmdb: expected a user store"):
        Funnel.open(store)


def test_a_store_without_a_label_the_features_need_is_refused(store: Path) -> None:
    UserStore.write(store / "users.lmdb", world.users(), [], labels=[])
    with pytest.raises(PrerankError, match="no label 'is_click'"):
        Funnel.open(store)
