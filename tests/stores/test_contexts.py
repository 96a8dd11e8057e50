"""Context values as stores keep them: the same in every version and on every machine, beside the log's events."""

from hashlib import blake2b
from pathlib import Path

import lmdb
import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prerank.errors import DataError
from prerank.schema import Category, Counter, FeatureSchema
from prerank.stores.contexts import UNKNOWN, columns_of, digest
from prerank.stores.users import UserStore
from tests.stores.test_users import event, raw, world


def test_a_text_is_the_first_eight_bytes_of_its_blake2b_and_an_integer_of_its_own_eight() -> None:
    def plain(content: bytes) -> int:
        return int.from_bytes(blake2b(content, digest_size=8).digest(), "little", signed=True)

    assert digest("feed") == plain(b"feed")
    assert digest("\udcff") == plain(b"\xed\xb3\xbf")
    assert digest(1) == digest(True) == plain(b"\x01" + bytes(7))
    assert digest(-1) == digest(2**64 - 1) == plain(b"\xff" * 8)


def test_only_null_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    assert digest(None) == UNKNOWN == 0
    assert 0 not in {digest(value) for value in ("", 0, False, "0", *range(1000))}
    monkeypatch.setattr("prerank.stores.contexts.blake2b", lambda content, digest_size: blake2b_of_zeros)
    assert digest("feed") == 1


class Zeros:
    def digest(self) -> bytes:
        return bytes(8)


blake2b_of_zeros = Zeros()


@given(st.lists(st.integers(-(2**63), 2**63 - 1), unique=True) | st.lists(st.text(), unique=True))
def test_values_of_one_column_that_differ_have_digests_that_differ(values: list[int] | list[str]) -> None:
    assert len({digest(value) for value in values}) == len(values)


def test_what_is_no_name_is_our_own_mistake() -> None:
    for value in (1.5, [1]):
        with pytest.raises(AssertionError, match="an integer, text or a boolean"):
            digest(value)


def test_the_columns_are_those_of_the_context_features_that_counters_are_on() -> None:
    context = {"surface": Category(column="place"), "page": Category(), "rare": Category(column="place", min_count=9)}
    counters = {
        name: Counter(on=on, window="1h") for name, on in (("a", "rare"), ("b", ""), ("c", "surface"), ("d", "rare"))
    }
    assert columns_of(FeatureSchema(context=context, interaction=counters)) == {"rare": "place", "surface": "place"}
    assert columns_of(FeatureSchema(context=context)) == {}


def test_the_contexts_of_events_are_stored_beside_them_and_sorted_with_them(tmp_path: Path) -> None:
    plain = event(7, (3, 9, 1), (1, 8, 2), (2, 7, 3))
    columns = np.array([[1, -(2**63), 0], [4, 5, 6]])
    UserStore.write(
        tmp_path / "s",
        world(),
        [event(-3, (1, 1, 1))[:5] + (columns[0][:1],) * 2, (*plain, *columns)],
        labels=[],
        contexts=["surface", "tab"],
    )
    with UserStore.open(tmp_path / "s") as store:
        assert store.contexts == ("surface", "tab")
        record, none = store.get(7), store.get(2**40)
    assert record is not None
    assert record.contexts.tolist() == [[0, 6], [-(2**63), 5], [1, 4]]
    assert record.contexts.dtype == np.int64
    assert [record.item_ids.tolist(), record.flags.tolist()] == [[2, 1, 3], [3, 2, 1]]
    assert none is not None
    assert none.contexts.shape == (0, 2)


def test_a_store_without_contexts_gives_every_event_none(tmp_path: Path) -> None:
    UserStore.write(tmp_path / "s", world(), [event(-3, (11, 500, 1), (10, 400, 3))], labels=[])
    with UserStore.open(tmp_path / "s") as store:
        record = store.get(-3)
    assert record is not None
    assert record.contexts.shape == (2, 0)


def test_a_store_from_before_there_were_contexts_is_one_without(tmp_path: Path) -> None:
    path = tmp_path / "s"
    UserStore.write(path, world(), [event(-3, (11, 500, 1))], labels=[])
    with lmdb.open(str(path), subdir=False, lock=False) as env, env.begin() as transaction:
        meta = msgspec.msgpack.decode(transaction.get(b"meta"))
    del meta["contexts"]
    raw(path, {b"meta": msgspec.msgpack.encode(meta)})
    with UserStore.open(path) as store:
        assert store.contexts == ()
        assert store.get(-3) is not None


@pytest.mark.parametrize(("num_columns", "length", "found"), [(2, 2, r"\[2, 2\]"), (1, 1, r"\[1\]"), (0, 0, r"\[\]")])
def test_events_with_other_contexts_than_the_store_are_refused(
    tmp_path: Path, num_columns: int, length: int, found: str
) -> None:
    events = [(*event(7, (1, 9, 0), (1, 9, 0)), *[np.zeros(length, np.int64)] * num_columns)]
    says = rf"user 7: expected 2 values of each of the context columns \['tab'\], found {found}"
    with pytest.raises(DataError, match=says):
        UserStore.write(tmp_path / "s", world(), events, labels=[], contexts=["tab"])
