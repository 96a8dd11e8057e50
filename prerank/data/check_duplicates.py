"""How many rows of a stream repeat an earlier one, in bounded memory."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa

from prerank.types import Array

_PARTS = 64
_MISSING = np.uint64(0x9E3779B97F4A7C15)


class RowHashes:
    """64-bit hashes of rows, spread over 64 files by their own top bits; equal rows meet in one file.

    A file of hashes is sorted at a time: 1/8 byte of memory a row. Two different rows of a billion share a hash with
    a chance of about 3 %, so a count may be one too high. List columns are not part of a row's identity.
    """

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="prerank-check-")
        self._files = [(Path(self._folder.name) / f"{n}").open("w+b") for n in range(_PARTS)]

    def add(self, batch: pa.RecordBatch) -> None:
        """Notes the rows of one batch; every batch has the same columns."""
        hashes = row_hashes(batch)
        part = (hashes >> np.uint64(58)).astype(np.uint8)
        order = np.argsort(part, kind="stable")
        ends = np.cumsum(np.bincount(part, minlength=_PARTS))
        for file, rows in zip(self._files, np.split(hashes[order], ends[:-1]), strict=True):
            file.write(rows.tobytes())

    def num_repeated(self) -> int:
        """Rows seen that are the same as an earlier one."""
        repeated = 0
        for file in self._files:
            file.seek(0)
            hashes = np.sort(np.frombuffer(file.read(), dtype=np.uint64))
            repeated += int((hashes[1:] == hashes[:-1]).sum())
        return repeated

    def close(self) -> None:
        """Removes the files."""
        for file in self._files:
            file.close()
        self._folder.cleanup()


def row_hashes(batch: pa.RecordBatch) -> Array:
    """A hash of each row, uint64 [rows]; columns that are lists are left out."""
    total = np.zeros(batch.num_rows, dtype=np.uint64)
    for number, column in enumerate(batch.columns):
        if not pa.types.is_nested(column.type):
            total = _mixed(total ^ (_words(column) + np.uint64(number)))
    return total


def _words(column: pa.Array) -> Array:
    """One uint64 a value; equal values of one column share it."""
    kind = column.type
    missing = column.is_null().to_numpy(zero_copy_only=False)
    if pa.types.is_boolean(kind) or pa.types.is_integer(kind):
        words = column.cast(pa.int64(), safe=False).fill_null(0).to_numpy(zero_copy_only=False).view(np.uint64)
    elif pa.types.is_floating(kind):
        words = column.cast(pa.float64()).fill_null(0.0).to_numpy(zero_copy_only=False).view(np.uint64)
    else:
        encoded = column if pa.types.is_dictionary(kind) else column.dictionary_encode()
        names = [_text_word(str(v)) for v in encoded.dictionary.to_pylist()]
        codes = encoded.indices.cast(pa.int64()).fill_null(0).to_numpy(zero_copy_only=False)
        words = np.array([*names, 0], dtype=np.uint64)[codes]
    return np.where(missing, _MISSING, words)


def _text_word(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _mixed(words: Array) -> Array:
    """The finaliser of splitmix64 (Steele et al., OOPSLA 2014): every bit of a word changes every bit."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: Array = words ^ (words >> np.uint64(31))
    return mixed
