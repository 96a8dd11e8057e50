"""A market's own targeting, from its items table to the winners: none of them is not for this user."""

from dataclasses import replace

import numpy as np
import pytest

from prerank.bundle.registry import Gate, Registry
from prerank.cli.demo import _last_requests
from prerank.config import TargetingRule, parse_config
from prerank.data.check import check
from prerank.data.logs import open_tables
from prerank.lifecycle.build import USERS, load_users, publish_trained
from prerank.serve.funnel import Funnel
from prerank.stores.users import UserStore
from prerank.types import Request
from tests.conftest import small_funnel

RULES = {
    "country": {"user": "country", "item": "countries"},
    "age": {"user": "age_band", "item": "age_bands"},
    "device": {"user": "device", "item": "devices"},
    "bored": {"user": "interests", "item": "category", "excludes": True},
    "surface": {"context": "surface", "item": "format", "excludes": True},
}


@pytest.fixture(scope="module")
def targeted(world, trained, tmp_path_factory):
    """The world's own models, published with rules; and its tables."""
    home = tmp_path_factory.mktemp("store") / "market"
    (home / "work").mkdir(parents=True)
    config = parse_config({**small_funnel(), "targeting": RULES}, "the small funnel with rules")
    tables = open_tables(config, world.data, home / "work")
    assert check(config, tables) == check(world.config, tables)
    load_users(config, tables, trained.prepared, home)
    version = publish_trained(replace(trained, config=config), tables, home, {})
    registry = Registry(home)
    registry.write_validation(version, [Gate("golden", "at_least 1.0", 1.0, True)])
    registry.promote(version, "a test", "the first")
    return home, config, tables


def test_every_winner_of_a_market_is_for_the_user_who_is_shown_it(targeted):
    home, _, tables = targeted
    items = {row["item_id"]: row for row in tables.items().to_pylist()}
    users = tables.users().to_pylist()
    with Funnel.open(home) as funnel:
        for n in np.random.default_rng(4).choice(len(users), 60, replace=False):
            user, surface = users[n], ("feed", "search", "text", "image")[n % 4]
            request = Request(user["user_id"], 50, 1_768_000_000_000, {"surface": surface, "hour": 9})

            def is_for(item, user=user, surface=surface):
                return (
                    all(
                        not item[column] or user[own] in item[column]
                        for own, column in (("country", "countries"), ("age_band", "age_bands"), ("device", "devices"))
                    )
                    and item["category"] not in user["interests"]
                    and item["format"] != surface
                )

            answer = funnel.recommend(request)
            expected = sum(map(is_for, items.values()))
            assert all(is_for(items[winner.item_id]) for winner in answer.winners)
            assert next(s.num_in for s in answer.stages if s.name == "retrieve") == expected
            assert len(answer.winners) == min(50, expected)


def test_users_are_loaded_again_with_what_the_rules_read_and_keep_what_another_version_reads(
    targeted, trained, tmp_path
):
    _, config, tables = targeted
    found = []
    for column in ("country", "account_age_days", ""):
        rules = {"rule": TargetingRule(item="category", user=column)} if column else {}
        load_users(replace(config, targeting=rules), tables, trained.prepared, tmp_path)
        with UserStore.open(tmp_path / USERS) as users:
            found.append(("account_age_days" in users.columns, (tmp_path / f"{USERS}.key").read_text()))
    assert [is_there for is_there, _ in found] == [False, True, True]  # the version before may be rolled back to
    assert len({mark for _, mark in found}) == 3


def test_the_requests_of_a_demo_have_the_fields_that_targeting_reads_from_the_log_or_null(targeted):
    _, config, tables = targeted
    rules = {name: TargetingRule(item="format", context=name) for name in ("surface", "position", "placement")}
    for one in _last_requests(replace(config, targeting=rules), tables, 3):
        assert set(one.context) == {"surface", "hour", "position", "placement"}
        assert one.context["placement"] is None
        assert isinstance(one.context["position"], int)
