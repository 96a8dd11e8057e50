"""Context features that nearly are a label: measured after the impression, most likely."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from prerank.data.check_columns import Problem
from prerank.schema import Kind, Number
from prerank.types import Array

SAMPLE_ROWS = 100_000
SEPARATES = 0.99
ENOUGH = 50
"""Positives, and negatives, without which a perfect separation may be chance."""


class LeakSample:
    """Every n-th row of the training days, n doubling as the log goes on, so at most `SAMPLE_ROWS` are held.

    `features` by name: the column and the kind. A number is judged by its AUC against each label, missing values
    lowest; a category or bag by the AUC of its values' label rates, learned on every other row and measured on the
    rest, so that a value of its own in each row is no leak.
    """

    def __init__(self, features: Mapping[str, tuple[str, Kind]], labels: Sequence[str]) -> None:
        self._features = {n: (c, k) for n, (c, k) in features.items() if c not in labels}
        self._labels = list(labels)
        self._columns = list(dict.fromkeys([c for c, _ in self._features.values()] + self._labels))
        self._step, self._seen, self._held = 1, 0, 0
        self._parts: list[pa.RecordBatch] = []

    def add(self, batch: pa.RecordBatch) -> None:
        """Takes its share of one batch of the training days."""
        if not self._features or not self._labels:
            return
        rows = np.arange(-self._seen % self._step, batch.num_rows, self._step)
        self._seen += batch.num_rows
        if len(rows):
            self._parts.append(batch.select(self._columns).take(pa.array(rows)))
            self._held += len(rows)
        while self._held > SAMPLE_ROWS:
            table = self._table()
            half = table.take(pa.array(np.arange(0, table.num_rows, 2)))
            self._parts, self._held, self._step = half.combine_chunks().to_batches(), half.num_rows, self._step * 2

    def problems(self) -> Iterator[Problem]:
        """One for each feature and label that are nearly the same."""
        if not self._parts:
            return
        table = self._table()
        for name, (column, kind) in self._features.items():
            values = table.column(column).combine_chunks()
            for label in self._labels:
                happened = table.column(label).cast(pa.bool_()).fill_null(False).to_numpy()
                if min(happened.sum(), (~happened).sum()) < ENOUGH:
                    continue
                if isinstance(kind, Number):
                    separation = auc(_amounts(values), happened)
                    separation = max(separation, 1 - separation)
                else:
                    codes = _codes(values)
                    separation = _rate_auc(codes, happened)
                    yield from self._pure(name, label, values, codes, happened)
                if separation >= SEPARATES:
                    yield Problem(
                        f"features.context.{name}",
                        "leaky feature computed after the label?",
                        f"a column known before the impression, with an AUC below {SEPARATES}",
                        f"AUC {separation:.4f} for {label} alone, on {table.num_rows} training rows; remove it",
                    )

    def _pure(self, name: str, label: str, values: pa.Array, codes: Array, happened: Array) -> Iterator[Problem]:
        """A value that comes with the label nearly always, although the label is not the rule."""
        rows, positives = np.bincount(codes), np.bincount(codes, weights=happened)
        pure = np.flatnonzero((positives >= ENOUGH) & (positives >= SEPARATES * rows))
        if happened.mean() > 0.9 or not len(pure):
            return
        value = values[int(np.flatnonzero(codes == pure[0])[0])].as_py()
        yield Problem(
            f"features.context.{name}",
            "leaky feature computed after the label?",
            f"values with a rate of {label} below {SEPARATES}, as its mean is {happened.mean():.3f}",
            f"{value!r} has {label} in {int(positives[pure[0]])} of {int(rows[pure[0]])} training rows",
            "warning",
        )

    def _table(self) -> pa.Table:
        return pa.Table.from_batches(self._parts)


def auc(amounts: Array, happened: Array) -> float:
    """The chance that a positive has the larger amount than a negative, ties half: float64 [rows], bool [rows]."""
    _, place, counts = np.unique(amounts, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2
    num_pos, num_neg = int(happened.sum()), int((~happened).sum())
    total = float(ranks[place][happened].sum())
    return (total - num_pos * (num_pos + 1) / 2) / (num_pos * num_neg)


def _rate_auc(codes: Array, happened: Array) -> float:
    learn, measure = np.arange(len(codes)) % 2 == 0, np.arange(len(codes)) % 2 == 1
    if min(happened[measure].sum(), (~happened[measure]).sum()) == 0:
        return 0.5
    size = int(codes.max()) + 1
    rows = np.bincount(codes[learn], minlength=size)
    positives = np.bincount(codes[learn], weights=happened[learn], minlength=size)
    rates = np.where(rows > 0, positives / np.maximum(rows, 1), happened[learn].mean())
    return auc(rates[codes[measure]], happened[measure])


def _amounts(values: pa.Array) -> Array:
    amounts: Array = values.cast(pa.float64()).fill_null(-np.inf).to_numpy(zero_copy_only=False)
    return np.where(np.isnan(amounts), -np.inf, amounts)


def _codes(values: pa.Array) -> Array:
    """The number of each value among the distinct ones, missing included; a list is one value."""
    if pa.types.is_nested(values.type):
        values = pa.array([None if v is None else repr(v) for v in values.to_pylist()], pa.string())
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    indices = pc.fill_null(values.dictionary_encode().indices, -1).to_numpy(zero_copy_only=False)
    codes: Array = indices.astype(np.int64) + 1
    return codes
