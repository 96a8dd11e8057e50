"""What is judged is what a server counted since the version was new, and a watch ends as soon as it is broken."""

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import httpx
import pytest

from prerank.bundle.registry import Registry
from prerank.errors import PrerankError
from prerank.lifecycle.watching import Limits, Sample, Watch, metrics_of, sample_of
from prerank.serve.http import create_app
from prerank.serve.watch import VersionWatch
from tests.serve.server import listening

NEW = "20260309T0000-0123456789ab"
FINE = Sample(NEW, requests=1000, errors=0, degraded=0, took={10.0: 900, 100.0: 1000})


def watch(*samples: Sample | None, for_s: float = 30.0, limits: Limits | None = None) -> tuple[Watch, list[float]]:
    """Reads these one after the other, the last again and again; None is no answer. And when it was read."""
    at, left = [0.0], list(samples)

    def read() -> Sample:
        one = left.pop(0) if len(left) > 1 else left[0]
        if one is None:
            raise PrerankError("nobody answers")
        return one

    def sleep(seconds: float) -> None:
        at.append(at[-1] + seconds)

    return Watch(read, for_s, limits or Limits(), sleep=sleep, clock=lambda: at[-1]), at


@pytest.mark.parametrize(
    ("seen", "why"),
    [
        (FINE, ""),
        (Sample(NEW, 1000, errors=10, took={10.0: 990}), ""),
        (Sample(NEW, 1000, errors=11, took={10.0: 989}), "1.1% of 1000 requests were errors, expected at most 1.0%"),
        (Sample(NEW, 1000, degraded=51, took={10.0: 1000}), "5.1% of 1000 requests were degraded answers"),
        (
            Sample(NEW, 1000, took={1000.0: 989, 5000.0: 1000}),
            "p99 is 1364 ms over 1000 requests, expected at most",
        ),
        (Sample(NEW, 1000, took={1000.0: 989, float("inf"): 1000}), "p99 is inf ms"),
        (Sample(NEW, 49, errors=49), ""),
        (Sample(NEW, 0, failed_loads=1), f"the server could not load {NEW}"),
    ],
)
def test_limits_are_shares_of_enough_requests(seen: Sample, why: str) -> None:
    found = Limits().broken(seen, NEW, 1.0)
    assert found.startswith(why)
    assert bool(found) == bool(why)


def test_a_server_that_does_not_switch_is_broken_after_a_while_and_at_the_end() -> None:
    old = Sample("old", 1000)
    assert Limits(switch_s=60).broken(old, NEW, 59) == ""
    assert Limits(switch_s=60).broken(old, NEW, 61) == f"the server serves old 61 s after {NEW} was rolled out"
    watched, _ = watch(Sample("old", 10), for_s=10)
    assert watched.over(NEW, Sample())[0] == f"the server serves old at the end of the watch, and not {NEW}"


def test_what_was_counted_before_does_not_count_and_a_restart_begins_anew() -> None:
    before = Sample("old", 500, errors=400, degraded=9, failed_loads=2, took={10.0: 100})
    now = Sample(NEW, 600, errors=401, degraded=9, failed_loads=2, took={10.0: 199, 20.0: 199})
    assert now.since(before) == Sample(NEW, 100, 1, 0, 0, {10.0: 99, 20.0: 199})
    restarted = Sample(NEW, 20, errors=1)
    assert restarted.since(before) == restarted
    watched, _ = watch(Sample(NEW, 600, errors=400), Sample(NEW, 700, errors=400))
    why, seen = watched.over(NEW, None)
    assert (why, seen.requests, seen.errors) == ("", 100, 0)


def test_a_watch_ends_as_soon_as_it_is_broken() -> None:
    watched, at = watch(Sample(NEW), FINE, Sample(NEW, 1100, errors=100))
    why, seen = watched.over(NEW, Sample())
    assert why == "9.1% of 1100 requests were errors, expected at most 1.0%"
    assert (seen.errors, at) == (100, [0, 5, 10])


def test_a_server_that_answers_no_more_is_broken_and_one_that_misses_a_call_is_not() -> None:
    watched, at = watch(FINE, None)
    assert watched.over(NEW, Sample())[0] == "the server did not answer 5 times: nobody answers"
    assert at[-1] == 25
    watched, at = watch(None, None, FINE, None, FINE)
    assert watched.over(NEW, Sample()) == ("", FINE)
    assert at[-1] == 30


@pytest.fixture
def address(retrained: Path) -> Iterator[tuple[VersionWatch, str]]:
    with closing(VersionWatch.open(retrained, workers=0)) as serving, listening(create_app(serving.live)) as address:
        yield serving, address


def test_a_servers_own_metrics_are_read(retrained: Path, address: tuple[VersionWatch, str]) -> None:
    serving, url = address
    read: Callable[[], Sample] = metrics_of(url)
    before = read()
    for _ in range(3):
        asked = httpx.post(f"{url}/v1/recommend", json={"user_id": 1, "k": 3, "context": {"hour": 2}}, timeout=30)
        assert asked.status_code == 200
    assert httpx.post(f"{url}/v1/recommend", json={"user_id": 1}, timeout=30).status_code == 422
    seen = read().since(before)
    assert (seen.version, seen.requests, seen.errors, seen.degraded) == (Registry(retrained).live(), 4, 0, 0)
    assert max(seen.took.values()) == 3
    assert 0 < seen.quantile_ms(0.99) < 60_000
    (retrained / "live").write_text(f"{NEW}\n")
    assert not serving.look()
    assert Limits().broken(read().since(before), NEW, 1.0) == f"the server could not load {NEW}"


def test_metrics_of_something_else_are_refused() -> None:
    with pytest.raises(PrerankError, match=r"expected the metrics of a prerank server, found \['up'\]"):
        sample_of("# TYPE up gauge\nup 1\n")
    with pytest.raises(PrerankError, match=r"http://127\.0\.0\.1:9/metrics: a server's metrics cannot"):
        metrics_of("http://127.0.0.1:9/")()
