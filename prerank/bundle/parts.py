"""What a version is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from prerank.config import Config
from prerank.features.transforms import Transforms
from prerank.models.ranker import Ranker
from prerank.models.towers import TwoTower
from prerank.types import Array, Columns


@dataclass(frozen=True, slots=True)
class Parts:
    """What a version is made of. Of I items in any order, and of G golden requests:

    item_ids int64 [I]; item_columns encoded [I, ...]; item_table raw [I], what answers show and what the rules read;
    popularity float32 [I, S];
    golden_user encoded user and context features and counters [G, ...]. `parents` names what it was made from,
    `metrics` what was measured; neither changes what the version is. Both models are left in eval mode.
    `targeting` are the raw columns [I] that the rules of [targeting] read. `vectors` float32 [I, D] are what the towers
    give of the items, made before; None lets `publish` make them. `asked_user` are as `golden_user`, of more requests:
    what the index is measured with, where it is (None: with those of `golden_user`).
    """

    config: Config
    transforms: Transforms
    towers: TwoTower
    ranker: Ranker
    item_ids: Array
    item_columns: Columns
    item_table: pa.Table
    popularity: Array
    golden_user: Columns
    parents: Mapping[str, str]
    metrics: Mapping[str, object]
    targeting: pa.Table | None = None
    vectors: Array | None = None
    asked_user: Columns | None = None

    def order(self) -> Array:
        """The places of ascending item_ids, which are the rows of a version."""
        return np.argsort(self.item_ids, kind="stable")
