"""The kinds of feature in plain sight: what each must be able to do, and which class does it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import pyarrow as pa

from prerank.features.categories import CategoryFit, read_category
from prerank.features.numbers import (
    EmbeddingFit,
    NumberFit,
    ValueFit,
    read_embedding,
    read_number,
    read_value,
)
from prerank.schema import Bag, Category, Embedding, History, Kind, Number, Rate, Value
from prerank.types import Array, Given


class Fitted(Protocol):
    """One feature, ready to encode. Raises Unreadable on a type it cannot take."""

    @property
    def expects(self) -> str:
        """What one value must be, for an error."""

    def column(self, chunk: pa.Array) -> Array:
        """R rows, without dictionary -> [R, ...]."""

    def one(self, value: Given) -> Array:
        """One value -> [1, ...], the same numbers."""

    def to_plain(self) -> dict[str, object]:
        """What is learnt, as JSON types."""


class Fit(Protocol):
    """One feature, learning."""

    def add(self, chunk: pa.Array, weights: Array) -> None:
        """Take in R rows, without dictionary, each `weights` int64 [R] times."""

    def fitted(self) -> Fitted:
        """What the rows teach."""


def start(kind: Kind) -> Fit:
    """A feature of this kind that has seen nothing."""
    match kind:
        case Category() | Bag():
            return CategoryFit(kind)
        case Number():
            return NumberFit(kind)
        case Embedding():
            return EmbeddingFit(kind)
        case Value():
            return ValueFit(kind)
        case History() | Rate():
            raise AssertionError("it is made of the log, and learns nothing of a column")


def read(kind: Kind, saved: Mapping[str, object]) -> Fitted:
    """A feature of this kind from what its `to_plain` gave. Raises Unreadable on anything else."""
    match kind:
        case Category() | Bag():
            return read_category(kind, saved)
        case Number():
            return read_number(kind, saved)
        case Embedding():
            return read_embedding(kind, saved)
        case Value():
            return read_value(kind, saved)
        case History() | Rate():
            raise AssertionError("it is made of the log, and learns nothing of a column")
