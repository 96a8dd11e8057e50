"""`prerank doctor`: what this machine has, what it can do at best, and what keeps prerank from using it."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from prerank import __version__
from prerank._machine import memory_gib, num_cores, processor, version_of
from prerank.kernels import native
from prerank.kernels.ceilings import ceilings

LIBRARIES = ("numpy", "pyarrow", "safetensors", "lmdb", "msgspec", "starlette", "uvicorn", "triton")
EXTRAS: Mapping[str, str] = {"redis": "redis", "grpc": "grpcio", "hnsw": "faiss-cpu", "otel": "opentelemetry-sdk"}
"""By the name of the extra, the library that it brings first."""
DRIVER = Path("/proc/driver/nvidia/version")
"""Where the driver tells of itself."""
_LEAST_GIB = 4.0


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that is not as it should be, and what to do. `is_error`: prerank does not work so."""

    what: str
    then: str
    is_error: bool = False


@dataclass(frozen=True, slots=True)
class Findings:
    """Sections of names and values, and the faults, the worst first. `ceilings` are empty where not measured."""

    machine: Mapping[str, str]
    software: Mapping[str, str]
    device: Mapping[str, str]
    ceilings: Mapping[str, float]
    faults: tuple[Fault, ...]


def examine(is_measured: bool = True) -> Findings:
    """Look at this machine; with `is_measured` its ceilings too, which takes some seconds."""
    has_device = torch.cuda.is_available()
    devices = [*(["cpu"] if is_measured else []), *(["cuda"] if is_measured and has_device else [])]
    found = {f"{one} {name}": value for one in devices for name, value in ceilings(one).items()}
    faults = sorted(_faults(), key=lambda one: not one.is_error)
    return Findings(_machine(), _software(), _device(), found, tuple(faults))


def _machine() -> dict[str, str]:
    return {
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "processor": processor(),
        "cores": str(num_cores()),
        "memory": f"{memory_gib():.1f} GiB",
    }


def _software() -> dict[str, str]:
    level = native.level() if not native.fault() else f"none: {native.fault()}"
    found = {
        "prerank": __version__,
        "python": platform.python_version(),
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "native kernels": level,
    }
    found |= {name: version_of(name) for name in LIBRARIES}
    return found | {f"extra {extra}": version_of(library) for extra, library in EXTRAS.items()}


def _device() -> dict[str, str]:
    if not torch.cuda.is_available():
        built = torch.version.cuda
        return {"cuda": "no device" if built else "this torch is built without CUDA"}
    found = {"driver": _driver(), "cuda": str(torch.version.cuda), "triton": version_of("triton")}
    for number in range(torch.cuda.device_count()):
        said = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        found[f"device {number}"] = (
            f"{said.name}, sm_{said.major}{said.minor}, {said.multi_processor_count} multiprocessors, "
            f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
        )
    return found


def _driver() -> str:
    """Its version, as the kernel's module says."""
    said = DRIVER.read_text(encoding="utf-8") if DRIVER.is_file() else ""
    # NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.133.20  Sun ..., or ... Open Kernel Module for x86_64  570...
    found = re.search(r"Kernel Module\s.*?(\d+\.\d+(?:\.\d+)?)", said)
    return found[1] if found else "not told"


def _faults() -> Iterator[Fault]:
    if native.fault():
        yield Fault(f"no native kernels ({native.fault()})", "torch ranks, several times slower")
    elif native.level() == "portable":
        yield Fault("this processor has no AVX2", "torch ranks, several times slower")
    if memory_gib() < _LEAST_GIB:
        yield Fault(f"{memory_gib():.1f} GiB of memory", f"a million items want about {_LEAST_GIB:g} GiB")
    policy = os.environ.get("OMP_WAIT_POLICY", "").upper()
    if policy == "ACTIVE":
        yield Fault("OMP_WAIT_POLICY is ACTIVE", "unset it: threads that spin take the cores from those that rank")
    if torch.cuda.is_available():
        if version_of("triton") == "not installed":
            yield Fault("a CUDA device and no triton", "pip install triton, of the version this torch names", True)
        for number in range(torch.cuda.device_count()):
            if torch.cuda.get_device_capability(number) < (8, 0):
                yield Fault(f"device {number} is older than sm_80", "its bfloat16 is slow; rank on the processor")
    elif DRIVER.exists() and not torch.version.cuda:
        yield Fault("an NVIDIA driver, and a torch built without CUDA", "docs/install.md says which torch to install")
