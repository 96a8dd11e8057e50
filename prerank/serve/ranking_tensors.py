"""The tensors of the ranking stage: which there are, what each must be, what it says.

A name with a dot is of a column: `context.hour`, `user.country`, `value.bid_micros`. Empty text and NaN are null.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isnan

import numpy as np
import torch
from torch import Tensor

from prerank._toml import nearest
from prerank.errors import RequestError
from prerank.features.transforms import Transforms
from prerank.schema import DERIVED, Bag, Category, Embedding, Kind, Owner, column_of
from prerank.serve.ranking import PADDING, Asker, RankedItems, Ranking, check_size
from prerank.serve.tensors import NamedTensor
from prerank.types import Features, Given, Scalar

_INTEGERS = ("INT64", "INT32", "INT16", "INT8", "UINT32", "UINT16", "UINT8")
_FLOATS = ("FP32", "FP64")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor by name: its shape, -1 for any number, and the datatypes it may have, the first of which is told."""

    name: str
    datatypes: tuple[str, ...]
    shape: tuple[int, ...]
    is_optional: bool = False

    def __str__(self) -> str:
        return f"{' or '.join(self.datatypes)} {list(self.shape)}"


@dataclass(frozen=True, slots=True)
class Candidates:
    """What a call asks: item_ids int64 [B, N], one asker a row, and `values` [B, N] by name, as `Ranking.rank` says."""

    item_ids: Tensor
    askers: Sequence[Asker]
    values: Features


class RankingTensors:
    """The inputs and outputs of one version's ranking stage."""

    def __init__(self, ranking: Ranking) -> None:
        self.transforms = ranking.transforms
        self._values = ranking.values
        self._columns = {owner: _columns(self.transforms, owner) for owner in ("context", "user")}
        bids = [TensorSpec("bids", _FLOATS, (-1, -1), True)] if len(ranking.values) == 1 else []
        self.inputs = (
            TensorSpec("item_ids", ("INT64",), (-1, -1)),
            TensorSpec("user_id", ("INT64",), (-1, 1)),
            *self._columns["context"].values(),
            TensorSpec("time_ms", ("INT64",), (-1, 1), True),
            *bids,
            *(TensorSpec(f"value.{name}", _FLOATS, (-1, -1), True) for name in ranking.values),
            *self._columns["user"].values(),
        )
        counts = ("num_valid", "num_unknown", "num_nonfinite", "num_below", "num_absent")
        self.outputs = (
            TensorSpec("item_ids", ("INT64",), (-1, -1)),
            TensorSpec("utility", ("FP32",), (-1, -1)),
            TensorSpec("probs", ("FP32",), (-1, -1, len(ranking.tasks))),
            *(TensorSpec(name, ("INT64",), (-1,)) for name in counts),
            TensorSpec("is_unknown_user", ("BOOL",), (-1,)),
        )

    def read(self, tensors: Sequence[NamedTensor], now_ms: int) -> Candidates:
        """What the inputs of a call ask, as of `now_ms` where they do not say.

        Raises RequestError naming the first input that is missing, unknown, given twice, of another datatype, shape or
        number of rows than it must be.
        """
        given = self._by_name(tensors)
        if "item_ids" not in given:
            raise RequestError(f"item_ids: missing; expected {self.inputs[0]}, a row of candidates a user")
        item_ids = given["item_ids"].array
        check_size(*item_ids.shape)  # before anything is made for each user
        num = len(item_ids)
        for tensor in given.values():
            if len(tensor.array) != num:
                raise RequestError(f"{tensor.name}: expected {num} rows as item_ids has, got {len(tensor.array)}")
        return Candidates(
            torch.from_numpy(item_ids), self._askers(given, num, now_ms), self._own(given, item_ids.shape)
        )

    def write(self, ranked: RankedItems) -> dict[str, NamedTensor]:
        """Every output by name. Past the last winner of a row item_ids are PADDING, utilities and probabilities 0."""
        top = ranked.winners
        found = {
            "item_ids": top.item_ids.masked_fill(~top.valid, PADDING),
            "utility": top.utility.masked_fill(~top.valid, 0.0),
            "probs": top.probs.masked_fill(~top.valid.unsqueeze(-1), 0.0),
            "num_valid": top.valid.sum(1),
            "num_unknown": ranked.num_unknown,
            "num_nonfinite": top.num_nonfinite,
            "num_below": top.num_below,
            "num_absent": top.num_absent,
            "is_unknown_user": ranked.is_unknown_user,
        }
        return {one.name: NamedTensor(one.name, one.datatypes[0], found[one.name].numpy()) for one in self.outputs}

    def _by_name(self, tensors: Sequence[NamedTensor]) -> dict[str, NamedTensor]:
        """Each as its spec says, those of one number a row as [B]."""
        specs = {one.name: one for one in self.inputs}
        found: dict[str, NamedTensor] = {}
        for tensor in tensors:
            spec = specs.get(tensor.name)
            if spec is None:
                raise RequestError(self._unknown(tensor.name, list(specs)))
            if tensor.name in found:
                raise RequestError(f"{tensor.name}: expected once, got it twice")
            shape, is_one_each = tensor.array.shape, spec.shape == (-1, 1)
            fits = len(shape) == len(spec.shape) and all(
                w in (-1, got) for w, got in zip(spec.shape, shape, strict=True)
            )
            if tensor.datatype not in spec.datatypes or not (fits or (is_one_each and len(shape) == 1)):
                raise RequestError(f"{tensor.name}: expected {spec}, got {tensor}")
            array = tensor.array.reshape(-1) if is_one_each else tensor.array
            found[tensor.name] = NamedTensor(tensor.name, tensor.datatype, array)
        return found

    def _unknown(self, name: str, names: Sequence[str]) -> str:
        if name == "bids":
            each = ", ".join(f"value.{one}" for one in self._values) or "none"
            return f"bids: expected no such input where the utility reads {len(self._values)} values; name them: {each}"
        return f"{name}: expected an input of {list(names)}{nearest(name, names)}"

    def _askers(self, given: Mapping[str, NamedTensor], num: int, now_ms: int) -> list[Asker]:
        contexts, profiles = (self._rows(owner, given, num) for owner in ("context", "user"))
        for spec in self._columns["context"].values():
            if spec.name not in given:
                raise RequestError(f"{spec.name}: missing; expected {spec}, one a user")
        if "user_id" not in given and not any(profiles):
            users = [spec.name for spec in self._columns["user"].values()]
            raise RequestError(f"user_id: missing; expected INT64 [-1, 1], or in its place some of {users}")
        times = given["time_ms"].array.tolist() if "time_ms" in given else [now_ms] * num
        ids = given["user_id"].array.tolist() if "user_id" in given else [None] * num
        return [Asker(*one) for one in zip(times, ids, profiles, contexts, strict=True)]

    def _rows(self, owner: str, given: Mapping[str, NamedTensor], num: int) -> list[dict[str, Given]]:
        """What is said of each row by column."""
        rows: list[dict[str, Given]] = [{} for _ in range(num)]
        for column, spec in self._columns[owner].items():
            if spec.name in given:
                for row, value in zip(rows, _values(given[spec.name]), strict=True):
                    row[column] = value
        return rows

    def _own(self, given: Mapping[str, NamedTensor], shape: tuple[int, ...]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, tensor in given.items():
            if name != "bids" and not name.startswith("value."):
                continue
            if tensor.array.shape != shape:
                raise RequestError(f"{name}: expected {list(shape)} as item_ids has, got {list(tensor.array.shape)}")
            column = self._values[0] if name == "bids" else name.removeprefix("value.")
            if column in found:
                raise RequestError(f"{name}: expected bids or value.{column}, which are one, got both")
            found[column] = torch.from_numpy(tensor.array)
        return found


def _values(tensor: NamedTensor) -> list[Given]:
    """One value a row: of [B, M] a list, without what is null."""
    if tensor.array.ndim == 1:
        return [_plain(tensor, one) for one in tensor.array.tolist()]
    if tensor.datatype in _FLOATS:  # an embedding, all of it or nothing
        return [None if np.isnan(row).all() else row.tolist() for row in tensor.array]
    rows = [[_plain(tensor, one) for one in row] for row in tensor.array.tolist()]
    return [[one for one in row if one is not None and one != PADDING] for row in rows]


def _plain(tensor: NamedTensor, one: object) -> Scalar:
    if isinstance(one, bytes):
        try:
            return one.decode() or None
        except UnicodeDecodeError:
            raise RequestError(f"{tensor.name}: expected text in UTF-8, got {one[:40]!r}") from None
    assert isinstance(one, bool | int | float)
    return None if isinstance(one, float) and isnan(one) else one


def _columns(transforms: Transforms, owner: Owner) -> dict[str, TensorSpec]:
    """A tensor for each column that the owner's features read; a profile's may be left out."""
    found: dict[str, TensorSpec] = {}
    for name, kind in transforms.schema.of(owner).items():
        # of several features that read a column, a category says most of what it must be
        if isinstance(kind, DERIVED) or (column_of(name, kind) in found and not isinstance(kind, Category | Bag)):
            continue
        column = column_of(name, kind)
        found[column] = TensorSpec(f"{owner}.{column}", *_form(transforms, owner, column, kind), owner == "user")
    return found


def _form(transforms: Transforms, owner: Owner, column: str, kind: Kind) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The datatypes and the shape of a column that a feature of this kind reads."""
    if isinstance(kind, Embedding):
        return _FLOATS, (-1, kind.width)
    if not isinstance(kind, Category | Bag):
        return (*_FLOATS, *_INTEGERS), (-1, 1)
    is_list = isinstance(kind, Bag) and not kind.separator
    examples: dict[tuple[str, ...], Scalar] = {("BOOL",): True, _INTEGERS: 1, ("BYTES",): "text"}
    others = dict.fromkeys(transforms.schema.columns(owner))
    for datatypes, one in examples.items():
        try:
            transforms.encode_row(owner, {**others, column: [one] if is_list else one})
        except RequestError:
            continue
        return datatypes, (-1, -1) if is_list else (-1, 1)
    raise AssertionError(f"{owner}.{column}: the features that read it have no value in common")
