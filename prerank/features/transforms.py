"""Raw columns and values to encoded features: fitted once on the training days, saved in the bundle, used everywhere.

Training encodes tables, serving one row at a time; both run the same arithmetic of the same fitted kinds.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import pyarrow as pa

from prerank._toml import Problems, structure
from prerank.errors import BundleError, DataError, RequestError
from prerank.features.categories import Bags, Categories
from prerank.features.kinds import Fitted, read, start
from prerank.features.reading import Unreadable, plain, shown
from prerank.features.vocabulary import Vocabulary
from prerank.schema import DERIVED, FeatureSchema, Kind, Owner, column_of
from prerank.types import Array, Given

FORMAT = 1


class Transforms:
    """Every feature of a schema but the histories, fitted.

    `fit` makes one from data, `from_json` from a bundle.
    """

    def __init__(self, schema: FeatureSchema, fitted: Mapping[tuple[Owner, str], Fitted]) -> None:
        self.schema = schema
        self._fitted = fitted
        self._plan: dict[Owner, list[tuple[str, str, Fitted]]] = {"user": [], "context": [], "item": []}
        for (owner, name), one in fitted.items():
            self._plan[owner].append((name, column_of(name, schema.of(owner)[name]), one))

    @classmethod
    def fit(
        cls,
        schema: FeatureSchema,
        *,
        users: tuple[pa.Table, Array],
        items: tuple[pa.Table, Array],
        context: Iterable[pa.RecordBatch | pa.Table],
    ) -> Transforms:
        """Learn vocabularies and statistics from the training window.

        `users` and `items` are a table and how often each row occurred there, int64 [rows]; a row with 0 teaches
        nothing. `context` is the window's log, read once, a row an occurrence.
        Raises DataError naming the feature where a column is missing or of a type its kind cannot take.
        """
        pieces: dict[Owner, Iterable[tuple[pa.Table, Array]]] = {
            "user": [_occurred(schema, "user", *users)],
            "context": ((batch, np.ones(batch.num_rows, dtype=np.int64)) for batch in context),
            "item": [_occurred(schema, "item", *items)],
        }
        fitted: dict[tuple[Owner, str], Fitted] = {}
        for owner, own in pieces.items():
            for name, one in _fit_owner(schema, owner, own).items():
                fitted[owner, name] = one
        return cls(schema, fitted)

    def lasting(self) -> Transforms:
        """Of `FeatureSchema.lasting` alone, which is what the towers read."""
        schema = self.schema.lasting()
        return Transforms(schema, {key: one for key, one in self._fitted.items() if key[1] in schema.of(key[0])})

    def encode(self, owner: Owner, columns: pa.Table | pa.RecordBatch) -> dict[str, Array]:
        """Every feature of one owner but histories, leading shape [rows]; `types.Features` says each dtype.

        Raises DataError naming the feature where a column is missing or of a type its kind cannot take.
        """
        encoded = {}
        for name, column, fitted in self._plan[owner]:
            with _Named(owner, name, column):
                encoded[name] = _joined([fitted.column(chunk) for chunk in _chunks(columns, column)])
        return encoded

    def encode_row(self, owner: Owner, values: Mapping[str, Given]) -> dict[str, Array]:
        """The same of one row given by column name, leading shape [1]; columns no feature reads are ignored.

        A user's or item's absent column is missing, as None is; a context column must be there, if only as None.
        Raises RequestError naming the field: what it must be, and what came.
        """
        encoded = {}
        for name, column, fitted in self._plan[owner]:
            value = values.get(column)
            if value is None and owner == "context" and column not in values:
                raise RequestError(
                    f"context.{column}: missing; expected {fitted.expects}, or null where it is not known"
                )
            try:
                encoded[name] = fitted.one(value)
            except Unreadable as error:
                raise RequestError(f"{owner}.{column}: expected {error.expected}, got {error.found}") from None
        return encoded

    def sizes(self) -> dict[str, int]:
        """Embedding rows of each category and bag by "owner.name", the unknown row 0 included."""
        return {
            f"{owner}.{name}": one.codes.size
            for (owner, name), one in self._fitted.items()
            if isinstance(one, Categories | Bags)
        }

    def names(self, owner: Owner, feature: str) -> tuple[int | str, ...] | None:
        """The values of a category or bag whose n-th, from 1, has code n; None where they are hashed."""
        fitted = self._fitted[owner, feature]
        assert isinstance(fitted, Categories | Bags)
        return fitted.codes.values if isinstance(fitted.codes, Vocabulary) else None

    def to_json(self) -> str:
        """All of it as strict JSON; `from_json` gives back a Transforms that encodes to the same bits."""
        learnt = {f"{owner}.{name}": one.to_plain() for (owner, name), one in self._fitted.items()}
        return json.dumps({"format": FORMAT, "schema": self.schema.to_dict(), "learnt": learnt}, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Transforms:
        """What `to_json` wrote. Raises BundleError naming what is wrong."""
        saved = _object(text)
        if set(saved) != {"format", "schema", "learnt"}:
            raise BundleError(f"transforms: expected the keys format, learnt and schema, found {sorted(saved)}")
        if saved["format"] != FORMAT:
            raise BundleError(f"transforms: expected format {FORMAT}, found {saved['format']!r}; publish again")
        problems = Problems()
        own = structure({"schema": saved["schema"]}, _SavedSchema, "", problems)
        if own is None:
            raise BundleError("\n".join(f"transforms: {p}" for p in problems))
        schema, learnt = own.schema, saved["learnt"]
        names = [f"{owner}.{name}" for owner, name, _ in _learning(schema)]
        if not isinstance(learnt, dict) or set(learnt) != set(names):
            found = sorted(learnt) if isinstance(learnt, dict) else shown(learnt)
            raise BundleError(f"transforms: expected what {sorted(names)} learnt, found {found}")
        fitted: dict[tuple[Owner, str], Fitted] = {}
        for owner, name, kind in _learning(schema):
            one = learnt[f"{owner}.{name}"]
            try:
                if not isinstance(one, dict):
                    raise Unreadable("an object", shown(one))
                fitted[owner, name] = read(kind, one)
            except Unreadable as error:
                raise BundleError(f"transforms: {owner}.{name}: {error}") from None
        return cls(schema, fitted)

    def first_difference(self, other: Transforms) -> str | None:
        """A sentence naming the first thing that is not the same in both, or None."""
        different = self.schema.first_difference(other.schema)
        if different:
            return different
        for (owner, name), one in self._fitted.items():
            mine, theirs = one.to_plain(), other._fitted[owner, name].to_plain()
            for key, here in mine.items():
                if here != theirs[key]:
                    return f"{owner} feature {name!r}: {key}{_first_other(here, theirs[key])}"
        return None


@dataclass(frozen=True, slots=True)
class _SavedSchema:
    schema: FeatureSchema


def _learning(schema: FeatureSchema) -> Iterator[tuple[Owner, str, Kind]]:
    return ((owner, name, kind) for owner, name, kind in schema if not isinstance(kind, DERIVED))


def _fit_owner(
    schema: FeatureSchema, owner: Owner, pieces: Iterable[tuple[pa.Table | pa.RecordBatch, Array]]
) -> dict[str, Fitted]:
    kinds = {name: kind for name, kind in schema.of(owner).items() if not isinstance(kind, DERIVED)}
    if not kinds:
        return {}
    learning = {name: start(kind) for name, kind in kinds.items()}
    rows = None
    for columns, weights in pieces:
        rows = (rows or 0) + columns.num_rows
        for name, fit in learning.items():
            column = column_of(name, kinds[name])
            with _Named(owner, name, column):
                first = 0
                for chunk in _chunks(columns, column):
                    fit.add(chunk, weights[first : first + len(chunk)])
                    first += len(chunk)
    if rows is None:
        raise DataError(f"{owner} features {list(kinds)} have no rows to learn from; check the days of [data].train")
    fitted = {}
    for name, fit in learning.items():
        with _Named(owner, name, column_of(name, kinds[name])):
            fitted[name] = fit.fitted()
    return fitted


def _occurred(schema: FeatureSchema, owner: Owner, table: pa.Table, counts: Array) -> tuple[pa.Table, Array]:
    """The rows that occurred in training, and how often."""
    assert counts.shape == (table.num_rows,), "one count a row"
    seen = counts > 0
    wanted = [name for name in schema.columns(owner) if name in table.column_names]
    return table.select(wanted).filter(pa.array(seen)), counts[seen]


def _chunks(columns: pa.Table | pa.RecordBatch, column: str) -> list[pa.Array]:
    """A column's chunks without dictionaries, at least one."""
    places = columns.schema.get_all_field_indices(column)
    if len(places) != 1:
        raise Unreadable(
            f"one column {column!r} in the table", f"{len(places)} among {', '.join(columns.schema.names) or 'none'}"
        )
    found = columns.column(places[0])
    chunks = found.chunks if isinstance(found, pa.ChunkedArray) else [found]
    return [plain(chunk) for chunk in chunks] or [plain(pa.array([], type=found.type))]


def _joined(parts: list[Array]) -> Array:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


class _Named:
    """Adds a feature's name to what its column could not be read for."""

    def __init__(self, owner: Owner, name: str, column: str) -> None:
        self.said = f"{owner} feature {name!r} (column {column!r})"

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Unreadable):
            raise DataError(
                f"{self.said}: expected {error.expected}, found {error.found}; "
                "mend the table, or the feature in funnel.toml"
            ) from None


def _object(text: str) -> dict[str, object]:
    """The JSON object of a text, where NaN and Infinity are no JSON."""
    try:
        saved = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"transforms: not valid JSON: {error}") from None
    if not isinstance(saved, dict):
        raise BundleError(f"transforms: expected a JSON object, found {type(saved).__name__}")
    return saved


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON number")


def _first_other(here: object, there: object) -> str:
    if isinstance(here, list) and isinstance(there, list):
        if len(here) != len(there):
            return f": {len(here)} here, {len(there)} there"
        place = next(n for n, (a, b) in enumerate(zip(here, there, strict=True)) if a != b)
        return f"[{place}]: {here[place]!r} here, {there[place]!r} there"
    return f": {here!r} here, {there!r} there"
