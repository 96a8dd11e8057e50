"""A small funnel with every kind of feature, its parts untrained: publishing asks only that they fit together."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from prerank.bundle import manifest
from prerank.bundle.manifest import FileEntry
from prerank.bundle.publish import Parts
from prerank.config import Config, parse_config
from prerank.features.transforms import Transforms
from prerank.models.rankers import build_ranker
from prerank.models.towers import build_towers

PLAIN: dict[str, object] = {
    "name": 'small "world" ü\x7f',
    "data": {
        "impressions": "i",
        "items": "t",
        "users": "u",
        "train": ["2026-01-01", "2026-01-02"],
        "validate": ["2026-01-03", "2026-01-03"],
        "test": ["2026-01-04", "2026-01-04"],
    },
    "features": {
        "user": {
            "country": {"kind": "category", "dim": 4},
            "age": {"kind": "number"},
            "clicks": {"kind": "history", "of": "advertiser", "events": "is_click", "length": 3},
        },
        "context": {"hour": {"kind": "category", "dim": 4}},
        "item": {
            "advertiser": {"kind": "category", "dim": 8},
            "topics": {"kind": "bag", "dim": 4, "length": 3},
            "price": {"kind": "number", "log": True},
            "vector": {"kind": "embedding", "width": 5},
            "bid": {"kind": "value"},
        },
    },
    "tasks": {"click": {"label": "is_click"}, "like": {"label": "is_like"}},
    "retrieval": {"relevant": "is_click", "targets": {"is_click": 1.0}, "dim": 8, "hidden": [8], "keep": 40},
    "ranker": {"dim": 4, "hidden": [8], "keep": 10},
    "utility": {"click": {"value": "bid"}},
    "validate": {"golden": {"at_least": 1.0}},
}


def config(**changes: object) -> Config:
    return parse_config({**PLAIN, **changes}, "test")


def parts(num_items: int = 300, seed: int = 0, num_golden: int = 4, settings: Config | None = None) -> Parts:
    settings = settings or config()
    rng, width = np.random.default_rng(seed), settings.features.item["vector"].width
    items = pa.table(
        {
            "advertiser": rng.integers(0, 50, num_items),
            "topics": [rng.integers(0, 20, rng.integers(0, 5)).tolist() for _ in range(num_items)],
            "price": rng.exponential(1e6, num_items),
            "vector": rng.normal(size=(num_items, width)).astype(np.float32).tolist(),
            "bid": rng.integers(1, 2**40, num_items),
            "title": [f"title {n}" for n in range(num_items)],
        }
    )
    users = pa.table({"country": ["a", "b", "c", "d"], "age": [20.0, 30.0, 40.0, 50.0]})
    context = pa.table({"hour": np.arange(24)})
    transforms = Transforms.fit(
        settings.features,
        users=(users, np.ones(4, dtype=np.int64)),
        items=(items, np.ones(num_items, dtype=np.int64)),
        context=[context],
    )
    torch.manual_seed(seed)
    sizes = transforms.sizes()
    chosen = rng.integers(0, [[4], [24]], (2, num_golden))
    golden = {
        **transforms.encode("user", users.take(chosen[0])),
        **transforms.encode("context", context.take(chosen[1])),
        "clicks": rng.integers(-1, sizes["item.advertiser"], (num_golden, 3)).astype(np.int32),
    }
    return Parts(
        config=settings,
        transforms=transforms,
        towers=build_towers(settings, sizes),
        ranker=build_ranker(settings, sizes),
        item_ids=rng.permutation(num_items * 3)[:num_items] - 100,
        item_columns=transforms.encode("item", items),
        item_table=items.select(["title", "advertiser"]),
        popularity=rng.normal(size=(num_items, settings.retrieval.popularity.num_series)).astype(np.float32),
        golden_user=golden,
        parents={"data": "f00", "run": "r1"},
        metrics={"recall": 0.5},
    )


def changed(those: Parts, **columns: Mapping[str, object]) -> Parts:
    """The same parts with some encoded item columns replaced."""
    return replace(those, item_columns={**those.item_columns, **columns})


def sign_again(path: Path) -> Path:
    """Give a version that was tampered with hashes and a name that fit, as a careful forger would."""
    said = manifest.read_manifest(path)
    files = {name: FileEntry.of(path / name) for name in manifest.files_of(path, said)}
    version = f"{str(said['version'])[:13]}-{manifest.content_id(files)}"
    manifest.write_manifest(path, {**said, "version": version}, files)
    return path.rename(path.with_name(version))
