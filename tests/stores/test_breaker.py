from pathlib import Path

import pyarrow as pa
import pytest

from prerank.errors import CircuitOpen
from prerank.stores.breaker import Breaker
from prerank.stores.redis_tail import RedisTail
from tests.stores.redis_server import redis_server


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def call(breaker: Breaker, fails: bool) -> str:
    try:
        with breaker:
            if fails:
                raise ValueError
    except ValueError:
        return "failed"
    except CircuitOpen as error:
        return "refused" if str(error).startswith("a store: failed ") else str(error)
    return "done"


def test_after_failures_in_a_row_nobody_asks_for_a_while_and_then_one_does() -> None:
    clock = Clock()
    breaker = Breaker("a store", failures=3, rest_s=2.0, clock=clock)
    assert [call(breaker, fails) for fails in (True, True, False, True, True)] == ["failed"] * 2 + ["done"] + [
        "failed"
    ] * 2
    assert not breaker.is_open
    assert [call(breaker, True) for _ in range(3)] == ["failed", "refused", "refused"]
    assert breaker.is_open
    clock.now = 2.0
    assert call(breaker, True) == "failed"  # the one that is let through
    assert call(breaker, False) == "refused"
    clock.now = 4.0
    assert [call(breaker, False), call(breaker, True), call(breaker, False)] == ["done", "failed", "done"]


def test_while_one_call_tries_whether_the_store_is_back_others_are_refused() -> None:
    clock = Clock()
    breaker = Breaker("a store", failures=1, rest_s=2.0, clock=clock)
    call(breaker, True)
    clock.now = 2.0
    with breaker:
        assert call(breaker, False) == "refused"
    assert call(breaker, False) == "done"


def test_a_redis_that_is_gone_is_not_asked_again_and_again(tmp_path: Path) -> None:
    pytest.importorskip("redis")
    with redis_server(tmp_path) as url:
        store = RedisTail.open(url, "market", 0.2)
        store.write(pa.table({"id": [1], "x": [2]}), "id", ["x"])
        assert store.get([1]) == [{"x": 2}]
    for _ in range(5):
        with pytest.raises(Exception, match="items cannot be read"):
            store.get([1])
    with pytest.raises(CircuitOpen, match="failed 5 times in a row; not asked again for"):
        store.get([1])
