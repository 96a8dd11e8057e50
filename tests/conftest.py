"""Worlds that several folders' tests share."""

import os
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import pytest
import torch

from prerank.config import Config, parse_config
from prerank.data.logs import Tables, open_tables
from prerank.lifecycle.build import load_users, publish_trained
from prerank.lifecycle.training import Trained, train
from prerank.market.generate import generate_market
from tests.stores.redis_server import redis_server

# before anything imports triton, which decides then: without a GPU its kernels are interpreted
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# a loaded machine is slow, not wrong
hypothesis.settings.register_profile("prerank", deadline=None)
hypothesis.settings.load_profile("prerank")

ROOT = Path(__file__).parent.parent

SMALL = """
[retrieval]
epochs = 1
batch = 256
keep = 100
hidden = [16]
[ranker]
epochs = 1
hidden = [16]
width = 16
experts = 2
low_rank = 4
dim = 8
keep = 50
"""


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class World:
    """A small market with the root funnel file, its widths made small; and its folder in a store."""

    config: Config
    config_path: Path
    data: Path
    store: Path

    @property
    def home(self) -> Path:
        return self.store / self.config.name

    def tables(self) -> Tables:
        return open_tables(self.config, self.data, self.home / "work")


def small_funnel() -> dict:
    plain = tomllib.loads((ROOT / "funnel.toml").read_text())
    for section, options in tomllib.loads(SMALL).items():
        plain[section] |= options
    plain["validate"] = {"golden": {"at_least": 1.0}}
    return plain


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> World:
    """Made once for the session: read it, do not write into its store."""
    from prerank.bundle.toml import to_toml

    folder = tmp_path_factory.mktemp("world")
    generate_market(folder / "market", num_ads=500, num_users=300, num_impressions=12_000, seed=3)
    config = parse_config(small_funnel(), where="the small funnel")
    path = folder / "funnel.toml"
    path.write_text(to_toml(config.to_dict()))
    return World(config, path, folder / "market", folder / "store")


@pytest.fixture(scope="session")
def trained(world) -> Trained:
    """Both models of the world, trained for one epoch."""
    return train(world.config, world.tables(), world.home)


@pytest.fixture(scope="session")
def published(world, trained) -> str:
    """The version id of the world's models, published with its users loaded, not promoted."""
    tables = world.tables()
    load_users(world.config, tables, trained.prepared, world.home)
    return publish_trained(trained, tables, world.home, {})


@pytest.fixture(scope="session")
def _redis_of_all(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with redis_server(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture
def redis_url(_redis_of_all: str) -> str:
    """An empty Redis, or a skip where none is installed."""
    import redis

    redis.Redis.from_url(_redis_of_all).flushall()
    return _redis_of_all


@pytest.fixture(scope="session")
def kuairand() -> Path:
    """The folder of KuaiRand-Pure, or a skip."""
    folder = Path(os.environ.get("PRERANK_DATA", ROOT.parent / "shared" / "data")) / "kuairand_pure"
    if not folder.is_dir():
        pytest.skip("needs KuaiRand-Pure: set PRERANK_DATA to the folder that holds kuairand_pure/")
    return folder
