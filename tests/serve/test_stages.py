from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from prerank.bundle.item_table import ItemTable
from prerank.bundle.judge import Ranked
from prerank.business.diversity import Diversity
from prerank.business.reserve import Reserve
from prerank.config import DiversityRule, Metadata
from prerank.errors import DataError, RequestError, SchemaMismatch
from prerank.features.histories import Timeline
from prerank.features.transforms import Transforms
from prerank.schema import Bag, FeatureSchema
from prerank.serve.answer import check_request
from prerank.serve.expand import ExpandUser
from prerank.serve.metadata import Descriptions
from prerank.serve.stages import Describe, Rank, RankBySimilarity
from prerank.stores.metadata import MetadataTable
from prerank.stores.users import UserStore
from prerank.types import CandidateSet, Features, Request, Scalar, TopK
from tests.serve import world
from tests.serve.world import T0

CONTEXT: Mapping[str, Scalar] = {"hour": 1, "surface": "feed"}


@pytest.fixture
def transforms() -> Transforms:
    return world.transforms(world.config())


@pytest.fixture
def table(transforms: Transforms) -> ItemTable:
    return ItemTable.build(world.items()["item_id"].to_numpy(), transforms.encode("item", world.items()))


@pytest.fixture
def expand(tmp_path: Path, transforms: Transforms, table: ItemTable) -> Iterator[ExpandUser]:
    world.write_users(tmp_path / "users.lmdb")
    with UserStore.open(tmp_path / "users.lmdb") as users:
        yield ExpandUser(users, transforms, table)


def ask(expand: ExpandUser, user_id: int, time_ms: int, **context: Scalar) -> tuple[Features, tuple[str, ...]]:
    written = expand.run({"request": Request(user_id, 1, time_ms, CONTEXT | context)})
    assert set(written) == expand.writes
    return written["features"], written["user_notes"]


def items_of(expand: ExpandUser, features: Features) -> list[int]:
    """The clicks history as item ids: 0 for the unknown item, -1 for no item."""
    encoded = expand.items.features()["item_id"].tolist()
    ids = dict(zip(encoded, expand.items.item_ids.tolist(), strict=True))
    return [ids.get(value, value) for value in features["clicks"][0].tolist()]


def test_features_are_those_of_profile_context_and_histories_each_of_one_request(expand: ExpandUser) -> None:
    features, notes = ask(expand, 1, T0 + 10_000)
    shapes = {name: tuple(feature.shape) for name, feature in features.items()}
    assert shapes == {"country": (1,), "clicks": (1, 3), "seen": (1, 4), "hour": (1,), "surface": (1,)}
    assert notes == ()
    encoded = expand.transforms.encode("user", pa.table({"country": ["de"]}))
    assert features["country"].numpy() == encoded["country"]


def test_a_history_holds_its_events_only_oldest_first_and_padded_on_the_left(expand: ExpandUser) -> None:
    features, _ = ask(expand, 1, T0 + 10_000)
    assert items_of(expand, features) == [-1, 101, 103]


@pytest.mark.parametrize(
    ("after_ms", "clicks"),
    [(0, [-1, -1, -1]), (1000, [-1, -1, -1]), (1001, [-1, -1, 101]), (3000, [-1, -1, 101]), (3001, [-1, 101, 103])],
)
def test_a_history_is_cut_strictly_before_the_moment(expand: ExpandUser, after_ms: int, clicks: list[int]) -> None:
    features, _ = ask(expand, 1, T0 + after_ms)
    assert items_of(expand, features) == clicks


def test_a_history_of_impressions_takes_every_event_and_keeps_the_newest(expand: ExpandUser) -> None:
    features, _ = ask(expand, 1, T0 + 10_000)
    genre = expand.items.features()["genre"]
    assert features["seen"][0].tolist() == genre[1:5].tolist()


def test_an_item_no_longer_there_is_the_unknown_item_and_the_answer_says_so(expand: ExpandUser) -> None:
    features, notes = ask(expand, 2, T0 + 10_000)
    assert items_of(expand, features) == [-1, 107, 0]
    assert notes == ("1 unknown items in history: each counts as the unknown item",)
    _, notes = ask(expand, 2, T0 + 1000)
    assert notes == ()


def test_a_stranger_is_a_new_user_and_the_answer_says_so(expand: ExpandUser) -> None:
    features, notes = ask(expand, 9, T0)
    assert notes == ("unknown user 9: served as a new user",)
    assert features["country"].tolist() == [0]
    assert features["clicks"].tolist() == [[-1] * 3]
    assert features["seen"].tolist() == [[-1] * 4]


def test_a_known_user_without_events_is_no_stranger(expand: ExpandUser) -> None:
    features, notes = ask(expand, 3, T0)
    assert notes == ()
    assert features["country"].tolist() != [0]
    assert features["clicks"].tolist() == [[-1] * 3]


def test_serving_one_user_gives_what_the_timeline_of_all_users_gives(expand: ExpandUser) -> None:
    rows, times, values, encoded = [], [], [], expand.items.features()["item_id"].numpy()
    for user_id, item_ids, time_ms, _, flags in world.events():
        for item_id, moment, flag in zip(item_ids, time_ms, flags, strict=True):
            if flag & 1:
                rows.append(user_id - 1)
                times.append(moment)
                values.append(encoded[item_id - 100] if item_id < 108 else 0)
    timeline = Timeline.build(3, np.array(rows), np.array(times), np.array(values, np.int32))
    for user_id in (1, 2, 3):
        for after_ms in range(0, 6000, 500):
            features, _ = ask(expand, user_id, T0 + after_ms)
            expected = timeline.before(np.array([user_id - 1]), np.array([T0 + after_ms]), 3)
            assert np.array_equal(features["clicks"].numpy(), expected)
            assert features["clicks"].numpy().dtype == expected.dtype


@pytest.mark.parametrize(
    ("context", "says"),
    [
        ({"hour": 1}, r"context\.surface: missing"),
        ({"hour": "one", "surface": "feed"}, r"context\.hour: expected an integer, got 'one'"),
        ({"hour": 1, "surface": 7}, r"context\.surface: expected text, got 7"),
    ],
)
def test_a_context_field_missing_or_mistyped_is_the_callers_error(
    expand: ExpandUser, context: Mapping[str, Scalar], says: str
) -> None:
    with pytest.raises(RequestError, match=says):
        expand.expand(None, Request(1, 1, T0, context))


def test_a_context_field_nobody_uses_is_said(expand: ExpandUser) -> None:
    _, notes = ask(expand, 1, T0, mood="good")
    assert notes == ("context field 'mood' is not used by this version",)


def test_a_profile_that_cannot_be_read_is_the_stores_error_not_the_callers(expand: ExpandUser) -> None:
    record = expand.users.get(1)
    assert record is not None
    broken = replace(record, profile={"country": 7})
    with pytest.raises(DataError, match=r"user store, user 1: user\.country: expected text, got 7 .*build it from"):
        expand.expand(broken, Request(1, 1, T0, CONTEXT))


@pytest.mark.parametrize(
    ("columns", "labels", "says"),
    [
        (["user_id"], ["is_click"], r"no column 'country' .* it has \['user_id'\]"),
        (["user_id", "country"], ["is_like"], r"no label 'is_click' .* it has \['is_like'\]"),
    ],
)
def test_a_store_without_what_the_features_read_is_refused_before_any_request(
    tmp_path: Path, transforms: Transforms, table: ItemTable, columns: list[str], labels: list[str], says: str
) -> None:
    UserStore.write(tmp_path / "s", world.users().select(columns), [], labels=labels)
    with UserStore.open(tmp_path / "s") as users, pytest.raises(SchemaMismatch, match=says):
        ExpandUser(users, transforms, table)


def test_the_rankers_fallback_keeps_retrievals_order_and_invents_no_numbers(table: ItemTable) -> None:
    candidates = CandidateSet(
        rows=torch.tensor([[5, 0, 3, 2]]),
        similarity=torch.tensor([[4.0, 3.0, 2.0, 1.0]]),
        valid=torch.tensor([[True, False, True, True]]),
    )
    stage = RankBySimilarity(table, 2)
    values = {"request": Request(1, 2, T0), "candidates": candidates}
    written = stage.run(values)
    top: TopK = written["winners"]
    assert top.item_ids[top.valid].tolist() == [105, 103]
    assert bool(top.utility.isnan().all())
    assert top.probs.shape == (1, 2, 2)
    assert bool(top.probs.isnan().all())
    assert stage.count(values, written) == (3, 2)
    more = stage.run(values | {"request": Request(1, 9, T0)})["winners"]
    assert more.item_ids[more.valid].tolist() == [105, 103, 102]


def test_the_ranks_fallback_keeps_to_the_diversity_rules(table: ItemTable) -> None:
    genres = Diversity.build({"genre": DiversityRule(1)}, world.items())
    candidates = CandidateSet(
        rows=torch.tensor([[6, 3, 1, 4, 2]]),
        similarity=torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0]]),
        valid=torch.tensor([[True, True, False, True, True]]),
    )
    top = RankBySimilarity(table, 2, genres).run({"request": Request(1, 4, T0), "candidates": candidates})["winners"]
    assert top.item_ids[top.valid].tolist() == [106, 104, 102]


class GivenWinners(torch.nn.Module):
    """A scorer that says three candidates had no finite utility, and two too little of it."""

    why_below = Reserve.why

    def rank(self, user_side: Features, candidates: CandidateSet, k: int) -> Ranked:
        rows = candidates.rows[:, :k]
        return Ranked(
            *(rows, rows + 100, torch.ones(rows.shape), torch.ones(*rows.shape, 2), rows >= 0),
            num_nonfinite=torch.tensor([3]),
            num_below=torch.tensor([2]),
            num_absent=torch.tensor([4]),
        )


def test_candidates_that_could_not_win_are_said_and_why() -> None:
    candidates = CandidateSet(torch.tensor([[2, 1]]), torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool))
    stage = Rank(GivenWinners())  # type: ignore[arg-type]
    values = {"request": Request(1, 1, T0), "user_side": {}, "candidates": candidates}
    written = stage.run(values)
    assert written["rank_notes"] == (
        "3 candidates had no finite utility and could not win",
        "2 candidates were below the reserve or a floor and could not win",
        "4 candidates are not resident and were not fetched in time, and could not win",
    )
    assert stage.count(values, written) == (2, 1)


@pytest.fixture
def metadata(tmp_path: Path) -> MetadataTable:
    with pa.OSFile(str(tmp_path / "m"), "wb") as sink, pa.ipc.new_file(sink, world.items().schema) as writer:
        writer.write_table(world.items())
    return MetadataTable.open(tmp_path / "m")


def descriptions(metadata: MetadataTable, *columns: str) -> Descriptions:
    items = ItemTable.build(np.arange(100, 100 + world.NUM_ITEMS), {})
    return Descriptions(Metadata(columns), metadata, items, "v", None)


def test_only_winners_are_described_and_in_their_order(metadata: MetadataTable) -> None:
    valid = torch.tensor([[True, True, False]])
    rows = torch.tensor([[7, 2, 0]])
    top = TopK(rows, rows + 100, torch.zeros(1, 3), torch.zeros(1, 3, 1), valid)
    stage = Describe(descriptions(metadata, "title"))
    written = stage.run({"winners": top, "request": Request(1, 3, T0)})
    assert [bytes(one) for one in written["described"]] == [b'{"title":"title 7"}', b'{"title":"title 2"}']
    assert stage.count({"winners": top}, written) == (2, 2)


def test_a_metadata_column_that_is_not_there_is_refused_before_any_request(metadata: MetadataTable) -> None:
    with pytest.raises(DataError, match="got 'titel'; did you mean \"title\""):
        descriptions(metadata, "titel")


def test_a_context_bag_is_given_as_a_list():
    """What a list column trains, a request can say."""
    schema = FeatureSchema(context={"topics": Bag(length=3)})
    log = pa.table({"topics": pa.array([["a", "b"], ["c"]])})
    none = (pa.table({}), np.zeros(0, np.int64))
    transforms = Transforms.fit(schema, users=none, items=none, context=[log])
    request = Request(user_id=1, k=1, time_ms=0, context={"topics": ["b", "?"]})
    check_request(request, max_k=1)
    encoded = transforms.encode_row("context", request.context)["topics"]
    assert encoded.tolist() == [[2, 0, -1]]
    with pytest.raises(RequestError, match=r"context\.topics: expected a finite number, got nan"):
        check_request(Request(user_id=1, k=1, time_ms=0, context={"topics": [1.0, float("nan")]}), max_k=1)
