"""A whole request on a device, from a user's features to winners: targeting, retrieval, ranking and rules in one graph.

The host sends a user's vector, which bitmaps the user is asked by, and the ranker's side of the user; nothing else of a
request goes up, and of a million items none but the winners come down.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from prerank.bundle.judge import Ranked
from prerank.business.targeting import Targeting
from prerank.errors import DeviceFailed
from prerank.index.exact import ExactIndex
from prerank.kernels.eligible_mask import eligible_mask
from prerank.kernels.scan import scan_top_k
from prerank.serve.device_memory import Field, Layout
from prerank.serve.device_replica import Asked
from prerank.serve.device_shapes import Shapes
from prerank.serve.device_streams import Device
from prerank.serve.device_updates import Updates
from prerank.types import Features

_USER = "user."


@dataclass(frozen=True, slots=True)
class Chosen:
    """Who asks, as `Targeting.choose` gives it: chosen int32 [C], starts int64 [G + 1], inverted bool [G]."""

    chosen: Tensor
    starts: Tensor
    inverted: Tensor


@dataclass(frozen=True, slots=True)
class Sizes:
    """`keep` candidates are retrieved and `k` win; a request chooses `most_chosen` bitmaps at most."""

    keep: int
    k: int
    most_chosen: int = 64


class DeviceWhole:
    """Requests one at a time, of users' sides like `like` [1, ...], by what `updates` keeps on `device`.

    Targeting and index are copied as they are now, and what is later put into them is not seen; what is live of items,
    and their side of the ranker, is as `updates` has it when a request begins. Vectors are looked at all, as they are
    stored. `number` is its own among the readers of `updates`.
    """

    def __init__(
        self,
        device: Device,
        updates: Updates,
        targeting: Targeting,
        index: ExactIndex,
        like: Features,
        sizes: Sizes,
        number: int = 0,
    ) -> None:
        self._replica, self._turns, self._sizes, self._number = updates.replica, updates.turns, sizes, number
        self._num_items, self._like = targeting.num_items, dict(like)
        self._shapes = Shapes(self._replica, like, sizes.k)
        groups = len(targeting.to_plain())
        inputs = Layout(
            [
                Field("query", (1, index.vectors.shape[1]), torch.float32),
                Field("starts", (groups + 1,), torch.int64),
                Field("chosen", (sizes.most_chosen,), torch.int32),
                Field("inverted", (groups,), torch.bool),
                *(Field(_USER + n, tuple(one.shape), self._replica.dtype_of(one)) for n, one in like.items()),
            ]
        )
        outputs = self._shapes.outputs(1)
        self._staging, self._answer = (device.locked((one.num_bytes,), torch.uint8) for one in (inputs, outputs))
        self._into, self._found = inputs.views(self._staging), outputs.views(self._answer)

        def allocate() -> None:
            where = device.where
            self._bitmaps, self._vectors = (one.to(where, copy=True) for one in (targeting.bitmaps, index.vectors))
            self._scales = None if index.scales is None else index.scales.to(where, copy=True)
            self._there = torch.zeros(inputs.num_bytes, dtype=torch.uint8, device=where)
            self._back = torch.zeros(outputs.num_bytes, dtype=torch.uint8, device=where)

        self._stream, self._pool = device.stream(), device.pool()
        self._stream.do(allocate)
        self._stream.mark().wait()
        self._given, self._out = inputs.views(self._there), outputs.views(self._back)
        # once before: what is compiled or grown when it is needed first is so then
        self._pool.stream.do(self._work)
        self._pool.stream.mark().wait()
        self._graph = self._pool.capture(self._work)

    def rank(self, query: Tensor, chosen: Chosen, user_side: Features) -> Ranked:
        """A user's vector float32 [1, D], the bitmaps to ask, the ranker's side [1, ...] -> the k winners [1, k].

        Raises DeviceFailed for what is not as the requests that this was made for: a device would not notice.
        """
        self._check(query, chosen, user_side)
        self._fill(query, chosen, user_side)
        with self._turns.reading(self._number, self._stream):
            self._stream.do(self._run)
        self._stream.mark().wait()
        return self._shapes.read(self._found, 0, self._sizes.k)

    def _run(self) -> None:
        self._there.copy_(self._staging, non_blocking=True)
        self._graph.replay()
        self._answer.copy_(self._back, non_blocking=True)

    def _work(self) -> None:
        given, replica = self._given, self._replica
        mask = eligible_mask(self._bitmaps, given["chosen"], given["starts"], given["inverted"], self._num_items)
        mask = (mask & replica.on)[: len(self._vectors)]
        _, rows = scan_top_k(self._vectors, self._scales, given["query"], self._sizes.keep, mask)
        user_side = {name: given[_USER + name] for name in self._like}
        ranked = replica.winners(replica.judge(Asked(user_side, rows, rows >= 0)), self._sizes.k)
        for one in fields(Ranked):
            self._out[one.name].copy_(getattr(ranked, one.name))

    def _fill(self, query: Tensor, chosen: Chosen, user_side: Features) -> None:
        into = self._into
        into["query"].copy_(query)
        into["chosen"].zero_()
        into["chosen"][: len(chosen.chosen)].copy_(chosen.chosen)
        into["starts"].copy_(chosen.starts)
        into["inverted"].copy_(chosen.inverted)
        for name, one in user_side.items():
            into[_USER + name].copy_(one)

    def _check(self, query: Tensor, chosen: Chosen, user_side: Features) -> None:
        wanted = {name: (one.dtype, one.shape) for name, one in self._like.items()}
        if (found := {name: (one.dtype, one.shape) for name, one in user_side.items()}) != wanted:
            raise DeviceFailed(f"a user's side is not as that of the version: {_first(found, wanted)}")
        if query.shape != self._into["query"].shape:
            raise DeviceFailed(f"expected a vector {list(self._into['query'].shape)}, got {list(query.shape)}")
        num, bounds = len(chosen.chosen), chosen.starts.tolist()
        if num > self._sizes.most_chosen:
            raise DeviceFailed(
                f"{num} bitmaps are chosen, expected {self._sizes.most_chosen} at most; make room for more"
            )
        if len(bounds) != len(self._into["starts"]) or bounds != sorted(bounds) or bounds[0] or bounds[-1] != num:
            raise DeviceFailed(f"expected starts that split {num} bitmaps into groups, got {bounds}")
        if num and not 0 <= int(chosen.chosen.min()) <= int(chosen.chosen.max()) < len(self._bitmaps):
            raise DeviceFailed(
                f"expected bitmaps 0 to {len(self._bitmaps) - 1}, got {chosen.chosen.tolist()}; "
                "targeting may have grown since it was copied"
            )


def _first(found: Mapping[str, object], wanted: Mapping[str, object]) -> str:
    names = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
    return f"other names, types or shapes of {names}"
