import json
import re
import shutil
from dataclasses import fields
from functools import partial

import numpy as np
import pyarrow as pa
import pytest
import torch

from prerank._tensor_files import read_tensors, write_tensors
from prerank.bundle import manifest
from prerank.bundle.golden import Answers, Golden
from prerank.bundle.load import load, verify
from prerank.bundle.publish import publish
from prerank.errors import BundleError
from prerank.index.exact import ExactIndex
from prerank.index.storage import STORAGES
from prerank.kernels import native
from prerank.stores.metadata import MetadataTable
from prerank.types import CandidateSet
from tests.bundle import world

SIDE = "item_side.vectors"
"""The one tensor of a two-tower ranker's item side, as a version's file names it."""


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    store = tmp_path_factory.mktemp("store")
    return store / "versions" / publish(store, world.parts())


@pytest.fixture
def version(pristine, tmp_path):
    """A copy of a good version, to damage."""
    path = tmp_path / pristine.name
    shutil.copytree(pristine, path)
    return path


def refused(path, said):
    with pytest.raises(BundleError) as caught:
        load(path)
    assert re.search(said, str(caught.value)), caught.value


@pytest.mark.parametrize("name", manifest.FILES)
def test_a_cut_file_is_named(version, name):
    path = version / name
    path.write_bytes(path.read_bytes()[:-1])
    refused(version, rf"{name}: expected \d+ bytes, found \d+: it was cut or changed after publishing; restore it")


@pytest.mark.parametrize("name", manifest.FILES)
def test_one_flipped_bit_is_named(version, name):
    path = version / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    refused(version, rf"{name}: expected sha256 [0-9a-f]{{12}}\.\.\., found [0-9a-f]{{12}}\.\.\.: it was changed")


@pytest.mark.parametrize("name", manifest.FILES)
def test_a_missing_file_is_named(version, name):
    (version / name).unlink()
    refused(version, f"{name}: the manifest lists it, and there is no such file")


@pytest.mark.parametrize("name", [n for n in manifest.FILES if n.endswith("safetensors")])
@pytest.mark.parametrize("left", [0, 7, 60, -1])
def test_a_cut_file_is_refused_even_with_hashes_that_fit(version, name, left):
    path = version / name
    path.write_bytes(path.read_bytes()[:left])
    refused(world.sign_again(version), f"{name}: expected a safetensors file, but it cannot be read")


def test_files_nobody_listed_are_not_read(version):
    (version / ".DS_Store").write_text("x")
    (version / "index" / "shard-1.safetensors").write_text("x")
    load(version)


def test_verify_reads_no_model(version):
    path = version / "scorer.safetensors"
    path.write_bytes(b"anything")
    verify(world.sign_again(version))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": 3}, "written in format 3 by prerank 0.1.0, and this one reads 2; upgrade prerank"),
        ({"format": "2"}, "expected format 2, found '2'"),
        ({"files": []}, r"expected an object as 'files', found \[\]"),
        ({"files": {}}, r"its files lack \['funnel.toml', .*\] and list unknown \[\]"),
        ({"files": {"../x": {}}}, r"list unknown \['../x'\]"),
        ({"files": dict.fromkeys(manifest.FILES, 1)}, "expected sha256 and bytes of each file"),
        ({"num_items": None}, "expected a whole number as 'num_items', found None"),
        (
            {"version": "20260101T0000-000000000000"},
            "does not hold the files of that version, but content [0-9a-f]{12}",
        ),
        ({"schema": {}}, "its schema is not that of funnel.toml"),
    ],
)
def test_a_manifest_that_is_not_as_written_is_refused(version, change, said):
    path = version / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    refused(version, f"manifest.json: .*{said}")


def test_a_version_from_when_features_had_fewer_options_loads(version):
    path = version / "manifest.json"
    said = json.loads(path.read_text())
    features = [one for owner in said["schema"].values() for one in owner.values()]
    newer = [(one, option) for one in features for option in ("history", "share", "log") if one.get(option) is False]
    assert newer
    for one, option in newer:
        del one[option]
    path.write_text(json.dumps(said))
    load(version)


@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "expected JSON"), ("[]", "expected a JSON object, found list"), ("\ud800", "expected JSON")],
)
def test_a_manifest_that_is_no_object_is_refused(version, text, said):
    (version / "manifest.json").write_bytes(text.encode(errors="surrogatepass"))
    refused(version, said)


def test_a_folder_without_a_manifest_is_no_version(version):
    (version / "manifest.json").unlink()
    refused(version, "no such file; .* is no version, or was never wholly published")
    refused(version / "nowhere", "no such file")


def test_a_version_under_another_name_is_refused(version):
    refused(version.rename(version.with_name("20200101T0000-000000000000")), "the folder holds version .*; name it so")


def with_tensors(version, name, change):
    """The version with one file's tensors changed, and hashes that fit."""
    path = version / name
    tensors, note = read_tensors(path)
    kept = {n: t.clone() for n, t in tensors.items()}
    change(kept)
    write_tensors(path, kept, note)
    return world.sign_again(version)


def first_weight(tensors):
    return next(n for n in tensors if n.endswith("weight") and not n.startswith("items."))


def reshape(tensors):
    tensors[first_weight(tensors)] = torch.zeros(1, 2)


def retype(tensors):
    tensors[first_weight(tensors)] = tensors[first_weight(tensors)].double()


def drop(tensors):
    del tensors[first_weight(tensors)]


@pytest.mark.parametrize("name", ["retrieval.safetensors", "scorer.safetensors"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (reshape, r"expected float32 \[.*\], found float32 \[1, 2\]"),
        (retype, r"expected float32 \[.*\], found float64 \["),
        (drop, r"expected float32 \[.*\], found none"),
        (
            lambda t: t.update({"ranker.x": torch.zeros(1)}),
            r"x': expected none, found float32 \[1\]",
        ),
    ],
)
def test_weights_of_another_shape_are_named(version, name, change, said):
    refused(with_tensors(version, name, change), f"{name}: weights '.*{said}")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda t: t.update({SIDE: t[SIDE][1:]}),
            r"expected item_side.vectors float32 \[300, 10\], found float32 \[299, 10\]",
        ),
        (
            lambda t: t.update({SIDE: t[SIDE][:, 1:].clone()}),
            r"expected item_side.vectors float32 \[300, 10\], found float32 \[300, 9\]",
        ),
        (
            lambda t: t.update({SIDE: t[SIDE].double()}),
            r"expected item_side.vectors float32 \[300, 10\], found float64 \[300, 10\]",
        ),
        (lambda t: t.pop(SIDE), r"expected item_side.vectors float32 \[300, 10\], found none"),
        (
            lambda t: t.update({"item_side.more": torch.zeros(300)}),
            r"expected item_side.more none, found float32 \[300\]",
        ),
        (
            lambda t: t.update(item_side=t.pop(SIDE)),  # as it was before a side had tensors by name
            r"expected item_side.vectors float32 \[300, 10\], found none",
        ),
        (lambda t: t.update(surplus=torch.zeros(1)), r"weights of no part of a scorer: \['surplus'\]"),
        (lambda t: t.pop("items.item_ids"), r"items: expected item_ids, published and features, found \['published'\]"),
        (lambda t: t["items.item_ids"].zero_(), "expected int64 item_ids, strictly ascending"),
        (lambda t: t.pop("items.feature_price"), r"item features: missing \['price'\]"),
        (lambda t: t["items.feature_advertiser"].fill_(120), "'advertiser': expected whole numbers from 0 to"),
    ],
)
def test_a_scorer_whose_parts_do_not_fit_is_refused(version, change, said):
    refused(with_tensors(version, "scorer.safetensors", change), said)


@pytest.fixture(scope="module")
def with_diversity(tmp_path_factory):
    """A version with two rules, one on a column that is shown and one on one that is not."""
    rules = {"advertiser": {"at_most": 3}, "title": {"at_most": 1}}
    store = tmp_path_factory.mktemp("diverse")
    settings = world.config(diversity=rules, metadata={"columns": ["title"]})
    return store / "versions" / publish(store, world.parts(settings=settings))


def test_rules_come_back_as_published_and_only_what_is_shown_is_in_the_metadata(with_diversity):
    scorer = load(with_diversity).scorer
    items = world.parts().item_table.take(np.argsort(world.parts().item_ids))
    for rule, name in enumerate(("advertiser", "title")):
        codes, values = scorer.diversity.codes[:, rule].tolist(), items.column(name).to_pylist()
        assert len(set(zip(codes, values, strict=True))) == len(set(codes)) == len(set(values))
    assert scorer.diversity.at_most.tolist() == [3, 1]
    assert list(MetadataTable.open(with_diversity / "metadata.arrow").columns) == ["title"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("diversity.codes"), r"expected codes and at_most of \['advertiser', 'title'\], found \['at_"),
        (lambda t: t.update({"diversity.more": torch.zeros(1)}), "expected codes and at_most of .*, found .*'more'"),
        (lambda t: t["diversity.at_most"].fill_(2), r"expected at_most \[3, 1\], found \[2, 2\]"),
        (lambda t: t["diversity.at_most"].fill_(0), r"expected at_most of 1 or more, found \[0, 0\]"),
        (
            lambda t: t.update({"diversity.codes": t["diversity.codes"][1:].clone()}),
            "groups of 299 items, expected 300",
        ),
        (
            lambda t: t.update({"diversity.codes": t["diversity.codes"].long()}),
            r"found int64 \[300, 2\] and int64 \[2\]",
        ),
        (lambda t: t["diversity.codes"].zero_(), "does not reproduce golden request"),
    ],
)
def test_rules_that_do_not_fit_are_refused(with_diversity, tmp_path, change, said):
    path = tmp_path / with_diversity.name
    shutil.copytree(with_diversity, path)
    refused(with_tensors(path, "scorer.safetensors", change), said)


def test_reserve_and_floors_come_back_as_published_and_a_version_without_them_has_none(tmp_path, version):
    rules = {"reserve_micros": 2.0**38, "floor": {"like": 0.3}}
    path = tmp_path / "versions" / publish(tmp_path, world.parts(settings=world.config(rules=rules)))
    reserve = load(path).scorer.rules["reserve"]
    assert float(reserve.reserve_micros) == 2.0**38
    assert reserve.floors.tolist() == [torch.tensor(0.3).item()]
    assert load(version).scorer.rules == {}
    refused(
        with_tensors(path, "scorer.safetensors", lambda t: t.pop("reserve.floors")),
        r"weights 'floors': expected float32 \[1\], found none",
    )


def test_a_reserve_nobody_asked_for_is_refused(version):
    refused(
        with_tensors(version, "scorer.safetensors", lambda t: t.update({"reserve.reserve_micros": torch.ones(())})),
        r"weights 'reserve_micros': expected none, found float32 \[\]",
    )


def test_rules_nobody_asked_for_are_refused(version):
    surplus = {"diversity.codes": torch.zeros(300, 1).int(), "diversity.at_most": torch.ones(1).long()}
    refused(
        with_tensors(version, "scorer.safetensors", lambda t: t.update(surplus)),
        r"diversity: expected codes and at_most of \[\], found \['at_most', 'codes'\] and no groups.arrow",
    )


def scale_one_layer(tensors):
    tensors["item_tower.encoder.linear.weight"] *= 1.05


def scale_the_users(tensors):
    tensors["user_tower.encoder.mlp.0.weight"] *= 1.05


def test_towers_the_index_was_not_built_with_are_refused(version):
    refused(
        with_tensors(version, "retrieval.safetensors", scale_the_users),
        r"shard-0.safetensors: expected vectors of the towers [0-9a-f]{12}, found those of \{'retrieval': '.*'\}; its",
    )


def test_wrong_towers_do_not_reproduce_what_was_retrieved(version):
    path = version / manifest.RETRIEVAL
    tensors, _ = read_tensors(path)
    changed = {n: t.clone() for n, t in tensors.items()}
    scale_the_users(changed)
    write_tensors(path, changed, {})
    vectors, note = read_tensors(version / manifest.INDEX)
    note["models"] = {"retrieval": manifest.FileEntry.of(path).model_id}
    write_tensors(version / manifest.INDEX, {n: t.clone() for n, t in vectors.items()}, note)
    refused(
        world.sign_again(version),
        r"does not reproduce golden request \d: expected item -?\d+ of similarity \S+ in place \d+ among those "
        r"retrieved, got item -?\d+ of similarity \S+; publish again",
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t[SIDE].mul_(1.05),
        lambda t: t["ranker.user_tower.encoder.mlp.0.weight"].mul_(1.05),
        lambda t: t["items.feature_bid"].mul_(2),
        lambda t: t["utility.constants"].mul_(1.01),
    ],
)
def test_a_wrong_scorer_does_not_reproduce_the_winners(version, change):
    refused(
        with_tensors(version, "scorer.safetensors", change),
        r"does not reproduce golden request \d: expected item -?\d+ of utility \S+ in place \d+ among the winners, "
        r"got item -?\d+ of utility \S+; publish again",
    )


def test_a_task_outside_the_utility_is_checked_too(version):
    # the like task's item bias is the last column
    refused(
        with_tensors(version, "scorer.safetensors", lambda t: t[SIDE][:, -1].add_(0.5)),
        r"golden request 0: expected item -?\d+ to have prob \S+ of like, got ",
    )


def test_golden_requests_of_other_features_are_refused(version):
    refused(
        with_tensors(version, "golden.safetensors", lambda t: t.pop("user.hour")),
        r"golden.safetensors: expected requests of the features \['age', 'clicks', 'country', 'hour'\], found \['age'",
    )


def test_golden_answers_that_are_missing_are_named(version):
    refused(
        with_tensors(version, "golden.safetensors", lambda t: t.pop("won")),
        r"golden requests: expected \['retrieved', .*\], and \['won'\] is missing",
    )


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("funnel.toml", "name = ", "funnel.toml: not a configuration this prerank reads: "),
        ("funnel.toml", 'name = "x"\nnew_key = 1', "new_key: unknown key"),
        ("transforms.json", "{}", "transforms.json: transforms: expected the keys"),
        ("metadata.arrow", "ARROW", "metadata.arrow: expected an Arrow IPC file"),
    ],
)
def test_a_file_of_another_kind_is_named(version, name, text, said):
    (version / name).write_text(text)
    refused(world.sign_again(version), said)


def test_transforms_of_other_features_are_refused(version):
    path = version / "funnel.toml"
    path.write_text(path.read_text().replace("log = true", "log = false"))
    refused(world.sign_again(version), "transforms.json: fitted for other features than funnel.toml says: item feature")


def test_metadata_of_other_items_is_refused(version):
    table = pa.table({"title": ["only one"]})
    with pa.OSFile(str(version / "metadata.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    refused(world.sign_again(version), "metadata.arrow: expected 300 rows, one an item, found 1")


def test_a_utility_of_what_the_items_lack_is_refused(version):
    path = version / "funnel.toml"
    said = path.read_text()
    path.write_text(said.replace('click = { value = "bid"', 'click = { value = "prize"'))
    refused(world.sign_again(version), "funnel.toml: .*utility.click.value: expected a value of")


def test_weights_are_views_of_the_mapped_file(pristine):
    bundle = load(pristine)
    tensors = [bundle.index.vectors, *side_of(bundle), *bundle.scorer.items.features().values()]
    with open("/proc/self/maps") as file:
        maps = [line.split() for line in file if str(pristine) in line]
    ranges = [tuple(int(end, 16) for end in line[0].split("-")) for line in maps]
    for tensor in [*tensors, *bundle.towers.parameters()]:
        assert any(low <= tensor.data_ptr() < high for low, high in ranges)


def side_of(bundle):
    """Each tensor of the ranker's item side."""
    return bundle.scorer.item_side.tensors().values()


def golden_of(bundle):
    return Golden.from_tensors(read_tensors(bundle.path / "golden.safetensors")[0])


def test_rounding_of_another_cpu_is_no_difference(pristine):
    bundle = load(pristine)
    golden = golden_of(bundle)
    generator = torch.Generator().manual_seed(0)
    for tensor in (*side_of(bundle), bundle.index.vectors):
        tensor.mul_(1 + 1e-6 * torch.randn(tensor.shape, generator=generator))
    assert golden.first_difference(bundle.towers, bundle.index, bundle.scorer) is None
    assert load(pristine).version, "a mapping is private: writing to it leaves the file alone"


@pytest.mark.parametrize("storage", STORAGES)
def test_a_machine_without_the_native_kernels_gives_the_answers_of_one_with_them(pristine, monkeypatch, storage):
    bundle = load(pristine)
    index = ExactIndex(bundle.index.vectors, storage)
    asked = partial(Golden.ask, golden_of(bundle).user, bundle.towers, index, bundle.scorer, keep=40, k=10)
    natively = asked()
    monkeypatch.setattr(native, "library", lambda: None)
    assert natively.first_difference(bundle.towers, index, bundle.scorer) is None
    by_torch = asked()
    monkeypatch.undo()
    assert by_torch.first_difference(bundle.towers, index, bundle.scorer) is None


def retold(golden, **answers):
    """The same requests with other answers."""
    known = {f.name: getattr(golden.answers, f.name) for f in fields(Answers)}
    return Golden(golden.user, Answers(**{**known, **answers}))


def test_items_that_tie_may_change_places_and_others_not(pristine):
    bundle = load(pristine)
    models = (bundle.towers, bundle.index, bundle.scorer)
    golden = golden_of(bundle)
    swapped = golden.answers.won.clone()
    swapped[0, [0, 1]] = swapped[0, [1, 0]]
    said = retold(golden, won=swapped).first_difference(*models)
    assert said is not None
    assert said.startswith("golden request 0: expected item")
    first, second = golden.answers.won[0, :2].tolist()
    for rows in (*side_of(bundle), bundle.scorer.live.value("bid")):
        rows[first] = rows[second]
    golden = Golden.ask(golden.user, *models, 40, 10)
    place = golden.answers.won[0].tolist().index(min(first, second))
    assert golden.answers.won[0, place + 1] == max(first, second), "equal, so ordered by row"
    swapped, names = golden.answers.won.clone(), golden.answers.item_ids.clone()
    for answers in (swapped, names):
        answers[0, [place, place + 1]] = answers[0, [place + 1, place]]
    assert retold(golden, won=swapped, item_ids=names).first_difference(*models) is None


def test_a_tie_across_the_last_place_may_keep_either(pristine):
    bundle = load(pristine)
    models = (bundle.towers, bundle.index, bundle.scorer)
    for rows in (*side_of(bundle), bundle.scorer.live.value("bid")):
        rows[:] = rows[0].clone()
    golden = Golden.ask(golden_of(bundle).user, *models, 40, 10)
    among = set(golden.answers.retrieved[0].tolist()) - set(golden.answers.won[0].tolist())
    other = golden.answers.won.clone()
    other[0, 9] = min(among)
    names = golden.answers.item_ids.clone()
    names[0, 9] = bundle.scorer.items.item_ids[min(among)]
    assert retold(golden, won=other, item_ids=names).first_difference(*models) is None


@pytest.mark.parametrize(("more", "is_same"), [(1e-6, True), (0.05, False)])
def test_of_two_that_tie_in_one_group_either_may_win_and_turn_others_away(with_diversity, more, is_same):
    bundle = load(with_diversity)
    models = (bundle.towers, bundle.index, bundle.scorer)
    codes, bids = bundle.scorer.diversity.codes, bundle.scorer.live.value("bid")
    bundle.scorer.diversity.at_most.fill_(1)
    codes.copy_(torch.arange(len(codes))[:, None].expand(-1, 2))
    golden = Golden.ask(golden_of(bundle).user, *models, 40, 10)
    low, high = sorted(golden.answers.won[0, :2].tolist())
    third = int(golden.answers.won[0, 2])
    for rows in (*side_of(bundle), bids):
        rows[high] = rows[low]
    codes[high] = torch.tensor([int(codes[low, 0]), int(codes[third, 1])])
    golden = Golden.ask(golden.user, *models, 40, 10)
    assert low in golden.answers.won[0]
    assert high not in golden.answers.won[0]
    bids[high] += int(more * int(bids[high]))
    found = Golden.ask(golden.user, *models, 40, 10).answers.won[0]
    assert high in found
    assert low not in found
    said = golden.first_difference(*models)
    assert said is None if is_same else str(said).startswith("golden request 0: expected item")


def test_a_row_that_became_another_item_is_a_difference(version):
    refused(
        with_tensors(version, "scorer.safetensors", lambda t: t["items.item_ids"].add_(1)),
        r"does not reproduce golden request 0: expected item -?\d+ in row \d+, got item",
    )


def test_one_winner_fewer_is_a_difference(pristine):
    bundle = load(pristine)
    golden = golden_of(bundle)
    won, utility = golden.answers.won.clone(), golden.answers.utility.clone()
    won[2, 9], utility[2, 9] = -1, 0
    said = retold(golden, won=won, utility=utility).first_difference(bundle.towers, bundle.index, bundle.scorer)
    assert said is not None
    assert re.match(r"golden request 2: expected nothing in place 9 among the winners, got item", said)


def test_a_loaded_version_serves_a_batch(pristine):
    bundle = load(pristine)
    user = golden_of(bundle).user
    with torch.inference_mode():
        found = bundle.index.search(bundle.towers.user_side(user), 40, None)
        top = bundle.scorer(user, CandidateSet(found.rows, found.similarity, found.valid), 10)
    assert top.valid.all()
    assert (top.utility[:, :-1] >= top.utility[:, 1:]).all()


def test_loading_draws_no_random_numbers(pristine):
    before = torch.get_rng_state()
    load(pristine)
    assert torch.equal(torch.get_rng_state(), before)
