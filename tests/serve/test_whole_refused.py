"""Funnels and versions that no device can answer whole: why, and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from prerank.errors import BundleError, NotOnDevice
from prerank.serve.device_retrieval import RetrievalReplica
from prerank.serve.device_streams import CpuDevice
from prerank.serve.funnel import Funnel
from tests.serve import spaces, test_tail, world
from tests.serve.cluster import running
from tests.serve.test_generators import GENERATORS
from tests.serve.whole import on, published


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"generators": GENERATORS}, r"it has candidate generators beside its index \(dear, same_genre, chosen\)"),
        ({"retrieval": {"index": {"kind": "hnsw"}}}, "its index is hnsw in 1 shards, not exact in one"),
        ({"retrieval": {"index": {"shards": 2}}}, "its index is exact in 2 shards, not exact in one"),
        ({"serve": {"stages": {"rank": {"deadline_ms": 50.0}}}}, r"\[serve.stages\] limits rank, which would be one"),
    ],
)
def test_a_funnel_that_a_device_cannot_answer_whole_is_refused_and_says_why(
    tmp_path: Path, changes: dict[str, object], why: str
) -> None:
    retrieval = world.config().to_dict()["retrieval"]
    more = changes.get("retrieval", {})
    assert isinstance(retrieval, dict)
    assert isinstance(more, dict)
    store = published(tmp_path / "tiny", **changes | {"retrieval": retrieval | more})
    with on(CpuDevice()) as place:
        with pytest.raises(NotOnDevice, match=f"--device-whole: .*: {why}.*; leave --device-whole out"):
            Funnel.open(store, workers=0, device=place)
        assert place.engine.snapshot().table_bytes == 0


def test_where_some_items_are_not_resident_it_is_refused_too(tmp_path: Path) -> None:
    with (
        on(CpuDevice()) as place,
        pytest.raises(NotOnDevice, match=r"--device-whole: .*: not all of its items are resident; leave"),
    ):
        Funnel.open(test_tail.published(tmp_path / "tail"), workers=0, device=place)


def test_beside_index_hosts_it_is_refused_too(tmp_path: Path) -> None:
    store = tmp_path / "tiny"
    version = spaces.publish_space(store, 0, spaces.config())
    with (
        running(store, [version], 1, 1) as cluster,
        on(CpuDevice()) as place,
        pytest.raises(NotOnDevice, match=r"--device-whole: .*: index hosts retrieve; leave"),
    ):
        Funnel.open(store, workers=0, hosts=cluster.hosts, device=place)


@pytest.mark.parametrize(
    ("shifted", "says"),
    [
        (lambda rows, similarity, num: (rows, similarity, num + 1), "expected 8 eligible items, got 9"),
        (lambda rows, similarity, num: (rows, 1.01 * similarity, num), "expected similarity .* in place 0, got"),
        (
            lambda rows, similarity, num: (rows.index_fill(1, rows[0, :1] * 0, -1), similarity, num),
            "expected 6 candidates, got 5",
        ),
    ],
)
def test_a_version_that_finds_others_on_the_device_is_not_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shifted: object, says: str
) -> None:
    right = RetrievalReplica.find
    assert callable(shifted)
    monkeypatch.setattr(RetrievalReplica, "find", lambda self, *of: shifted(*right(self, *of)))
    store = published(tmp_path / "tiny", targeting={})
    with on(CpuDevice("cpu")) as place:
        with pytest.raises(BundleError, match=f"cpu finds others: golden user 0: {says}"):
            Funnel.open(store, workers=0, device=place)
        assert place.engine.snapshot().table_bytes == 0
