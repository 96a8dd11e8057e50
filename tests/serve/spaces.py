"""Versions of the tiny world whose towers are orthogonal: each has numbers of its own, and is 0 in all others'.

So a vector of one version beside one of another has a similarity of exactly 0, and within a version none is 0: whoever
mixes two is seen.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from prerank.bundle.load import Bundle
from prerank.bundle.publish import Parts, publish
from prerank.bundle.registry import Gate, Registry
from prerank.config import Config
from prerank.models.rankers import build_ranker
from prerank.models.towers import TwoTower, build_towers
from prerank.types import Array, Columns
from tests.serve import world
from tests.serve.conftest import golden

WIDTH = 3
"""How many numbers are a version's own."""
MOST = 5
NUM_ITEMS = 40
CONTEXT = {"hour": 1, "surface": "feed"}


def config(**changes: object) -> Config:
    retrieval = {
        "relevant": "is_click",
        "targets": {"is_click": 1.0},
        "popularity": {"half_life_days": [1.0]},
        "dim": WIDTH * MOST,
        "hidden": [8],
        "keep": 12,
    }
    ranker = {"model": "two_tower", "dim": 4, "hidden": [8], "keep": 12}
    return world.config(**({"retrieval": retrieval, "ranker": ranker} | changes))


def items(number: int) -> pa.Table:
    """Those of one version: each lacks a few, and calls the genres otherwise, so that codes differ too."""
    n = [one for one in range(NUM_ITEMS) if one % 13 != number]
    return pa.table(
        {
            "item_id": [100 + i for i in n],
            "genre": [f"genre {(i + number) % 3}" for i in n],
            "bid_micros": [1000 * (i + 1) for i in n],
            "title": [f"title {i}" for i in n],
            "topics": [[f"topic {j}" for j in range(i % 3)] for i in n],
        }
    )


def publish_space(store: Path, number: int, funnel: Config | None = None) -> str:
    """Version `number`, from 0, of those in `store`, validated; the first is live."""
    funnel = funnel or config()
    table, transforms = items(number), world.transforms(funnel)
    towers, ranker = build_towers(funnel, transforms.sizes()), build_ranker(funnel, transforms.sizes())
    world.seeded(towers, 10 + number)
    world.seeded(ranker, 50 + number)  # type: ignore[arg-type]
    _confine(towers, number)
    encoded, popularity = transforms.encode("item", table), np.zeros((table.num_rows, 1), np.float32)
    parts = Parts(
        config=funnel,
        transforms=transforms,
        towers=towers,
        ranker=ranker,
        item_ids=table["item_id"].to_numpy(),
        item_columns=encoded,
        item_table=table,
        popularity=popularity,
        golden_user=golden(transforms, funnel),
        parents={"data": "tiny", "run": f"space {number}"},
        metrics={},
        targeting=_listed(table) if funnel.targeting else None,
        vectors=_vectors(towers, encoded, popularity),
    )
    version = publish(store, parts)
    registry = Registry(store)
    registry.write_validation(version, [Gate("golden", "at_least 1.0", 1.0, True)])
    if registry.live() is None:
        registry.promote(version, "a test", "the first")
        world.write_users(store / "users.lmdb")
    return version


def _listed(table: pa.Table) -> pa.Table:
    """What items list: their genre, and of every fourth one the country that may not see it."""
    countries = [["de", "fr"][i % 8 // 4 :][:1] if i % 4 == 0 else [] for i in range(table.num_rows)]
    return table.select(["genre"]).append_column("country", pa.array(countries, pa.list_(pa.string())))


def _confine(towers: TwoTower, number: int) -> None:
    own = torch.zeros(WIDTH * MOST, 1)
    own[WIDTH * number : WIDTH * (number + 1)] = 1
    with torch.no_grad():
        for tower in (towers.item_tower, towers.user_tower):
            encoder = tower.encoder
            for linear in (encoder.linear, encoder.mlp[-1]):  # type: ignore[index]
                linear.weight.mul_(own)  # type: ignore[union-attr]
                linear.bias.mul_(own[:, 0])  # type: ignore[union-attr]


def space_of(vectors: torch.Tensor) -> set[int]:
    """Of which versions float32 [..., D] have numbers; the last column is 1 of a user and 0 of an item."""
    own = vectors[..., : WIDTH * MOST].unflatten(-1, (MOST, WIDTH)).abs().amax(-1)
    return {number for number in range(MOST) if bool((own[..., number] > 0).any())}


def vectors_of(bundle: Bundle, stored_in: str = "") -> dict[int, torch.Tensor]:
    """Each item's vector in a version's index, or in the exact one that it has, by item_id."""
    ids = bundle.scorer.items.item_ids.tolist()
    index = getattr(bundle.index, stored_in) if stored_in else bundle.index
    return dict(zip(ids, index.vectors, strict=True))


@torch.no_grad()
def _vectors(towers: TwoTower, encoded: Columns, popularity: Array) -> Array:
    """Of items, rounded: those that are alike have the same numbers in every row, whatever a processor makes of it."""
    features = {name: torch.from_numpy(np.array(column)) for name, column in encoded.items()}
    vectors: Array = (towers.eval().item_side(features, torch.from_numpy(popularity)) * 1024).round().numpy() / 1024
    return vectors
