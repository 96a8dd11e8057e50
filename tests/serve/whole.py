"""Tiny funnels that a device answers whole, and what is the same answer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from prerank.serve.answer import Answer
from prerank.serve.device import DeviceEngine
from prerank.serve.device_buckets import Buckets
from prerank.serve.device_bundle import OnDevice
from prerank.serve.device_group import DeviceGroup
from prerank.serve.device_streams import CpuDevice
from tests.serve import world
from tests.serve.conftest import publish_live
from tests.serve.test_inventory import LISTS, TARGETING

BUCKETS = Buckets((4, 16), 64, 4)
FAILED = "the device could not answer this request; the host's own stages did"


def published(store: Path, keep: int = 6, **changes: object) -> Path:
    retrieval = world.config().to_dict()["retrieval"]
    assert isinstance(retrieval, dict)
    options: dict[str, object] = {
        "inventory": {"slack": 60},
        "targeting": TARGETING,
        "diversity": {"genre": {"at_most": 3}},
        "retrieval": {**retrieval, "keep": keep},
    }
    return publish_live(store, world.config(**options | changes), LISTS)


@contextmanager
def on(*devices: CpuDevice, **options: object) -> Iterator[OnDevice]:
    with ExitStack() as ends:
        engines = [ends.enter_context(DeviceEngine(one, 2, wait_ms=0)) for one in devices]
        engine = engines[0] if len(engines) == 1 else ends.enter_context(DeviceGroup(engines))
        yield OnDevice(engine, None, BUCKETS, whole=True, **options)  # type: ignore[arg-type]


def assert_same(found: Answer, wanted: Answer) -> None:
    assert [one.item_id for one in found.winners] == [one.item_id for one in wanted.winners]
    assert [one.metadata for one in found.winners] == [one.metadata for one in wanted.winners]
    utility, expected = ([one.utility_micros for one in answer.winners] for answer in (found, wanted))
    assert utility == pytest.approx(expected, rel=1e-5)
    assert found.notes == wanted.notes
    assert not found.degraded
