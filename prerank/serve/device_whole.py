"""A whole request on a device, from a user's features to winners: targeting, retrieval, ranking and rules in one graph.

The host sends a user's vector, which bitmaps the user is asked by, what is excluded, and the ranker's side of the user;
nothing else of a request goes up, and of a million items none but the winners come down, unless candidates are wanted.
"""

from __future__ import annotations

import time
from dataclasses import fields
from functools import partial

import torch

from prerank.bundle.judge import Ranked
from prerank.serve.device_graphs import Graphs, Key
from prerank.serve.device_ground import Ground
from prerank.serve.device_memory import Field, Layout
from prerank.serve.device_ranker import segment_of
from prerank.serve.device_replica import Asked
from prerank.serve.device_shapes import Shapes
from prerank.serve.device_sought import Found, Sought
from prerank.serve.device_streams import Stream
from prerank.types import CandidateSet, Features

_USER = "user."
_WHOLE = "a whole request"
_RANKED = tuple(one.name for one in fields(Ranked))


class DeviceWhole:
    """Requests one at a time, of users' sides like `like` [1, ...], for `k` winners at most, in `stream`.

    What is known of items is as `ground.updates`, which must have a retrieval, has it when a request begins; among
    its readers this is the `number`-th. Its graph, one a segment, is one of `graphs`.
    """

    def __init__(self, number: int, ground: Ground, like: Features, k: int, graphs: Graphs, stream: Stream) -> None:
        assert ground.updates.retrieval is not None
        self._number, self._ground, self._retrieval = number, ground, ground.updates.retrieval
        replica, keep, device = ground.updates.replica, self._retrieval.keep, ground.device
        self._like, self._graphs, self._stream = dict(like), graphs, stream
        self._shapes = Shapes(replica, like, k)
        user = [Field(_USER + n, tuple(one.shape), replica.dtype_of(one)) for n, one in like.items()]
        self._inputs = Layout([*self._retrieval.inputs(), *user])
        self._outputs = Layout(
            [
                *self._shapes.outputs(1).fields,
                Field("num_eligible", (1,), torch.int64),
                # what few requests want is last, and copied only where one does
                Field("similarity", (1, keep), torch.float32),
                Field("candidates", (1, keep), torch.int64),
            ]
        )
        self._staging = device.locked((self._inputs.num_bytes,), torch.uint8)
        self._answer = device.locked((self._outputs.num_bytes,), torch.uint8)
        self._into, self._found = self._inputs.views(self._staging), self._outputs.views(self._answer)
        ground.loading.do(self._allocate)
        ground.loading.mark().wait()
        for segment in replica.ranker.segments:
            key = Key(_WHOLE, segment)
            graphs.capture(key, partial(self._work, segment))
            ground.times.note(None, 1, graphs.time_s(key))

    @property
    def buffer_bytes(self) -> int:
        """Of a device's memory that requests and answers are copied through."""
        return self._inputs.num_bytes + self._outputs.num_bytes

    def rank(self, user_side: Features, sought: Sought, k: int) -> Found:
        """The ranker's side of a user [1, ...], and what is sought, both checked -> the k winners [1, k]."""
        start = time.perf_counter()
        self._retrieval.fill(self._into, sought)
        for name, one in user_side.items():
            self._into[_USER + name].copy_(one)
        last = "candidates" if sought.with_candidates else "num_eligible"
        with self._ground.updates.turns.reading(self._number, self._stream):
            self._stream.do(partial(self._run, Key(_WHOLE, segment_of(user_side)), self._outputs.end_of(last)))
        self._stream.mark().wait()
        self._ground.times.note(None, 1, time.perf_counter() - start)
        found = self._read(sought, k)
        num = min(self._retrieval.keep, found.num_eligible)
        self._ground.counts.add(requests=1, batches=1, candidates=num, padding=self._retrieval.keep - num)
        return found

    def _allocate(self) -> None:
        where = self._ground.device.where
        self._there = torch.zeros(self._inputs.num_bytes, dtype=torch.uint8, device=where)
        self._back = torch.zeros(self._outputs.num_bytes, dtype=torch.uint8, device=where)
        self._given, self._out = self._inputs.views(self._there), self._outputs.views(self._back)

    def _run(self, key: Key, num_bytes: int) -> None:
        self._there.copy_(self._staging, non_blocking=True)
        self._graphs.run(key)
        self._answer[:num_bytes].copy_(self._back[:num_bytes], non_blocking=True)

    def _work(self, segment: int | None) -> None:
        given, replica = self._given, self._ground.updates.replica
        rows, similarity, num_eligible = self._retrieval.find(given, replica.on)
        user_side = {name: given[_USER + name] for name in self._like}
        judged = replica.judge(Asked(user_side, rows, rows >= 0), segment)
        ranked = replica.winners(judged, self._shapes.most_k)
        for name in _RANKED:
            self._out[name].copy_(getattr(ranked, name))
        for name, one in {"num_eligible": num_eligible, "similarity": similarity, "candidates": rows}.items():
            self._out[name].copy_(one)

    def _read(self, sought: Sought, k: int) -> Found:
        ranked = self._shapes.read({name: self._found[name] for name in _RANKED}, 0, k)
        num_eligible = int(self._found["num_eligible"])
        candidates: CandidateSet | None = None
        if sought.with_candidates:
            # as many as the index would have been asked for
            num = min(self._retrieval.keep, max(num_eligible, 1))
            rows, similarity = (self._found[name][:, :num].clone() for name in ("candidates", "similarity"))
            candidates = CandidateSet(rows, similarity, rows >= 0)
        return Found(
            **{name: getattr(ranked, name) for name in _RANKED}, num_eligible=num_eligible, candidates=candidates
        )
