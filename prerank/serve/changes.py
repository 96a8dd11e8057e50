"""Changes of items: what one must be, how it is kept, and what it does to the version that serves."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import NoReturn

import structlog

from prerank._toml import nearest
from prerank.bundle.inventory import Inventory
from prerank.business.live import LiveItems
from prerank.errors import RequestError
from prerank.serve.answer import INT64
from prerank.stores.items import ItemStore, Stored
from prerank.types import ItemChange

_log = structlog.get_logger(__name__)

MOST_CHANGES = 100_000
"""The most items of one call."""


@dataclass(frozen=True, slots=True)
class Changed:
    """The changes of one call, all of them taken: `accepted`, and how many are of items that this version lacks.

    `free_rows` are left for items that come.
    """

    accepted: int
    unknown_items: int
    free_rows: int


class Changes:
    """The changes of a version's items since it was published: in its `inventory`, and kept in `store` if there is one.

    `until_ns` is the moment until which the version was made with whole items from the store, and without those that
    left. Threads may call; they write in turn.
    """

    def __init__(self, inventory: Inventory, live: LiveItems, store: ItemStore | None, until_ns: int) -> None:
        self._inventory, self._live, self._store = inventory, live, store
        self._until_ns = until_ns
        self._writing = threading.Lock()
        if store is not None:
            self._replay(store.all())

    def take(self, changes: Sequence[ItemChange]) -> Changed:
        """See `Funnel.change`."""
        check_changes(changes, self._live.names)
        wanted = _merged(changes)
        place = {one.item_id: at for at, one in enumerate(changes)}
        coming = [one for one in wanted if one.columns is not None]
        arrivals = self._inventory.read(coming, [f"items[{place[one.item_id]}].columns" for one in coming])
        with self._writing:
            written = self._inventory.write(arrivals) if coming else None
            try:
                known = wanted if self._store is None else self._store.put(changes)
            except BaseException:
                if written is not None:
                    self._inventory.leave(written)
                raise
            # what was said of an item before it came is true of it now
            after = {one.item_id: one for one in known}
            if written is not None:
                self._inventory.swap(written, [after[one.item_id] for one in coming])
            num_unknown = self._rest([one for one in wanted if one.columns is None])
            return Changed(len(changes), num_unknown, self._inventory.num_free)

    def catch_up(self, item_ids: Collection[int]) -> None:
        """Take what the store has of these items by now; what was taken before is taken again, which changes nothing.

        So another version may be told of items while this one is loaded, if it is told of them afterwards.
        """
        if self._store is not None and item_ids:
            with self._writing:
                self._replay(self._store.get(item_ids))

    def _replay(self, stored: Iterable[Stored]) -> None:
        """What changed before this version served; of what it was made with, only what is no part of a version."""
        read, names = set(self._inventory.columns), set(self._live.names)
        coming: list[Stored] = []
        rest: list[ItemChange] = []
        num_unfit = 0
        for one in stored:
            # a column or a value that this version does not read is another's
            change = replace(one.change, values={n: v for n, v in one.change.values.items() if n in names})
            if one.time_ns <= self._until_ns:
                rest.append(replace(change, columns=None, removed=False))
            elif change.columns is None:
                rest.append(change)
            elif read <= set(change.columns):
                columns = {name: change.columns[name] for name in self._inventory.columns}
                # a record is all that is known: what it does not say is as of an item that nobody changed, also where
                # an earlier replay found one of the same id that has left since
                on, pacing = change.on is not False, 1.0 if change.pacing is None else change.pacing
                coming.append(Stored(replace(change, columns=columns, on=on, pacing=pacing), one.time_ns))
            else:
                num_unfit += 1
        if coming:
            coming.sort(key=lambda one: one.time_ns)
            fits = [one.change for one in coming[: self._inventory.num_free]]
            if fits:
                self._bring(fits)
            if len(fits) < len(coming):
                _log.warning("no slack for items that came", left_out=len(coming) - len(fits), taken=len(fits))
        if num_unfit:
            _log.warning("items came without columns that this version reads", left_out=num_unfit, reads=sorted(read))
        self._rest(rest)

    def _bring(self, items: Sequence[ItemChange]) -> None:
        """Items as an earlier version read them, without those that this one cannot."""
        try:
            written = self._inventory.write(self._inventory.read(items, [f"item {one.item_id}" for one in items]))
        except RequestError as error:
            if len(items) == 1:
                _log.warning("an item that came is not as this version reads it", error=str(error))
                return
            half = len(items) // 2  # one that is wrong is found in a few turns
            self._bring(items[:half])
            self._bring(items[half:])
        else:
            self._inventory.swap(written, items)

    def _rest(self, changes: Sequence[ItemChange]) -> int:
        """Changes of items that are there, or leave; how many are of items that this version does not have."""
        if not changes:
            return 0
        rows = self._inventory.rows_of([one.item_id for one in changes])
        self._live.change(rows, changes)
        leaving = [one.item_id for one in changes if one.removed]
        if leaving:
            self._inventory.remove(leaving)
        return sum(row < 0 for row in rows)


def _merged(changes: Sequence[ItemChange]) -> list[ItemChange]:
    """Each item's as one."""
    found: dict[int, ItemChange] = {}
    for one in changes:
        found[one.item_id] = found[one.item_id].then(one) if one.item_id in found else one
    return list(found.values())


def check_changes(changes: Sequence[ItemChange], names: Sequence[str]) -> None:
    """Raises RequestError naming the first change's field that is wrong, what it must be, and what came.

    `names` are the item values that the utility reads. What is in `columns` is for `bundle.inventory` to check.
    """
    if not 1 <= len(changes) <= MOST_CHANGES:
        raise RequestError(f"items: expected 1 to {MOST_CHANGES:,} of them, got {len(changes):,}; send more calls")
    for at, one in enumerate(changes):
        if one.item_id not in INT64:
            _wrong(at, "item_id", "an int64", one.item_id)
        if one.removed and one != ItemChange(one.item_id, removed=True):
            raise RequestError(f"items[{at}]: expected nothing beside removed, for the item is gone")
        if one == ItemChange(one.item_id):
            raise RequestError(f"items[{at}]: expected at least one of on, pacing, values, columns and removed")
        if one.pacing is not None and not (isfinite(one.pacing) and one.pacing >= 0):
            _wrong(at, "pacing", "a finite number of 0 or more", one.pacing)
        for name, value in one.values.items():
            if name not in names:
                known = f"one of {list(names)}" if names else "none, for this funnel's utility reads no item value"
                raise RequestError(f"items[{at}].values: expected {known}, got {name!r}{nearest(name, names)}")
            if not isfinite(value):
                _wrong(at, f"values.{name}", "a finite number", value)


def _wrong(at: int, field: str, expected: str, came: object) -> NoReturn:
    raise RequestError(f"items[{at}].{field}: expected {expected}, got {came}")
