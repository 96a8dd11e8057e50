"""Two versions over the same items whose towers are of two spaces, each a rotation of the truth and its own noise.

So how many of a user's true best items a version finds is known, and in which order it finds them; a vector of one
space among the items of the other finds next to none of either's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from prerank.bundle.index_files import shards_of
from prerank.bundle.publish import Parts, publish
from prerank.bundle.registry import Gate, Registry
from prerank.config import Config, parse_config
from prerank.features.transforms import Transforms
from prerank.models.rankers import build_ranker
from prerank.models.towers import TwoTower, build_towers
from prerank.stores.users import UserStore
from prerank.types import Array

SEED, WIDTH, KEEP, MOST = 7, 16, 100, 300
NOISE = (0.06, 0.04)
"""Of each version's towers, beside the truth's 1."""
_FEWEST = 5


def config(hosts_ms: float) -> Config:
    """One vector a user and an item, and the two-tower ranker; all candidates may win, so that answers show them."""
    plain = {
        "name": "rollout",
        "data": {
            "impressions": "impressions.parquet",
            "items": "items.parquet",
            "users": "users.parquet",
            "train": ["2026-01-05", "2026-01-05"],
            "validate": ["2026-01-06", "2026-01-06"],
            "test": ["2026-01-07", "2026-01-07"],
        },
        "features": {
            "user": {"taste": {"kind": "embedding", "width": WIDTH}},
            "item": {"kind_of": {"kind": "embedding", "width": WIDTH}, "bid_micros": {"kind": "value"}},
        },
        "tasks": {"click": {"label": "is_click"}},
        "retrieval": {
            "relevant": "is_click",
            "targets": {"is_click": 1.0},
            "popularity": {"half_life_days": []},
            "dim": WIDTH,
            "hidden": [8],
            "keep": KEEP,
        },
        "ranker": {"model": "two_tower", "dim": 8, "hidden": [8], "keep": MOST},
        "utility": {"click": {"value": "bid_micros"}},
        "metadata": {"columns": ["bid_micros"]},
        "serve": {"deadline_ms": 10_000.0, "max_k": MOST, "hosts_ms": hosts_ms},
    }
    return parse_config(plain, "the benchmark's funnel")


@dataclass(frozen=True, slots=True)
class World:
    """A store of two versions, the first live; of each user the truth, item_ids int64 [U, KEEP].

    Of each version its `recall` of it by the whole index, float64 [U], and the `order` it finds items in, int64
    [U, MOST]. `crossed`, int64 [U, KEEP], is what the first version's user vectors find among the second's items.
    """

    store: Path
    versions: tuple[str, str]
    truth: Array
    recall: tuple[Array, Array]
    order: tuple[Array, Array]
    crossed: Array

    def num_of_no_version(self, user: int, found: Array, num_shards: int) -> int:
        """Of how many shards what was found, item_ids int64 [n], is the best of neither version.

        Less than half of the m best of either: rounding moves an item or two, another space moves all.
        """
        at, num = shards_of(found, num_shards), 0
        for shard in range(num_shards):
            mine = found[at == shard]
            shared = []
            for order in self.order:
                own = order[user][shards_of(order[user], num_shards) == shard][: len(mine)]
                shared.append(len(np.intersect1d(own, mine)))
            num += len(mine) >= _FEWEST and max(shared) < len(mine) / 2
        return num

    @classmethod
    def build(cls, store: Path, num_items: int, num_users: int, hosts_ms: float) -> World:
        """Published into `store`, users loaded."""
        draw, funnel = np.random.default_rng(SEED), config(hosts_ms)
        items = draw.normal(size=(num_items, WIDTH)).astype(np.float32)
        users = draw.normal(size=(num_users, WIDTH)).astype(np.float32)
        ids = np.sort(draw.choice(10 * num_items, num_items, replace=False)).astype(np.int64)
        item_table = pa.table({"kind_of": list(items), "bid_micros": draw.integers(1, 10**6, num_items)})
        user_table = pa.table({"user_id": np.arange(num_users), "taste": list(users)})
        transforms = Transforms.fit(
            funnel.features,
            users=(user_table, np.ones(num_users, np.int64)),
            items=(item_table, np.ones(num_items, np.int64)),
            context=[],
        )
        made = [_publish(store, funnel, transforms, ids, item_table, user_table, number) for number in range(2)]
        registry = Registry(store)
        registry.promote(made[0][0], "a benchmark", "the first")
        UserStore.write(store / "users.lmdb", user_table, [], labels=["is_click"])
        truth = ids[_best(users, items, KEEP)]
        first, second = (ids[_best(users @ user.T, items @ item.T, MOST)] for _, user, item in made)
        recall = _recall(truth, first[:, :KEEP]), _recall(truth, second[:, :KEEP])
        crossed = ids[_best(users @ made[0][1].T, items @ made[1][2].T, KEEP)]
        return cls(store, (made[0][0], made[1][0]), truth, recall, (first, second), crossed)


def _publish(
    store: Path, funnel: Config, transforms: Transforms, ids: Array, items: pa.Table, users: pa.Table, number: int
) -> tuple[str, Array, Array]:
    """The version, and the maps float32 [WIDTH, WIDTH] of its towers."""
    torch.manual_seed(SEED + number)
    towers, ranker = build_towers(funnel, transforms.sizes()), build_ranker(funnel, transforms.sizes())
    turn = torch.linalg.qr(torch.randn(WIDTH, WIDTH))[0]
    maps = [turn @ (torch.eye(WIDTH) + NOISE[number] * torch.randn(WIDTH, WIDTH)) for _ in range(2)]
    _set(towers, maps)
    user = transforms.encode("user", users.slice(0, 4))
    version = publish(
        store,
        Parts(
            config=funnel,
            transforms=transforms,
            towers=towers,
            ranker=ranker,
            item_ids=ids,
            item_columns=transforms.encode("item", items),
            item_table=items,
            popularity=np.zeros((len(ids), 0), np.float32),
            golden_user=user,
            parents={"run": f"version {number}"},
            metrics={},
        ),
    )
    Registry(store).write_validation(version, [Gate("golden", "at_least 1.0", 1.0, True)])
    return version, maps[0].numpy(), maps[1].numpy()


def _set(towers: TwoTower, maps: list[torch.Tensor]) -> None:
    with torch.no_grad():
        for encoder, own in zip((towers.user_tower.encoder, towers.item_tower.encoder), maps, strict=True):
            for name, weights in encoder.named_parameters():
                weights.copy_(own if name == "linear.weight" else torch.zeros_like(weights))


def _best(users: Array, items: Array, most: int) -> Array:
    """The rows of each user's `most` largest products, best first, int64 [U, most]."""
    some = np.array_split(users, 16)
    return torch.cat([(torch.from_numpy(u) @ torch.from_numpy(items).T).topk(most).indices for u in some]).numpy()


def _recall(truth: Array, found: Array) -> Array:
    pairs = zip(truth, found, strict=True)
    return np.array([len(np.intersect1d(one, other)) / KEEP for one, other in pairs])
