"""What goes to a device and what comes back, as one piece of memory each: which tensors, and how requests fill them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import torch
from torch import Tensor

from prerank.bundle.judge import Judged, Ranked
from prerank.errors import DeviceFailed
from prerank.serve.device_batches import Job
from prerank.serve.device_buckets import Shape
from prerank.serve.device_memory import Field, Layout
from prerank.serve.device_ranker import segment_of
from prerank.serve.device_replica import Asked, Replica
from prerank.types import Features

_USER, _HAS, _VALUE = "user.", "has.", "value."
_COUNTS = ("num_nonfinite", "num_below", "num_absent")


class Shapes:
    """Of requests of `replica`, whose users' sides are as `like` [1, ...], with answers of `most_k` winners."""

    def __init__(self, replica: Replica, like: Features, most_k: int) -> None:
        self._replica, self._like, self.most_k = replica, dict(like), most_k
        self._values, self._num_tasks = replica.values, len(replica.tasks)

    def inputs(self, shape: Shape) -> Layout:
        """Of a batch: what few requests say is last, and not copied where none does."""
        requests, cells = shape.requests, (shape.requests, shape.candidates)
        named = self._like.items()
        found = [Field(_USER + name, (requests, *one.shape[1:]), self._replica.dtype_of(one)) for name, one in named]
        optional = {_VALUE + name: torch.float32 for name in self._values}
        if self._replica.takes_slots:
            optional["slots"] = torch.int64
        found += [Field(_HAS + name, (requests,), torch.bool) for name in optional]
        found += [Field("rows", cells, torch.int64), Field("valid", cells, torch.bool)]
        return Layout([*found, *(Field(name, cells, dtype) for name, dtype in optional.items())])

    def outputs(self, num_requests: int) -> Layout:
        """Of a batch: the fields of `Ranked`."""
        kept, dtypes = (num_requests, self.most_k), {"utility": torch.float32, "valid": torch.bool}
        found = [Field(one.name, kept, dtypes.get(one.name, torch.int64)) for one in fields(Ranked)]
        found = [one for one in found if one.name not in ("probs", *_COUNTS)]
        found.append(Field("probs", (*kept, self._num_tasks), torch.float32))
        return Layout([*found, *(Field(name, (num_requests,), torch.int64) for name in _COUNTS)])

    def judged(self, shape: Shape) -> Layout:
        """Of a batch, or a piece of a request, before anybody has won: the fields of `Judged`."""
        cells = (shape.requests, shape.candidates)
        found = [
            Field("rows", cells, torch.int64),
            Field("utility", cells, torch.float32),
            Field("probs", (*cells, self._num_tasks), torch.float32),
            Field("may_win", cells, torch.bool),
        ]
        return Layout([*found, *(Field(name, (shape.requests,), torch.int64) for name in _COUNTS)])

    def asked(self, views: Features) -> Asked:
        """The inputs by name as a replica reads them."""
        values = {name: views[_VALUE + name] for name in self._values}
        return Asked(
            user_side={name: views[_USER + name] for name in self._like},
            rows=views["rows"],
            valid=views["valid"],
            slots=views.get("slots"),
            has_slots=views.get(_HAS + "slots"),
            values=values,
            has_values={name: views[_HAS + _VALUE + name] for name in values},
        )

    def fill(self, views: Features, jobs: Sequence[Job], piece: tuple[int, int]) -> str:
        """Write these candidates of jobs into the inputs by name; the name of the last input that counts.

        Past a request's candidates stands whatever other shapes left there; it is only said not to be valid.
        """
        last = "valid"
        views["valid"].zero_()
        for name, view in views.items():
            if name.startswith(_HAS):
                view.zero_()
        for at, job in enumerate(jobs):
            for name in self._like:
                views[_USER + name][at].copy_(job.user_side[name][0])
            for name, column in _columns(job).items():
                part = column[0, piece[0] : piece[1]]
                # not by torch, which would begin as many threads as there are cores, all on this worker's own
                views[name][at, : len(part)].numpy()[:] = part.numpy()
                if name not in ("rows", "valid"):
                    views[_HAS + name][at] = True
        for at in range(len(jobs), len(views["valid"])):  # nobody's: somebody's, for a ranker may look what is there
            for name in self._like:
                views[_USER + name][at].copy_(jobs[0].user_side[name][0])
        for name in views:  # in the order in which they stand
            if _HAS + name in views and bool(views[_HAS + name].any()):
                last = name
        return last

    def read(self, views: Features, at: int, k: int) -> Ranked:
        """The answer of one request of a batch, the first k of its winners [1, k], in memory of its own."""
        own = {name: view[at : at + 1] for name, view in views.items()}
        return Ranked(**{name: (one if name in _COUNTS else one[:, :k]).clone() for name, one in own.items()})

    def read_judged(self, views: Features, at: int, num: int) -> Judged:
        """What was judged of one request of a batch, its `num` candidates [1, N], in memory of its own."""
        own = {name: view[at : at + 1] for name, view in views.items()}
        return Judged(**{name: (one if name in _COUNTS else one[:, :num]).clone() for name, one in own.items()})

    def check_user(self, job: Job) -> None:
        """Of `check` what does not depend on candidates."""
        like = {name: (one.dtype, one.shape) for name, one in self._like.items()}
        found = {name: (one.dtype, one.shape) for name, one in job.user_side.items()}
        if found != like:
            wrong = sorted(name for name in {*like, *found} if like.get(name) != found.get(name))
            raise DeviceFailed(f"a user's side is not as that of the version: other names, types or shapes of {wrong}")
        segments = self._replica.ranker.segments
        if (segment := segment_of(job.user_side)) not in segments:
            raise DeviceFailed(f"a user's side is of segment {segment}, expected one of {list(segments)}")
        if not 0 <= job.k <= self.most_k:
            raise DeviceFailed(f"expected 0 to {self.most_k} winners, got {job.k}")

    def check(self, job: Job) -> None:
        """Raises DeviceFailed where a request is not as those that shapes were made for: a device would not notice."""
        self.check_user(job)
        candidates = job.given
        if len(candidates.rows) != 1:
            raise DeviceFailed(f"expected one request, got {len(candidates.rows)}")
        if candidates.slots is not None and not self._replica.takes_slots:
            raise DeviceFailed("the candidates say where features are, and all items are resident")
        if unknown := sorted(set(candidates.values) - set(self._values)):
            raise DeviceFailed(f"the candidates have values {unknown}, and the utility reads {list(self._values)}")
        _check_range("rows", candidates.rows, candidates.valid, 0, self._replica.num_rows)
        if candidates.slots is not None:
            _check_range("slots", candidates.slots, candidates.valid, -1, self._replica.num_slots)


def _columns(job: Job) -> dict[str, Tensor]:
    """By the names of inputs, [1, N] each."""
    candidates = job.given
    found = {"rows": candidates.rows, "valid": candidates.valid}
    if candidates.slots is not None:
        found["slots"] = candidates.slots
    return found | {_VALUE + name: column for name, column in candidates.values.items()}


def _check_range(what: str, given: Tensor, valid: Tensor, least: int, end: int) -> None:
    if given.numel():
        low, high = (int(one) for one in torch.where(valid, given, 0).aminmax())
        if low < least or high >= end:
            raise DeviceFailed(f"{what}: expected {least} to {end - 1}, got {low} to {high}")
