"""Items that come, change and leave while a version serves: new rows in its slack, and the old ones out of the way.

An item that is changed is written anew, in a row that nobody has, and then takes the old one's place; so no reader
ever sees half of it. Order makes that so: a row's vector, without which it is not found, is written last, and rows are
swapped under the lock that readers of what is live take. A row that was left is given away again when every request
that began before has ended; one of those published never is, for their order is that of the item_ids.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from prerank.bundle.load import Bundle
from prerank.bundle.readers import Readers
from prerank.business.targeting import Listed
from prerank.errors import DataError, NoRoom, RequestError
from prerank.features.rates import GroupRates
from prerank.stores.metadata import MetadataTable
from prerank.types import Array, Features, Given, ItemChange


@dataclass(frozen=True, slots=True)
class Arrivals:
    """n items read, ready to be put: all that can be wrong with them has been looked for.

    item_ids int64 [n], each once; encoded features [n, ...]; what they list by targeting rule; their groups int32
    [n, G]; and the columns that they came as.
    """

    item_ids: Array
    features: Features
    listed: Listed
    groups: Tensor | None
    raw: pa.Table


@dataclass(frozen=True, slots=True)
class Written:
    """n items in rows of their own that nobody finds yet: item_ids and rows int64 [n], features, vectors [n, ...]."""

    item_ids: Tensor
    rows: Tensor
    features: Features
    vectors: Tensor


@dataclass(frozen=True, slots=True)
class _Made:
    """Of n items: features with their rates, the ranker's item side, popularity and the item tower's vectors."""

    features: Features
    side: Features
    popularity: Tensor
    vectors: Tensor


class Inventory:
    """The items of `bundle`, whose answers show `metadata`. Threads may call; they write in turn."""

    def __init__(self, bundle: Bundle, metadata: MetadataTable) -> None:
        self._bundle, self._metadata = bundle, metadata
        self._items, self._scorer = bundle.scorer.items, bundle.scorer
        config = bundle.config
        shown = [name for name in metadata.columns if name not in config.item_columns()]
        self.columns = (*config.item_columns(), *shown)
        self.readers = Readers()
        self._lock = threading.Lock()
        self._next = self._items.num_published  # the high-water mark: rows from here on were never taken
        self._left: deque[tuple[int, int]] = deque()  # slack rows that items left, and after which line of readers
        if self.num_free:
            self._own()
        self._unseen: Tensor | None = None  # the popularity of items that nobody was shown
        self._rates: dict[str, GroupRates] = {}

    @property
    def num_free(self) -> int:
        """How many rows of slack are free, now or as soon as the requests that run have ended."""
        return self._items.num_rows - self._next + len(self._left)

    def _own(self) -> None:
        """Have the pages that will be written copied from the mapped file now.

        Each that is copied while serving interrupts every core that may have seen it.
        """
        self._bundle.index.own()
        first, slots = self._items.num_published, self._items.num_resident
        with torch.inference_mode():
            for tensor in [*self._items.buffers(), *self._scorer.item_side.buffers()]:
                start = first if len(tensor.shape) and len(tensor) == self._items.num_rows else slots
                if len(tensor.shape) and len(tensor) in (self._items.num_rows, self._items.num_slots):
                    tensor[start:] = tensor[start:].clone()

    def rows_of(self, item_ids: Sequence[int]) -> list[int]:
        """Where items are, -1 for one that is not here."""
        return list(self._items.rows_of(torch.tensor(item_ids, dtype=torch.int64)).tolist())

    def check_room(self, num: int) -> None:
        """Raises NoRoom where there are not so many free rows."""
        fresh = self._items.num_rows - self._next
        if num > fresh + self._num_left(num - fresh):
            free = fresh + self._num_left(len(self._left))
            slack = self._items.num_rows - self._items.num_published
            raise NoRoom(
                f"items: {num} of them need a row each, and of {slack} rows of slack {free} are free; publish again, "
                "which makes those that came the version's own, or with more [inventory] slack"
            )

    def read(self, items: Sequence[ItemChange], names: Sequence[str]) -> Arrivals:
        """Items, each once, as plain values, one, if only None, for each of `columns`; errors call them by `names`.

        Raises RequestError naming the first item, and its column, that is wrong.
        """
        rows = [one.columns or {} for one in items]
        for name, row in zip(names, rows, strict=True):
            missing = [column for column in self.columns if column not in row]
            if missing:
                raise RequestError(
                    f"{name}: expected a value, or null where it is not known, for each of {list(self.columns)}; "
                    f"{missing} are missing"
                )
            extra = [column for column in row if column not in self.columns]
            if extra:
                raise RequestError(f"{name}: expected {list(self.columns)}, and nothing reads {extra}")
        return self._arrivals([one.item_id for one in items], self._table(rows, names), names)

    def _arrivals(self, item_ids: Sequence[int], rows: pa.Table, names: Sequence[str]) -> Arrivals:
        features = self._encoded(rows, names)
        scorer = self._scorer
        try:
            listed: Listed = []
            if scorer.targeting is not None:
                listed = scorer.targeting.read({name: rows[name] for name in rows.column_names})
            groups = None if scorer.diversity is None else scorer.diversity.codes_of(rows)
        except DataError as error:
            raise RequestError(f"items: {error}") from None
        return Arrivals(np.asarray(item_ids, np.int64), features, listed, groups, rows)

    def write(self, arrivals: Arrivals) -> Written:
        """The items in rows that nobody has, whole, but found by nobody before they are swapped in, or `leave`.

        Raises NoRoom where there are more of them than free rows, RequestError where a model or a rule cannot take one.
        """
        with self._lock, torch.inference_mode():
            self.check_room(len(arrivals.item_ids))
            ids = torch.from_numpy(arrivals.item_ids)
            before = self._items.rows_of(ids)
            made = self._made(arrivals.features, before)
            rows = torch.tensor(self._take(len(ids)), dtype=torch.int64)
            try:
                self._write(arrivals, made, rows)
            except BaseException:
                self._leave(rows)
                raise
            return Written(ids, rows, made.features, made.vectors)

    def swap(self, written: Written, said: Sequence[ItemChange]) -> None:
        """Let every request that begins after this find these items, and none the rows that they had before.

        They are as `said`, one change an item; where it does not say, an item is on, and paced, as it was, and a new
        one on.
        """
        with self._lock, torch.inference_mode():
            live, before = self._scorer.live, self._items.rows_of(written.item_ids)
            is_new, was = before < 0, before.clamp_min(0)
            on, pacing = live.on[was] | is_new, torch.where(is_new, 1.0, live.pacing[was])
            values = {name: written.features[name].float() for name in live.names}
            for at, one in enumerate(said):
                if one.on is not None:
                    on[at] = one.on
                if one.pacing is not None:
                    pacing[at] = one.pacing
                for name, value in one.values.items():
                    values[name][at] = value
            live.prepare(written.rows, values, pacing)
            self._bundle.index.put(written.rows, written.vectors)
            live.swap(written.rows, on, before[~is_new])
            self._items.move(written.item_ids, written.rows)
            self._leave(before[~is_new])

    def leave(self, written: Written) -> None:
        """Give rows back that were not swapped in."""
        with self._lock:
            self._leave(written.rows)

    def remove(self, item_ids: Sequence[int]) -> int:
        """Let no request that begins after this find these items; how many of them there were."""
        with self._lock, torch.inference_mode():
            ids = torch.tensor(list(dict.fromkeys(item_ids)), dtype=torch.int64)
            rows = self._items.rows_of(ids)
            gone, rows = ids[rows >= 0], rows[rows >= 0]
            self._scorer.live.swap(rows[:0], rows[:0].bool(), rows)
            self._items.move(gone, torch.full_like(gone, -1))
            self._leave(rows)
            return len(rows)

    def _num_left(self, most: int) -> int:
        """How many rows, at most so many, that items left nobody reads any more; those left first are the first."""
        num, past = 0, -1
        for _, line in islice(self._left, max(most, 0)):
            if line != past and not self.readers.are_past(line):
                break
            num, past = num + 1, line
        return num

    def _take(self, num: int) -> list[int]:
        """Rows that nobody has or reads, of which there are so many."""
        again = [self._left.popleft()[0] for _ in range(self._num_left(num))]
        first = self._next
        self._next += num - len(again)
        return [*again, *range(first, self._next)]

    def _made(self, features: Features, before: Tensor) -> _Made:
        """What the models make of items [n] that were in rows int64 [n], -1 for new ones."""
        whole = dict(features)
        for name, rate in self._bundle.config.features.rates().items():
            whole[name] = self._rate(name, rate.by, features, before)
        popularity = self._items.popularity
        assert popularity is not None, "a table with slack has it"
        if self._unseen is None:
            self._unseen = popularity[: self._items.num_published].amin(0)
        popularity = torch.where((before < 0).unsqueeze(1), self._unseen, popularity[before.clamp_min(0)])
        side, vectors = self._scorer.ranker.item_side(whole), self._bundle.towers.item_side(whole, popularity)
        for made in (*side.values(), vectors):
            if made.is_floating_point() and not bool(made.isfinite().all()):
                at = int((~made.reshape(len(made), -1).isfinite().all(1)).nonzero()[0, 0])
                raise RequestError(f"items[{at}].columns: the models make numbers of them that are not finite")
        return _Made(whole, side, popularity, vectors)

    def _rate(self, name: str, by: str, features: Features, before: Tensor) -> Tensor:
        """The rate of an item's group; of those that are their own, as it was, and of a new one 0, as all together."""
        held = self._items.features()
        if by and name not in self._rates:
            num = self._items.num_resident
            self._rates[name] = GroupRates(held[by][:num].numpy(), held[name][:num].numpy())
        if by:
            return torch.from_numpy(self._rates[name].of(features[by].numpy()))
        slots = self._items.slots_of(before.clamp_min(0))
        return torch.where((before < 0) | (slots < 0), 0.0, held[name][slots.clamp_min(0)])

    def _write(self, arrivals: Arrivals, made: _Made, rows: Tensor) -> None:
        """All of `rows` but what is live of them, and their vectors."""
        items, scorer = self._items, self._scorer
        try:
            for rule in scorer.rules.values():
                rule.put(rows, arrivals.raw)
            for generator in self._bundle.generators.values():
                generator.put(rows, made.features, arrivals.raw)
        except DataError as error:
            raise RequestError(f"items: {error}") from None
        items.put(rows, torch.from_numpy(arrivals.item_ids), made.features)
        assert items.popularity is not None
        items.popularity[rows] = made.popularity
        scorer.put_side(items.slots_of(rows), made.side)
        if scorer.diversity is not None and arrivals.groups is not None:
            scorer.diversity.codes[rows] = arrivals.groups
        if scorer.targeting is not None:
            scorer.targeting.put(rows, arrivals.listed)
        self._metadata.put(rows.tolist(), arrivals.raw.select(list(self._metadata.columns)))

    def _leave(self, rows: Tensor) -> None:
        self._bundle.index.put(rows, None)
        line = self.readers.mark()
        self._left.extend((row, line) for row in rows.tolist() if row >= self._items.num_published)

    def _table(self, rows: Sequence[Mapping[str, Given]], names: Sequence[str]) -> pa.Table:
        columns = {}
        for column in self.columns:
            try:
                columns[column] = pa.array([row[column] for row in rows])
            except (pa.ArrowException, TypeError, OverflowError):
                self._refuse_first(rows, names)
                kinds = sorted({type(row[column]).__name__ for row in rows})
                raise RequestError(f"items: columns.{column}: expected values of one type, got {kinds}") from None
        return pa.table(columns)

    def _encoded(self, rows: pa.Table, names: Sequence[str]) -> dict[str, Tensor]:
        transforms = self._bundle.transforms
        try:
            encoded = transforms.encode("item", rows)
        except DataError as error:
            self._refuse_first(rows.to_pylist(), names)
            raise RequestError(f"items: {error}") from None
        return {name: torch.from_numpy(np.array(column)) for name, column in encoded.items()}

    def _refuse_first(self, rows: Sequence[Mapping[str, Given]], names: Sequence[str]) -> None:
        """Raises RequestError naming the first row with a value that its feature cannot read."""
        for name, row in zip(names, rows, strict=True):
            try:
                self._bundle.transforms.encode_row("item", row)
            except RequestError as error:
                raise RequestError(f"{name}: {str(error).removeprefix('item.')}") from None
