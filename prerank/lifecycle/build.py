"""A version from tables: prepare, train both models, publish them with the items, and load users into the store.

Every step keeps what it made under the funnel's `work` folder by a key of its inputs, so a second build does again
only what changed, and an interrupted one goes on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from prerank.bundle.publish import Parts, publish
from prerank.config import Config
from prerank.data.logs import Tables
from prerank.evaluate.ranking import RankingQuality, evaluate_ranking
from prerank.evaluate.retrieval import FLOORS, RetrievalQuality, evaluate_retrieval
from prerank.models.rankers import Ranker
from prerank.models.towers import TwoTower
from prerank.stores.users import Events, UserStore
from prerank.train.examples import UserExamples
from prerank.train.prepare import Prepared, preparation_key, prepare
from prerank.train.ranking import train_ranker
from prerank.train.retrieval import ItemPopularity, train_retrieval
from prerank.types import Report, silent

NUM_GOLDEN = 16
MOST_QUESTIONS = 5_000
USERS = "users.lmdb"
_TRAINING_FORM = 1  # raise it when a change to the training code should train again


@dataclass(frozen=True, slots=True)
class Trained:
    """Both trained models with what they were trained on, and one record an epoch of each."""

    config: Config
    prepared: Prepared
    towers: TwoTower
    ranker: Ranker
    run: str
    retrieval_epochs: list[dict[str, float]]
    ranker_epochs: list[dict[str, float]]


def train(config: Config, tables: Tables, home: Path, report: Report = silent) -> Trained:
    """The models of `config` on `tables`; `home` is the funnel's folder of the store."""
    work = home / "work"
    prepared = prepare(config, tables, work, report)
    data = preparation_key(config, tables)
    plain = config.to_dict()
    retrieval_key = _key(data, config.seed, plain["retrieval"])
    ranker_key = _key(data, config.seed, plain["ranker"], plain["tasks"])
    validate_days = config.data.days("validate")

    def recall(towers: TwoTower) -> Mapping[str, float]:
        quality = evaluate_retrieval(towers, prepared, config, validate_days, most=1000)
        return {"recall@100": quality.at("two towers", 100)}

    def log_losses(ranker: Ranker) -> Mapping[str, float]:
        quality = evaluate_ranking(ranker, prepared, config, validate_days)
        return {f"{task}.log_loss": numbers["log_loss"] for task, numbers in quality.tasks.items()}

    folder = work / f"retrieval-{retrieval_key}"
    towers, retrieval_epochs = train_retrieval(prepared, config, folder, retrieval_key, recall, report)
    folder = work / f"ranker-{ranker_key}"
    ranker, ranker_epochs = train_ranker(prepared, config, folder, ranker_key, log_losses, report)
    run = _key(retrieval_key, ranker_key)
    return Trained(config, prepared, towers, ranker, run, retrieval_epochs, ranker_epochs)


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


def publish_trained(trained: Trained, tables: Tables, home: Path, metrics: Mapping[str, object]) -> str:
    """The version id of the published models; its popularity is that of the whole log, for it serves from now on."""
    prepared, config = trained.prepared, trained.config
    items = tables.items().sort_by(config.data.item_id)
    columns = list(config.metadata.columns) or [c for c in items.column_names if c != config.data.item_id]
    last = np.flatnonzero(prepared.events["logged"])
    moments = last[np.argsort(prepared.events["time_ms"][last], kind="stable")[-NUM_GOLDEN:]]
    golden = UserExamples(prepared, config.features).at(moments)
    parts = Parts(
        config=config,
        transforms=prepared.transforms,
        towers=trained.towers,
        ranker=trained.ranker,
        item_ids=prepared.item_ids,
        item_columns=prepared.items,
        item_table=items.select(columns),
        popularity=ItemPopularity(prepared, config).latest().numpy(),
        golden_user={name: column.numpy() for name, column in golden.items()},
        parents={"data": preparation_key(config, tables), "run": trained.run},
        metrics=metrics,
    )
    return publish(home, parts)


def load_users(config: Config, tables: Tables, prepared: Prepared, home: Path, report: Report = silent) -> Path:
    """Every user's profile and events into the funnel's user store, unless the same were loaded before."""
    path, mark = home / USERS, home / f"{USERS}.key"
    key = preparation_key(config, tables)
    if path.exists() and mark.exists() and mark.read_text() == key:
        return path
    mark.unlink(missing_ok=True)
    user_id = config.data.user_id
    users = tables.users().select([user_id, *(c for c in config.features.columns("user") if c != user_id)])
    UserStore.write(path, users, _events_by_user(prepared, report), labels=prepared.labels, user_id=user_id)
    mark.write_text(key)
    return path


def _events_by_user(prepared: Prepared, report: Report) -> Iterator[Events]:
    log = prepared.events
    users, start = np.unique(log["user"], return_index=True)
    end = np.append(start[1:], len(log["user"]))
    for done, (user, a, b) in enumerate(zip(users, start, end, strict=True), start=1):
        item_ids = prepared.item_ids[log["item"][a:b]]
        yield int(prepared.user_ids[user]), item_ids, np.asarray(log["time_ms"][a:b]), np.asarray(log["flags"][a:b])
        if done % 1000 == 0 or done == len(users):
            report("load users", done, len(users), "users")


def _key(*said: object) -> str:
    code = [_TRAINING_FORM, torch.__version__.partition("+")[0], *said]
    return hashlib.sha256(json.dumps(code, sort_keys=True).encode()).hexdigest()[:16]
