"""What of a version finds candidates, on a device: targeting's bitmaps and the index's vectors, changed in place.

The host's are the truth. A value that no item listed before has a bitmap of its own, for which there is some room.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from prerank.business.targeting import Targeting
from prerank.errors import DeviceFailed, DeviceFull
from prerank.index.exact import ExactIndex
from prerank.kernels.eligible import WORD, num_words
from prerank.kernels.eligible_mask import eligible_mask
from prerank.kernels.scan import scan_top_k
from prerank.serve.device_memory import Field
from prerank.serve.device_replica import Piece
from prerank.serve.device_sought import Sought
from prerank.serve.device_streams import Device
from prerank.types import Features

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Retrieval:
    """The `keep` items most similar by `index`, of those that `targeting`, if there is any, lets through.

    A request chooses `most_chosen` bitmaps at most and excludes `most_excluded` items; `room` is for so many bitmaps
    more than there are.
    """

    targeting: Targeting | None
    index: ExactIndex
    keep: int
    most_chosen: int = 64
    most_excluded: int = 1024
    room: int = 256


class RetrievalReplica:
    """`retrieval` on `device`, where every item is looked at, as it is stored. Raises DeviceFull where it does not fit.

    The first `num_bitmaps` bitmaps are as the host has them.
    """

    def __init__(self, retrieval: Retrieval, device: Device) -> None:
        self._from, self._where = retrieval, device.where
        index = retrieval.index
        self.num_rows, self._width = index.vectors.shape
        empty = torch.zeros((0, num_words(self.num_rows)), dtype=torch.int64)
        bitmaps = empty if retrieval.targeting is None else retrieval.targeting.bitmaps
        self.num_bitmaps = len(bitmaps)
        self._num_groups = 0 if retrieval.targeting is None else len(retrieval.targeting.to_plain())
        assert bitmaps.shape[1] == empty.shape[1]
        room = retrieval.room if self._num_groups else 0
        self.num_bytes = 8 * (len(bitmaps) + room) * bitmaps.shape[1] + index.vectors.nbytes
        self.num_bytes += 0 if index.scales is None else index.scales.nbytes
        if self.num_bytes > (free := device.free_bytes()):
            raise DeviceFull(
                f"the device has {free / 2**30:.3g} GiB free beside the ranker's tables, and vectors and bitmaps of "
                f"{self.num_rows:,} items need {self.num_bytes / 2**30:.3g}; serve without "
                "--device-whole, or publish with vectors that are stored in less"
            )
        self._bitmaps = torch.zeros((len(bitmaps) + room, bitmaps.shape[1]), dtype=torch.int64, device=self._where)
        self._bitmaps[: len(bitmaps)].copy_(bitmaps)
        self._vectors = index.vectors.to(self._where, copy=True)
        self._scales = None if index.scales is None else index.scales.to(self._where, copy=True)

    @property
    def keep(self) -> int:
        """How many candidates it finds."""
        return self._from.keep

    def inputs(self) -> list[Field]:
        """What of a request goes up."""
        return [
            Field("query", (1, self._width), torch.float32),
            Field("starts", (self._num_groups + 1,), torch.int64),
            Field("excluded", (self._from.most_excluded,), torch.int64),
            Field("chosen", (self._from.most_chosen,), torch.int32),
            Field("inverted", (self._num_groups,), torch.bool),
        ]

    def fill(self, views: Features, sought: Sought) -> None:
        """Write a request, which was checked, into the inputs by name."""
        views["query"].copy_(sought.query)
        views["excluded"].fill_(self.num_rows)
        views["excluded"][: len(sought.excluded)].copy_(sought.excluded)
        views["chosen"].zero_()
        if sought.chosen is not None:
            views["chosen"][: len(sought.chosen.chosen)].copy_(sought.chosen.chosen)
            views["starts"].copy_(sought.chosen.starts)
            views["inverted"].copy_(sought.chosen.inverted)

    def find(self, views: Features, on: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of rows that are `on`, bool [I]: candidates' rows int64 [1, keep], -1 past the last, and their similarity.

        And how many are eligible, int64 [1]. No shape depends on a value, and nothing waits.
        """
        if self._num_groups:
            asked = views["chosen"], views["starts"], views["inverted"]
            on = eligible_mask(self._bitmaps, *asked, self.num_rows) & on
        # one row more, which is the one excluded where a request excludes fewer than it may
        mask = pad(on, (0, 1)).index_fill(0, views["excluded"], False)[:-1]
        similarity, rows = scan_top_k(self._vectors, self._scales, views["query"], self.keep, mask)
        return rows, similarity, mask.sum().unsqueeze(0)

    def staged(self, rows: Tensor) -> tuple[list[Piece], int]:
        """What the host has of rows int64 [n] by now, to be written; `num_bitmaps` is the second number then."""
        index, targeting = self._from.index, self._from.targeting
        pieces = [(self._vectors, rows, index.vectors.index_select(0, rows))]
        if self._scales is not None and index.scales is not None:
            pieces.append((self._scales, rows, index.scales.index_select(0, rows)))
        if targeting is None:
            return pieces, self.num_bitmaps
        bitmaps, room = targeting.bitmaps, len(self._bitmaps)
        if len(bitmaps) > room and self.num_bitmaps < room:
            _log.warning("requests that ask for values over %d are answered by the host: the device has no room", room)
        num = min(len(bitmaps), room)
        new, words = torch.arange(self.num_bitmaps, num), torch.unique(rows // WORD)
        pieces.append((self._bitmaps, new, bitmaps[self.num_bitmaps : num].clone()))
        pieces.append((self._bitmaps[:num].T, words, bitmaps[:num].index_select(1, words).T.contiguous()))
        return pieces, num

    def check(self, sought: Sought) -> None:
        """Raises DeviceFailed for what is not as the requests that this was made for: a device would not notice."""
        limits, chosen = self._from, sought.chosen
        if sought.query.shape != (1, self._width) or sought.query.dtype != torch.float32:
            raise DeviceFailed(
                f"expected a vector float32 {[1, self._width]}, got {sought.query.dtype} {list(sought.query.shape)}"
            )
        if len(sought.excluded) > limits.most_excluded:
            raise DeviceFailed(f"{len(sought.excluded)} items are excluded, expected {limits.most_excluded} at most")
        _check_range("rows that are excluded", sought.excluded, self.num_rows)
        if (chosen is None) != (limits.targeting is None):
            raise DeviceFailed("expected who asks where there is targeting, and only there")
        if chosen is None:
            return
        num, bounds = len(chosen.chosen), chosen.starts.tolist()
        if num > limits.most_chosen:
            raise DeviceFailed(f"{num} bitmaps are chosen, expected {limits.most_chosen} at most")
        if len(bounds) != self._num_groups + 1 or bounds != sorted(bounds) or bounds[0] or bounds[-1] != num:
            raise DeviceFailed(f"expected starts that split {num} bitmaps into groups, got {bounds}")
        _check_range("bitmaps", chosen.chosen, self.num_bitmaps)


def _check_range(what: str, given: Tensor, end: int) -> None:
    if len(given) and not 0 <= int(given.min()) <= int(given.max()) < end:
        raise DeviceFailed(f"expected {what} 0 to {end - 1}, got {int(given.min())} to {int(given.max())}")
