"""What of a version makes a user's vector, for a process that serves another one: its user tower and its transforms.

Of the items there is what a past is read by, their item_ids and the features that histories are of, mapped from the
file: no ranker, no rules, no index.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from prerank._tensor_files import read_tensors
from prerank.bundle import manifest
from prerank.bundle.in_use import Hold, hold
from prerank.bundle.item_table import ItemTable
from prerank.bundle.load import NothingDrawn, below, config_of, fill, transforms_of
from prerank.errors import BundleError
from prerank.features.transforms import Transforms
from prerank.models.towers import TwoTower, build_towers

_READ = (manifest.CONFIG, manifest.TRANSFORMS, manifest.RETRIEVAL, manifest.SCORER)
_FEATURE, _KNOWN = "feature_", "known_"


@dataclass(frozen=True, slots=True)
class UserSide:
    """One version's `towers`, `transforms` without rates and counters, and `items` as histories read them.

    `models` is what an index must have been built with, for these vectors to be of its space.
    """

    version: str
    models: Mapping[str, str]
    transforms: Transforms
    towers: TwoTower
    items: ItemTable
    hold: Hold | None = field(default=None, compare=False, repr=False)


def load_user_side(path: Path) -> UserSide:
    """Of the version in the folder `path`; weights are views of the mapped files.

    Only what it reads is checked against the hashes. Raises BundleError naming the first thing that is not as
    published.
    """
    held = hold(path)
    said = manifest.verify(path, _READ)
    config = config_of(path / manifest.CONFIG)
    transforms = transforms_of(path, config, said)
    with NothingDrawn():
        towers = build_towers(config, transforms.sizes())
    fill(towers, read_tensors(path / manifest.RETRIEVAL)[0], path / manifest.RETRIEVAL)
    stored = below(read_tensors(path / manifest.SCORER)[0], "items.")
    prefix = _KNOWN if "slots" in stored else _FEATURE  # where some are not resident, these are known of all
    read = {_FEATURE + one.of: prefix + one.of for one in config.features.histories().values()}
    wanted = {"item_ids": "item_ids", "published": "published", **read}
    missing = sorted(set(wanted.values()) - set(stored))
    if missing:
        raise BundleError(f"{path / manifest.SCORER}: histories are of item columns that are missing: {missing}")
    items = ItemTable.from_state({name: stored[was] for name, was in wanted.items()})
    model_id = manifest.files_of(path, said)[manifest.RETRIEVAL].model_id
    return UserSide(str(said["version"]), {"retrieval": model_id}, transforms.lasting(), towers, items, held)
