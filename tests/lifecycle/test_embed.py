from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from prerank.errors import TrainingError
from prerank.lifecycle import embed as embedding
from prerank.lifecycle.embed import embed
from prerank.models.towers import TwoTower, build_towers
from prerank.types import Array, Features
from tests.serve import world

NUM = 23


@pytest.fixture(autouse=True)
def pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "AT_ONCE", 5)


@pytest.fixture
def towers() -> TwoTower:
    torch.manual_seed(3)
    return build_towers(world.config(), world.transforms(world.config()).sizes()).eval()


def items() -> tuple[dict[str, Array], Array]:
    made = world.transforms(world.config()).encode("item", world.items())
    chosen = np.random.default_rng(0).integers(0, world.NUM_ITEMS, NUM)
    series = world.config().retrieval.popularity.num_series
    popularity = np.random.default_rng(1).random((NUM, series), dtype=np.float32)
    return {name: column[chosen] for name, column in made.items()}, popularity


def expected(towers: TwoTower) -> Array:
    columns, popularity = items()
    with torch.no_grad():
        features = {name: torch.from_numpy(column) for name, column in columns.items()}
        return towers.item_side(features, torch.from_numpy(popularity)).numpy()


class Counting:
    """The towers, counting the items they are asked about, and stopping after so many pieces."""

    def __init__(self, towers: TwoTower, stop_after: int = 1_000) -> None:
        self.towers, self.left, self.num = towers, stop_after, 0

    def item_side(self, features: Features, popularity: torch.Tensor) -> torch.Tensor:
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        self.num += len(popularity)
        return self.towers.item_side(features, popularity)

    def __getattr__(self, name: str) -> object:
        return getattr(self.towers, name)


def test_the_vectors_are_those_of_the_tower_whatever_the_pieces(towers: TwoTower, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    found = embed(towers, *items(), tmp_path, "these", lambda _, done, total, unit: told.append((done, total)))
    np.testing.assert_allclose(found, expected(towers), rtol=1e-5, atol=1e-6)
    assert told == [(5, NUM), (10, NUM), (15, NUM), (20, NUM), (NUM, NUM)]


def test_an_interrupted_run_goes_on_and_a_finished_one_does_nothing(towers: TwoTower, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        embed(Counting(towers, stop_after=3), *items(), tmp_path, "these")  # type: ignore[arg-type]
    second = Counting(towers)
    found = embed(second, *items(), tmp_path, "these")  # type: ignore[arg-type]
    assert second.num == NUM - 15
    np.testing.assert_allclose(found, expected(towers), rtol=1e-5, atol=1e-6)
    third = Counting(towers)
    embed(third, *items(), tmp_path, "these")  # type: ignore[arg-type]
    assert third.num == 0


def test_other_towers_or_items_are_made_anew_and_earlier_vectors_go(towers: TwoTower, tmp_path: Path) -> None:
    embed(towers, *items(), tmp_path, "these")
    first = {path.name for path in tmp_path.iterdir()}
    embed(towers, *items(), tmp_path, "others")
    second = {path.name for path in tmp_path.iterdir()}
    assert not first & second
    torch.manual_seed(4)
    other = build_towers(world.config(), world.transforms(world.config()).sizes()).eval()
    found = embed(other, *items(), tmp_path, "others")
    np.testing.assert_allclose(found, expected(other), rtol=1e-5, atol=1e-6)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("damage", ["cut", "mark", "other"])
def test_a_file_that_is_not_whole_is_made_anew(towers: TwoTower, tmp_path: Path, damage: str) -> None:
    embed(towers, *items(), tmp_path, "these")
    (path,), (mark,) = tmp_path.glob("*.npy"), tmp_path.glob("*.json")
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-20])
    elif damage == "mark":
        mark.write_text(json.dumps({"done": NUM + 1}))
    else:
        np.save(path, np.zeros((NUM - 1, 2), np.float32))
    counting = Counting(towers)
    found = embed(counting, *items(), tmp_path, "these")  # type: ignore[arg-type]
    assert counting.num == NUM
    np.testing.assert_allclose(found, expected(towers), rtol=1e-5, atol=1e-6)


def test_vectors_that_are_not_finite_are_refused(towers: TwoTower, tmp_path: Path) -> None:
    columns, popularity = items()
    popularity[7] = np.nan
    with pytest.raises(TrainingError, match="vectors that are not finite; train again"):
        embed(towers, columns, popularity, tmp_path, "these")
