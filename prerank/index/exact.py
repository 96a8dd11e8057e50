"""The k most similar rows by looking at all of them: always right, and fast enough for a few million rows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from prerank._tensor_files import read_tensors, write_tensors
from prerank.errors import BundleError
from prerank.index.top_k import NONE, order_keys, value_and_row
from prerank.types import CandidateSet

_SIMILARITIES_AT_ONCE = 1 << 19


class ExactIndex(nn.Module):
    """Item vectors float32 [I, D], one a row, scanned whole for every query.

    The two products of one item are rounded the same on one machine, not on two: rows whose similarities differ by
    rounding alone may change places between devices.
    """

    is_exact = True
    vectors: Tensor

    def __init__(self, vectors: Tensor) -> None:
        super().__init__()
        assert vectors.dim() == 2
        assert vectors.dtype == torch.float32
        self.register_buffer("vectors", vectors)
        self.models: Mapping[str, str] = {}

    def search(self, query: Tensor, k: int, eligible: Tensor | None) -> CandidateSet:
        """The k rows of largest dot product with each query float32 [B, D]; see `Index.search`."""
        num_queries, num_items = query.shape[0], self.vectors.shape[0]
        assert query.shape[1] == self.vectors.shape[1]
        assert eligible is None or (eligible.dtype == torch.bool and eligible.shape == (num_items,))
        best = torch.full((num_queries, k), NONE, device=query.device)
        step = max(1, _SIMILARITIES_AT_ONCE // max(num_queries, 1))
        for start in range(0, num_items if k else 0, step):
            similarity = query @ self.vectors[start : start + step].T
            if eligible is not None:
                similarity.masked_fill_(~eligible[start : start + step], -torch.inf)
            similarity.nan_to_num_(nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf)
            # only what beats the k-th so far can enter, which soon is few; an equal one has a larger row
            beaten, _ = value_and_row(best[:, -1:])
            entering = max((similarity > beaten).sum(1).tolist(), default=0)
            if entering < min(k, similarity.shape[1]):
                similarity, rows = similarity.topk(entering)
            else:
                rows = torch.arange(similarity.shape[1], device=query.device)
            keys = order_keys(similarity, rows + start, None)
            best = torch.cat([best, keys.topk(min(k, keys.shape[1])).values], dim=1).topk(k).values
        similarity, rows = value_and_row(best)
        return CandidateSet(rows=rows, similarity=similarity, valid=best != NONE)

    def save(self, path: Path, models: Mapping[str, str]) -> None:
        """Write one safetensors file; `models` is the version of each model the vectors were made with, by name."""
        write_tensors(path, {"vectors": self.vectors}, {"index": "exact", "models": dict(models)})

    @classmethod
    def load(cls, path: Path) -> Self:
        """What `save` wrote, memory-mapped, with its `models`. Raises BundleError for anything else."""
        tensors, note = read_tensors(path)
        models = note.get("models")
        if note.get("index") != "exact" or not isinstance(models, dict):
            raise BundleError(f"{path}: expected an exact index with the models it was built with, found {note}")
        vectors = tensors.get("vectors")
        if len(tensors) != 1 or vectors is None or vectors.dim() != 2 or vectors.dtype != torch.float32:
            shapes = {name: f"{t.dtype} {list(t.shape)}".removeprefix("torch.") for name, t in tensors.items()}
            raise BundleError(f"{path}: expected one tensor, vectors float32 [I, D], found {shapes}")
        index = cls(vectors)
        index.models = {str(name): str(version) for name, version in models.items()}
        return index
