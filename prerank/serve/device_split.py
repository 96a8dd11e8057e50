"""An item table that is too large for one device, split by rows over several of one process.

Each device has a part of the rows and judges the candidates that are among them, by graphs of its engine's workers. The
host puts what was judged back where each candidate stood and takes the winners, once: what one device would answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from prerank.bundle.judge import Judged, Ranked
from prerank.bundle.scorer import Scorer
from prerank.errors import ConfigError, DeviceFailed, NotOnDevice
from prerank.serve.device_asking import waited
from prerank.serve.device_many import Engines
from prerank.serve.device_options import Options
from prerank.serve.device_sought import Found, Sought
from prerank.serve.device_version import DeviceVersion
from prerank.types import CandidateSet, Features

_COUNTS = ("num_nonfinite", "num_below", "num_absent")


def split(num_rows: int, num_shards: int) -> list[slice]:
    """Rows as so many shards, as even as can be. Raises ConfigError where there are fewer rows than shards."""
    if num_rows < num_shards:
        raise ConfigError(f"{num_rows} rows cannot be split over {num_shards} devices; use fewer")
    ends = [num_rows * number // num_shards for number in range(num_shards + 1)]
    return [slice(start, end) for start, end in pairwise(ends)]


class DeviceSplit(Engines):
    """Engines of several devices, each of which has a part of a version's rows. Threads may share one."""

    def load(self, scorer: Scorer, like: Features, options: Options) -> SplitVersion:
        """A version over all devices; see `DeviceEngine.load`. Raises DeviceFull where a part does not fit.

        Raises NotOnDevice where not all items are resident, or a device should find candidates.
        """
        if scorer.items.slots is not None or options.retrieval is not None:
            why = "not all items are resident" if options.retrieval is None else "each device has a part of the items"
            raise NotOnDevice(f"--device-shards: {why}; leave it out, or --device-whole if that is given")
        parts = split(scorer.items.num_rows, len(self.engines))
        own = [replace(options, fallback=None, part=part) for part in parts]
        return SplitVersion(scorer, self.load_each(scorer, like, own), parts, options)


@dataclass(frozen=True, slots=True)
class _Piece:
    """Candidates of request `at` that stand at `places` int64 [n], on their way."""

    at: int
    places: Tensor
    future: Future[Judged]


class SplitVersion:
    """A version whose rows are split over `shards`, of which each has its own of `parts`. Threads may share one."""

    def __init__(
        self, scorer: Scorer, shards: Sequence[DeviceVersion], parts: Sequence[slice], options: Options
    ) -> None:
        self._scorer, self._shards, self._parts = scorer, tuple(shards), tuple(parts)
        self._fallback, self._largest = options.fallback, options.buckets.largest
        self.name = "+".join(one.name for one in shards)

    @property
    def parts(self) -> tuple[SplitVersion]:
        """Itself: no device answers alone."""
        return (self,)

    def rank(self, user_side: Features, candidates: CandidateSet, k: int) -> Ranked:
        """As `Scorer.rank`, of B requests; by the fallback where a device fails, or DeviceFailed without one."""
        try:
            judged = self.judge(user_side, candidates)
        except DeviceFailed:
            self.note_fallback()
            if self._fallback is None:
                raise
            return self._fallback(user_side, candidates, k)
        return self._scorer.winners(judged, k)

    def judge(self, user_side: Features, candidates: CandidateSet) -> Judged:
        """What candidates [B, N] are worth, each by the device that has it. Raises DeviceFailed where one fails."""
        rows = candidates.rows.masked_fill(~candidates.valid, 0)
        if candidates.slots is not None or not bool(((rows >= 0) & (rows < self._parts[-1].stop)).all()):
            raise DeviceFailed("the candidates say where features are, or a row is none")
        pieces = list[_Piece]()
        found = _nothing(rows, len(self._scorer.ranker.tasks))
        try:
            for one in self._submitted(user_side, candidates):
                pieces.append(one)  # as it is on its way, for the next one may be refused
            for one in pieces:
                _put(found, one, waited(one.future))
        finally:
            for one in pieces:
                one.future.cancel()
        return found

    def probs(self, user_side: Features, rows: Tensor) -> Tensor:
        """The ranker's side of users [B, ...] and rows int64 [B, N] -> each task's probability, float32 [B, N, T]."""
        there = CandidateSet(rows, torch.zeros(rows.shape), rows >= 0)
        return self.judge(user_side, there).probs

    def find(self, user_side: Features, sought: Sought, k: int) -> Found:
        """Raises DeviceFailed: no device has all items to find candidates among."""
        raise DeviceFailed(f"{self.name}: each device has a part of the items, and finds no candidates")

    def note_fallback(self) -> None:
        """A request was answered without the devices; it is counted where the first of them counts."""
        self._shards[0].note_fallback()

    def put(self, rows: Tensor | None = None, slots: Tensor | None = None, taken: Tensor | None = None) -> None:
        """Let every request that begins after this know what the scorer has of rows and slots, int64 [n], by now.

        Until this is done one device may know of it and another not.
        """
        for one in self._shards:
            one.put(rows, slots, taken)

    def close(self) -> None:
        """Take nothing new, wait for what runs, and leave the memory of the devices."""
        for one in self._shards:
            one.close()

    def _submitted(self, user_side: Features, candidates: CandidateSet) -> Iterator[_Piece]:
        for at in range(len(candidates.rows)):
            user = {name: tensor[at : at + 1] for name, tensor in user_side.items()}
            rows, valid = candidates.rows[at], candidates.valid[at]
            for shard, part in zip(self._shards, self._parts, strict=True):
                own = (valid & (rows >= part.start) & (rows < part.stop)).nonzero().squeeze(1)
                for places in own.split(self._largest) if len(own) else ():
                    values = {name: column[at : at + 1, places] for name, column in candidates.values.items()}
                    those = (rows[places] - part.start).unsqueeze(0)
                    piece = CandidateSet(those, torch.zeros(those.shape), those >= 0, values=values)
                    yield _Piece(at, places, shard.judge(user, piece))


def _nothing(rows: Tensor, num_tasks: int) -> Judged:
    """Candidates of rows int64 [B, N] of which nobody may win."""
    return Judged(
        rows=rows,
        utility=torch.zeros(rows.shape),
        probs=torch.zeros((*rows.shape, num_tasks)),
        may_win=torch.zeros(rows.shape, dtype=torch.bool),
        **{name: rows.new_zeros(len(rows)) for name in _COUNTS},
    )


def _put(whole: Judged, piece: _Piece, judged: Judged) -> None:
    """What was judged, where it stood; their rows are there already."""
    for name in ("utility", "probs", "may_win"):
        getattr(whole, name)[piece.at, piece.places] = getattr(judged, name)[0]
    for name in _COUNTS:
        getattr(whole, name)[piece.at] += getattr(judged, name)[0]
