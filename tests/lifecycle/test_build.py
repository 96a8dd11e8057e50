"""What publishing leaves in a funnel's store beside the version."""

from dataclasses import replace
from pathlib import Path

from prerank.config import Inventory, Resident
from prerank.lifecycle.build import load_tail
from prerank.schema import Category
from prerank.stores.tail import RATE, TAIL, LmdbTail


def test_the_tail_has_every_column_that_a_feature_reads_the_item_id_too(world, trained, tmp_path: Path) -> None:
    config = replace(world.config, inventory=Inventory(resident=Resident(top=5, by="bid_micros")))
    for item in (dict(config.features.item), {"item_id": Category(), **config.features.item}):
        own = replace(config, features=replace(config.features, item=item))
        load_tail(own, world.tables(), trained.prepared, tmp_path)
        wanted = {*own.features.columns("item"), *(RATE + name for name in own.features.rates())}
        ids = world.tables().items()["item_id"].to_pylist()
        with LmdbTail.open(tmp_path / TAIL) as tail:
            rows = tail.get(ids)
        assert all(row is not None and set(row) == wanted for row in rows)
        if "item_id" in item:
            assert [row["item_id"] for row in rows if row is not None] == ids
