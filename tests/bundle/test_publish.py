import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch

from prerank.bundle import durable, manifest
from prerank.bundle.item_table import ItemTable
from prerank.bundle.load import load, verify
from prerank.bundle.publish import publish
from prerank.bundle.registry import Registry
from prerank.errors import BundleError, DataError, SchemaMismatch
from prerank.index.storage import STORAGES
from prerank.schema import Number
from prerank.stores.metadata import MetadataTable
from tests.bundle import world
from tests.processes import forked

STORES_FILES = {"manifest.json", *manifest.FILES}


def published(store):
    return [v.version for v in Registry(store).versions()]


def files_below(folder):
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def test_a_version_is_exactly_the_files_of_the_format(tmp_path):
    version = publish(tmp_path, world.parts())
    assert re.fullmatch(r"\d{8}T\d{4}-[0-9a-f]{12}", version)
    assert files_below(tmp_path / "versions") == {f"{version}/{name}" for name in STORES_FILES}
    said = json.loads((tmp_path / "versions" / version / "manifest.json").read_text())
    assert said["format"] == 2
    assert said["version"] == version
    assert said["num_items"] == 300
    assert said["parents"] == {"data": "f00", "run": "r1"}
    assert said["metrics"] == {"recall": 0.5}
    assert said["torch"] == torch.__version__
    assert said["schema"] == world.config().features.to_dict()
    verify(tmp_path / "versions" / version)


def test_no_file_of_a_version_is_a_pickle(tmp_path):
    folder = tmp_path / "versions" / publish(tmp_path, world.parts())
    for path in folder.rglob("*"):
        # a pickle starts with its protocol, a torch archive with a zip's header
        assert path.is_dir() or path.read_bytes()[:2] not in (b"\x80\x02", b"\x80\x04", b"PK")


@pytest.mark.parametrize("storage", STORAGES)
def test_an_index_is_stored_as_its_funnel_says(tmp_path, storage):
    base = world.config()
    index = replace(base.retrieval.index, storage=storage)
    settings = replace(base, retrieval=replace(base.retrieval, index=index))
    bundle = load(tmp_path / "versions" / publish(tmp_path, world.parts(settings=settings)))
    assert bundle.index.storage == storage


def test_what_is_loaded_is_what_was_published(tmp_path):
    parts = world.parts()
    version = publish(tmp_path, parts)
    bundle = load(tmp_path / "versions" / version)
    assert (bundle.version, bundle.config) == (version, parts.config)
    assert bundle.transforms.first_difference(parts.transforms) is None
    assert bundle.manifest["metrics"] == {"recall": 0.5}
    for name, weights in parts.towers.state_dict().items():
        assert torch.equal(bundle.towers.state_dict()[name], weights), name
    for name, weights in parts.ranker.state_dict().items():
        assert torch.equal(bundle.scorer.ranker.state_dict()[name], weights), name
    assert not any(p.requires_grad for p in [*bundle.towers.parameters(), *bundle.scorer.parameters()])
    assert not bundle.towers.training
    assert not bundle.scorer.training


def test_row_item_vector_popularity_and_metadata_belong_to_one_item(tmp_path):
    parts = world.parts()
    bundle = load(tmp_path / "versions" / publish(tmp_path, parts))
    rows = bundle.scorer.items.rows_of(torch.from_numpy(parts.item_ids))
    features = {name: torch.from_numpy(np.array(column)) for name, column in parts.item_columns.items()}
    with torch.inference_mode():
        vectors = parts.towers.item_side(features, torch.from_numpy(parts.popularity))
        item_side = parts.ranker.item_side(features)
    assert torch.allclose(bundle.index.vectors[rows], vectors, atol=1e-6)
    stored = bundle.scorer.item_side.tensors()
    assert set(stored) == set(item_side)
    for name, tensor in item_side.items():
        assert torch.allclose(stored[name][rows], tensor, atol=1e-6), name
    metadata = MetadataTable.open(bundle.path / "metadata.arrow").take(rows.numpy())
    assert [m["title"] for m in metadata] == [f"title {n}" for n in range(len(rows))]


def test_the_same_content_again_is_the_version_there_is(tmp_path):
    parts = world.parts()
    version = publish(tmp_path, parts)
    assert publish(tmp_path, replace(parts, parents={}, metrics={"later": 1})) == version
    order = np.random.default_rng(5).permutation(len(parts.item_ids))
    shuffled = replace(
        parts,
        item_ids=parts.item_ids[order],
        item_columns={name: column[order] for name, column in parts.item_columns.items()},
        item_table=parts.item_table.take(order),
        popularity=parts.popularity[order],
    )
    assert publish(tmp_path, shuffled) == version
    assert published(tmp_path) == [version]
    assert json.loads((tmp_path / "versions" / version / "manifest.json").read_text())["metrics"] == {"recall": 0.5}


def test_other_content_is_another_version(tmp_path):
    versions = {publish(tmp_path, world.parts(seed=seed)) for seed in (0, 1)}
    versions.add(publish(tmp_path, world.parts(settings=world.config(seed=8))))
    assert set(published(tmp_path)) == versions
    assert len(versions) == 3


def test_the_same_content_damaged_on_disk_is_told(tmp_path):
    parts = world.parts()
    version = publish(tmp_path, parts)
    (tmp_path / "versions" / version / "transforms.json").unlink()
    with pytest.raises(BundleError, match=r"transforms.json: the manifest lists it.* delete the version and publish"):
        publish(tmp_path, parts)


def test_a_publish_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        publish(tmp_path, world.parts())
    assert files_below(tmp_path) == {".lock"}


def _die_publishing(store):
    os.replace = lambda *_: os._exit(9)
    publish(store, world.parts())


def test_a_publish_killed_before_its_last_step_leaves_no_version_and_is_swept_an_hour_later(tmp_path):
    process = forked(_die_publishing, tmp_path)
    process.join()
    assert process.exitcode == 9
    (left,) = (tmp_path / "versions").iterdir()
    assert left.name.startswith(".tmp-")
    assert published(tmp_path) == []
    first = publish(tmp_path, world.parts())
    assert left.exists(), "it may be another publish at work"
    os.utime(left, (0, 0))
    second = publish(tmp_path, world.parts(seed=1))
    assert {p.name for p in (tmp_path / "versions").iterdir()} == {first, second}


def test_publishers_of_the_same_content_at_once_make_one_version(tmp_path):
    parts = world.parts()
    with ThreadPoolExecutor(4) as pool:
        versions = set(pool.map(lambda _: publish(tmp_path, parts), range(4)))
    assert len(versions) == 1
    assert published(tmp_path) == [*versions]
    load(tmp_path / "versions" / versions.pop())


def test_a_text_replaced_by_rename_is_the_old_or_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "live"
    durable.replace_text(path, "old")

    def fail(*_: object) -> None:
        raise OSError("cut")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="cut"):
        durable.replace_text(path, "new")
    assert path.read_text() == "old"
    assert files_below(tmp_path) == {"live"}


def _with_nan(parts, model):
    with torch.no_grad():
        next(iter(getattr(parts, model).parameters())).view(-1)[-1] = torch.nan
    return parts


def _with_infinite_items(parts):
    columns = {**parts.item_columns, "vector": np.full_like(parts.item_columns["vector"], np.inf)}
    return replace(parts, item_columns=columns)


REFUSED = [
    (lambda p: _with_nan(p, "towers"), BundleError, r"towers: weights '.*': 1 are not finite, the first at \[.*\]"),
    (lambda p: _with_nan(p, "ranker"), BundleError, r"ranker: weights '.*': 1 are not finite"),
    (
        _with_infinite_items,
        BundleError,
        r"the item vectors: \d+ are not finite, the first at \[0, \d\]; train again",
    ),
    (lambda p: replace(p, popularity=p.popularity[:-1]), DataError, "popularity has 299 rows for 300 item_ids"),
    (lambda p: replace(p, item_table=p.item_table[:-1]), DataError, "item_table has 299 rows for 300 item_ids"),
    (
        lambda p: replace(p, config=world.config(diversity={"brand": {"at_most": 1}})),
        DataError,
        r"diversity: expected the items' column 'brand', found \['title', 'advertiser'\]",
    ),
    (lambda p: replace(p, item_ids=np.zeros(300, dtype=np.int64)), DataError, "each item_id once, got 0 twice"),
    (
        lambda p: replace(p, item_columns={**p.item_columns, "advertiser": np.full(300, 999)}),
        SchemaMismatch,
        "'advertiser': expected whole numbers from 0 to .*; encode the items with the transforms published",
    ),
    (
        lambda p: replace(p, golden_user={"age": p.golden_user["age"]}),
        SchemaMismatch,
        r"the golden requests have the features \['age'\], and the user side reads \['country', 'age'",
    ),
    (
        lambda p: replace(p, golden_user={n: c[:0] for n, c in p.golden_user.items()}),
        BundleError,
        "expected at least one golden request, got none",
    ),
    (lambda p: replace(p, metrics={"auc": float("nan")}), BundleError, "metrics and parents of finite JSON values"),
    (
        lambda p: replace(p, config=world.config(tasks={"click": {"label": "is_click"}})),
        SchemaMismatch,
        r"the ranker predicts \('click', 'like'\), and the tasks are \('click',\)",
    ),
    (
        lambda p: replace(p, config=replace(p.config, features=replace(p.config.features, context={"dow": Number()}))),
        SchemaMismatch,
        "the transforms were fitted for other features than the configuration's: context feature 'hour'",
    ),
    (
        lambda p: replace(p, config=world.config(metadata={"columns": ["titel"]})),
        DataError,
        "got 'titel'; did you mean \"title\"",
    ),
]


@pytest.mark.parametrize(("change", "error", "said"), REFUSED)
def test_parts_that_do_not_fit_are_refused_and_leave_nothing(tmp_path, change, error, said):
    with pytest.raises(error, match=said):
        publish(tmp_path, change(world.parts()))
    assert files_below(tmp_path) <= {".lock"}


def test_the_item_side_must_be_finite_too(tmp_path, monkeypatch):
    def item_side(items):
        return {"codes": items["bid"], "x": torch.full((len(items["bid"]), 10), torch.inf)}

    parts = world.parts()
    monkeypatch.setattr(parts.ranker, "item_side", item_side)
    with pytest.raises(BundleError, match="the ranker's item side 'x': 3000 are not finite"):
        publish(tmp_path, parts)


def test_an_item_table_of_a_version_holds_no_wider_numbers_than_needed(tmp_path):
    bundle = load(tmp_path / "versions" / publish(tmp_path, world.parts()))
    assert isinstance(bundle.scorer.items, ItemTable)
    held = {name: column.dtype for name, column in bundle.scorer.items.features().items()}
    assert held["advertiser"] == held["topics"] == torch.int8
    assert held["bid"] == torch.int64


def test_who_may_see_an_item_stays_its_own_whatever_order_the_items_came_in(tmp_path):
    settings = world.config(targeting={"country": {"user": "country", "item": "countries"}})
    lists = [[["a", "b", "c"][n % 3]] if n % 5 else None for n in range(300)]
    parts = replace(world.parts(settings=settings), targeting=pa.table({"countries": lists}))
    version = publish(tmp_path, parts)
    assert files_below(tmp_path / "versions") == {f"{version}/{n}" for n in (*STORES_FILES, manifest.TARGETING)}
    scorer = load(tmp_path / "versions" / version).scorer
    for country in ("a", "b", "c", "d"):
        rows = scorer.targeting.rows({"country": country}, {}, 0)
        allowed = [not one or country in one for one in lists]
        assert scorer.items.item_ids[rows].tolist() == sorted(parts.item_ids[allowed].tolist())
    assert publish(tmp_path, parts) == version
    lists[7] = ["a"]
    changed = publish(tmp_path, replace(parts, targeting=pa.table({"countries": lists})))
    assert changed[-12:] != version[-12:]
