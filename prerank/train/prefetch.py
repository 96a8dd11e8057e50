"""Batches made by one background thread, a few ahead of whoever computes on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from queue import SimpleQueue
from threading import Semaphore, Thread
from typing import Generic, TypeVar

import torch
from threadpoolctl import threadpool_limits

Key = TypeVar("Key")
Batch = TypeVar("Batch")


@contextmanager
def ahead(make: Callable[[Key], Batch], keys: Sequence[Key], depth: int) -> Iterator[Iterator[Batch]]:
    """`make(key)` of every key, in order, at most `depth` of them made and not yet taken; 0 makes each when asked.

    What `make` raises is raised where its batch would have been taken, with its own traceback. However the block is
    left, the thread has ended when it is.
    """
    if not depth:
        yield map(make, keys)
        return
    maker = _Maker(make, keys, depth)
    try:
        maker.start()
        yield iter(maker)
    finally:
        maker.end()


class _Maker(Generic[Key, Batch]):
    """The thread, and the queue between it and its one reader."""

    def __init__(self, make: Callable[[Key], Batch], keys: Sequence[Key], depth: int) -> None:
        self._make, self._keys = make, keys
        # a free place is taken before a batch is made, so a full queue costs no batch more in memory
        self._places = Semaphore(depth)
        self._made: SimpleQueue[tuple[Batch | None, BaseException | None]] = SimpleQueue()
        self._ended = False
        # a daemon, so that a second interrupt while the first is handled cannot hold the process
        self._thread = Thread(target=self._work, name="prefetch", daemon=True)

    def start(self) -> None:
        """Begin with the first key."""
        self._thread.start()

    def _work(self) -> None:
        # a pool of threads of its own would make more threads than cores, and OpenMP then lets all of them, those of
        # whoever computes too, sleep after each operation; torch says its number once a thread, so after that
        torch.get_num_threads()
        with threadpool_limits(1, "openmp"):
            self._make_all()

    def _make_all(self) -> None:
        try:
            for key in self._keys:
                self._places.acquire()
                if self._ended:
                    return
                self._made.put((self._make(key), None))
        except BaseException as error:
            self._made.put((None, error))

    def __iter__(self) -> Iterator[Batch]:
        for _ in self._keys:
            batch, error = self._made.get()
            if error is not None:
                raise error
            self._places.release()
            yield batch  # type: ignore[misc]

    def end(self) -> None:
        """Return once the thread makes nothing more; it may have to finish the batch it is at."""
        self._ended = True
        self._places.release()
        if self._thread.ident is not None:
            self._thread.join()
