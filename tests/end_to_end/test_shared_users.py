"""A market's users and events in a Redis, from its tables to the winners: the same as in the store's own files."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from prerank.bundle.registry import Gate, Registry
from prerank.cli.demo import _last_requests
from prerank.lifecycle.build import USERS, load_users
from prerank.serve.funnel import Funnel
from prerank.serve.http import create_app
from prerank.stores.redis_client import RedisPair
from prerank.stores.redis_users import RedisUsers
from prerank.stores.users import UserStore
from tests.serve.client import Client


@pytest.fixture
def home(world, published, tmp_path) -> Path:
    """The world's store, live, and this test's own."""
    home = Path(shutil.copytree(world.home, tmp_path / "home"))
    registry = Registry(home)
    registry.write_validation(published, [Gate("golden", "at_least 1.0", 1.0, True)])
    registry.promote(published, "a test", "the first")
    return home


def test_every_user_is_loaded_as_into_the_file_and_only_when_something_changed(world, trained, home, redis_url):
    told = []
    for _ in range(2):
        load_users(
            world.config, world.tables(), trained.prepared, home, lambda *given: told.append(given), redis=redis_url
        )
    assert len({given[1] for given in told}) == len(told) > 0, "the second time there was nothing to do"
    with (
        UserStore.open(home / USERS) as files,
        RedisUsers.open(RedisPair.open(redis_url, 10.0), world.config.name) as shared,
    ):
        assert (shared.columns, shared.labels, shared.contexts) == (files.columns, files.labels, files.contexts)
        assert (len(shared), shared.until_ms) == (len(files), files.until_ms)
        for user_id in files.user_ids():
            one, other = files.get(user_id), shared.get(user_id)
            assert one is not None
            assert other is not None
            assert one.profile == other.profile
            for name in ("item_ids", "time_ms", "known_ms", "flags", "contexts"):
                assert np.array_equal(getattr(one, name), getattr(other, name))


def test_columns_that_another_version_reads_stay_when_the_users_are_loaded_again(world, trained, home, redis_url):
    pair = RedisPair.open(redis_url, 10.0)
    users = world.tables().users()
    extra = next(name for name in users.column_names if name not in world.config.features.columns("user"))
    RedisUsers.write(pair.writes, world.config.name, users, [], labels=[], user_id=world.config.data.user_id)
    assert extra in users.column_names
    load_users(world.config, world.tables(), trained.prepared, home, redis=redis_url)
    with RedisUsers.open(pair, world.config.name) as store:
        assert extra in store.columns


def test_winners_over_http_are_the_same_wherever_the_users_are(world, trained, home, redis_url):
    load_users(world.config, world.tables(), trained.prepared, home, redis=redis_url)
    requests = _last_requests(world.config, world.tables(), 20)
    with (
        Funnel.open(home) as files,
        Funnel.open(home, users=redis_url) as shared,
        Client(create_app(files)) as one,
        Client(create_app(shared)) as other,
    ):
        now_ms = files._users.until_ms + 60_000

        def asked(client: Client) -> list[list[dict]]:
            answers = []
            for request in requests:
                body = {"user_id": request.user_id, "k": 20, "context": request.context, "time_ms": now_ms}
                answer = client.post("/v1/recommend", json={**body, "deadline_ms": 60_000}).json()
                assert not answer["degraded"]
                answers.append(answer["winners"])
            return answers

        before = asked(other)
        assert before == asked(one)
        happened = [
            {"user_id": request.user_id, "item_id": winners[n]["item_id"], "event": event, "time_ms": now_ms - n - 1}
            for request, winners in zip(requests, before, strict=True)
            for n, event in enumerate(["is_click", "impression"])
        ]
        taken = [client.post("/v1/events", json={"events": happened}).json() for client in (one, other)]
        assert taken == [{"accepted": 40, "unknown_items": 0, "repeated": 0, "already_logged": 0}] * 2
        after = asked(other)
        assert after == asked(one)
        assert after != before, "what happened since counts"
