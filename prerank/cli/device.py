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
DeviceShards = Annotated[
    bool, typer.Option("--device-shards", help="Split the items by rows over the devices, each of which has a part.")
]


@contextmanager
def placed(
    names: Sequence[str],
    workers: int = 2,
    wait_ms: float = 0.2,
    dtype: Dtype = Dtype.BFLOAT16,
    whole: bool = False,
    shards: bool = False,
) -> Iterator[OnDevice | None]:
    """The devices of these names with an engine, which is closed when this ends; None where none is named.

    Raises ConfigError for a name that is none or comes twice, or of a device that is not there; for a `whole` request
    on none, and `shards` of which there would be one.
    """
    if whole and (shards or not names):
        why = "no device has all items with --device-shards; leave either out" if shards else "no device is named"
        raise ConfigError(f"--device-whole: {why}{'' if shards else '; say which with --device'}")
    if shards and len(names) < 2:
        raise ConfigError(f"--device-shards: expected several devices, got {len(names)}; repeat --device")
    if not names:
        yield None
        return
    numbers = _numbers(names)
    import torch

    from prerank.serve.device import DeviceEngine  # only needed where there is a device
    from prerank.serve.device_bundle import OnDevice
    from prerank.serve.device_cuda import cuda_device
    from prerank.serve.device_group import DeviceGroup
    from prerank.serve.device_split import DeviceSplit

    kept = torch.bfloat16 if dtype is Dtype.BFLOAT16 else torch.float32
    devices = [cuda_device(number) for number in numbers]
    with ExitStack() as engines:
        opened = [engines.enter_context(DeviceEngine(one, workers, wait_ms)) for one in devices]
        if len(opened) == 1:
            yield OnDevice(opened[0], kept, whole=whole)
        else:
            yield OnDevice(DeviceSplit(opened) if shards else DeviceGroup(opened), kept, whole=whole)


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
