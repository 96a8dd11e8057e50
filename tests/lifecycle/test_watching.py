"""What is judged is what a server counted since the version was new, and a watch ends as soon as it is broken."""

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import httpx
import pytest

from prerank.bundle.registry import Registry
from prerank.errors import PrerankError
from prerank.lifecycle.watching import Limits, Sample, Watch, Watched, metrics_of, sample_of, together
from prerank.serve.http import create_app
from prerank.serve.watch import VersionWatch
from tests.serve.server import listening

NEW = "20260309T0000-0123456789ab"
NOTHING = {"one": Sample()}
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

    return Watch({"one": read}, for_s, limits or Limits(), sleep=sleep, clock=lambda: at[-1]), at


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
    assert watched.over(NEW, NOTHING).why == f"one: the server serves old at the end of the watch, and not {NEW}"


def test_what_was_counted_before_does_not_count_and_a_restart_begins_anew() -> None:
    before = Sample("old", 500, errors=400, degraded=9, failed_loads=2, took={10.0: 100})
    now = Sample(NEW, 600, errors=401, degraded=9, failed_loads=2, took={10.0: 199, 20.0: 199})
    assert now.since(before) == Sample(NEW, 100, 1, 0, 0, {10.0: 99, 20.0: 199})
    restarted = Sample(NEW, 20, errors=1)
    assert restarted.since(before) == restarted
    watched, _ = watch(Sample(NEW, 600, errors=400), Sample(NEW, 700, errors=400))
    found = watched.over(NEW, {})
    assert (found.why, found.total.requests, found.total.errors) == ("", 100, 0)


def test_a_server_that_restarted_is_not_taken_for_one_that_did_not_once_it_counted_as_far() -> None:
    watched, _ = watch(Sample(NEW, 10), Sample(NEW, 600, errors=3), for_s=10.0)
    found = watched.over(NEW, {"one": Sample("old", 500)})
    assert (found.total.requests, found.total.errors) == (600, 3)


def test_a_watch_ends_as_soon_as_it_is_broken() -> None:
    watched, at = watch(Sample(NEW), FINE, Sample(NEW, 1100, errors=100))
    found = watched.over(NEW, NOTHING)
    assert found.why == "one: 9.1% of 1100 requests were errors, expected at most 1.0%"
    assert (found.seen["one"].errors, at) == (100, [0, 5, 10])


def test_a_server_that_answers_no_more_is_broken_and_one_that_misses_a_call_is_not() -> None:
    watched, at = watch(FINE, None)
    assert watched.over(NEW, NOTHING).why == "one: the server did not answer 5 times: nobody answers"
    assert at[-1] == 25
    watched, at = watch(None, None, FINE, None, FINE)
    found = watched.over(NEW, NOTHING)
    assert found == Watched("", {"one": FINE}, {"one": 3})
    assert found.said() == "1000 requests, 0 errors, p99 91 ms; one did not answer 3 times"
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


def several(**servers: Sample | None) -> Watch:
    """Each reads the same again and again; None is no answer."""

    def reads(one: Sample | None) -> Callable[[], Sample]:
        def read() -> Sample:
            if one is None:
                raise PrerankError("nobody answers there")
            return one

        return read

    at = [0.0]
    return Watch(
        {name: reads(one) for name, one in servers.items()},
        20.0,
        Limits(),
        sleep=lambda seconds: at.append(at[-1] + seconds),
        clock=lambda: at[-1],
    )


def test_one_server_that_breaks_is_enough_and_is_named() -> None:
    bad = Sample(NEW, 100, errors=5, took={10.0: 95})
    assert several(a=FINE, b=FINE).over(NEW, {"a": Sample(), "b": Sample()}).why == ""
    found = several(a=FINE, b=bad, c=FINE).over(NEW, dict.fromkeys("abc", Sample()))
    assert found.why == "b: 5.0% of 100 requests were errors, expected at most 1.0%", "of 2100 together 0.2%"
    assert (found.total.requests, found.total.errors) == (2100, 5)
    stays = several(a=FINE, b=Sample("old", 3)).over(NEW, dict.fromkeys("ab", Sample()))
    assert stays.why == f"b: the server serves old at the end of the watch, and not {NEW}"
    both = several(a=bad, b=bad).over(NEW, dict.fromkeys("ab", Sample())).why
    assert both.count("5.0% of 100 requests") == 2


def test_servers_that_have_too_few_requests_each_are_judged_together() -> None:
    few = Sample(NEW, 20, errors=2, took={10.0: 18})
    before = dict.fromkeys("abc", Sample())
    assert several(a=few, b=few).over(NEW, before).why == "", "40 requests are no verdict"
    found = several(a=few, b=few, c=few).over(NEW, before)
    assert found.why == "all 3 servers together: 10.0% of 60 requests were errors, expected at most 1.0%"


def test_a_server_that_cannot_be_reached_is_named_before_and_breaks_the_watch_later() -> None:
    one = several(a=FINE, b=None)
    with pytest.raises(PrerankError, match=r"^nobody answers there$"):
        one.look()
    found = one.over(NEW, {"a": Sample(), "b": Sample()})
    assert found.why == "b: the server did not answer 5 times: nobody answers there"
    assert found.missed == {"b": 5}


def test_counters_of_several_are_added() -> None:
    a = Sample(NEW, 10, 1, 2, 0, {10.0: 5, 20.0: 10})
    assert together([a, a]) == Sample(NEW, 20, 2, 4, 0, {10.0: 10, 20.0: 20})
    assert together([a, Sample("old", 1)]).version == ""
    assert together([]) == Sample()


def test_two_servers_are_watched_at_their_addresses(retrained: Path) -> None:
    version = str(Registry(retrained).live())
    with (
        closing(VersionWatch.open(retrained, workers=0)) as first,
        closing(VersionWatch.open(retrained, workers=0)) as second,
        listening(create_app(first.live)) as a,
        listening(create_app(second.live)) as b,
    ):
        watch = Watch({url: metrics_of(url) for url in (a, b)}, 0.4, Limits(least=2, p99_ms=60_000), every_s=0.2)
        before = watch.look()
        for url in (a, b, b):
            asked = httpx.post(f"{url}/v1/recommend", json={"user_id": 1, "k": 3, "context": {"hour": 2}}, timeout=30)
            assert asked.status_code == 200
        found = watch.over(version, before)
        assert (found.why, [found.seen[url].requests for url in (a, b)]) == ("", [1, 2])
        assert found.said().startswith("3 requests of 2 servers, 0 errors, p99 ")
        (retrained / "live").write_text(f"{NEW}\n")
        assert not second.look()
        found = watch.over(NEW, before)
        assert found.why == f"{b}: the server could not load {NEW}"
