"""A request's work as one captured graph: its inputs up in one copy, its answer down in one, one wait."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

from prerank.bundle.judge import Ranked
from prerank.serve.device_memory import Field, Layout
from prerank.serve.device_streams import Device
from prerank.types import Features

T = TypeVar("T")
Work: TypeAlias = Callable[[Features], Features]
"""Inputs on the device by name -> outputs there by name; no shape depends on a value, and nothing waits."""


class Captured:
    """`work` for inputs of the shapes and types of `like`. One thread at a time."""

    def __init__(self, device: Device, work: Work, like: Features) -> None:
        self._stream, self._pool = device.stream(), device.pool()
        inputs = Layout([Field(name, tuple(one.shape), one.dtype) for name, one in like.items()])
        self._there, self._staging = made(device, lambda: _bytes(inputs, device)), _locked(inputs, device)
        self._into, given = inputs.views(self._staging), inputs.views(self._there)
        self._fill(like)
        self._pool.stream.do(self._send)
        found = list[Features]()
        self._pool.stream.do(lambda: found.append(work(given)))
        self._pool.stream.mark().wait()
        outputs = Layout([Field(name, tuple(one.shape), one.dtype) for name, one in found[0].items()])
        self._back, self._answer = made(device, lambda: _bytes(outputs, device)), _locked(outputs, device)
        self._found, views = outputs.views(self._answer), outputs.views(self._back)

        def whole() -> None:
            for name, tensor in work(given).items():
                views[name].copy_(tensor)

        self._pool.stream.do(whole)
        self._pool.stream.mark().wait()
        self._graph = self._pool.capture(whole)

    def __call__(self, given: Features) -> Mapping[str, Tensor]:
        """The outputs on the host, until the next call."""
        self._fill(given)
        self._stream.do(self._send)
        self._stream.do(self._graph.replay)
        self._stream.do(self._fetch)
        self._stream.mark().wait()
        return self._found

    def replay(self) -> None:
        """The graph alone, of what was given last."""
        self._stream.do(self._graph.replay)
        self._stream.mark().wait()

    def _fill(self, given: Features) -> None:
        for name, view in self._into.items():
            view.copy_(given[name])

    def _send(self) -> None:
        self._there.copy_(self._staging, non_blocking=True)

    def _fetch(self) -> None:
        self._answer.copy_(self._back, non_blocking=True)


def made(device: Device, make: Callable[[], T]) -> T:
    """What `make` makes on the device, all there for every stream."""
    stream, found = device.stream(), list[T]()
    stream.do(lambda: found.append(make()))
    stream.mark().wait()
    return found[0]


def _bytes(layout: Layout, device: Device) -> Tensor:
    return torch.zeros(layout.num_bytes, dtype=torch.uint8, device=device.where)


def _locked(layout: Layout, device: Device) -> Tensor:
    return device.locked((layout.num_bytes,), torch.uint8)


def by_name(ranked: Ranked) -> dict[str, Tensor]:
    """Winners as outputs."""
    return {one.name: getattr(ranked, one.name) for one in fields(Ranked)}


def joined(parts: Sequence[Features]) -> dict[str, Tensor]:
    """Requests [1, ...] each as a batch [B, ...]."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
