"""What a command makes of --device: an engine, as said, which ends with the command."""

import json
import sys
import threading

import pytest
import structlog
import torch

from prerank.cli.app import main
from prerank.cli.device import Dtype, placed
from prerank.errors import ConfigError, DeviceFailed
from prerank.serve import device_cuda
from prerank.serve.device_options import Options
from prerank.serve.device_streams import CpuDevice
from prerank.serve.funnel import Funnel
from prerank.types import CandidateSet
from tests.bundle.test_scorer import scorer
from tests.serve import world
from tests.serve.conftest import publish_live
from tests.serve.logs import log
from tests.serve.test_generators import GENERATORS


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


def said(monkeypatch, capsys, *words, code=0):
    """What `prerank` prints, in this process, where devices can be others."""
    monkeypatch.setattr(sys, "argv", ["prerank", *map(str, words)])
    threads = torch.get_num_threads()
    try:
        main()
        left = 0
    except SystemExit as end:
        left = end.code or 0
    finally:  # a server sets what is the process's own: these threads, and logs to what is stderr now
        torch.set_num_threads(threads)
        structlog.reset_defaults()
    told = capsys.readouterr()
    assert left == code, told
    return told.out + told.err


@pytest.mark.usefixtures("devices")
def test_a_device_answers_whole_requests_where_that_is_said(monkeypatch, capsys, tmp_path):
    publish_live(tmp_path / "tiny", world.config())
    words = ("recommend", "-u", 1, "-k", 3, "-x", "hour=1", "-x", "surface=feed", "--store", tmp_path, "--json")
    host, device = (
        json.loads(said(monkeypatch, capsys, *words, *more)) for more in ((), ("--device", "cuda", "--device-whole"))
    )
    assert "whole" in {one["name"] for one in device["stages"]}
    assert [one["item_id"] for one in device["winners"]] == [one["item_id"] for one in host["winners"]]


@pytest.mark.usefixtures("devices")
def test_a_profile_tells_the_whole_stage_of_a_device(monkeypatch, capsys, tmp_path):
    with Funnel.open(publish_live(tmp_path / "tiny", world.config())) as funnel:
        log(funnel, tmp_path / "log")
    words = ("profile", "--store", tmp_path, "-n", 2, "--no-measure", "--json", "--out", tmp_path / "trace.json")
    whole = ("--device", "cuda", "--device-whole")
    printed = said(monkeypatch, capsys, *words, *whole, "--requests", tmp_path / "log")
    told, _ = json.JSONDecoder().raw_decode(printed[printed.index("{") :])
    stages = {one["stage"] for one in told["lines"]}
    assert "whole" in stages
    assert not stages & {"target", "retrieve", "rank"}
    told = " ".join(said(monkeypatch, capsys, *words, *whole, code=1).split())
    assert "--device-whole: expected --requests too; golden requests are of every item that is on" in told


@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize("verb", [("serve",), ("recommend", "-u", 1)])
def test_a_funnel_that_no_device_can_answer_whole_is_an_error_that_says_so(monkeypatch, capsys, tmp_path, verb):
    publish_live(tmp_path / "tiny", world.config(generators=GENERATORS))
    words = (*verb, "--store", tmp_path, "--device", "cuda", "--device-whole")
    told = " ".join(said(monkeypatch, capsys, *words, code=1).split())
    assert told.startswith("error: --device-whole: ")
    assert told.endswith("(dear, same_genre, chosen); leave --device-whole out, and the device only ranks")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--device-shards"], "--device-shards: expected several devices, got 0; repeat --device"),
        (["--device", "cuda", "--device-shards"], "--device-shards: expected several devices, got 1; repeat --device"),
        (
            ["--device", "cuda", "--device", "cuda:1", "--device-shards", "--device-whole"],
            "--device-whole: no device has all items with --device-shards; leave either out",
        ),
    ],
)
def test_items_are_split_over_several_devices_and_then_no_device_finds_any(
    devices, monkeypatch, capsys, tmp_path, words, says
):
    publish_live(tmp_path / "tiny", world.config())
    told = " ".join(said(monkeypatch, capsys, "serve", "--store", tmp_path, *words, code=1).split())
    assert says in told
    assert devices == []


def test_devices_that_have_a_part_each_are_one_engine_which_ends_with_the_command(devices):
    with placed(["cuda:1", "cuda"], shards=True) as place:
        assert devices == [1, 0]
        version = place.engine.load(scorer([0.0, 1.0], [0.0, 0.0]), {"u": torch.zeros(1)}, Options(1))
        assert version.name == "cuda:1+cuda:0"
    assert not [one for one in threading.enumerate() if one.name.startswith("device-")]


def test_whole_requests_want_a_device(monkeypatch, capsys, tmp_path):
    publish_live(tmp_path / "tiny", world.config())
    told = said(monkeypatch, capsys, "serve", "--store", tmp_path, "--device-whole", code=1)
    assert told == "error: --device-whole: no device is named; say which with --device\n"
