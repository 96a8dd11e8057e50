"""The graphs of other libraries over the same vectors: hnswlib and usearch, as their manuals say."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from benchmarks.retrieval_world import equally_long
from prerank.index.graph import LINKS
from prerank.types import Array

EF_CONSTRUCTION = 100
Search: TypeAlias = Callable[[Array, int, int], Array]
"""A user float32 [1, D], k and the width -> rows int64 [k]."""


def peers(items: Tensor, threads: int) -> Iterator[tuple[str, Callable[[], Search]]]:
    """Each by name, to be built: over inner products, and over nearness of vectors made equally long.

    One that is not installed raises ImportError when it is built.
    """
    for name, build in (("hnswlib", _hnswlib), ("usearch", _usearch)):
        yield f"{name}, inner product", partial(build, items, True, threads)
        yield f"{name}, equally long", partial(build, items, False, threads)


def _hnswlib(items: Tensor, by_product: bool, threads: int) -> Search:
    import hnswlib

    numbers = (items if by_product else equally_long(items)).numpy()
    index = hnswlib.Index(space="ip" if by_product else "l2", dim=numbers.shape[1])
    index.init_index(max_elements=len(items), M=LINKS, ef_construction=EF_CONSTRUCTION, random_seed=1)
    index.add_items(numbers, num_threads=threads)

    def search(user: Array, k: int, width: int) -> Array:
        index.set_ef(width)
        rows: Array = index.knn_query(user if by_product else _longer(user), k, num_threads=1)[0][0]
        return rows

    return search


def _usearch(items: Tensor, by_product: bool, threads: int) -> Search:
    from usearch.index import Index

    numbers = (items if by_product else equally_long(items)).numpy()
    metric = "ip" if by_product else "l2sq"
    index = Index(ndim=numbers.shape[1], metric=metric, dtype="f32", connectivity=LINKS, expansion_add=EF_CONSTRUCTION)
    index.add(np.arange(len(numbers)), numbers, threads=threads)

    def search(user: Array, k: int, width: int) -> Array:
        index.expansion_search = width
        one = user if by_product else _longer(user)
        rows: Array = index.search(one[0], k, threads=1).keys.astype(np.int64)
        return rows

    return search


def _longer(user: Array) -> Array:
    """With 0 for the number that makes items equally long."""
    longer: Array = torch.nn.functional.pad(torch.from_numpy(user), (0, 1)).numpy()
    return longer
