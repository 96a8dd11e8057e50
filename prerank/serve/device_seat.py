"""A worker's part of a version on a device: its stream, its captured graphs, and the memory they read and write.

Nothing waits for the device between the first copy of a batch and the event after its last one.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import fields
from functools import partial

import torch
from torch import Tensor

from prerank.bundle.judge import Judged, Ranked, joined
from prerank.errors import DeviceFull
from prerank.serve.device_batches import Job
from prerank.serve.device_buckets import Shape
from prerank.serve.device_graphs import Graphs, Key
from prerank.serve.device_ground import Ground
from prerank.serve.device_ranker import segment_of
from prerank.serve.device_replica import Asked
from prerank.serve.device_shapes import Shapes
from prerank.serve.device_sought import Sought
from prerank.serve.device_whole import DeviceWhole
from prerank.types import Features

_PIECE = "a piece"


class Seat:
    """The seat `number`, for users' sides `like` [1, ...] and up to `most_k` winners; one thread at a time.

    Every shape is captured, the largest first. One that cannot be is done by torch, and counted. One that only `judges`
    leaves it to others who wins. Raises DeviceFull where there is no memory for a shape.
    """

    def __init__(self, number: int, ground: Ground, like: Features, most_k: int, judges: bool = False) -> None:
        self._number, self._ground, self._judges = number, ground, judges
        buckets = ground.buckets
        self._replica, self._shapes = ground.updates.replica, Shapes(ground.updates.replica, like, most_k)
        self._stream, self._graphs = ground.device.stream(), Graphs(ground.device, ground.counts)
        shapes = buckets.shapes()
        self._in = {shape: self._shapes.inputs(shape) for shape in shapes}
        self._out = {one: self._shapes.judged(one) if judges else self._shapes.outputs(one.requests) for one in shapes}
        self._whole = Shape(1, buckets.largest)
        try:
            ground.loading.do(self._allocate)
            ground.loading.mark().wait()
            for shape in shapes:
                for segment in self._replica.ranker.segments:
                    key = Key(shape, segment)
                    self._graphs.capture(key, partial(self._rank, shape, segment))
                    # a first guess, before anybody has asked
                    ground.times.note(shape.candidates, shape.requests, self._graphs.time_s(key))
            for segment in () if judges else self._replica.ranker.segments:
                self._graphs.capture(Key(_PIECE, segment), partial(self._judge, segment))
            self._found: DeviceWhole | None = None
            if ground.updates.retrieval is not None:
                self._found = DeviceWhole(number, ground, like, most_k, self._graphs, self._stream)
                self.buffer_bytes += self._found.buffer_bytes
        except torch.OutOfMemoryError as error:
            raise DeviceFull(
                f"the device has no memory for the shapes of worker {number}, the largest of which is {shapes[0]}: "
                f"{error}; ask for smaller or fewer buckets, fewer workers, or bfloat16"
            ) from None

    @property
    def graph_bytes(self) -> int:
        """What the captured graphs hold."""
        return self._graphs.num_bytes

    def close(self) -> None:
        """Let go of the graphs; nothing may be running."""
        self._graphs.close()

    def rank(self, jobs: Sequence[Job]) -> Sequence[Ranked | Judged]:
        """The winners of each job, [1, k]; they are of one size and segment, and if one must be cut there is no other.

        One whose candidates are to be found is alone. Where this only judges none is to be cut.
        """
        if isinstance(sought := jobs[0].candidates, Sought):
            assert len(jobs) == 1
            assert self._found is not None
            return [self._found.rank(jobs[0].user_side, sought, jobs[0].k)]
        segment = segment_of(jobs[0].user_side)
        pieces = self._ground.buckets.pieces(max(job.num for job in jobs))
        start = time.perf_counter()
        if len(pieces) > 1:
            assert len(jobs) == 1
            assert not self._judges
            shape, sent = self._whole, [self._fill(self._whole, jobs, at, piece) for at, piece in enumerate(pieces)]
        else:
            shape = self._ground.buckets.shape_of([job.num for job in jobs])
            sent = [self._fill(shape, jobs, 0, pieces[0])]
        with self._ground.updates.turns.reading(self._number, self._stream):
            if len(sent) > 1:
                self._enqueue_pieces(sent, segment)
            else:
                self._enqueue(shape, segment, sent[0])
        self._stream.mark().wait()
        self._ground.times.note(shape.candidates, len(jobs), (time.perf_counter() - start) / len(sent))
        num = sum(job.num for job in jobs)
        computed = shape.requests * shape.candidates * len(sent)
        self._ground.counts.add(
            requests=len(jobs), batches=1, candidates=num, padding=computed - num, cut=int(len(sent) > 1)
        )
        return self._read(shape, jobs)

    def _enqueue(self, shape: Shape, segment: int | None, num_bytes: int) -> None:
        do = self._stream.do
        do(partial(self._send, 0, num_bytes))
        do(partial(self._graphs.run, Key(shape, segment)))
        do(partial(self._fetch, shape))

    def _enqueue_pieces(self, sent: Sequence[int], segment: int | None) -> None:
        """Judge one piece after the other, and take the winners once."""
        do, found = self._stream.do, list[Judged]()

        def keep() -> None:
            found.append(Judged(*(getattr(self._piece, one.name).clone() for one in fields(Judged))))

        for at, num_bytes in enumerate(sent):
            do(partial(self._send, at, num_bytes))
            do(partial(self._graphs.run, Key(_PIECE, segment)))
            do(keep)
        do(lambda: self._win(self._whole, joined(found)))
        do(partial(self._fetch, self._whole))

    def _fill(self, shape: Shape, jobs: Sequence[Job], at: int, piece: tuple[int, int]) -> int:
        """Write jobs, or a piece of one, where they are copied from; how many bytes are to be copied."""
        while len(self._staging) <= at:
            self._staging.append(self._ground.device.locked(self._there.shape, torch.uint8))
        layout = self._in[shape]
        last = self._shapes.fill(layout.views(self._staging[at]), jobs, piece)
        return layout.end_of(last)

    def _send(self, at: int, num_bytes: int) -> None:
        self._there[:num_bytes].copy_(self._staging[at][:num_bytes], non_blocking=True)

    def _fetch(self, shape: Shape) -> None:
        num_bytes = self._out[shape].num_bytes
        self._answers[:num_bytes].copy_(self._back[:num_bytes], non_blocking=True)

    def _read(self, shape: Shape, jobs: Sequence[Job]) -> Sequence[Ranked | Judged]:
        views = self._out[shape].views(self._answers)
        if self._judges:
            return [self._shapes.read_judged(views, at, job.num) for at, job in enumerate(jobs)]
        return [self._shapes.read(views, at, job.k) for at, job in enumerate(jobs)]

    def _rank(self, shape: Shape, segment: int | None) -> None:
        judged = self._replica.judge(self._asked(shape), segment)
        if self._judges:
            self._leave(shape, judged)
        else:
            self._win(shape, judged)

    def _win(self, shape: Shape, candidates: Judged) -> None:
        self._leave(shape, self._replica.winners(candidates, self._shapes.most_k))

    def _leave(self, shape: Shape, found: Ranked | Judged) -> None:
        for name, view in self._out[shape].views(self._back).items():
            view.copy_(getattr(found, name))

    def _judge(self, segment: int | None) -> None:
        judged = self._replica.judge(self._asked(self._whole), segment)
        for one in fields(Judged):
            getattr(self._piece, one.name).copy_(getattr(judged, one.name))

    def _asked(self, shape: Shape) -> Asked:
        return self._shapes.asked(self._in[shape].views(self._there))

    def _allocate(self) -> None:
        """The memory that graphs read and write, of which every shape takes as much as it needs."""
        most_in, most_out = (max(one.num_bytes for one in kind.values()) for kind in (self._in, self._out))
        judged = self._shapes.judged(self._whole)
        self._there, self._back, piece = map(self._on_device, (most_in, most_out, judged.num_bytes))
        self._piece = Judged(**judged.views(piece))
        self._answers = self._ground.device.locked((most_out,), torch.uint8)
        self._staging = [self._ground.device.locked((most_in,), torch.uint8)]
        self.buffer_bytes = most_in + most_out + judged.num_bytes

    def _on_device(self, num_bytes: int) -> Tensor:
        return torch.zeros(num_bytes, dtype=torch.uint8, device=self._ground.device.where)
