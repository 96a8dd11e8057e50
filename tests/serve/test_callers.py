"""A search that nobody waits for any more ends within milliseconds, also in the middle of a native scan."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from prerank.bundle.shard import Place
from prerank.errors import Cancelled
from prerank.kernels import native
from prerank.kernels.scan import scan_by_torch, scan_top_k
from prerank.kernels.stop import Stop, current
from prerank.serve.callers import Callers
from prerank.serve.index_flight import FlightHost, FlightServer
from prerank.serve.index_host import Found, HostFailed, IndexHost, Search


@pytest.fixture(scope="module")
def slow() -> Callable[[], None]:
    """A scan of a second or more."""
    vectors, query = torch.rand(400_000, 64), torch.rand(256, 64)

    def scan() -> None:
        scan_top_k(vectors, None, query, 100, None, threads=1)

    return scan


class Slow(IndexHost):
    """A host that scans for long, and says when it began and how it ended."""

    def __init__(self, store: Path, scan: Callable[[], None]) -> None:
        super().__init__(store, Place(0, 1))
        self.scan, self.began, self.ended = scan, threading.Event(), threading.Event()
        self.was_cancelled = False

    def search(self, search: Search, timeout_s: float | None = None) -> Found:
        self.began.set()
        try:
            self.scan()
        except Cancelled:
            self.was_cancelled = True
            raise
        finally:
            self.ended.set()
        return Found(search.version, torch.zeros(0, dtype=torch.int64), torch.zeros(0), 0)


@pytest.mark.alone
def test_a_search_whose_time_is_up_frees_the_host_at_once(slow: Callable[[], None], tmp_path: Path) -> None:
    start = time.monotonic()
    slow()
    whole_s = time.monotonic() - start
    host = Slow(tmp_path, slow)
    server = FlightServer(host)
    client = FlightHost(f"127.0.0.1:{server.port}")
    try:
        start = time.monotonic()
        with pytest.raises(HostFailed):
            client.search(Search("any", {}, torch.zeros(1), 1), timeout_s=0.1)
        assert host.ended.wait(60)
        took_s = time.monotonic() - start
    finally:
        client.close()
        server.shutdown()
    assert host.was_cancelled
    assert took_s < 0.1 + 0.5 * (whole_s - 0.1), f"{took_s} s of {whole_s} s"


def test_a_scan_is_ended_in_the_middle_and_answers_nothing(slow: Callable[[], None]) -> None:
    gone = threading.Event()
    threading.Timer(0.05, gone.set).start()
    with pytest.raises(Cancelled), Callers().waited_for(gone.is_set):
        slow()
    assert not current().is_set(), "what runs here next is not left"
    slow()


@pytest.mark.parametrize("way", ["torch", "here"])
def test_a_scan_that_is_left_before_it_begins_raises(way: str) -> None:
    if way == "here" and native.library() is None:
        pytest.skip("no native kernels here")
    scan = scan_by_torch if way == "torch" else scan_top_k
    vectors, query = torch.rand(10, 4), torch.rand(1, 4)
    stop = Stop()
    stop.set()
    with pytest.raises(Cancelled), stop.here():
        scan(vectors, None, query, 2, None)


def test_whoever_has_gone_is_not_asked_after_the_search_ended() -> None:
    asked: list[float] = []
    callers = Callers()
    with callers.waited_for(lambda: bool(asked.append(time.monotonic()))):
        time.sleep(0.05)
    assert asked
    num = len(asked)
    time.sleep(0.05)
    assert len(asked) == num
