"""What answers say of items: what comes with them, what is asked for later, and what nobody reads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from prerank.cli.app import app
from prerank.errors import ConfigError, DataError, RequestError
from prerank.serve.funnel import Funnel
from prerank.serve.http import create_app
from prerank.stores.reads import FILE, ReadCounts, Reads
from prerank.types import ItemChange, Request
from tests.serve import world
from tests.serve.client import Client
from tests.serve.conftest import publish_live
from tests.serve.fake import FakeFunnel, error_of

OPTIONS = {"columns": ["title"], "deferred": ["genre", "topics"]}


def ask(metadata: tuple[str, ...] | None = None) -> Request:
    return Request(1, 5, world.T0 + 10_000, {"hour": 1, "surface": "feed"}, metadata=metadata)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return publish_live(tmp_path / "stores" / "tiny", world.config(metadata=OPTIONS, inventory={"slack": 2}))


@pytest.fixture
def funnel(store: Path) -> Iterator[Funnel]:
    with Funnel.open(store) as funnel:
        yield funnel


def test_an_answer_has_what_comes_with_it_or_what_is_wanted_of_that(funnel: Funnel) -> None:
    assert all(list(one.metadata) == ["title"] for one in funnel.recommend(ask()).winners)
    assert all(one.metadata == {} for one in funnel.recommend(ask(())).winners)
    with pytest.raises(RequestError, match="'genre' does not come with answers; ask for it with POST /v1/metadata"):
        funnel.recommend(ask(("genre",)))
    with pytest.raises(RequestError, match=r"metadata: expected columns of \['title'\], got 'titel'.*title"):
        funnel.recommend(ask(("titel",)))


def test_deferred_columns_are_asked_for_by_item(funnel: Funnel) -> None:
    told = funnel.describe([102, 5, 100], ["topics", "title"])
    assert told.version == funnel.version
    assert told.items == [
        {"topics": ["topic 0", "topic 1"], "title": "title 2"},
        None,
        {"topics": [], "title": "title 0"},
    ]
    assert funnel.describe([101], None).items == [{"title": "title 1", "genre": "genre 1", "topics": ["topic 0"]}]
    assert funnel.describe([101], []).items == [{}]
    for ids, columns, says in (
        ([], None, "item_ids: expected 1 to 10,000 of them, got 0"),
        ([1 << 63], None, "item_ids: expected int64, got"),
        ([1], ["bid_micros"], r"columns: expected some of \['title', 'genre', 'topics'\], got 'bid_micros'"),
    ):
        with pytest.raises(RequestError, match=says):
            funnel.describe(ids, columns)


def test_an_item_that_comes_has_its_metadata_too(funnel: Funnel) -> None:
    columns = {"item_id": 500, "genre": "g", "bid_micros": 1, "title": "new", "topics": ["a"]}
    funnel.change([ItemChange(500, columns=columns)])
    assert funnel.describe([500, 101], ["title", "topics"]).items == [
        {"title": "new", "topics": ["a"]},
        {"title": "title 1", "topics": ["topic 0"]},
    ]


def test_what_is_read_is_counted_and_the_audit_tells(store: Path) -> None:
    with Funnel.open(store) as funnel:  # which asks one request itself, of one winner
        funnel.recommend(ask())
        funnel.recommend(ask(("title",)))
        funnel.describe([100, 101, 5], ["genre"])
    counts = ReadCounts.open(store / FILE)
    assert counts.all() == {"title": Reads(5, 6), "genre": Reads(2, 0)}
    counts.close()
    told = CliRunner().invoke(app, ["audit", "metadata", "--store", str(store.parent)])
    assert told.exit_code == 0, told.output
    lines = {line.split()[0]: line for line in told.output.splitlines() if line.strip()}
    assert "with answers" in lines["title"]
    assert "when asked for" in lines["topics"]
    assert "nobody asks: leave it out" in lines["topics"]
    assert "nobody" not in lines["genre"]


def test_counts_of_several_servers_add_up(tmp_path: Path) -> None:
    first, second = ReadCounts.open(tmp_path / FILE), ReadCounts.open(tmp_path / FILE)
    first.add(["a", "b"], 3, by_name=True)
    second.add(["a"], 4, by_name=False)
    assert first.all() | second.all() == {"a": Reads(3, 4), "b": Reads(3, 0)}
    first.close()
    second.close()
    (tmp_path / "other").write_bytes(b"no database" * 1000)
    with pytest.raises(DataError, match="not a file of counters"):
        ReadCounts.open(tmp_path / "other")


def test_a_column_cannot_be_both(tmp_path: Path) -> None:
    says = r"metadata.deferred: expected columns that do not come with answers, got 'title'"
    with pytest.raises(ConfigError, match=says):
        world.config(metadata={"columns": ["title"], "deferred": ["title"]})
    with pytest.raises(DataError, match="'nowhere'"):
        publish_live(tmp_path / "tiny", world.config(metadata={"columns": ["title"], "deferred": ["nowhere"]}))


def test_over_http() -> None:
    with Client(create_app(FakeFunnel())) as client:
        told = client.post("/v1/metadata", json={"item_ids": [5, 50], "columns": ["title"]})
        assert told.status_code == 200
        assert told.json() == {"version": "20220501T0000-abc", "items": [{"title": "item 5"}, None]}
        for content, status, says in (
            ("{", 400, "body: expected one JSON object"),
            ('{"columns": []}', 422, "item_ids: missing, and every call needs it"),
            ('{"item_ids": ["5"]}', 422, "item_ids[0]: expected int, got str"),
            ('{"item_ids": [5], "colums": []}', 422, "colums: unknown field, expected one of ['item_ids', 'columns']"),
        ):
            got, _, message = error_of(client.post("/v1/metadata", content=content))
            assert got == status
            assert says in message
        asked = client.post("/v1/recommend", json={"user_id": 1, "k": 1, "metadata": ["title"]})
        assert asked.status_code == 200
