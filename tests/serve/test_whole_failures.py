"""Whole requests that a device cannot answer, or not in time: what the host makes of them."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from prerank.serve import device_bundle
from prerank.serve.device import DeviceEngine
from prerank.serve.device_bundle import OnDevice
from prerank.serve.device_streams import CpuDevice
from prerank.serve.device_version import DeviceVersion
from prerank.serve.funnel import Funnel
from prerank.serve.trace_pages import narrowing
from prerank.serve.whole import Whole
from prerank.types import ItemChange
from tests.serve.late_device import LateDevice, Lost
from tests.serve.test_inventory import COLUMNS, REQUEST
from tests.serve.whole import BUCKETS, FAILED, assert_same, on, published


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return published(tmp_path_factory.mktemp("whole") / "tiny")


@pytest.fixture
def funnel(store: Path, tmp_path: Path) -> Iterator[Funnel]:
    folder = shutil.copytree(store, tmp_path / "store")
    with on(CpuDevice()) as place, Funnel.open(folder, workers=0, device=place) as funnel:
        yield funnel


def test_what_a_lost_device_cannot_answer_the_host_does_and_it_comes_back_with_what_changed(
    store: Path, tmp_path: Path
) -> None:
    folder, device = shutil.copytree(store, tmp_path / "store"), LateDevice(threading.RLock())
    with DeviceEngine(device, 1, wait_ms=0) as engine:
        place = OnDevice(engine, None, BUCKETS, whole=True)
        with Funnel.open(store, workers=0) as host, Funnel.open(folder, workers=0, device=place) as funnel:
            version = funnel._on_device
            assert version is not None
            device.replay_error = device.capture_error = Lost("gone")
            wanted = host.recommend(REQUEST)
            answer = funnel.recommend(REQUEST)
            assert answer.notes == [*wanted.notes, FAILED]
            assert_same(replace(answer, notes=wanted.notes), wanted)
            assert engine.snapshot().fallbacks == 1
            assert engine.snapshot().restarts == 1
            funnel.change([ItemChange(500, columns={**COLUMNS, "countries": ["de", "zz"]})])
            assert funnel.recommend(REQUEST).winners[0].item_id == 500
            device.replay_error = device.capture_error = None
            for part in version.parts:
                assert isinstance(part, DeviceVersion)
                part._retry_at = 0.0
                part._revive()
            before = engine.snapshot().fallbacks
            answer = funnel.recommend(REQUEST)
            assert answer.winners[0].item_id == 500
            assert answer.notes == wanted.notes
            assert engine.snapshot().fallbacks == before


def test_of_several_devices_another_answers_for_one_that_is_lost(store: Path, tmp_path: Path) -> None:
    folder, devices = shutil.copytree(store, tmp_path / "store"), [LateDevice(threading.RLock(), name=n) for n in "ab"]
    with on(*devices) as place, Funnel.open(folder, workers=0, device=place) as funnel:
        wanted = funnel.recommend(REQUEST)
        devices[0].replay_error = devices[0].capture_error = Lost("gone")
        for _ in range(4):
            assert_same(funnel.recommend(REQUEST), wanted)
        funnel.change([ItemChange(500, columns=COLUMNS)])
        assert funnel.recommend(REQUEST).winners[0].item_id == 500
        assert place.engine.snapshot().fallbacks == 0
        devices[0].replay_error = devices[0].capture_error = None


def test_what_a_device_has_no_room_for_the_host_answers(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = device_bundle.retrieval_of
    monkeypatch.setattr(device_bundle, "retrieval_of", lambda *of: replace(right(*of), most_excluded=1, room=1))
    folder = shutil.copytree(store, tmp_path / "store")
    with on(CpuDevice()) as place, Funnel.open(folder, workers=0, device=place) as funnel:
        assert FAILED not in funnel.recommend(replace(REQUEST, exclude=(100,))).notes
        answer = funnel.recommend(replace(REQUEST, exclude=(100, 101)))
        assert FAILED in answer.notes
        assert not {100, 101} & {one.item_id for one in answer.winners}
        # of two values that are new there is room for the first; whoever asks by none of them is answered as ever
        funnel.change([ItemChange(500, columns={**COLUMNS, "banned": ["search", "elsewhere"]})])
        for surface, notes in {"feed": [], "elsewhere": [], "search": [FAILED]}.items():
            answer = funnel.recommend(replace(REQUEST, context={"hour": 1, "surface": surface}))
            assert answer.notes == notes
            assert (500 in {one.item_id for one in answer.winners}) == (surface == "feed")
        assert place.engine.snapshot().fallbacks == 2


def test_an_excluded_item_that_is_written_anew_as_it_is_asked_does_not_win(
    funnel: Funnel, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Whole.sought
    nowhere = torch.zeros(0, dtype=torch.int64)  # its row is no more what it was when it was looked up
    monkeypatch.setattr(Whole, "sought", lambda self, *of: replace(right(self, *of), excluded=nowhere))
    best = funnel.recommend(REQUEST).winners[0].item_id
    answer = funnel.recommend(replace(REQUEST, exclude=(best,)))
    assert best not in {one.item_id for one in answer.winners}
    assert FAILED in answer.notes


def test_where_a_device_is_late_the_candidates_are_ordered_by_similarity(
    funnel: Funnel, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait, right = threading.Event(), DeviceVersion.find
    monkeypatch.setattr(DeviceVersion, "find", lambda self, *of: wait.wait(60) and right(self, *of))
    try:
        answer = funnel.recommend(replace(REQUEST, deadline_ms=300.0))
    finally:
        wait.set()
    assert answer.degraded
    assert answer.winners
    assert {one.utility_micros for one in answer.winners} == {None}
    assert "whole_by_similarity took its place" in answer.notes[-1]
    assert [(one.name, one.num) for one in narrowing(answer.stages)] == [("items", 8), ("winners", 5)]
