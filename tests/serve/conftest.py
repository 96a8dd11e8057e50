"""The tiny world, published and live: everything serving needs, made the way a user's funnel is."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from prerank.bundle.publish import Parts, publish
from prerank.bundle.registry import Gate, Registry
from prerank.config import Config
from prerank.features.transforms import Transforms
from prerank.models.rankers import build_ranker
from prerank.models.towers import build_towers
from prerank.serve.funnel import Funnel
from prerank.types import Array
from tests.serve import world


def golden(transforms: Transforms, config: Config) -> dict[str, Array]:
    """Two requests' user and context features: one known user, one new, both with short histories."""
    rows = {"country": ["de", None], "hour": [1, 2], "surface": ["feed", "search"]}
    table = world.pa.table(rows)
    histories = {
        name: np.array([[-1] * (h.length - 1) + [1], [-1] * h.length], np.int32)
        for name, h in config.features.histories().items()
    }
    counters = {
        name: np.full((2, one.length), -1, np.int32) if one.by else np.zeros(2, np.int32)
        for name, one in config.features.interaction.items()
    }
    return {**transforms.encode("user", table), **transforms.encode("context", table), **histories, **counters}


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store whose one version is live; read-only, so all tests share it."""
    return publish_live(tmp_path_factory.mktemp("store") / "tiny", world.config())


def publish_live(
    store: Path, config: Config, targeting: pa.Table | None = None, items: pa.Table | None = None, seed: int = 1
) -> Path:
    """The tiny world published with `config` into `store` and live, its users loaded; weights are those of `seed`."""
    transforms = world.transforms(config)
    towers, ranker = build_towers(config, transforms.sizes()), build_ranker(config, transforms.sizes())
    world.seeded(towers, seed)
    world.seeded(ranker, seed + 1)  # type: ignore[arg-type]
    table = world.items() if items is None else items
    parts = Parts(
        config=config,
        transforms=transforms,
        towers=towers,
        ranker=ranker,
        item_ids=table["item_id"].to_numpy(),
        item_columns=transforms.encode("item", table),
        item_table=table,
        popularity=np.linspace(-1, 1, world.NUM_ITEMS, dtype=np.float32).reshape(-1, 1),
        golden_user=golden(transforms, config),
        parents={"data": "tiny", "run": "seed 1"},
        metrics={},
        targeting=targeting,
    )
    version = publish(store, parts)
    registry = Registry(store)
    registry.write_validation(version, [Gate("golden", "at_least 1.0", 1.0, True)])
    registry.promote(version, "a test", "the first")
    world.write_users(store / "users.lmdb")
    return store


@pytest.fixture
def store(published: Path, tmp_path: Path) -> Path:
    """A copy of the store to damage."""
    return Path(shutil.copytree(published, tmp_path / "store"))


@pytest.fixture
def funnel(published: Path) -> Iterator[Funnel]:
    with Funnel.open(published) as funnel:
        yield funnel
