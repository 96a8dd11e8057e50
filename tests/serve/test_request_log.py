"""What is logged is what was asked, known and answered; nobody waits for it, and no reader sees half of it."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import httpx
import numpy as np
import pytest
import structlog
import torch

from prerank.errors import ConfigError
from prerank.serve.expand import ExpandUser
from prerank.serve.funnel import Funnel
from prerank.serve.http import create_app
from prerank.serve.request_log import LogOptions, RequestLog
from prerank.serve.seeing import Seeing, Sight
from prerank.serve.seen import Seen, begin, end
from prerank.serve.served import NUM_LOST, Served, _drawn
from prerank.stores.live import LiveUsers
from prerank.stores.requests import digest_of
from prerank.types import CandidateSet, ItemChange, Request
from tests.serve import world
from tests.serve.client import Client
from tests.serve.fake import FakeFunnel
from tests.serve.logs import BODIES, BODY, NOW, log, read
from tests.serve.test_generators import publish
from tests.serve.test_serve import started

IDS = [f"request {n}" for n in range(20_000)]


@pytest.fixture
def options(tmp_path: Path) -> LogOptions:
    return LogOptions(tmp_path / "log", share=1.0)


@pytest.fixture
def served(funnel: Funnel) -> Served:
    """What a request was answered from."""
    seen = Seen("r", is_logged=True)
    token = begin(seen)
    funnel.recommend(Request(1, 3, NOW, {"hour": 1, "surface": "feed"}, request_id="r"))
    end(token)
    assert seen.served is not None
    return seen.served


def test_a_row_is_what_was_asked_known_and_answered(funnel: Funnel, published: Path, tmp_path: Path) -> None:
    answers, rows = log(funnel, tmp_path), read(tmp_path)
    assert len(rows) == len(BODIES)
    with LiveUsers.open(published / "users.lmdb", published / "events.lmdb") as users:
        for n, (body, answer, row) in enumerate(zip(BODIES, answers, rows, strict=True)):
            assert row.request_id == answer["request_id"] == f"r{n}"
            assert (row.version, row.user_id, row.k) == (answer["version"], body["user_id"], body["k"])
            assert (row.time_ms, row.context) == (body["time_ms"], body["context"])
            assert list(row.exclude) == body.get("exclude", [])
            assert row.item_ids.tolist() == [one["item_id"] for one in answer["winners"]]
            np.testing.assert_allclose(row.utility, [one["utility_micros"] for one in answer["winners"]], rtol=1e-6)
            assert row.tasks == ("click", "like")
            np.testing.assert_allclose(row.probs, [list(one["prob"].values()) for one in answer["winners"]], rtol=1e-6)
            bids = world.items()["bid_micros"].to_numpy()
            assert row.value_names == ("bid_micros",)
            assert row.values[:, 0].tolist() == bids[row.item_ids - 100].tolist()
            assert row.pacing.tolist() == [1.0] * len(row.item_ids)
            assert (row.degraded, list(row.notes)) == (answer["degraded"], answer["notes"])
            assert [one[0] for one in row.stages] == [one["name"] for one in answer["stages"]]
            assert 0 < sum(one[2] for one in row.stages) < 60_000
            assert row.ms > 0
            known = users.get(row.user_id)
            assert (row.record is None) == (known is None)
            if known is not None and row.record is not None:
                before = known.time_ms < row.time_ms
                assert row.record.profile == known.profile
                assert row.record.item_ids.tolist() == known.item_ids[before].tolist()
                assert row.record.flags.tolist() == known.flags[before].tolist()


def test_from_a_row_the_features_are_made_again_to_the_bit(funnel: Funnel, published: Path, tmp_path: Path) -> None:
    log(funnel, tmp_path)
    transforms, items = funnel.ranking.transforms, funnel.scorer.items
    with LiveUsers.open(published / "users.lmdb", published / "events.lmdb") as users:
        expand = ExpandUser(users, transforms, items)
        for row in read(tmp_path):
            features, _ = expand.expand(row.record, Request(row.user_id, row.k, row.time_ms, row.context))
            assert digest_of({name: one.numpy() for name, one in features.items()}) == row.digest
        assert row.record is not None
        one_less = {f.name: getattr(row.record, f.name)[1:] for f in fields(row.record) if f.name != "profile"}
        shorter = replace(row.record, **one_less)
        features, _ = expand.expand(shorter, Request(row.user_id, row.k, row.time_ms, row.context))
        assert digest_of({name: one.numpy() for name, one in features.items()}) != row.digest


def test_an_event_after_the_moment_asked_about_is_not_in_the_row(funnel: Funnel, tmp_path: Path) -> None:
    log(funnel, tmp_path, [{**BODY, "time_ms": world.T0 + 2000}])
    (row,) = read(tmp_path)
    assert row.record is not None
    assert row.record.item_ids.tolist() == [100, 101]


def test_those_that_lost_are_candidates_that_did_not_win_with_their_similarity(funnel: Funnel, tmp_path: Path) -> None:
    log(funnel, tmp_path)
    for row in read(tmp_path):
        assert row.num_candidates == 6
        lost = row.lost_item_ids.tolist()
        assert len(lost) == len(set(lost)) == row.num_candidates - len(row.item_ids)
        assert not set(lost) & set(row.item_ids.tolist())
        assert np.isfinite(row.lost_similarity).all()


def test_those_that_lost_are_drawn_alike(served: Served) -> None:
    """Of 400 candidates, of which the first ten won, each of the others comes as often."""
    rows = torch.arange(400)[None]
    valid = torch.ones_like(rows, dtype=torch.bool)
    valid[0, 300:] = False
    candidates = CandidateSet(rows, torch.zeros(1, 400), valid)
    drawn = np.zeros(400)
    for n in range(2000):
        places = _drawn(replace(served.request, request_id=str(n)), candidates, torch.arange(10))
        assert len(places) <= NUM_LOST
        drawn[places.numpy()] += 1
    assert drawn[:10].sum() == drawn[300:].sum() == 0
    expected = drawn.sum() / 290
    assert abs(drawn[10:300] / expected - 1).max() < 0.35  # four and a half standard deviations
    again = _drawn(served.request, candidates, torch.arange(10))
    assert again.tolist() == _drawn(served.request, candidates, torch.arange(10)).tolist()


def test_generators_and_what_changed_while_serving_are_in_the_row(tmp_path: Path) -> None:
    with Funnel.open(publish(tmp_path / "tiny", keep=3)) as funnel:
        funnel.change([ItemChange(100 + n, pacing=0.5, values={"bid_micros": 7.0}) for n in range(8)])
        answers = log(funnel, tmp_path / "log")
    for row, answer in zip(read(tmp_path / "log"), answers, strict=True):
        assert row.generators == ("index", "dear", "same_genre", "chosen")
        for bits, one in zip(row.found_by.tolist(), answer["winners"], strict=True):
            assert [name for at, name in enumerate(row.generators) if bits >> at & 1] == one["found_by"]
        assert row.values[:, 0].tolist() == [7.0] * len(row.item_ids)
        assert row.pacing.tolist() == [0.5] * len(row.item_ids)


def test_the_share_is_kept_and_every_server_keeps_the_same(options: LogOptions, tmp_path: Path) -> None:
    logs = [RequestLog(replace(options, folder=tmp_path / str(n), share=0.1)) for n in range(2)]
    kept = [[one for one in IDS if log.wants(one)] for log in logs]
    more = RequestLog(replace(options, share=0.2))
    for log_ in (*logs, more):
        log_.close()
    assert kept[0] == kept[1]
    assert abs(len(kept[0]) / len(IDS) - 0.1) < 0.01  # five standard deviations
    assert all(more.wants(one) for one in kept[0]), "of a larger share they are a part"


@pytest.mark.parametrize(("share", "num"), [(0.0, 0), (1.0, len(IDS))])
def test_none_and_all_are_shares_too(options: LogOptions, share: float, num: int) -> None:
    log = RequestLog(replace(options, share=share))
    log.close()
    assert sum(map(log.wants, IDS)) == num


def test_a_request_that_is_not_answered_is_not_logged(funnel: Funnel, options: LogOptions) -> None:
    with Client(create_app(funnel, sight=Sight(requests=options))) as client:
        assert client.post("/v1/recommend", json={**BODY, "k": 0}).status_code == 422
        assert client.post("/v1/recommend", json=BODY).status_code == 200
        client.get("/healthz")
        told = client.get("/metrics").text
        assert "prerank_logged_requests_waiting" in told
    assert [row.k for row in read(options.folder)] == [3]


@pytest.mark.parametrize(("status", "num"), [(200, 1), (499, 0), (500, 0)])
def test_an_answer_that_nobody_got_is_not_logged(served: Served, options: LogOptions, status: int, num: int) -> None:
    seeing = Seeing(Sight(requests=options))
    seen = Seen("r")
    seeing.arrives(seen, "POST", {})
    assert seen.is_logged
    seen.request, seen.served = served.request, served
    seeing.leaves(seen, "/v1/recommend", status, 0.002)
    seeing.close()
    assert len(list(options.folder.iterdir())) == num


def metric(text: str, outcome: str) -> float:
    (line,) = (
        one for one in text.splitlines() if one.startswith(f'prerank_logged_requests_total{{outcome="{outcome}"')
    )
    return float(line.split()[-1])


def test_a_full_queue_drops_and_counts_and_nobody_waits(
    funnel: Funnel, options: LogOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    logged = Served.logged

    def slow(self: Served, ms: float) -> object:
        go_on.wait(30)
        return logged(self, ms)

    monkeypatch.setattr(Served, "logged", slow)
    with Client(create_app(funnel, sight=Sight(requests=replace(options, waiting=3)))) as client:
        begun = time.monotonic()
        for _ in range(20):
            assert client.post("/v1/recommend", json=BODY).status_code == 200
        assert time.monotonic() - begun < 25
        told = client.get("/metrics").text
        # three wait; a fourth is with the thread, if it took one before the queue was full
        assert metric(told, "dropped") in (16, 17)
        go_on.set()
    assert len(read(options.folder)) == 20 - metric(told, "dropped")


def test_a_disk_that_takes_nothing_is_said_once_and_counted_and_requests_are_answered(
    funnel: Funnel, options: LogOptions
) -> None:
    at_once = replace(options, file_bytes=1)
    with structlog.testing.capture_logs() as logs:
        sight = Sight(requests=at_once)
        with Client(create_app(funnel, sight=sight)) as client:

            def until(outcome: str, num: int) -> None:
                for _ in range(500):
                    if metric(client.get("/metrics").text, outcome) == num:
                        return
                    time.sleep(0.02)
                raise AssertionError(client.get("/metrics").text)

            shutil.rmtree(options.folder)  # as a full or a lost disk: it cannot be written to
            for n in range(3):
                assert client.post("/v1/recommend", json=BODY).status_code == 200
                until("failed", n + 1)
            options.folder.mkdir()
            client.post("/v1/recommend", json=BODY)
            until("written", 1)
    said = [one for one in logs if "cannot be written" in one["event"]]
    assert len(said) == 1
    assert "FileNotFoundError" in said[0]["error"]
    assert len(read(options.folder)) == 1


def test_files_roll_by_size_and_by_time_and_are_for_their_owner(served: Served, options: LogOptions) -> None:
    by_size = RequestLog(replace(options, file_bytes=1))
    for _ in range(3):
        by_size.put(served, 1.0)
    by_size.close()
    files = sorted(options.folder.iterdir())
    assert len(files) == 3
    assert options.folder.stat().st_mode & 0o777 == 0o700
    assert all(one.stat().st_mode & 0o077 == 0 for one in files)
    by_time = RequestLog(replace(options, file_s=0.1))
    by_time.put(served, 1.0)
    for _ in range(500):
        if by_time.counts()["written"]:
            break
        time.sleep(0.02)
    assert by_time.counts()["written"] == 1, "a file is written though no other request comes"
    by_time.close()
    assert len(read(options.folder)) == 4


def test_the_oldest_files_go_when_all_take_too_much_or_are_too_old(served: Served, options: LogOptions) -> None:
    options.folder.mkdir()
    other = options.folder / "mine.parquet"
    other.touch()

    def write(limits: LogOptions, num: int) -> None:
        log = RequestLog(replace(limits, file_bytes=1))
        for _ in range(num):
            log.put(served, 1.0)
        log.close()

    write(options, 4)
    files = sorted(options.folder.glob("requests-*"))
    left_behind = options.folder / ".requests-1.parquet-00"
    left_behind.touch()
    os.utime(left_behind, (0, 0))
    os.utime(files[0], (0, 0))
    write(replace(options, keep_days=1.0), 1)
    assert not files[0].exists()
    assert not left_behind.exists()
    assert files[1].exists()
    size = files[1].stat().st_size
    write(replace(options, keep_bytes=int(2.5 * size)), 1)
    left = sorted(options.folder.glob("requests-*"))
    assert len(left) == 2
    assert not set(left) & set(files)
    assert other.exists()


def test_a_server_that_is_killed_leaves_whole_files_only(published: Path, tmp_path: Path) -> None:
    folder = tmp_path / "log"
    said = (
        "from prerank.serve.seeing import Sight; from prerank.serve.request_log import LogOptions; "
        f"sight = Sight(requests=LogOptions(Path({str(folder)!r}), 1.0, file_bytes=1))"
    )
    with started(published, said, "sight=sight") as (process, address), httpx.Client(base_url=address) as http:
        for _ in range(50):
            assert http.post("/v1/recommend", json=BODY).status_code == 200
        process.kill()
        process.wait(timeout=30)
    rows = read(folder)
    assert 1 <= len(rows) <= 50
    assert all(row.item_ids.tolist() == rows[0].item_ids.tolist() for row in rows)


def test_a_server_that_ends_writes_what_waits(published: Path, tmp_path: Path) -> None:
    folder = tmp_path / "log"
    said = (
        "from prerank.serve.seeing import Sight; from prerank.serve.request_log import LogOptions; "
        f"sight = Sight(requests=LogOptions(Path({str(folder)!r}), 1.0))"
    )
    with started(published, said, "sight=sight") as (process, address), httpx.Client(base_url=address) as http:
        for _ in range(5):
            http.post("/v1/recommend", json=BODY)
        process.terminate()
        process.communicate(timeout=30)
    assert len(read(folder)) == 5


def test_a_folder_that_cannot_be_written_to_is_refused_at_start(options: LogOptions) -> None:
    options.folder.write_text("a file")
    with pytest.raises(ConfigError, match=r"--log-requests .*log: expected a folder that this process may write to"):
        create_app(FakeFunnel(), sight=Sight(requests=options))


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    for thread in threading.enumerate():
        if thread.name == "request-log":
            thread.join(10)
            assert not thread.is_alive()
