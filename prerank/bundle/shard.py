"""One shard of a version's index, for a process that holds nothing else of it.

Which shard an item is in is asked of its item_id, or of a column's value, never of a row: so it is the same in every
version, and while some shards have a newer version than others no item is in two of them or in none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from prerank._tensor_files import read_tensors
from prerank.bundle import manifest
from prerank.bundle.golden import Golden
from prerank.bundle.in_use import Hold, hold
from prerank.bundle.load import below, config_of, index_of, targeting_of
from prerank.business.targeting import Targeting
from prerank.config import Config
from prerank.errors import BundleError, ConfigError, DataError
from prerank.index.base import Index
from prerank.index.exact import ExactIndex
from prerank.stores.contexts import digest
from prerank.stores.metadata import MetadataTable
from prerank.types import Array, Features

_READ = (manifest.CONFIG, manifest.SCORER, manifest.INDEX, manifest.TARGETING, manifest.GOLDEN)
_ITEMS, _TARGETING = "items.", "targeting."


@dataclass(frozen=True, slots=True)
class Place:
    """Shard `number`, from 0, of `of`. Raises ConfigError where there is no such shard."""

    number: int
    of: int

    def __post_init__(self) -> None:
        if not 0 <= self.number < self.of:
            raise ConfigError(f"shard {self.number} of {self.of}: expected a number from 0 to {self.of - 1}")


@dataclass(frozen=True, slots=True)
class Shard:
    """The items of one shard in one version: item_ids int64 [n], ascending, and `targeting` of them, if there is any.

    `values` are the item values that its utility reads, such as bids, by name, [n] each, as they were published.
    `models` is what the index says it was built with; `rows` int64 [n] is where in the index the items are, None where
    that is their place: an index that can be cut is of these items alone. A query is `width` wide.
    """

    version: str
    models: Mapping[str, str]
    place: Place
    by: str
    width: int
    item_ids: Tensor
    index: Index
    rows: Tensor | None
    targeting: Targeting | None
    values: Features
    hold: Hold | None = field(default=None, compare=False, repr=False)


def shards_of(keys: Array, of: int) -> Array:
    """int64 [n] item_ids or digests -> the shard of each, int64 [n] from 0 to `of` - 1; part of the hosts' contract.

    The remainder of the splitmix64 finaliser (Steele, Lea, Flood, OOPSLA 2014), so that ids in any order spread.
    """
    mixed = keys.astype(np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    mixed ^= mixed >> np.uint64(31)
    return (mixed % np.uint64(of)).astype(np.int64)


def load_shard(path: Path, place: Place) -> Shard:
    """The items at `place` of the version in the folder `path`, as they were published.

    Only what it reads is checked against the hashes. Raises BundleError naming the first thing that is not as
    published, such as an item that is not found for a golden request as it was, and where no item of the version is in
    this shard.
    """
    held = hold(path)
    said = manifest.verify(path, _READ)
    config = config_of(path / manifest.CONFIG)
    by = config.retrieval.index.by
    if by:
        manifest.verify(path, [manifest.METADATA])
    tensors = read_tensors(path / manifest.SCORER)[0]
    items = below(tensors, _ITEMS)
    if not {"item_ids", "published"} <= set(items):
        raise BundleError(f"{path / manifest.SCORER}: expected the items' item_ids and how many, found {sorted(items)}")
    num_rows, num_items = len(items["item_ids"]), int(items["published"])
    item_ids = items["item_ids"][:num_items]
    keys = item_ids.numpy() if not by else _digests(path, by, num_items)
    rows = torch.from_numpy(np.flatnonzero(shards_of(keys, place.of) == place.number))
    if not len(rows):
        raise BundleError(f"{path}: none of {num_items} items is in shard {place.number} of {place.of}; have fewer")
    targeting = targeting_of(path, config, said, below(tensors, _TARGETING), num_rows)
    index = index_of(path, config, said)
    is_cut = isinstance(index, ExactIndex)
    part = index.part(rows) if isinstance(index, ExactIndex) else index
    golden = Golden.from_tensors(read_tensors(path / manifest.GOLDEN)[0])
    difference = golden.first_difference_of_shard(part, rows, item_ids[rows], is_cut)
    if difference:
        where = f"{path}: shard {place.number} of {place.of}"
        raise BundleError(f"{where} does not reproduce {difference}; publish again with this prerank")
    return Shard(
        version=str(said["version"]),
        models=dict(index.models),
        place=place,
        by=by,
        width=_width(config),
        item_ids=item_ids[rows],
        index=part,
        rows=None if is_cut else rows,
        targeting=None if targeting is None else targeting.part(rows.numpy()),
        values={name: column[:num_items][rows] for name, column in _values(path, config, items).items()},
        hold=held,
    )


def _values(path: Path, config: Config, items: Mapping[str, Tensor]) -> dict[str, Tensor]:
    prefix = "known_" if "slots" in items else "feature_"  # where some are not resident, values are known of all
    read = {term.value for term in config.utility.values() if isinstance(term.value, str)}
    missing = sorted(name for name in read if prefix + name not in items)
    if missing:
        raise BundleError(f"{path / manifest.SCORER}: the utility reads item values that are missing: {missing}")
    return {name: items[prefix + name] for name in sorted(read)}


def _digests(path: Path, by: str, num_items: int) -> Array:
    """Of each item's value of a column, int64 [I]; those of a list are as one text."""
    try:
        values = [one[by] for one in MetadataTable.open(path / manifest.METADATA).take(np.arange(num_items), [by])]
    except DataError as error:
        raise BundleError(f"retrieval.index.by = {by!r}: {error}") from None
    plain = [one if one is None or isinstance(one, str | int) else str(one) for one in values]
    known = {one: digest(one) for one in set(plain)}
    return np.array([known[one] for one in plain], np.int64)


def _width(config: Config) -> int:
    return config.retrieval.dim + 1  # `TwoTower.width`
