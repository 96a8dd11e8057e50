"""Several requests that a device is asked one by one, and waited for as long as somebody waits for them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from dataclasses import fields
from typing import Protocol, TypeAlias, TypeVar

import torch

from prerank.bundle.judge import Ranked
from prerank.errors import DeviceFailed
from prerank.kernels import stop
from prerank.serve.device_sought import Found, Sought
from prerank.types import CandidateSet, Features

Submit: TypeAlias = Callable[[Features, CandidateSet, int], Future[Ranked]]
"""One request: the ranker's side of its user [1, ...], candidates [1, N], and how many winners."""


class Finds(Protocol):
    """What takes requests whose candidates are sought."""

    def submit(self, user_side: Features, candidates: Sought, k: int) -> Future[Ranked]:
        """One of them."""
        ...

    def note_fallback(self) -> None:
        """One that was not answered, which somebody else is asked then."""
        ...


Answer = TypeVar("Answer")

_LOOK_S = 0.02  # between two looks at whether anybody still waits


def rank_each(submit: Submit, user_side: Features, candidates: CandidateSet, k: int) -> Ranked:
    """B requests [B, ...] that are submitted one by one and waited for -> their winners [B, k].

    Raises what their futures have, and Cancelled where nobody waits for this any more (`kernels.stop`).
    """
    futures = [submit(*_one(user_side, candidates, n), k) for n in range(len(candidates.rows))]
    try:
        found = [waited(future) for future in futures]
    except BaseException:
        for future in futures:
            future.cancel()
        raise
    return Ranked(**{one.name: torch.cat([getattr(top, one.name) for top in found]) for one in fields(Ranked)})


def find(version: Finds, user_side: Features, sought: Sought, k: int) -> Found:
    """One request whose candidates are sought, waited for; raises as `rank_each`.

    Where it fails with DeviceFailed that is counted, for its caller has to answer it in another way.
    """
    try:
        future = version.submit(user_side, sought, k)
        try:
            found = waited(future)
        except BaseException:
            future.cancel()
            raise
    except DeviceFailed:
        version.note_fallback()
        raise
    assert isinstance(found, Found)
    return found


def _one(user_side: Features, candidates: CandidateSet, n: int) -> tuple[Features, CandidateSet]:
    """One request of a batch."""
    part = slice(n, n + 1)
    own = CandidateSet(
        candidates.rows[part],
        candidates.similarity[part],
        candidates.valid[part],
        None if candidates.slots is None else candidates.slots[part],
        values={name: column[part] for name, column in candidates.values.items()},
    )
    return {name: tensor[part] for name, tensor in user_side.items()}, own


def waited(future: Future[Answer]) -> Answer:
    """What a future has, as soon as it is there; raises what it ended with, Cancelled where nobody waits for it."""
    while True:
        try:
            return future.result(_LOOK_S)
        except NotYet:
            if future.done():  # it is what the request ended with
                raise
            stop.current().check()
