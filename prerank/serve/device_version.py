"""A version on a device: its replica, a seat a worker, and what happens when the device fails.

Another version is loaded beside it, its graphs captured while this one's are replayed; whoever asks then takes the
other, and this one is closed when the last of its requests has ended.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import cast

import torch
from torch import Tensor

from prerank.bundle.judge import Judged, Ranked
from prerank.bundle.scorer import Scorer
from prerank.errors import DeviceBusy, DeviceFailed
from prerank.serve.device_asking import find, rank_each
from prerank.serve.device_batches import Job
from prerank.serve.device_ground import Ground
from prerank.serve.device_options import Options, Shared
from prerank.serve.device_ranker import segment_of
from prerank.serve.device_replica import Asked, Replica
from prerank.serve.device_retrieval import RetrievalReplica
from prerank.serve.device_seat import Seat
from prerank.serve.device_shapes import Shapes
from prerank.serve.device_sought import Found, Sought, num_of
from prerank.serve.device_times import Times
from prerank.serve.device_updates import Updates
from prerank.serve.graph import Deadline
from prerank.types import CandidateSet, Features

_log = logging.getLogger(__name__)


class DeviceVersion:
    """`scorer` on a device, whose requests have users' sides like `like` [1, ...]. Threads may share one.

    Raises DeviceFull where it does not fit; nothing of it is then left on the device.
    """

    def __init__(self, shared: Shared, scorer: Scorer, like: Features, options: Options) -> None:
        self._shared, self._scorer, self._like, self._options = shared, scorer, dict(like), options
        self._times = Times(options.buckets)
        self._writing, self._reviving = threading.Lock(), threading.Lock()
        self._changed = threading.Condition()
        self._num_waiting, self._is_closed, self._retry_at = 0, False, 0.0
        self._updates: Updates | None = None
        self._seats: list[Seat] | None = None
        self._build()

    @property
    def name(self) -> str:
        """Of the device."""
        return self._shared.device.name

    @property
    def parts(self) -> tuple[DeviceVersion]:
        """Itself: it is on one device."""
        return (self,)

    @property
    def is_lost(self) -> bool:
        """Whether the device is not there, and every request would be the fallback's."""
        return self._seats is None and not self._is_closed

    @property
    def may_revive(self) -> bool:
        """Whether the device is lost, and would be begun again if it were asked now."""
        return self.is_lost and not self._reviving.locked() and time.monotonic() >= self._retry_at

    @property
    def wait_s(self) -> float:
        """How long what waits for the device will keep it, in seconds."""
        return self._shared.backlog.seconds / self._shared.num_workers

    def own_s(self, num: int | None) -> float:
        """How long a batch with a request of `num` candidates may take, in seconds; None: it finds them itself."""
        return self._times.own_s(num)

    def note_fallback(self) -> None:
        """A request that this could not answer was answered without it."""
        self._shared.counts.add(fallbacks=1)

    def submit(
        self, user_side: Features, candidates: CandidateSet | Sought, k: int, deadline: Deadline | None = None
    ) -> Future[Ranked]:
        """The k winners [1, k] of one request, the ranker's side of its user [1, ...] and candidates [1, N].

        Of a request whose candidates are sought the future has what was `Found`, and there is no fallback.
        Raises DeviceBusy at once where the deadline would pass before the device is done with it, DeviceFailed where it
        is not as this version's requests are. The future has DeviceFailed where the device failed and there is no
        fallback, DeadlineExceeded where its time ran out as it waited; cancelled, nothing of it is done.
        """
        job = self._job(user_side, candidates, k, deadline)
        self._let_in(job)
        with self._changed:
            if self._is_closed:
                raise DeviceFailed("this version has left the device; ask the one that serves now")
            self._num_waiting += 1
        if (num := num_of(candidates)) is not None:
            self._shared.counts.saw(num)
        job.expected_s = self._times.share_s(num)
        self._shared.backlog.add(job.expected_s)
        try:
            self._shared.lines.put(job)
        except DeviceFailed:
            self.ended(job)
            raise
        return job.future

    def rank(self, user_side: Features, candidates: CandidateSet, k: int) -> Ranked:
        """As `Scorer.rank`, of B requests; see `device_asking.rank_each`."""
        return rank_each(self.submit, user_side, candidates, k)

    def find(self, user_side: Features, sought: Sought, k: int) -> Found:
        """One request whose candidates are sought; see `device_asking.find`."""
        return find(self, user_side, sought, k)

    def judge(self, user_side: Features, candidates: CandidateSet) -> Future[Judged]:
        """What candidates [1, N] are worth, of a version that has a part of the rows; raises as `submit`.

        Their rows count from the first of the part, and there are no more of them than the largest size.
        """
        assert self._options.part is not None
        assert candidates.rows.shape[1] <= self._options.buckets.largest
        return cast("Future[Judged]", self.submit(user_side, candidates, 0))

    def probs(self, user_side: Features, rows: Tensor) -> Tensor:
        """The ranker's side of users [B, ...] and rows int64 [B, N] -> each task's probability, float32 [B, N, T].

        By torch on the device, without graphs: to be held against answers that are known.
        """
        updates, found = self._updates, list[Tensor]()
        if updates is None:
            raise DeviceFailed("this version has left the device; ask the one that serves now")
        replica, where = updates.replica, self._shared.device.where

        def judge() -> None:
            side = {name: tensor.to(where, replica.dtype_of(tensor)) for name, tensor in user_side.items()}
            there = rows.to(where)
            found.append(replica.judge(Asked(side, there, there >= 0), segment_of(user_side)).probs.cpu())

        self._shared.loading.do(judge)
        self._shared.loading.mark().wait()
        return found[0]

    def put(self, rows: Tensor | None = None, slots: Tensor | None = None, taken: Tensor | None = None) -> None:
        """Let every request that begins after this know what the scorer has of rows and slots, int64 [n], by now.

        And what targeting and the index have of rows that are `taken` anew. No request sees a part of it.
        """
        with self._writing:
            updates = self._updates
        if updates is None:
            return
        try:
            updates.put(rows, slots, taken)
        except Exception as error:
            if not self._shared.device.is_lost(error):
                raise
            _log.error("the device was lost as items changed; it will have them when it is back: %s", error)

    def close(self) -> None:
        """Take nothing new, wait for what runs, and leave the device's memory."""
        with self._changed:
            self._is_closed = True
            self._changed.wait_for(lambda: not self._num_waiting)
        seats, self._seats, self._updates = self._seats or [], None, None
        for one in seats:
            one.close()

    def answer(self, worker: int, jobs: Sequence[Job]) -> None:
        """Settle the futures of a batch, from the thread of this worker."""
        seats, error = self._seats, DeviceFailed("the device was lost, and is not back yet")
        if seats is not None:
            try:
                found = seats[worker].rank(jobs)
            except Exception as failed:
                error = DeviceFailed(f"the device failed: {failed}")
                self._failed(seats, failed)
            else:
                for job, ranked in zip(jobs, found, strict=True):
                    self.ended(job)
                    job.future.set_result(ranked)
                return
        for job in jobs:
            self._answer_without(job, error)
        self._revive()

    def ended(self, job: Job) -> None:
        """A job is no longer waited for."""
        self._shared.backlog.add(-job.expected_s)
        with self._changed:
            self._num_waiting -= 1
            self._changed.notify_all()

    def sizes(self) -> tuple[int, int, int]:
        """Bytes of captured graphs, of tables and weights, and of what requests are copied through."""
        seats, updates = self._seats or [], self._updates
        tables = 0 if updates is None else updates.num_bytes
        return sum(one.graph_bytes for one in seats), tables, sum(one.buffer_bytes for one in seats)

    def _job(self, user_side: Features, candidates: CandidateSet | Sought, k: int, deadline: Deadline | None) -> Job:
        """A request in its line. Raises DeviceFailed where it is not as this version's are."""
        if isinstance(candidates, Sought):
            job, updates = Job(user_side, candidates, k, (self, None), deadline=deadline), self._updates
            self._shapes.check_user(job)
            if updates is None or updates.retrieval is None:
                raise DeviceFailed("this version finds no candidates on the device, or has left it")
            updates.retrieval.check(candidates)
            return job
        buckets, num = self._options.buckets, candidates.rows.shape[1]
        is_cut, size = num > buckets.largest, buckets.size_of(num)
        line = self, size, is_cut, segment_of(user_side)
        job = Job(user_side, candidates, k, line, 1 if is_cut else buckets.most_of(size), deadline)
        self._shapes.check(job)
        return job

    def _let_in(self, job: Job) -> None:
        """Raises DeviceBusy for one that would be late."""
        if job.deadline is None:
            return
        num = num_of(job.candidates)
        wait_s, own_s = self.wait_s, self.own_s(num)
        if wait_s + own_s > job.deadline.left_s(time.perf_counter()):
            self._shared.counts.add(refused=1)
            what = "a whole request" if num is None else f"{num:,} candidates"
            raise DeviceBusy(
                f"the deadline of {job.deadline.ms:g} ms would pass first: what waits for the device takes about "
                f"{1000 * wait_s:.3g} ms, and {what} about {1000 * own_s:.3g}; try again later, or allow more"
            )

    def _build(self) -> None:
        """Everything on the device, from what the scorer has now."""
        shared, options = self._shared, self._options
        with torch.inference_mode():
            with self._writing:  # what changes from here on is written to the new tables
                made = list[Updates]()
                shared.loading.do(lambda: made.append(self._tables()))
                shared.loading.mark().wait()
                self._updates = made[0]
            self._shapes = Shapes(made[0].replica, self._like, options.most_k)
            ground = Ground(shared.device, shared.loading, made[0], options.buckets, self._times, shared.counts)
            made_as = ground, self._like, options.most_k, options.part is not None
            seats = [Seat(number, *made_as) for number in range(shared.num_workers)]
            with self._changed:
                self._seats = None if self._is_closed else seats

    def _tables(self) -> Updates:
        device, retrieval = self._shared.device, self._options.retrieval
        replica = Replica(self._scorer, device, self._options.dtype, self._options.part or slice(None))
        return Updates(device, replica, None if retrieval is None else RetrievalReplica(retrieval, device))

    def _failed(self, seats: list[Seat], error: Exception) -> None:
        is_lost = self._shared.device.is_lost(error)
        _log.error("a batch failed on the device%s: %s", ", which is lost" if is_lost else "", error)
        if is_lost:
            with self._changed:
                if self._seats is seats:  # of the workers the first that sees it
                    self._seats = None
                    self._shared.counts.add(restarts=1)

    def _answer_without(self, job: Job, error: DeviceFailed) -> None:
        fallback = self._options.fallback
        try:
            if fallback is None or isinstance(job.candidates, Sought):
                raise error
            ranked = fallback(job.user_side, job.candidates, job.k)
        except Exception as failed:
            self.ended(job)
            job.future.set_exception(failed)
        else:
            self.note_fallback()
            self.ended(job)
            job.future.set_result(ranked)

    def _revive(self) -> None:
        """Where the device was lost, begin again with everything anew, one worker for all."""
        if self._seats is not None or self._is_closed or not self._reviving.acquire(blocking=False):
            return
        try:
            if self._seats is None and time.monotonic() >= self._retry_at:
                self._build()
                _log.warning("the device is back")
        except Exception as error:
            self._retry_at = time.monotonic() + self._options.retry_s
            _log.error("the device is still lost, next try in %g s: %s", self._options.retry_s, error)
        finally:
            self._reviving.release()
