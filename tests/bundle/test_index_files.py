"""A version whose index is in several shards, each a file: whole in one process, and a shard alone on a host."""

import shutil

import numpy as np
import pytest
import torch

from prerank._tensor_files import read_tensors, write_tensors
from prerank.bundle import manifest
from prerank.bundle.index_files import keys_of, shards_of
from prerank.bundle.load import load
from prerank.bundle.publish import publish
from prerank.bundle.shard import Place, load_shard
from prerank.errors import BundleError, ConfigError, DataError
from prerank.index import plan
from prerank.index.hnsw import HNSWIndex
from prerank.index.sharded import ShardedIndex
from tests.bundle import world

OF = 3


def settings(of: int = OF, **index: object):
    retrieval = {**world.PLAIN["retrieval"], "index": {"shards": of, **index}}
    return world.config(retrieval=retrieval, inventory={"slack": 7})


def published(store, **index):
    parts = world.parts(settings=settings(**index))
    return store / "versions" / publish(store, parts)


@pytest.fixture(scope="module", params=["float32", "int8"])
def pristine(request, tmp_path_factory):
    return published(tmp_path_factory.mktemp("store"), storage=request.param)


@pytest.fixture
def version(pristine, tmp_path):
    path = tmp_path / pristine.name
    shutil.copytree(pristine, path)
    return path


def searched(index, query, eligible=None):
    return index.search(query, 20, eligible)


def test_the_shards_find_what_one_index_of_all_does(pristine, tmp_path):
    bundle = load(pristine)
    whole = load(published(tmp_path, of=1, storage=bundle.config.retrieval.index.storage))
    query = torch.randn(3, bundle.towers.width, generator=torch.Generator().manual_seed(1))
    mask = torch.from_numpy(np.random.default_rng(2).random(bundle.scorer.items.num_rows) < 0.5)
    assert isinstance(bundle.index, ShardedIndex)
    assert bundle.index.is_exact
    for eligible in (None, mask):
        found, expected = searched(bundle.index, query, eligible), searched(whole.index, query, eligible)
        assert torch.equal(found.rows, expected.rows)
        assert torch.equal(found.similarity, expected.similarity)
    row = torch.tensor([bundle.scorer.items.num_published + 2])
    for index in (bundle.index, whole.index):
        index.own()
        index.put(row, query[:1] * 100)
    assert searched(bundle.index, query).rows[0, 0] == row
    assert torch.equal(searched(bundle.index, query).rows, searched(whole.index, query).rows)


def test_a_host_of_one_of_so_many_reads_its_own_file_alone(version):
    items = load(version).scorer.items
    keys, seen = shards_of(items.item_ids[: items.num_published].numpy(), OF), []
    for number in range(OF):
        alone = version.parent / f"{number}" / version.name
        shutil.copytree(version, alone)
        for other in set(range(OF)) - {number}:
            (alone / manifest.shard_file(other)).unlink()
        shard = load_shard(alone, Place(number, OF))
        assert shard.rows is None
        assert torch.equal(shard.item_ids, items.item_ids[: items.num_published][keys == number])
        seen += shard.item_ids.tolist()
        query = torch.ones(1, shard.width)
        found = shard.index.search(query, 400, None).rows[0]
        assert sorted(found[found >= 0].tolist()) == list(range(len(shard.item_ids))), "its items, and no free rows"
    assert sorted(seen) == items.item_ids[: items.num_published].tolist()


@pytest.mark.parametrize("of", [1, 2])
def test_hosts_of_another_number_hold_all_and_search_among_their_own(pristine, of):
    whole, seen = load(pristine), []
    query = torch.randn(1, whole.towers.width, generator=torch.Generator().manual_seed(1))
    for number in range(of):
        shard = load_shard(pristine, Place(number, of))
        found = shard.index.search(query, 5, shard.rows)
        assert torch.equal(found.rows, whole.index.search(query, 5, shard.rows).rows)
        seen += shard.item_ids.tolist()
    assert len(seen) == len(set(seen)) == whole.scorer.items.num_published


def test_items_that_share_a_value_are_in_one_shard(tmp_path):
    path = published(tmp_path, by="advertiser")
    rows = read_tensors(path / manifest.SHARDS)[0]["shard"]
    metadata = [one.as_py() for one in world.parts(settings=settings()).item_table["advertiser"]]
    order = world.parts(settings=settings()).order()
    of_value = dict(zip((metadata[at] for at in order), rows.tolist(), strict=False))
    assert [of_value[metadata[at]] for at in order] == rows.tolist()[: len(order)]
    assert len(set(of_value.values())) == OF
    seen = [one for number in range(OF) for one in load_shard(path, Place(number, OF)).item_ids.tolist()]
    assert len(seen) == len(set(seen)) == len(order)


def test_a_column_that_there_is_not_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"retrieval\.index\.by: the items have .*, not 'owner'"):
        published(tmp_path, by="owner")


def test_a_shard_without_items_is_refused(tmp_path):
    with pytest.raises(BundleError, match=r"none of 300 items is in shard \d+ of 256; have fewer"):
        published(tmp_path, of=256)


@pytest.mark.parametrize("of", [0, 257])
def test_a_number_of_shards_that_cannot_be_is_refused(of):
    with pytest.raises(ConfigError, match=rf"retrieval\.index\.shards: expected 1 to 256, got {of}"):
        settings(of=of)


@pytest.mark.parametrize("number", range(OF))
def test_a_damaged_shard_is_refused_where_it_is_read(version, number):
    path = version / manifest.shard_file(number)
    path.write_bytes(path.read_bytes()[:-1])
    said = rf"shard-{number}\.safetensors: expected \d+ bytes"
    for read in (lambda: load(version), lambda: load_shard(version, Place(number, OF))):
        with pytest.raises(BundleError, match=said):
            read()
    load_shard(version, Place((number + 1) % OF, OF))
    load(version, with_index=False)


def with_shards(version, shard):
    write_tensors(version / manifest.SHARDS, {"shard": shard}, {})
    return world.sign_again(version)


def test_what_says_which_shard_a_row_is_in_must_say_so(version):
    shard = read_tensors(version / manifest.SHARDS)[0]["shard"].clone()
    for wrong, said in (
        (shard.long(), "expected 'shard' int32"),
        (shard[:0], "expected 'shard' int32"),
        (shard + 1, "expected shards 0 to 2, found 1 to 3"),
    ):
        version = with_shards(version, wrong)
        with pytest.raises(BundleError, match=said):
            load(version)


def test_a_version_that_lacks_a_shard_is_refused(version):
    (version / manifest.shard_file(1)).unlink()
    with pytest.raises(BundleError, match=r"shard-1\.safetensors: the manifest lists it, and there is no such file"):
        load(version)


def test_shards_of_graphs_are_loaded_as_they_were_published(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "_pace", lambda tried, truth: 0.5)
    path = published(tmp_path, kind="hnsw", floor=0.9)
    bundle = load(path)
    assert not bundle.index.is_exact
    assert all(isinstance(part, HNSWIndex) and part.plan.has_graph for part in bundle.index.parts)
    for number in range(OF):
        shard = load_shard(path, Place(number, OF))
        assert shard.rows is None
        assert shard.index.graph.num_rows == len(bundle.index.parts[number].graph.links.levels)


def test_values_that_differ_have_keys_that_differ_and_lists_are_one_text():
    values = [1, "1", None, ["a", "b"], "['a', 'b']", 1]
    keys = keys_of(values)
    assert keys[0] == keys[5]
    assert keys[3] == keys[4]
    assert len(set(keys.tolist())) == 4
