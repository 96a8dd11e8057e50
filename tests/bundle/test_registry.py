import json
import os
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from prerank.bundle.publish import publish
from prerank.bundle.registry import Event, Gate, Registry
from prerank.errors import BundleError, GateFailed, RegistryError
from tests.bundle import world
from tests.processes import forked

HOLDS = Gate("golden", "at least 1", 1.0, True)


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    store = tmp_path_factory.mktemp("three")
    versions = [publish(store, world.parts(num_items=20, seed=seed)) for seed in range(3)]
    for version in versions:
        Registry(store).write_validation(version, [HOLDS])
    return store, versions


@pytest.fixture
def registry(three, tmp_path):
    shutil.copytree(three[0], tmp_path / "store")
    return Registry(tmp_path / "store")


@pytest.fixture
def abc(three):
    return three[1]


def moves(registry):
    return [(e.action, e.source, e.to) for e in registry.history()]


def test_a_store_begins_with_nothing_live(tmp_path):
    registry = Registry(tmp_path / "new")
    assert registry.live() is None
    assert registry.versions() == []
    assert registry.history() == []


def test_promote_moves_the_pointer_and_is_remembered(registry, abc):
    a, b, _ = abc
    registry.promote(a, "ada", "first")
    registry.promote(b, "bob", 'better, "he said"\n')
    assert registry.live() == b
    assert (registry.store / "live").read_text() == f"{b}\n"
    assert moves(registry) == [("promote", None, a), ("promote", a, b)]
    lines = (registry.store / "history.jsonl").read_text().splitlines()
    assert [set(json.loads(line)) for line in lines] == [{"time", "action", "from", "to", "by", "why"}] * 2
    last = registry.history()[-1]
    assert (last.by, last.why) == ("bob", 'better, "he said"\n')
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", last.time)


def test_versions_say_when_which_is_live_and_their_gates(registry, abc):
    registry.promote(abc[1], "ada", "")
    infos = {v.version: v for v in registry.versions()}
    assert list(infos) == sorted(abc)
    assert [v for v, info in infos.items() if info.is_live] == [abc[1]]
    assert infos[abc[0]].gates == (HOLDS,)
    assert infos[abc[0]].created.replace("-", "").replace(":", "")[:13] == abc[0][:13]
    (registry.path(abc[2]) / "validation.json").unlink()
    assert next(v.gates for v in registry.versions() if v.version == abc[2]) is None


def test_rolling_back_again_and_again_goes_further_back(registry, abc):
    a, b, c = abc
    for version in abc:
        registry.promote(version, "ada", "")
    registry.rollback(None, "ada", "worse")
    assert registry.live() == b
    registry.rollback(None, "ada", "that too")
    assert registry.live() == a
    with pytest.raises(RegistryError, match=f"no version was live before {a}; nothing to go back to"):
        registry.rollback(None, "ada", "")
    registry.rollback(c, "ada", "it was not the version")
    assert registry.live() == c
    registry.rollback(None, "ada", "it was")
    assert registry.live() == a
    assert [m[0] for m in moves(registry)] == ["promote"] * 3 + ["rollback"] * 4


def test_rolling_back_to_a_named_version_forgets_those_above_it(registry, abc):
    a, b, c = abc
    for version in (a, b, c):
        registry.promote(version, "ada", "")
    registry.rollback(a, "ada", "")
    registry.promote(c, "ada", "")
    registry.rollback(None, "ada", "")
    assert registry.live() == a
    registry.promote(b, "ada", "")
    registry.promote(a, "ada", "")
    registry.rollback(None, "ada", "")
    assert registry.live() == b


def test_rollback_goes_only_where_the_pointer_was(registry, abc):
    with pytest.raises(RegistryError, match="no version was live before None"):
        registry.rollback(None, "ada", "")
    registry.promote(abc[0], "ada", "")
    with pytest.raises(RegistryError, match=f"{abc[1]}: it was never live; promote it instead"):
        registry.rollback(abc[1], "ada", "")
    with pytest.raises(RegistryError, match=f"{abc[0]} is live already"):
        registry.rollback(abc[0], "ada", "")
    assert registry.live() == abc[0]


def test_rollback_asks_no_gate(registry, abc):
    registry.promote(abc[0], "ada", "")
    registry.promote(abc[1], "ada", "")
    registry.write_validation(abc[0], [Gate("golden", "at least 1", 0.0, False)])
    registry.rollback(None, "ada", "")
    assert registry.live() == abc[0]


def test_promoting_what_is_live_is_refused(registry, abc):
    registry.promote(abc[0], "ada", "")
    with pytest.raises(RegistryError, match="is live already"):
        registry.promote(abc[0], "ada", "")
    assert len(registry.history()) == 1


@pytest.mark.parametrize("version", ["20200101T0000-000000000000", "../versions", "", ".tmp-0123"])
def test_a_version_that_is_not_there_is_refused_with_those_that_are(registry, abc, version):
    for act in (registry.path, lambda v: registry.promote(v, "", ""), lambda v: registry.rollback(v, "", "")):
        with pytest.raises(RegistryError, match=re.escape(f"expected one of the versions {sorted(abc)}, got")):
            act(version)


def test_a_version_that_was_not_validated_stays_unpointed(registry, abc):
    (registry.path(abc[0]) / "validation.json").unlink()
    with pytest.raises(GateFailed, match="it was never validated; validate it before promoting it"):
        registry.promote(abc[0], "ada", "")
    assert registry.live() is None
    assert registry.history() == []


def test_one_gate_that_does_not_hold_is_named_with_bound_and_measured(registry, abc):
    registry.write_validation(abc[0], [HOLDS, Gate("retrieval_recall", "at least 0.9", 0.25, False)])
    with pytest.raises(GateFailed, match=f"{abc[0]}: gate retrieval_recall expected at least 0.9, measured 0.25"):
        registry.promote(abc[0], "ada", "")


def test_a_gate_says_by_how_much_it_fails_beside_what_live_has_and_all_of_it_is_kept(registry, abc):
    gate = Gate("kl_loss", "not above live by more than 0.002", 0.25, False, off=0.148, live=0.1, about="one task")
    registry.write_validation(abc[0], [HOLDS, gate])
    assert registry.versions()[sorted(abc).index(abc[0])].gates == (HOLDS, gate)
    said = "expected not above live by more than 0.002, measured 0.25: 0.148 too high (live has 0.1); one task"
    with pytest.raises(GateFailed, match=re.escape(f"{abc[0]}: gate kl_loss {said}")):
        registry.promote(abc[0], "ada", "")


def test_a_validation_written_before_gates_said_by_how_much_is_read(registry, abc):
    plain = [{"name": "golden", "bound": "at least 1", "measured": 1.0, "holds": True}]
    text = json.dumps({"version": abc[0], "gates": plain})
    (registry.path(abc[0]) / "validation.json").write_text(text)
    registry.promote(abc[0], "ada", "")
    assert registry.live() == abc[0]


def test_a_gate_nobody_measured_does_not_hold(registry, abc):
    registry.write_validation(abc[0], [])
    with pytest.raises(GateFailed, match=r"has the gates \['golden'\], never measured; validate again"):
        registry.promote(abc[0], "ada", "")


def test_a_measure_json_has_no_word_for_is_kept(registry, abc):
    gate = Gate("recall_over_popularity", "at least 1", float("inf"), True)
    registry.write_validation(abc[0], [gate, HOLDS])
    assert registry.versions()[sorted(abc).index(abc[0])].gates == (gate, HOLDS)
    assert "Infinity" not in (registry.path(abc[0]) / "validation.json").read_text()


@pytest.mark.parametrize("text", ["{", "[]", '{"version": "x", "gates": []}', '{"gates": 1}'])
def test_a_validation_that_cannot_be_read_is_named(registry, abc, text):
    (registry.path(abc[0]) / "validation.json").write_text(text)
    with pytest.raises(RegistryError, match=f"validation.json: cannot be read: .*; validate {abc[0]} again"):
        registry.promote(abc[0], "ada", "")


def test_a_damaged_version_cannot_become_live(registry, abc):
    a, b, _ = abc
    registry.promote(a, "ada", "")
    registry.promote(b, "ada", "")
    (registry.path(a) / "scorer.safetensors").write_bytes(b"cut")
    with pytest.raises(BundleError, match=r"scorer\.safetensors: expected"):
        registry.promote(a, "ada", "")
    with pytest.raises(BundleError, match=r"scorer\.safetensors: expected"):
        registry.rollback(None, "ada", "")
    assert registry.live() == b


def _flip(path):
    content = bytearray((path / "scorer.safetensors").read_bytes())
    content[len(content) // 2] ^= 1
    (path / "scorer.safetensors").write_bytes(content)


def _newer(path):
    said = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**said, "format": said["format"] + 1}))


DAMAGES = {
    "a flipped bit": (_flip, r"scorer\.safetensors: expected sha256 .*, found "),
    "a cut file": (
        lambda p: (p / "retrieval.safetensors").write_bytes(b"cut"),
        r"retrieval\.safetensors: expected \d+",
    ),
    "a missing file": (lambda p: (p / "transforms.json").unlink(), r"transforms\.json: the manifest lists it"),
    "a wrong manifest": (lambda p: (p / "manifest.json").write_text("{"), r"manifest\.json: expected JSON"),
    "a newer format": (_newer, r"manifest\.json: written in format \d+ by prerank .*; upgrade prerank"),
    "a validation that is none": (lambda p: (p / "validation.json").write_text("{"), "validation.json: cannot be read"),
    "all of it gone": (shutil.rmtree, "expected one of the versions"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_rolling_back_from_a_damaged_version_works_at_once_and_it_cannot_come_back(registry, abc, damage):
    a, b, _ = abc
    registry.promote(a, "ada", "")
    registry.promote(b, "ada", "")
    spoil, said = DAMAGES[damage]
    spoil(registry.path(b))
    start = time.perf_counter()
    registry.rollback(None, "ada", damage)
    assert time.perf_counter() - start < 1
    assert registry.live() == a
    assert a in registry.names()
    with pytest.raises((BundleError, RegistryError), match=said):
        registry.promote(b, "ada", "")
    assert registry.live() == a


def test_a_damaged_pointer_is_told_not_guessed(registry):
    (registry.store / "live").write_text("\n")
    with pytest.raises(RegistryError, match=r"live: expected one version id, found ''; see history\.jsonl"):
        registry.live()


def test_a_damaged_line_of_the_history_is_told(registry, abc):
    registry.promote(abc[0], "ada", "")
    path = registry.store / "history.jsonl"
    path.write_text("garbage\n" + path.read_text())
    with pytest.raises(RegistryError, match="line 1 is damaged: 'garbage'; mend it by hand"):
        registry.history()


def _die_promoting(store, version, failpoint):
    if failpoint == "rename":
        os.replace = lambda *_: os._exit(9)
    else:
        os.fsync = lambda *_: os._exit(9)  # the event is written, and nothing after it
    Registry(store).promote(version, "ada", "cut short")


@pytest.mark.parametrize("failpoint", ["rename", "event"])
def test_a_promote_killed_on_its_way_leaves_the_old_version_live_and_counts_for_nothing(registry, abc, failpoint):
    a, b, c = abc
    registry.promote(a, "ada", "")
    process = forked(_die_promoting, registry.store, b, failpoint)
    process.join()
    assert process.exitcode == 9
    assert registry.live() == a
    assert moves(registry) == [("promote", None, a)]
    with pytest.raises(RegistryError, match="it was never live"):
        registry.rollback(b, "ada", "")
    registry.promote(c, "ada", "")
    assert moves(registry) == [("promote", None, a), ("promote", a, c)]
    registry.rollback(None, "ada", "")
    assert registry.live() == a


def test_an_event_cut_while_being_written_counts_for_nothing(registry, abc):
    a, b, _ = abc
    registry.promote(a, "ada", "")
    path = registry.store / "history.jsonl"
    whole = path.read_text()
    path.write_text(whole + Event("t", "promote", a, b, "ada", "x").to_json()[:20])
    assert moves(registry) == [("promote", None, a)]
    registry.promote(b, "ada", "")
    assert moves(registry) == [("promote", None, a), ("promote", a, b)]
    assert path.read_text().startswith(whole)


def test_promoters_at_once_take_turns(registry, abc):
    def promote(n):
        with suppress(RegistryError):  # it is live already
            registry.promote(abc[n % 3], f"thread {n}", "")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(promote, range(60)))
    events = registry.history()
    assert len(events) == len((registry.store / "history.jsonl").read_text().splitlines())
    assert [e.source for e in events] == [None, *(e.to for e in events[:-1])]
    assert registry.live() == events[-1].to


def _promote_many(store, versions, n):
    for step in range(10):
        with suppress(RegistryError):  # it is live already
            Registry(store).promote(versions[(n + step) % 3], f"process {n}", "")


def test_promoters_of_other_processes_take_turns_too(registry, abc):
    workers = [forked(_promote_many, registry.store, abc, n) for n in range(2)]
    for worker in workers:
        worker.join()
    assert [w.exitcode for w in workers] == [0, 0]
    events = registry.history()
    assert len(events) == len((registry.store / "history.jsonl").read_text().splitlines())
    assert [e.source for e in events] == [None, *(e.to for e in events[:-1])]
