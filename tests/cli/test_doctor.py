from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from prerank.cli import doctor
from prerank.cli.app import app
from prerank.kernels import native


def run(*words: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["doctor", *words])
    return done.exit_code, done.stdout


def test_it_tells_of_the_machine_and_what_is_installed() -> None:
    code, said = run("--no-measure", "--json")
    found = json.loads(said)
    assert code == 0
    assert found["software"]["torch"].startswith(torch.__version__)
    assert found["software"]["native kernels"] == native.level()
    assert int(found["machine"]["cores"]) >= 1
    assert found["ceilings"] == {}


def test_what_it_measures_are_the_processors_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "ceilings", lambda device: {"copy_gb_s": 12.25 if device == "cpu" else 0.0})
    assert json.loads(run("--json")[1])["ceilings"] == {"cpu copy_gb_s": 12.25}
    assert "cpu copy gb/s" in run()[1]
    assert "12.2" in run()[1]


def test_what_is_amiss_comes_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    native.library.cache_clear()
    monkeypatch.setenv(native.OFF, "1")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    monkeypatch.setattr(doctor, "memory_gib", lambda: 1.5)
    try:
        code, said = run("--no-measure")
    finally:
        native.library.cache_clear()
    assert code == 0, "slower, but it works"
    assert f"no native kernels ({native.OFF} is set): torch ranks, several times slower" in said
    assert "OMP_WAIT_POLICY is ACTIVE: unset it" in said
    assert "1.5 GiB of memory: a million items want about 4 GiB" in said


def test_a_device_that_cannot_be_used_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = SimpleNamespace(name="H100", major=7, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: made)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2**30, 2**31))
    monkeypatch.setattr(doctor, "version_of", lambda library: "not installed" if library == "triton" else "1.0")
    monkeypatch.setattr(doctor, "DRIVER", tmp_path / "none")
    code, said = run("--no-measure", "--json")
    found = json.loads(said)
    assert code == 1
    assert [one["what"] for one in found["faults"]][:2] == [
        "a CUDA device and no triton",
        "device 0 is older than sm_80",
    ]
    assert (found["device"]["driver"], found["device"]["triton"]) == ("not told", "not installed")
    assert found["device"]["device 0"] == "H100, sm_70, 132 multiprocessors, 1.0 of 2.0 GiB free"


@pytest.mark.parametrize(
    "said",
    [
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.133.20  Sun Mar 30 03:44:49 UTC 2025",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.133.20  Release Build  (archlinux-builder@)",
    ],
)
def test_of_a_device_the_driver_triton_capability_memory_and_ceilings_are_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, said: str
) -> None:
    made = SimpleNamespace(name="H200", major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: made)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (130 * 2**30, 140 * 2**30))
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(doctor, "version_of", lambda _: "3.6.0")
    monkeypatch.setattr(doctor, "DRIVER", tmp_path / "version")
    (tmp_path / "version").write_text(said + "\nGCC version:  gcc version 13.3.0\n")
    rates = {"copy_gb_s": 4_300.0, "fp32_matmul_gflop_s": 50_000.0, "bf16_matmul_gflop_s": 790_000.0}
    monkeypatch.setattr(doctor, "ceilings", lambda device: rates if device == "cuda" else {})
    code, told = run("--json")
    found = json.loads(told)
    assert code == 0
    assert found["device"] == {
        "driver": "570.133.20",
        "cuda": "12.8",
        "triton": "3.6.0",
        "device 0": "H200, sm_90, 132 multiprocessors, 130.0 of 140.0 GiB free",
    }
    assert found["ceilings"] == {f"cuda {name}": rate for name, rate in rates.items()}
