"""One pass over the log: keys, times, days, labels, ids, duplicates and a sample for the search of leaks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from prerank.config import Config
from prerank.data.calendar import FIRST_MS, LAST_MS, iso_day
from prerank.data.check_columns import Problem, num_not_finite
from prerank.data.check_duplicates import RowHashes
from prerank.data.check_leaks import LeakSample
from prerank.data.logs import DAY
from prerank.schema import DERIVED, Embedding, Number, Value, column_of
from prerank.types import Array, day_number

_UNITS = {"seconds": 1_000, "microseconds": 1 / 1_000, "nanoseconds": 1 / 1_000_000}


@dataclass(slots=True)
class _Strange:
    """Ids of the log that are in no table."""

    rows: int = 0
    examples: list[int] = field(default_factory=list)


class LogCheck:
    """Sees batches of one table of events ("impressions" or "history"), then tells its problems.

    `columns` are those of the table that can be read; `ids` holds, by key column, the ascending ids of its table.
    A context manager: row hashes lie in a temporary folder.
    """

    def __init__(self, config: Config, name: str, columns: Sequence[str], ids: Mapping[str, Array]) -> None:
        self.config, self.name, self.ids = config, name, ids
        self.is_log = name == "impressions"
        data = config.data
        self.time = data.time
        self.keys = [c for c in (data.user_id, data.item_id, data.time) if c in columns]
        self.labels = [c for c in config.labels() if c in columns]
        self.labelled = data.labelled if self.is_log and data.labelled in columns else ""
        self.known_early, self.early_example = 0, ""
        context = config.features.context if self.is_log else {}
        known = {n: k for n, k in context.items() if not isinstance(k, DERIVED) and column_of(n, k) in columns}
        self.numbers = [column_of(n, k) for n, k in known.items() if isinstance(k, Number | Value | Embedding)]
        late = [self.labelled] if self.labelled else []
        context_columns = [column_of(n, k) for n, k in known.items()]
        self.columns = list(dict.fromkeys([*self.keys, *self.labels, *late, *context_columns]))
        self.rows = self.implausible = self.backwards = 0
        self.units: dict[str, int] = {}
        self.odd_time: int | None = None
        self.first_backwards = ""
        self.latest = -1
        self.days: dict[int, int] = {}
        self.nulls = dict.fromkeys([*self.keys, *self.labels], 0)
        self.odd_labels: dict[str, list[float]] = {}
        self.num_odd = dict.fromkeys(self.labels, 0)
        self.positives = dict.fromkeys(self.labels, 0)
        self.not_finite = dict.fromkeys(self.numbers, 0)
        self.strange = {c: _Strange() for c in (data.user_id, data.item_id) if c in columns and c in ids}
        self.train = np.array([day_number(d) for d in data.days("train")], dtype=np.int32)
        self.hashes = RowHashes()
        self.sample = LeakSample({n: (column_of(n, k), k) for n, k in known.items()}, self.labels)

    def __enter__(self) -> LogCheck:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.hashes.close()

    def see(self, batch: pa.RecordBatch) -> None:
        """Takes note of one batch: `columns` and `day`."""
        in_train = np.isin(batch.column(DAY).fill_null(-1).to_numpy(zero_copy_only=False), self.train)
        for name in self.keys:
            self.nulls[name] += batch.column(name).null_count
        self._see_times(batch.column(self.time))
        if self.labelled:
            self._see_known(batch.column(self.labelled), batch.column(self.time))
        for name, strange in self.strange.items():
            self._see_ids(batch.column(name), self.ids[name], strange)
        for name in self.labels:
            self._see_label(name, batch.column(name), in_train)
        for name in self.numbers:
            self.not_finite[name] += num_not_finite(batch.column(name))
        if self.is_log:
            self._see_days(batch.column(DAY))
            self.hashes.add(batch.select(self.columns))
            self.sample.add(batch.filter(pa.array(in_train)))
        self.rows += batch.num_rows

    def _see_times(self, column: pa.Array) -> None:
        time_ms = column.drop_null().cast(pa.int64()).to_numpy()
        odd = time_ms[(time_ms < FIRST_MS) | (time_ms >= LAST_MS)]
        self.implausible += len(odd)
        if len(odd) and self.odd_time is None:
            self.odd_time = int(odd[0])
        for unit, factor in _UNITS.items():
            as_ms = odd * factor
            self.units[unit] = self.units.get(unit, 0) + int(((as_ms >= FIRST_MS) & (as_ms < LAST_MS)).sum())

    def _see_known(self, known: pa.Array, time: pa.Array) -> None:
        known_ms, time_ms = (column.cast(pa.int64()) for column in (known, time))
        early = pc.less(known_ms, time_ms).fill_null(False).to_numpy(zero_copy_only=False)
        self.known_early += int(early.sum())
        if early.any() and not self.early_example:
            row = int(np.flatnonzero(early)[0])
            self.early_example = f"{known_ms[row]} of an impression at {time_ms[row]}"

    def _see_days(self, column: pa.Array) -> None:
        days = column.fill_null(-1).to_numpy(zero_copy_only=False)
        before = np.maximum.accumulate(np.concatenate([[self.latest], days]))[:-1]
        back = np.flatnonzero((days < before) & (days >= 0))
        if len(back) and not self.backwards:
            row = back[0]
            day, after = iso_day(int(days[row])), iso_day(int(before[row]))
            self.first_backwards = f"row {self.rows + int(row) + 1} is of {day} after rows of {after}"
        self.backwards += len(back)
        self.latest = int(max(self.latest, days.max(initial=-1)))
        for day, count in zip(*np.unique(days, return_counts=True), strict=True):
            self.days[int(day)] = self.days.get(int(day), 0) + int(count)

    def _see_ids(self, column: pa.Array, known: Array, strange: _Strange) -> None:
        ids = column.drop_null().cast(pa.int64()).to_numpy()
        if len(known):
            places = np.searchsorted(known, ids).clip(max=len(known) - 1)
            ids = ids[known[places] != ids]
        strange.rows += len(ids)
        if len(ids) and len(strange.examples) < 3:
            strange.examples = list(dict.fromkeys([*strange.examples, *ids.tolist()]))[:3]

    def _see_label(self, name: str, column: pa.Array, in_train: Array) -> None:
        self.nulls[name] += column.null_count
        values = column.cast(pa.float64()).fill_null(0.0).to_numpy(zero_copy_only=False)
        odd = values[(values != 0) & (values != 1)]
        self.num_odd[name] += len(odd)
        if len(odd):
            self.odd_labels.setdefault(name, odd[:3].tolist())
        self.positives[name] += int(((values == 1) & in_train).sum())

    def problems(self) -> Iterator[Problem]:
        """Everything seen, in the order of the columns."""
        if not self.rows:
            if self.is_log:
                yield Problem(self.name, "no rows", "at least one row", "none")
            return
        for name in self.keys:
            if self.nulls[name]:
                found = f"{self._share(self.nulls[name])}"
                what = "nulls in the time" if name == self.time else "nulls in a key"
                yield Problem(f"{self.name}.{name}", what, "a value in every row", found)
        yield from self._time_problems()
        for name, strange in self.strange.items():
            if strange.rows:
                table = "users" if name == self.config.data.user_id else "items"
                kind = table[:-1]
                examples = ", ".join(str(i) for i in strange.examples)
                found = f"{self._share(strange.rows)} with {_article(name)} {name} not there, such as {examples}"
                what = f"{kind} in the log but not in the table"
                yield Problem(f"{self.name}.{name}", what, f"every id in the {table} table", found)
        yield from self._label_problems()
        if self.known_early:
            found = f"{self._share(self.known_early)} earlier, such as {self.early_example}"
            expected = "UTC milliseconds, at the impression's time or later"
            yield Problem(f"{self.name}.{self.labelled}", "labels known before their impression", expected, found)
        for name, count in self.not_finite.items():
            if count:
                found = f"NaN or infinity in {self._share(count)}; write null where a value is missing"
                yield Problem(f"{self.name}.{name}", "not a finite number", "finite numbers, or null", found)
        repeated = self.hashes.num_repeated() if self.is_log else 0
        if repeated:
            found = f"{self._share(repeated)} repeat an earlier one in all the funnel reads"
            yield Problem(self.name, "duplicate rows", "each impression once", found, "warning")
        yield from self.sample.problems()

    def _time_problems(self) -> Iterator[Problem]:
        where = f"{self.name}.{self.time}"
        if self.implausible:
            unit = max(self.units, key=lambda u: self.units[u])
            hint = f"; they look like {unit}" if self.units[unit] else ""
            found = f"{self._share(self.implausible)} outside, such as {self.odd_time}{hint}"
            yield Problem(where, "implausible time", "UTC milliseconds between 1990 and 2100", found)
        if not self.is_log or self.implausible + self.nulls[self.time] >= self.rows:
            return
        if self.backwards:
            found = f"{self._share(self.backwards)} of an earlier day than a row before; {self.first_backwards}"
            yield Problem(where, "days out of order", "days that never go back, in file order", found)
        known = sorted(d for d in self.days if d >= 0)
        reach = f"{iso_day(known[0])} to {iso_day(known[-1])}" if known else "no day"
        for part in ("train", "validate", "test"):
            days = self.config.data.days(part)
            empty = [d for d in days if day_number(d) not in self.days]
            if empty:
                found = f"no rows on {', '.join(empty[:3])}{' ...' if len(empty) > 3 else ''}; the log has {reach}"
                yield Problem(f"data.{part}", "day without rows", "rows on each of its days", found)

    def _label_problems(self) -> Iterator[Problem]:
        for name in self.labels:
            where = f"{self.name}.{name}"
            if self.num_odd[name]:
                examples = ", ".join(f"{v:g}" for v in self.odd_labels[name])
                yield Problem(
                    where, "not 0 or 1", "a label of 0 and 1", f"{self._share(self.num_odd[name])}, such as {examples}"
                )
            if not self.is_log:
                continue
            if self.nulls[name]:
                yield Problem(where, "nulls in a label", "0 or 1 in every row", self._share(self.nulls[name]))
            trained = any(int(d) in self.days for d in self.train)
            if trained and not self.positives[name]:
                yield Problem(where, "no positives", "at least one 1 on the training days", "none")

    def _share(self, count: int) -> str:
        return f"{count} of {self.rows} rows ({count / self.rows:.2%})"


def _article(word: str) -> str:
    # "user" begins with a consonant's sound
    return "an" if word[0] in "aeio" else "a"
