"""Parts of a version alone: a shard of its index, and what embeds a user."""

import shutil

import numpy as np
import pytest
import torch

from prerank._tensor_files import read_tensors, write_tensors
from prerank.bundle import manifest
from prerank.bundle.load import load
from prerank.bundle.publish import publish
from prerank.bundle.shard import Place, load_shard
from prerank.bundle.user_side import load_user_side
from prerank.errors import BundleError
from tests.bundle import world

SHARD_READS = (manifest.CONFIG, manifest.SCORER, manifest.INDEX, manifest.GOLDEN)
USER_READS = (manifest.CONFIG, manifest.TRANSFORMS, manifest.RETRIEVAL, manifest.SCORER)
RESIDENT = {"resident": {"top": 100, "by": "bid"}, "slack": 7}


def a_shard(path):
    return load_shard(path, Place(0, 2))


@pytest.fixture(scope="module", params=["all resident", "a tail"])
def pristine(request, tmp_path_factory):
    settings = world.config(**({} if request.param == "all resident" else {"inventory": RESIDENT}))
    parts = world.parts(settings=settings)
    if request.param != "all resident":
        parts = world.replace(parts, item_table=parts.item_table.append_column("bid", [parts.item_columns["bid"]]))
    store = tmp_path_factory.mktemp("store")
    return store / "versions" / publish(store, parts)


@pytest.fixture
def version(pristine, tmp_path):
    path = tmp_path / pristine.name
    shutil.copytree(pristine, path)
    return path


def test_all_shards_are_the_items_as_they_were_published(pristine):
    bundle = load(pristine)
    items = bundle.scorer.items
    seen = []
    for number in range(3):
        shard = load_shard(pristine, Place(number, 3))
        assert shard.width == bundle.towers.width
        rows = items.rows_of(shard.item_ids)
        assert torch.equal(shard.index.vectors, bundle.index.vectors[rows])
        assert torch.equal(shard.values["bid"], items.of_every_row("bid")[rows])
        assert shard.models == bundle.index.models
        seen += shard.item_ids.tolist()
    assert sorted(seen) == items.item_ids[: items.num_published].tolist()


def test_a_user_side_reads_the_past_as_the_whole_version_does(pristine):
    bundle, side = load(pristine), load_user_side(pristine)
    ids = bundle.scorer.items.item_ids[: bundle.scorer.items.num_published]
    rows = side.items.rows_of(ids)
    assert torch.equal(rows, bundle.scorer.items.rows_of(ids))
    whole = bundle.scorer.items.codes("advertiser", rows.numpy())
    assert np.array_equal(side.items.codes("advertiser", rows.numpy()), whole)
    for name, weights in bundle.towers.state_dict().items():
        assert torch.equal(side.towers.state_dict()[name], weights)
    assert side.models == bundle.index.models
    assert side.items.names == ("advertiser",), "nothing else of the items is looked at"


@pytest.mark.parametrize(("read", "names"), [(a_shard, SHARD_READS), (load_user_side, USER_READS)])
def test_what_is_read_is_checked_and_what_is_not_may_be_anything(read, names, version):
    for name in manifest.FILES:
        path = version / name
        content = path.read_bytes()
        path.write_bytes(content[:-1])
        if name in names:
            with pytest.raises(BundleError, match=rf"{name}: expected \d+ bytes"):
                read(version)
        else:
            assert read(version).version == version.name
        path.write_bytes(content)


def without(version, name):
    tensors, note = read_tensors(version / manifest.SCORER)
    write_tensors(version / manifest.SCORER, {n: t.clone() for n, t in tensors.items() if n != name}, note)
    return world.sign_again(version)


def of_all(pristine, name):
    """A feature of every item, as the version's file names it."""
    is_whole = "items.slots" not in read_tensors(pristine / manifest.SCORER)[0]
    return f"items.{'feature' if is_whole else 'known'}_{name}"


def test_a_version_without_what_a_shard_is_made_of_is_refused(pristine, version):
    with pytest.raises(BundleError, match="the utility reads item values that are missing: \\['bid'\\]"):
        a_shard(without(version, of_all(pristine, "bid")))


def test_a_version_without_item_ids_is_refused(version):
    with pytest.raises(BundleError, match="expected the items' item_ids and how many"):
        a_shard(without(version, "items.item_ids"))


def test_a_version_without_what_histories_are_of_is_refused(pristine, version):
    name = of_all(pristine, "advertiser")
    with pytest.raises(BundleError, match=f"histories are of item columns that are missing: .*{name[6:]}"):
        load_user_side(without(version, name))


def test_an_index_of_other_towers_is_refused(version):
    index = load(version).index
    index.save(version / manifest.INDEX, {"retrieval": "0123456789ab"})
    with pytest.raises(BundleError, match=r"expected vectors of the towers .*, found those of .*0123456789ab"):
        a_shard(world.sign_again(version))


def with_vectors(version, change):
    """The version with other vectors, and hashes that fit."""
    tensors, note = read_tensors(version / manifest.INDEX)
    write_tensors(version / manifest.INDEX, {n: change(t.clone()) for n, t in tensors.items()}, note)
    return world.sign_again(version)


@pytest.mark.parametrize(
    "change",
    [lambda t: t * 1.01, lambda t: t.roll(1, 0), lambda t: t * torch.nan],
    ids=["scaled", "of other items", "of none"],
)
def test_a_shard_that_does_not_find_what_was_retrieved_is_refused(version, change):
    said = (
        r"shard 0 of 2 does not reproduce golden request \d: expected item -?\d+ of similarity \S+ in place \d+ among"
    )
    with pytest.raises(BundleError, match=said + " those retrieved of this shard, got "):
        a_shard(with_vectors(version, change))


def test_a_shard_that_cannot_be_cut_is_asked_for_what_was_retrieved_of_it(version, monkeypatch):
    monkeypatch.setattr("prerank.bundle.shard.ExactIndex", type("Another", (), {}))
    assert a_shard(version).rows is not None
    with pytest.raises(BundleError, match="shard 0 of 2 does not reproduce golden request"):
        a_shard(with_vectors(version, lambda t: t.roll(1, 0)))


def test_a_shard_of_a_version_without_user_vectors_is_held_unasked(version):
    tensors, note = read_tensors(version / manifest.GOLDEN)
    write_tensors(version / manifest.GOLDEN, {n: t.clone() for n, t in tensors.items() if n != "query"}, note)
    assert a_shard(with_vectors(version, lambda t: t * 1.01)).place == Place(0, 2)
