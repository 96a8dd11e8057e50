"""The device that ranks for a command: a CUDA device that is named, or none, and then this machine's processor does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from prerank.errors import ConfigError

if TYPE_CHECKING:
    from prerank.serve.device_bundle import OnDevice


class Dtype(StrEnum):
    """In what the ranker's floats are on a device; products are summed in float32 in any case."""

    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"


DeviceName = Annotated[
    str | None,
    typer.Option("--device", help="cuda or cuda:N: the GPU that ranks; by default the native kernels of the CPU do."),
]
DeviceWorkers = Annotated[
    int, typer.Option(min=1, max=64, help="Threads with a stream and graphs of their own, of a --device.")
]
DeviceWaitMs = Annotated[
    float, typer.Option(min=0, max=1000, help="How long a small request waits for others to share a --device's batch.")
]
DeviceDtype = Annotated[
    Dtype, typer.Option(help="In what a --device has the ranker and its tables; float32 takes twice the memory.")
]


@contextmanager
def placed(
    name: str | None, workers: int = 2, wait_ms: float = 0.2, dtype: Dtype = Dtype.BFLOAT16
) -> Iterator[OnDevice | None]:
    """The device of this name with an engine, which is closed when this ends; None where none is named.

    Raises ConfigError for a name that is none, or of a device that is not there.
    """
    if name is None:
        yield None
        return
    number = _number(name)
    import torch

    from prerank.serve.device import DeviceEngine  # only needed where there is a device
    from prerank.serve.device_bundle import OnDevice
    from prerank.serve.device_cuda import cuda_device

    kept = torch.bfloat16 if dtype is Dtype.BFLOAT16 else torch.float32
    with DeviceEngine(cuda_device(number), workers, wait_ms) as engine:
        yield OnDevice(engine, kept)


def _number(name: str) -> int:
    kind, colon, number = name.partition(":")
    if kind != "cuda" or (colon and not (number.isascii() and number.isdecimal())):
        raise ConfigError(f"--device {name!r}: expected cuda, or cuda:N with the number of the device")
    return int(number or 0)
