"""A version from trained models: measure them, publish them with the items, and load users into the store."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from prerank.bundle.publish import ITEMS_UNTIL, Parts, publish
from prerank.config import Config
from prerank.data.logs import Tables
from prerank.evaluate.ranking import RankingQuality, evaluate_ranking
from prerank.evaluate.retrieval import FLOORS, RetrievalQuality, evaluate_retrieval
from prerank.lifecycle.arrivals import Stock, with_arrivals
from prerank.lifecycle.coverage import COVERAGE, training_coverage
from prerank.lifecycle.embed import embed
from prerank.lifecycle.training import Trained
from prerank.lifecycle.user_shelves import USERS, UserFile, UserRedis
from prerank.stores.contexts import UNKNOWN, columns_of, digest
from prerank.stores.records import EXPOSED
from prerank.stores.redis_tail import RedisTail
from prerank.stores.tail import RATE, TAIL, LmdbTail
from prerank.stores.user_file import Events
from prerank.train.examples import UserExamples
from prerank.train.items import DailyItems
from prerank.train.prepare import Prepared, preparation_key
from prerank.train.retrieval import ItemPopularity
from prerank.types import Array, Report, silent

NUM_GOLDEN, NUM_ASKED = 16, 256
_APART = 16
MOST_QUESTIONS = 5_000
_REDIS_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Quality:
    """Both stages on the test days, beside their floors."""

    retrieval: RetrievalQuality
    ranking: RankingQuality


def evaluate(trained: Trained, home: Path) -> Quality:
    """The test days' quality; measured once a run and kept."""
    path = home / "work" / f"quality-{trained.run}.json"
    if path.exists():
        plain = json.loads(path.read_text())
        return Quality(RetrievalQuality.from_dict(plain["retrieval"]), RankingQuality(**plain["ranking"]))
    config, days = trained.config, trained.config.data.days("test")
    quality = Quality(
        evaluate_retrieval(trained.towers, trained.prepared, config, days, tuple(FLOORS), MOST_QUESTIONS),
        evaluate_ranking(trained.ranker, trained.prepared, config, days),
    )
    path.write_text(json.dumps(asdict(quality), indent=1))
    return quality


def publish_trained(
    trained: Trained, tables: Tables, home: Path, metrics: Mapping[str, object], report: Report = silent
) -> str:
    """The version id of the published models; its popularity is that of the whole log, for it serves from now on."""
    prepared, config = trained.prepared, trained.config
    item_id, names = config.data.item_id, tables.source("items").schema.names
    kept = config.metadata.columns and [*config.metadata.columns, *config.metadata.deferred]
    shown = list(kept) or [c for c in names if c != item_id]
    read = list(dict.fromkeys([*shown, *config.item_columns(), *(column for column, _ in config.numbers().values())]))
    items = tables.items(list(dict.fromkeys([item_id, *read]))).sort_by(item_id)  # what nobody reads stays on the disk
    rates = {name: rate.numpy() for name, rate in DailyItems(prepared, config).latest_rates().items()}
    stock = Stock(
        item_ids=prepared.item_ids,
        columns={**prepared.items, **rates},  # what no day changes stays on the disk
        table=items.select(read),
        popularity=ItemPopularity(prepared, config).latest().numpy(),
        until_ns=0,
    )
    stock = with_arrivals(stock, config, prepared.transforms, tables, home)
    data = preparation_key(config, tables)
    stated = f"{data} {stock.until_ns} {config.retrieval.popularity}"
    vectors = embed(trained.towers, stock.columns, stock.popularity, home / "work", stated, report)
    last = np.flatnonzero(prepared.events["logged"])
    latest = last[np.argsort(prepared.events["time_ms"][last], kind="stable")]
    examples = UserExamples(prepared, config.features)
    golden = examples.at(latest[-NUM_GOLDEN:])
    # the latest few are often one user's
    asked = examples.at(latest[-NUM_ASKED * _APART :: _APART])
    parts = Parts(
        config=config,
        transforms=prepared.transforms,
        towers=trained.towers,
        ranker=trained.ranker,
        item_ids=stock.item_ids,
        item_columns=stock.columns,
        item_table=stock.table,
        popularity=stock.popularity,
        golden_user={name: column.numpy() for name, column in golden.items()},
        parents={
            "data": data,
            "run": trained.run,
            **({ITEMS_UNTIL: str(stock.until_ns)} if stock.until_ns else {}),
        },
        metrics={**metrics, COVERAGE: training_coverage(prepared, config)},
        vectors=vectors,
        asked_user={name: column.numpy() for name, column in asked.items()},
        targeting=stock.table.select(config.targeted("item")) if config.targeting else None,
    )
    return publish(home, parts)


def load_users(
    config: Config,
    tables: Tables,
    prepared: Prepared,
    home: Path,
    report: Report = silent,
    redis: str | None = None,
) -> None:
    """Every user's profile and events into the funnel's user store, unless the same were loaded before.

    It is at the url `redis`, or in `users.lmdb`.
    """
    targeted, user_id = config.targeted("user"), config.data.user_id
    key = " ".join([preparation_key(config, tables), *targeted])
    shelf = UserFile(home / USERS) if redis is None else UserRedis(redis, config.name)
    with closing(shelf):
        if shelf.loaded() == key:
            return
        users = tables.users()
        # a version that is live, or may be again, reads columns of its own
        kept = [name for name in shelf.columns() if name in users.column_names]
        users = users.select(list(dict.fromkeys([user_id, *config.features.columns("user"), *targeted, *kept])))
        digests = _context_digests(config, prepared)
        events = _events_by_user(prepared, digests, report)
        shelf.write(key, users, events, prepared.labels, list(digests), user_id)


def load_tail(
    config: Config, tables: Tables, prepared: Prepared, home: Path, redis: str | None = None, report: Report = silent
) -> None:
    """Every item's columns into the store of those that are not resident, if [inventory] leaves any out.

    All items, for which are resident differs between versions; at the url `redis`, or in `tail.lmdb`.
    """
    if config.inventory.resident is None:
        return
    features = config.features.columns("item")
    items = tables.items(list(dict.fromkeys([config.data.item_id, *features]))).sort_by(config.data.item_id)
    latest = DailyItems(prepared, config).latest() if config.features.rates() else {}
    for name in config.features.rates():
        items = items.append_column(RATE + name, pa.array(latest[name].numpy()))
    stored = [*features, *(RATE + name for name in config.features.rates())]
    if redis is None:
        LmdbTail.write(home / TAIL, items, config.data.item_id, stored, report)
    else:
        RedisTail.open(redis, config.name, _REDIS_TIMEOUT_S).write(items, config.data.item_id, stored, report)


def _context_digests(config: Config, prepared: Prepared) -> dict[str, dict[str, Array]]:
    """By context column that counters read: for each feature they are `on` there, the digest of every code, int64."""
    digests: dict[str, dict[str, Array]] = {}
    columns = columns_of(config.features)
    for name, column in columns.items():
        values = prepared.transforms.names("context", name)
        assert values is not None, "the schema refuses a hashed category"
        digests.setdefault(column, {})[name] = np.array([UNKNOWN, *map(digest, values)], np.int64)
    return digests


def _events_by_user(prepared: Prepared, digests: Mapping[str, Mapping[str, Array]], report: Report) -> Iterator[Events]:
    log = prepared.events
    users, start = np.unique(log["user"], return_index=True)
    end = np.append(start[1:], len(log["user"]))
    for done, (user, a, b) in enumerate(zip(users, start, end, strict=True), start=1):
        item_ids = prepared.item_ids[log["item"][a:b]]
        time_ms, known_ms = np.asarray(log["time_ms"][a:b]), np.asarray(log["known_ms"][a:b])
        # features of one column know some of its values each, and agree on the digest of those that several know
        contexts = [
            np.bitwise_or.reduce([of_code[log[name][a:b]] for name, of_code in features.items()])
            for features in digests.values()
        ]
        flags = log["flags"][a:b] | EXPOSED
        yield int(prepared.user_ids[user]), item_ids, time_ms, known_ms, flags, *contexts
        if done % 1000 == 0 or done == len(users):
            report("load users", done, len(users), "users")
