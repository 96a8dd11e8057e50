"""The devices that rank for a command: CUDA devices that are named, or none, and then this machine's processor does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
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


DeviceNames = Annotated[
    list[str],
    typer.Option("--device", help="cuda or cuda:N: the GPU that ranks, repeat for several; none: the CPU's kernels."),
]
DeviceWorkers = Annotated[
    int, typer.Option(min=1, max=64, help="Threads with a stream and graphs of their own, of each --device.")
]
DeviceWaitMs = Annotated[
    float, typer.Option(min=0, max=1000, help="How long a small request waits for others to share a --device's batch.")
]
DeviceDtype = Annotated[
    Dtype, typer.Option(help="In what a --device has the ranker and its tables; float32 takes twice the memory.")
]

DeviceWhole = Annotated[
    bool,
    typer.Option("--device-whole", help="Let a --device find the candidates too: exactly, of items it has itself."),
]


@contextmanager
def placed(
    names: Sequence[str],
    workers: int = 2,
    wait_ms: float = 0.2,
    dtype: Dtype = Dtype.BFLOAT16,
    whole: bool = False,
) -> Iterator[OnDevice | None]:
    """The devices of these names with an engine, which is closed when this ends; None where none is named.

    Raises ConfigError for a name that is none or comes twice, or of a device that is not there; and for a `whole`
    request on none.
    """
    if not names:
        if whole:
            raise ConfigError("--device-whole: no device is named; say which with --device")
        yield None
        return
    numbers = _numbers(names)
    import torch

    from prerank.serve.device import DeviceEngine  # only needed where there is a device
    from prerank.serve.device_bundle import OnDevice
    from prerank.serve.device_cuda import cuda_device
    from prerank.serve.device_group import DeviceGroup

    kept = torch.bfloat16 if dtype is Dtype.BFLOAT16 else torch.float32
    devices = [cuda_device(number) for number in numbers]
    with ExitStack() as engines:
        opened = [engines.enter_context(DeviceEngine(one, workers, wait_ms)) for one in devices]
        yield OnDevice(opened[0] if len(opened) == 1 else DeviceGroup(opened), kept, whole=whole)


def _numbers(names: Sequence[str]) -> list[int]:
    numbers = [_number(name) for name in names]
    for at, number in enumerate(numbers):
        if number in numbers[:at]:
            raise ConfigError(f"--device {names[at]!r}: named twice; one engine has all of a device (--device-workers)")
    return numbers


def _number(name: str) -> int:
    kind, colon, number = name.partition(":")
    if kind != "cuda" or (colon and not (number.isascii() and number.isdecimal())):
        raise ConfigError(f"--device {name!r}: expected cuda, or cuda:N with the number of the device")
    return int(number or 0)
