"""An item table that is too large for one device, split by rows over processes of a device each.

Every process has the rows of its shard: the ranker's side of these items, what is live of them, their groups. The
leader sends a request to all, each judges the candidates whose rows it has, and the leader takes the winners of all
that was judged, once: what one device would answer. It is torch.distributed's default group that they talk through,
and each request is a broadcast and a gather.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from prerank.bundle.judge import Judged, Ranked, winners
from prerank.bundle.scorer import Scorer
from prerank.errors import ConfigError, DeviceFailed
from prerank.serve.device_memory import Field, Layout
from prerank.serve.device_replica import Asked, Replica, Staged
from prerank.serve.device_split import split
from prerank.serve.device_streams import Device
from prerank.types import CandidateSet, Features

_END, _RANK, _PUT = 0, 1, 2
_USER, _VALUE = "user.", "value."
_COUNTS = ("num_nonfinite", "num_below", "num_absent")


class RowShards:
    """This process's shard of `scorer` on `device`, for users' sides like `like` [1, ...], floats as `dtype`.

    Every process of the group makes one, of the same version before anything of it changed. The first is the leader:
    it calls `rank`, `put` and `close`, from any thread, and the others `follow`. Raises ConfigError where some items
    are not resident, DeviceFull where the shard does not fit.
    """

    def __init__(self, scorer: Scorer, device: Device, like: Features, dtype: torch.dtype | None = None) -> None:
        if scorer.items.slots is not None:
            raise ConfigError("a table is split by rows only where all items are resident ([inventory] resident)")
        self._number, self._num_rows = dist.get_rank(), scorer.items.num_rows
        self._parts = split(self._num_rows, dist.get_world_size())
        self._where, self._like = device.where, dict(like)
        self._replica = Replica(scorer, device, dtype, self._parts[self._number])
        self._one = threading.Lock()  # a process tells others one thing at a time

    def rank(self, user_side: Features, candidates: CandidateSet, k: int) -> Ranked:
        """As `Scorer.rank`, on the leader. Raises DeviceFailed where a shard does not answer, or a row is none."""
        self._check(user_side, candidates)
        if not candidates.rows.shape[1]:
            candidates = _padded(candidates)
        given = [name for name in self._replica.values if name in candidates.values]
        flags = sum(1 << self._replica.values.index(name) for name in given)
        num_requests, num = candidates.rows.shape
        layout = self._inputs(num_requests, num, given)
        said = {_USER + name: user_side[name] for name in self._like}
        said |= {"rows": candidates.rows, "valid": candidates.valid}
        said |= {_VALUE + name: candidates.values[name] for name in given}
        with self._telling():
            views = self._sent((_RANK, num_requests, num, flags), layout, said)
            most = self._most(views)
            return self._merged(views, self._gathered(self._judged(views, given, most)), most, k)

    def put(self, rows: Tensor) -> None:
        """Let every request after this know what the leader's scorer has of rows int64 [n] by now."""
        taken = self._replica.taken(rows)
        with self._telling():
            self._write(self._sent((_PUT, len(rows), 0, 0), self._changes(len(rows)), {"rows": rows, **taken}))

    def close(self) -> None:
        """Let the others return from `follow`."""
        with self._telling():
            self._tell((_END, 0, 0, 0))

    def follow(self) -> None:
        """Do what the leader asks for until it closes. Raises DeviceFailed where it is gone."""
        with self._telling():
            while (said := self._told())[0] != _END:
                what, num_requests, num, flags = said
                if what == _PUT:
                    self._write(self._received(self._changes(num_requests)))
                    continue
                given = [name for at, name in enumerate(self._replica.values) if flags >> at & 1]
                views = self._received(self._inputs(num_requests, num, given))
                self._gathered(self._judged(views, given, self._most(views)))

    def _check(self, user_side: Features, candidates: CandidateSet) -> None:
        num = len(candidates.rows)
        like = {name: (one.dtype, (num, *one.shape[1:])) for name, one in self._like.items()}
        found = {name: (one.dtype, tuple(one.shape)) for name, one in user_side.items()}
        unknown = set(candidates.values) - set(self._replica.values)
        if found != like or unknown or candidates.slots is not None:
            raise DeviceFailed("a request is not as those of the version: its user's side, its values, or its slots")
        rows = candidates.rows[candidates.valid]
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < self._num_rows:
            raise DeviceFailed(f"rows: expected 0 to {self._num_rows - 1}, got {int(rows.min())} to {int(rows.max())}")

    def _inputs(self, num_requests: int, num: int, given: Sequence[str]) -> Layout:
        cells, named = (num_requests, num), self._like.items()
        user = [Field(_USER + name, (num_requests, *one.shape[1:]), self._replica.dtype_of(one)) for name, one in named]
        own = [Field(_VALUE + name, cells, torch.float32) for name in given]
        return Layout([*user, Field("rows", cells, torch.int64), Field("valid", cells, torch.bool), *own])

    def _outputs(self, num_requests: int, num: int) -> Layout:
        cells = (num_requests, num)
        num_groups = self._replica.groups(torch.zeros((1, 1), dtype=torch.int64, device=self._where))[0].shape[1]
        return Layout(
            [
                Field("utility", cells, torch.float32),
                Field("probs", (*cells, len(self._replica.tasks)), torch.float32),
                Field("may_win", cells, torch.bool),
                Field("names", cells, torch.int64),
                Field("groups", (*cells, num_groups), torch.int32),
                *(Field(name, (num_requests,), torch.int64) for name in _COUNTS),
            ]
        )

    def _changes(self, num: int) -> Layout:
        tables = self._replica.tables.items()
        return Layout(
            [
                Field("rows", (num,), torch.int64),
                *(Field(name, (num, *one.shape[1:]), one.dtype) for name, one in tables),
            ]
        )

    def _most(self, views: Features) -> int:
        """The most candidates that a request has in one shard: as many are computed in each."""
        return max(1, *(int(_own(views, part).sum(1).max()) for part in self._parts))

    def _judged(self, views: Features, given: Sequence[str], num: int) -> Tensor:
        """What the candidates of this shard are worth, as `_outputs` lays it out."""
        part = self._parts[self._number]
        places, is_there = _places(views, part, num)
        rows = (views["rows"].gather(1, places) - part.start).masked_fill(~is_there, 0)
        user = {name: views[_USER + name] for name in self._like}
        values = {name: views[_VALUE + name].gather(1, places) for name in given}
        has = {name: torch.ones(len(rows), dtype=torch.bool, device=self._where) for name in given}
        judged = self._replica.judge(Asked(user, rows, is_there, values=values, has_values=has))
        layout = self._outputs(*rows.shape)
        memory = self._memory(layout)
        for name, view in layout.views(memory).items():
            if name not in ("names", "groups"):
                view.copy_(getattr(judged, name))
        layout.views(memory)["names"].copy_(self._replica.names(rows))
        layout.views(memory)["groups"].copy_(self._replica.groups(rows)[0].permute(0, 2, 1))
        return memory

    def _merged(self, views: Features, answers: Sequence[Tensor], num: int, k: int) -> Ranked:
        """The winners of what every shard judged, each candidate where it stood."""
        shape = views["rows"].shape
        whole = self._outputs(*shape)
        found = whole.views(self._memory(whole))
        for part, memory in zip(self._parts, answers, strict=True):
            judged = self._outputs(shape[0], num).views(memory)
            places, is_there = _places(views, part, num)
            at = is_there.nonzero(as_tuple=True)
            for name, view in found.items():
                if name in _COUNTS:
                    view += judged[name]
                else:
                    view[at[0], places[at]] = judged[name][at]
        # a candidate is called by its place among all, for no table here has its row
        places = torch.arange(views["rows"].numel(), device=self._where).view(shape)
        candidates = Judged(rows=places, **{name: found[name] for name in (one.name for one in fields(Judged)[1:])})
        at_most = self._replica.groups(places[:1, :1] * 0)[1]
        groups = found["groups"].permute(0, 2, 1), at_most
        top = winners(candidates, found["names"], groups, found["names"].flatten(), k)
        told = {one.name: getattr(top, one.name) for one in fields(Ranked)}
        rows = views["rows"].flatten()[top.rows.clamp_min(0)].masked_fill(~top.valid, -1)
        return Ranked(**{name: one.cpu() for name, one in (told | {"rows": rows}).items()})

    def _write(self, views: Features) -> None:
        part, tables = self._parts[self._number], self._replica.tables
        own = (views["rows"] >= part.start) & (views["rows"] < part.stop)
        at = views["rows"][own] - part.start
        Staged([(table, at, views[name][own]) for name, table in tables.items()]).write()

    def _sent(self, said: tuple[int, ...], layout: Layout, columns: Features) -> Features:
        memory = self._memory(layout)
        for name, view in layout.views(memory).items():
            view.copy_(columns[name])
        self._tell(said)
        dist.broadcast(memory, 0)
        return layout.views(memory)

    def _received(self, layout: Layout) -> Features:
        memory = self._memory(layout)
        dist.broadcast(memory, 0)
        return layout.views(memory)

    def _tell(self, said: tuple[int, ...]) -> None:
        dist.broadcast(torch.tensor(said, device=self._where), 0)

    def _told(self) -> list[int]:
        said = torch.zeros(4, dtype=torch.int64, device=self._where)
        dist.broadcast(said, 0)
        told: list[int] = said.tolist()
        return told

    def _gathered(self, memory: Tensor) -> list[Tensor]:
        """On the leader what every shard has; nothing elsewhere."""
        found = [torch.empty_like(memory) for _ in self._parts] if self._number == 0 else []
        dist.gather(memory, found or None, 0)
        return found

    def _memory(self, layout: Layout) -> Tensor:
        return torch.zeros(layout.num_bytes, dtype=torch.uint8, device=self._where)

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            with self._one, torch.inference_mode():
                yield
        except RuntimeError as error:
            raise DeviceFailed(f"a shard of the items is gone, or failed: {error}; start all of them again") from error


def _own(views: Features, part: slice) -> Tensor:
    """Which candidates [B, N] are of a shard."""
    own: Tensor = views["valid"] & (views["rows"] >= part.start) & (views["rows"] < part.stop)
    return own


def _places(views: Features, part: slice, num: int) -> tuple[Tensor, Tensor]:
    """Where the candidates of a shard stand, int64 [B, num], and bool [B, num] where there is one."""
    own = _own(views, part)
    places = own.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :num]
    return places, own.gather(1, places)


def _padded(candidates: CandidateSet) -> CandidateSet:
    """One candidate that is none, where there are none: a shape of nothing is a case of its own everywhere."""
    rows, similarity, valid = (pad(one, (0, 1)) for one in (candidates.rows, candidates.similarity, candidates.valid))
    return CandidateSet(rows, similarity, valid)
