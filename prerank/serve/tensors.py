"""Tensors of the Open Inference Protocol as numpy arrays, from JSON and from raw bytes, and back."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import prod

import msgspec
import numpy as np

from prerank._toml import nearest
from prerank.errors import RequestError
from prerank.types import Array

DATATYPES: dict[str, np.dtype[np.generic]] = {
    "BOOL": np.dtype(np.bool_),
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype(np.int16),
    "INT32": np.dtype(np.int32),
    "INT64": np.dtype(np.int64),
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype(np.uint16),
    "UINT32": np.dtype(np.uint32),
    "UINT64": np.dtype(np.uint64),
    "FP32": np.dtype(np.float32),
    "FP64": np.dtype(np.float64),
    "BYTES": np.dtype(np.object_),
}
"""The protocol's datatypes, and what holds each here; an element of BYTES is a `bytes`."""
_MOST_DIMENSIONS = 8
_LENGTH = struct.Struct("<I")  # before each element of raw BYTES


@dataclass(frozen=True, slots=True)
class NamedTensor:
    """`array` [...] is of the dtype that DATATYPES says for `datatype`."""

    name: str
    datatype: str
    array: Array

    def __str__(self) -> str:
        return f"{self.datatype} {list(self.array.shape)}"


def from_raw(name: str, datatype: str, shape: Sequence[int], content: bytes | memoryview) -> NamedTensor:
    """The tensor whose elements stand in `content` row by row, little-endian; before each of BYTES its length, uint32.

    Raises RequestError naming the tensor where datatype, shape or the number of bytes are not as they must be.
    """
    num = _num_elements(name, datatype, shape)
    if datatype == "BYTES":
        return NamedTensor(name, datatype, _objects(_split(name, num, content), shape))
    dtype = DATATYPES[datatype]
    if len(content) != num * dtype.itemsize:
        raise RequestError(
            f"{name}: expected {num * dtype.itemsize} bytes for {datatype} {list(shape)}, got {len(content)}"
        )
    if datatype == "BOOL":
        return NamedTensor(name, datatype, (np.frombuffer(content, np.uint8) != 0).reshape(shape))
    # copied, for what comes over the wire cannot be written to and may begin at any byte
    found = np.frombuffer(content, dtype.newbyteorder("<")).astype(dtype, copy=True)
    return NamedTensor(name, datatype, found.reshape(shape))


def to_raw(tensor: NamedTensor) -> bytes:
    """What `from_raw` reads."""
    if tensor.datatype == "BYTES":
        return b"".join(_LENGTH.pack(len(one)) + one for one in tensor.array.reshape(-1).tolist())
    return tensor.array.astype(tensor.array.dtype.newbyteorder("<"), copy=False).tobytes()


def from_values(name: str, datatype: str, shape: Sequence[int], values: Sequence[object]) -> NamedTensor:
    """The tensor of plain values, nested as `shape` says or row by row.

    Raises RequestError naming the tensor where datatype, shape, number or range are not as they must be.
    """
    num, dtype = _num_elements(name, datatype, shape), DATATYPES[datatype]
    try:
        with np.errstate(over="ignore"):  # a number that no float32 can hold is infinite
            found = np.array(values, dtype=dtype)
    except OverflowError:
        raise RequestError(f"{name}: expected numbers that {datatype} can hold") from None
    except ValueError:
        raise RequestError(f"{name}: expected values in the shape {list(shape)}, got rows of several lengths") from None
    if found.shape not in (tuple(shape), (num,)):
        raise RequestError(f"{name}: expected {num} values for {datatype} {list(shape)}, got {list(found.shape)}")
    return NamedTensor(name, datatype, found.reshape(shape))


def from_json(name: str, datatype: str, shape: Sequence[int], data: bytes | memoryview) -> NamedTensor:
    """The tensor whose values are this JSON array, nested as `shape` says or row by row; BYTES are text.

    Raises RequestError as `from_values`, and for values of another type.
    """
    _num_elements(name, datatype, shape)
    text = bytes(data)
    depth = len(text) - len(text.lstrip(b"[ \t\r\n"))
    depth = max(1, min(text[:depth].count(b"["), _MOST_DIMENSIONS))
    try:
        values = _decoder(_ELEMENTS.get(DATATYPES[datatype].kind, float), depth).decode(text)
    except msgspec.ValidationError as error:
        told = str(error).replace("`", "").replace("$", "data")
        raise RequestError(f"{name}: {told[:1].lower()}{told[1:]}, for {datatype} {list(shape)}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise RequestError(f"{name}: expected a JSON array of {datatype}, got what is none") from None
    found = from_values(name, datatype, shape, values)
    if datatype == "BYTES":
        flat = [text.encode() for text in found.array.reshape(-1).tolist()]
        return NamedTensor(name, datatype, _objects(flat, shape))
    return found


def to_values(tensor: NamedTensor) -> list[object]:
    """The elements row by row as JSON has them. Numbers only: no tensor of ours holds text."""
    assert tensor.datatype != "BYTES"
    return list(tensor.array.reshape(-1).tolist())


_ELEMENTS: dict[str, type] = {"b": bool, "i": int, "u": int, "f": float, "O": str}


@cache
def _decoder(element: type, depth: int) -> msgspec.json.Decoder[list[object]]:
    kind: type = element
    for _ in range(depth):
        kind = list[kind]  # type: ignore[valid-type]
    return msgspec.json.Decoder(kind)


def _num_elements(name: str, datatype: str, shape: Sequence[int]) -> int:
    """How many elements a tensor has. Raises RequestError for a datatype or shape that no tensor has."""
    if datatype not in DATATYPES:
        known = list(DATATYPES)
        raise RequestError(f"{name}: expected a datatype of {known}, got {datatype!r}{nearest(datatype, known)}")
    if len(shape) > _MOST_DIMENSIONS or any(not 0 <= one < 2**31 for one in shape):
        raise RequestError(
            f"{name}: expected a shape of at most {_MOST_DIMENSIONS} dimensions from 0 on, got {list(shape)[:20]}"
        )
    return prod(shape)


def _split(name: str, num: int, content: bytes | memoryview) -> list[bytes]:
    """The elements of raw BYTES."""
    found: list[bytes] = []
    at = 0
    while at < len(content) and len(found) < num:
        end = at + _LENGTH.size
        # of a length that is cut off, nothing is left after it either
        length = _LENGTH.unpack_from(content, at)[0] if end <= len(content) else 0
        if end + length > len(content):
            raise RequestError(f"{name}: element {len(found)} ends after byte {len(content)}, where the tensor ends")
        found.append(bytes(content[end : end + length]))
        at = end + length
    if len(found) != num or at != len(content):
        raise RequestError(f"{name}: expected {num} elements in all {len(content)} bytes, got {len(found)} in {at}")
    return found


def _objects(elements: Sequence[bytes], shape: Sequence[int]) -> Array:
    """Elements as an array of objects: numpy's own bytes lose zeros at their end."""
    found = np.empty(len(elements), np.object_)
    found[:] = elements
    return found.reshape(shape)
