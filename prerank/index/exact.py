"""The k most similar rows by looking at all of them: always right, and fast enough for a few million rows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from prerank._tensor_files import read_tensors, write_tensors
from prerank.errors import BundleError
from prerank.index.storage import STORAGES, Storage, storage_named, store
from prerank.kernels.scan import scan_top_k
from prerank.types import CandidateSet


class ExactIndex(nn.Module):
    """Item vectors float32 [I, D], one a row, scanned whole for every query.

    It is exact over what it stores: with `storage` "bfloat16" or "int8" the vectors are rounded to that first, and read
    in half or a quarter of the bytes. `vectors` is [I, D] as stored, `scales` float32 [I] beside int8 ones.

    The two products of one item are rounded the same on one machine, not on two: rows whose similarities differ by
    rounding alone may change places between devices.
    """

    is_exact = True
    threads: int | None = None
    vectors: Tensor
    scales: Tensor | None

    def __init__(self, vectors: Tensor, storage: Storage = "float32") -> None:
        super().__init__()
        assert vectors.dim() == 2
        assert vectors.dtype == torch.float32
        self._keep(*store(vectors, storage))

    def search(self, query: Tensor, k: int, eligible: Tensor | None) -> CandidateSet:
        """The k rows of largest dot product with each query float32 [B, D]; see `Index.search`."""
        similarity, rows = scan_top_k(self.vectors, self.scales, query, k, eligible, self.threads)
        return CandidateSet(rows=rows, similarity=similarity, valid=rows >= 0)

    def put(self, rows: Tensor, vectors: Tensor | None) -> None:
        """Give rows int64 [n] these vectors float32 [n, D], or none; see `Index.put`."""
        with torch.inference_mode():
            if vectors is None:
                (self.vectors if self.scales is None else self.scales)[rows] = torch.nan
                return
            stored, scales = store(vectors, self.storage)
            self.vectors[rows] = stored
            # an int8 row is found by its scale, which is not a number until its codes are there
            if self.scales is not None and scales is not None:
                self.scales[rows] = scales

    def prepare(self, query: Tensor, k: int, floor: float) -> None:
        """Nothing: every search looks at all rows."""

    def own(self) -> None:
        """See `Index.own`."""
        self.register_buffer("vectors", self.vectors.clone())
        self.register_buffer("scales", None if self.scales is None else self.scales.clone())

    def part(self, rows: Tensor) -> Self:
        """These rows int64 [n] alone, copied, as an index of their own: its row n is rows[n] of this one."""
        part = type(self)(torch.empty(0, 0))
        part._keep(self.vectors[rows], None if self.scales is None else self.scales[rows])
        part.models, part.threads = self.models, self.threads
        return part

    def save(self, path: Path, models: Mapping[str, str]) -> None:
        """Write one safetensors file; `models` is the version of each model the vectors were made with, by name."""
        write_tensors(path, self.to_tensors(), {"index": "exact", "storage": self.storage, "models": dict(models)})

    @classmethod
    def load(cls, path: Path) -> Self:
        """What `save` wrote, memory-mapped, with its `models`. Raises BundleError for anything else."""
        tensors, note = read_tensors(path)
        index = cls.of_stored(path, tensors, note, "exact")
        index.models = models_of(note)
        return index

    @classmethod
    def of_stored(cls, path: Path, tensors: Mapping[str, Tensor], note: Mapping[str, object], kind: str) -> Self:
        """Over vectors as they were stored, and for int8 the scales, if the file's `note` is of an index of this kind.

        Raises BundleError for anything else, which names `path`.
        """
        storage = storage_named(note.get("storage"))
        if note.get("index") != kind or not isinstance(note.get("models"), dict) or storage is None:
            raise BundleError(f"{path}: expected an {kind} index with the models it was built with, found {note}")
        vectors, scales = tensors.get("vectors"), tensors.get("scales")
        if vectors is None or not _is_stored(tensors, vectors, scales, storage):
            wanted = f"one tensor, vectors {storage} [I, D]"
            if storage == "int8":
                wanted = "two tensors, vectors int8 [I, D] and scales float32 [I]"
            shapes = {name: f"{t.dtype} {list(t.shape)}".removeprefix("torch.") for name, t in tensors.items()}
            raise BundleError(f"{path}: expected {wanted}, found {shapes}")
        index = cls(torch.empty(0, 0))
        index._keep(vectors, scales)
        return index

    def to_tensors(self) -> dict[str, Tensor]:
        """What is stored, by name, for a file."""
        return {"vectors": self.vectors} if self.scales is None else {"vectors": self.vectors, "scales": self.scales}

    def finite(self) -> Tensor:
        """Which rows can be found: bool [I]."""
        rows = self.vectors if self.scales is None else self.scales.unsqueeze(1)
        return rows.isfinite().all(1)

    @property
    def storage(self) -> Storage:
        """What the vectors are kept as."""
        return next(name for name, dtype in STORAGES.items() if dtype == self.vectors.dtype)

    def _keep(self, vectors: Tensor, scales: Tensor | None) -> None:
        self.register_buffer("vectors", vectors)
        self.register_buffer("scales", scales)
        self.models: Mapping[str, str] = {}


def models_of(note: Mapping[str, object]) -> dict[str, str]:
    """The version of each model that a file's note names."""
    models = note.get("models")
    assert isinstance(models, dict)
    return {str(name): str(version) for name, version in models.items()}


def _is_stored(tensors: Mapping[str, Tensor], vectors: Tensor, scales: Tensor | None, storage: Storage) -> bool:
    names = {"vectors", "scales"} if storage == "int8" else {"vectors"}
    if tensors.keys() != names or vectors.dim() != 2 or vectors.dtype != STORAGES[storage]:
        return False
    return scales is None or (scales.dtype == torch.float32 and scales.shape == vectors.shape[:1])
