"""A version without its index, for who asks index hosts: that file may be gone, and all else is checked as ever."""

import re
import shutil
from pathlib import Path

import pytest
import torch

from prerank._tensor_files import read_tensors, write_tensors
from prerank.bundle import manifest
from prerank.bundle.load import load
from prerank.bundle.publish import publish
from prerank.errors import BundleError
from prerank.types import CandidateSet
from tests.bundle import world


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    store = tmp_path_factory.mktemp("store")
    return store / "versions" / publish(store, world.parts(settings=world.config(inventory={"slack": 6})))


@pytest.fixture
def version(pristine, tmp_path):
    """A copy without the index."""
    path = tmp_path / pristine.name
    shutil.copytree(pristine, path)
    (path / manifest.INDEX).unlink()
    return path


def with_tensors(path, name, change):
    tensors, note = read_tensors(path / name)
    changed = {n: t.clone() for n, t in tensors.items()}
    change(changed)
    write_tensors(path / name, changed, note)


def signed_again(pristine, version):
    """What fits the rest, with the index that there was."""
    shutil.copyfile(pristine / manifest.INDEX, version / manifest.INDEX)
    path = world.sign_again(version)
    (path / manifest.INDEX).unlink()
    return path


def test_it_ranks_as_the_whole_version_and_knows_what_an_index_must_be_built_with(pristine, version):
    whole, loaded = load(pristine), load(version, with_index=False)
    assert loaded.index.models == whole.index.models
    assert loaded.version == whole.version
    rows = torch.arange(30).unsqueeze(0)
    user = {name: column[:1] for name, column in read_user(pristine).items()}
    asked = CandidateSet(rows, torch.zeros(1, 30), rows >= 0)
    assert torch.equal(loaded.scorer(user, asked, 5).item_ids, whole.scorer(user, asked, 5).item_ids)
    assert not loaded.index.search(torch.ones(1, whole.towers.width), 5, None).valid.any()


def read_user(path):
    golden = read_tensors(path / manifest.GOLDEN)[0]
    return {name.removeprefix("user."): t for name, t in golden.items() if name.startswith("user.")}


def test_the_index_is_not_mapped(pristine):
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("says what is mapped on Linux alone")

    def is_mapped(name):
        return str(pristine / name) in maps.read_text()

    bundle = load(pristine, with_index=False)
    assert is_mapped(manifest.SCORER)
    assert not is_mapped(manifest.INDEX)
    del bundle
    bundle = load(pristine)
    assert is_mapped(manifest.INDEX)
    del bundle


def test_other_files_are_missed_and_the_whole_needs_its_index(version):
    with pytest.raises(BundleError, match=r"shard-0\.safetensors: the manifest lists it, and there is no such file"):
        load(version)
    (version / manifest.METADATA).unlink()
    with pytest.raises(BundleError, match=r"metadata\.arrow: the manifest lists it, and there is no such file"):
        load(version, with_index=False)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        (
            manifest.RETRIEVAL,
            lambda t: t["user_tower.encoder.mlp.0.weight"].mul_(1.05),
            r"does not reproduce golden request \d: expected a user vector with \S+ in place \d+, got \S+; publish",
        ),
        (
            manifest.SCORER,
            lambda t: t["items.feature_bid"].mul_(2),
            r"does not reproduce golden request \d: expected item -?\d+ of utility \S+ in place \d+ among the winners",
        ),
    ],
)
def test_wrong_towers_and_a_wrong_scorer_do_not_reproduce_their_half(pristine, version, name, change, said):
    with_tensors(version, name, change)
    with pytest.raises(BundleError) as raised:
        load(signed_again(pristine, version), with_index=False)
    assert re.search(said, str(raised.value))


def test_a_version_published_without_user_vectors_is_served_all_the_same(pristine, version):
    with_tensors(version, manifest.GOLDEN, lambda t: t.pop("query"))
    path = signed_again(pristine, version)
    assert load(path, with_index=False).version == path.name
    shutil.copyfile(pristine / manifest.INDEX, path / manifest.INDEX)
    assert load(path).version == path.name
