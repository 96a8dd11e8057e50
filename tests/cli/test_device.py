"""What a command makes of --device: an engine, as said, which ends with the command."""

import threading

import pytest
import torch

from prerank.cli.device import Dtype, placed
from prerank.errors import ConfigError, DeviceFailed
from prerank.serve import device_cuda
from prerank.serve.device_options import Options
from prerank.serve.device_streams import CpuDevice
from prerank.types import CandidateSet
from tests.bundle.test_scorer import scorer


@pytest.fixture
def devices(monkeypatch):
    """The numbers of the devices that were asked for, of which each is a CPU."""
    asked = []
    monkeypatch.setattr(device_cuda, "cuda_device", lambda number: asked.append(number) or CpuDevice(f"cuda:{number}"))
    return asked


def test_without_a_name_there_is_no_device(devices):
    with placed([]) as place:
        assert place is None
    assert devices == []


@pytest.mark.parametrize(("name", "number"), [("cuda", 0), ("cuda:0", 0), ("cuda:12", 12)])
def test_a_device_has_so_many_workers_and_its_engine_ends_with_the_command(devices, name, number):
    with placed([name], workers=3, wait_ms=0, dtype=Dtype.FLOAT32) as place:
        assert devices == [number]
        assert place.dtype is torch.float32
        assert len([one for one in threading.enumerate() if one.name.startswith("device-")]) == 3
        version = place.engine.load(scorer([0.0, 1.0], [0.0, 0.0]), {"u": torch.zeros(1)}, Options(1))
        assert version.name == f"cuda:{number}"
    assert not [one for one in threading.enumerate() if one.name.startswith("device-")]
    rows = torch.tensor([[0, 1]])
    with pytest.raises(DeviceFailed, match="left the device"):
        version.submit({"u": torch.zeros(1)}, CandidateSet(rows, rows.float(), rows >= 0), 1)


def test_floats_are_bfloat16_unless_told_otherwise(devices):
    with placed(["cuda"]) as place:
        assert place.dtype is torch.bfloat16


def test_several_devices_are_one_engine_which_ends_with_the_command(devices):
    with placed(["cuda:1", "cuda"], workers=2) as place:
        assert devices == [1, 0]
        assert set(place.engine.snapshots()) == {"cuda:0", "cuda:1"}
        assert len([one for one in threading.enumerate() if one.name.startswith("device-")]) == 4
    assert not [one for one in threading.enumerate() if one.name.startswith("device-")]


def test_a_device_that_is_named_twice_is_refused_before_anything_begins(devices):
    with (
        pytest.raises(ConfigError, match="--device 'cuda:0': named twice; one engine has all of a device"),
        placed(["cuda", "cuda:0"]),
    ):
        pass
    assert devices == []
