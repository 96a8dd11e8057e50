"""Candidates from several generators side by side: the index, the dearest, the same genre, a list."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from prerank._tensor_files import read_tensors, write_tensors
from prerank.bundle.load import load
from prerank.bundle.registry import Registry
from prerank.config import GeneratorConfig
from prerank.errors import BundleError, ConfigError, DataError, RequestError
from prerank.index.top import Top
from prerank.serve.funnel import Funnel
from prerank.serve.generate import Attribute, Merge
from prerank.types import CandidateSet, Given, ItemChange, Request, TopK
from tests.bundle.world import sign_again
from tests.serve import world
from tests.serve.conftest import publish_live

GENERATORS = {
    "dear": {"kind": "top", "by": "bid_micros", "quota": 2},
    "same_genre": {"kind": "same", "history": "seen", "quota": 2},
    "chosen": {"kind": "list", "items": [107, 999, 100], "quota": 2},
}
REQUEST = Request(user_id=1, k=5, time_ms=world.T0 + 10_000, context={"hour": 1, "surface": "feed"})


def publish(store: Path, keep: int = 1, generators: object = GENERATORS, **more: object) -> Path:
    retrieval = world.config().to_dict()["retrieval"]
    assert isinstance(retrieval, dict)
    return publish_live(
        store,
        world.config(generators=generators, retrieval={**retrieval, "keep": keep}, inventory={"slack": 4}, **more),
    )


@pytest.fixture
def funnel(tmp_path: Path) -> Iterator[Funnel]:
    with Funnel.open(publish(tmp_path / "tiny")) as funnel:
        yield funnel


def found(funnel: Funnel, request: Request = REQUEST) -> dict[int, list[str]]:
    return {one.item_id: list(one.found_by) for one in funnel.recommend(request).winners}


def test_every_winner_says_who_found_it(funnel: Funnel) -> None:
    said = found(funnel)
    assert sum("index" in names for names in said.values()) <= 1
    assert {item for item, names in said.items() if "dear" in names} <= {105, 106, 107}
    # user 1 saw 100 to 104: genres 1, 0, 2, 1, 0 from the newest, so one of each in turn
    by_genre = {item for item, names in said.items() if "same_genre" in names}
    assert by_genre <= {100, 101, 102, 103, 104, 105, 106, 107}
    assert {item for item, names in said.items() if "chosen" in names} <= {107, 100}
    assert all(said.values())
    stages = {one.name: (one.num_in, one.num_out) for one in funnel.recommend(REQUEST).stages}
    assert stages["merge"][1] == stages["rank"][0] <= 1 + 2 + 2 + 2
    assert {"generate_dear", "generate_same_genre", "generate_chosen", "attribute"} <= set(stages)


def test_a_generators_items_are_held_to_what_is_live_and_excluded(funnel: Funnel) -> None:
    funnel.change([ItemChange(107, on=False)])
    assert 107 not in found(funnel)
    assert 106 not in found(funnel, replace(REQUEST, exclude=(106,)))


def test_an_item_that_comes_is_found_by_every_generator_it_is_for(funnel: Funnel) -> None:
    columns: dict[str, Given] = {"item_id": 999, "genre": "genre 1", "bid_micros": 10**9, "title": "new"}
    funnel.change([ItemChange(999, columns=columns)])
    assert {"dear", "chosen", "same_genre"} <= set(found(funnel)[999])
    # written anew as cheap, the row that it had before is not found for its old worth
    funnel.change([ItemChange(999, columns={**columns, "bid_micros": 1, "genre": "genre 0"})])
    assert "dear" not in found(funnel).get(999, [])
    funnel.change([ItemChange(999, removed=True)])
    assert 999 not in found(funnel)


def test_a_column_of_a_generator_that_is_wrong_in_a_change_is_refused(funnel: Funnel) -> None:
    columns: dict[str, Given] = {"item_id": 999, "genre": "genre 1", "bid_micros": "much", "title": "new"}
    with pytest.raises(RequestError, match="bid_micros"):
        funnel.change([ItemChange(999, columns=columns)])


def test_targeting_holds_for_generators_too(tmp_path: Path) -> None:
    rules = {"country": {"item": "countries", "user": "country"}}
    retrieval = world.config().to_dict()["retrieval"]
    assert isinstance(retrieval, dict)
    config = world.config(generators=GENERATORS, targeting=rules, retrieval={**retrieval, "keep": 1})
    lists = pa.table({"countries": [["fr"] if n != 103 else ["de"] for n in range(100, 108)]})
    with Funnel.open(publish_live(tmp_path / "tiny", config, lists)) as funnel:
        assert set(found(funnel)) == {103}
        assert 103 not in found(funnel, replace(REQUEST, user_id=2))


def test_the_same_version_publishes_the_same_bytes_and_gives_its_generators_back(tmp_path: Path) -> None:
    first, again = publish(tmp_path / "a"), publish(tmp_path / "b")
    assert str(Registry(first).live())[-12:] == str(Registry(again).live())[-12:]
    bundle = load(Registry(first).path(str(Registry(first).live())))
    assert list(bundle.generators) == list(GENERATORS)
    top = bundle.generators["dear"]
    assert isinstance(top, Top)
    assert top.rows.tolist() == [7, 6, 5, 4, 3, 2, 1, 0]


@pytest.mark.parametrize(
    ("name", "tensor", "says"),
    [
        ("dear.rows", torch.tensor([99]), "generator 'bid_micros': expected rows int64 and numbers float64"),
        ("same_genre.starts", torch.tensor([0, 5]), "generator 'seen': expected rows int64"),
        ("chosen.item_ids", torch.tensor([1]), "a generator's list: expected"),
        ("other.rows", torch.tensor([1]), "generators: expected those of"),
    ],
)
def test_generators_that_are_not_as_published_are_refused(
    tmp_path: Path, name: str, tensor: torch.Tensor, says: str
) -> None:
    store = publish(tmp_path / "tiny")
    path = Registry(store).path(str(Registry(store).live()))
    tensors, note = read_tensors(path / "generators.safetensors")
    kept = {key: one.clone() for key, one in tensors.items()}
    write_tensors(path / "generators.safetensors", {**kept, name: tensor}, note)
    with pytest.raises(BundleError, match=says):
        load(sign_again(path))


@pytest.mark.parametrize(
    ("generators", "says"),
    [
        ({"a": {"kind": "top", "quota": 2}}, "generators.a: expected by and no other with kind = 'top', got"),
        ({"a": {"kind": "top", "quota": 0, "by": "x"}}, "generators.a.quota: expected 1 or more, got 0"),
        ({"a": {"kind": "same", "quota": 2, "history": "clickz"}}, "generators.a.history: .*'clickz'"),
        ({"index": {"kind": "list", "quota": 2, "items": [1]}}, "generators.index: expected a name of letters"),
        ({"a": {"kind": "list", "quota": 2, "items": [1, 1]}}, "generators.a.items: expected each item_id once"),
        ({"a": {"kind": "random", "quota": 2}}, "generators.a.kind"),
    ],
)
def test_a_generator_that_cannot_be_is_refused_by_its_key(generators: object, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        world.config(generators=generators)


@pytest.mark.parametrize("by", ["title", "nowhere"])
def test_a_column_that_is_no_numbers_is_refused_at_publish(tmp_path: Path, by: str) -> None:
    with pytest.raises(DataError, match=f"generators: expected .*the items' column '{by}'"):
        publish(tmp_path / "tiny", generators={"a": {"kind": "top", "by": by, "quota": 1}})


def test_the_largest_numbers_come_first_times_too_and_nulls_never() -> None:
    times = pa.array([3, None, 5, 5, 1], pa.timestamp("ms"))
    options = GeneratorConfig("top", 1, by="t")
    top = Top.build(options, world.config(), {}, pa.table({"t": times}), 5)
    assert top.rows.tolist() == [2, 3, 0, 4]


def test_merging_keeps_the_index_in_order_and_takes_of_each_what_nobody_had_up_to_its_quota() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        rows = rng.permutation(30)[: rng.integers(1, 12)]
        others = {name: rng.permutation(30)[: rng.integers(0, 12)] for name in ("a", "b")}
        quotas = {"a": int(rng.integers(1, 4)), "b": int(rng.integers(1, 4))}
        first = CandidateSet(
            torch.tensor(rows)[None], torch.rand(1, len(rows)), torch.ones(1, len(rows), dtype=torch.bool)
        )
        given = {
            "retrieved": first,
            **{f"found_{n}": torch.tensor(own, dtype=torch.int64) for n, own in others.items()},
        }
        merged = Merge(quotas).run(given)["candidates"]
        # the same in plain Python
        expected = {int(row): {"index"} for row in rows}
        for name, own in others.items():
            new = [int(row) for row in own if int(row) not in expected][: quotas[name]]
            known = [int(row) for row in own if int(row) in expected]
            for row in known:
                expected[row].add(name)
            expected |= {row: {name} for row in new}
        assert merged.rows[0].tolist() == list(expected)
        assert merged.similarity[0, : len(rows)].equal(first.similarity[0])
        won = torch.tensor([list(expected)[::-1]])
        top = TopK(won, won, won.float(), won.float()[..., None], torch.ones_like(won, dtype=torch.bool))
        said = Attribute(("index", "a", "b")).run({"candidates": merged, "winners": top})["found_by"]
        assert [set(one) for one in said] == list(expected.values())[::-1]
