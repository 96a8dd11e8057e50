"""Whatever hosts hold and whatever a server knows of it, no request mixes two spaces.

The versions' towers are orthogonal (tests/serve/spaces.py): a user vector of one has a similarity of exactly 0 with
every item of another, and its numbers stand where only its own version's do.
"""

import json
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from prerank.bundle.index_files import shards_of
from prerank.bundle.load import Bundle, load
from prerank.bundle.registry import Registry
from prerank.serve.expand import ExpandUser
from prerank.serve.retrieve_hosts import RetrieveFromHosts
from prerank.stores.live import LiveUsers
from prerank.types import CandidateSet, Request
from tests.serve import spaces, world
from tests.serve.cluster import Cluster, Fragile

KEEP = 12
CONFIG = spaces.config(serve={"hosts_ms": 5000.0, "towers": 3})
SHARDS, REPLICAS = 3, 2
numbers = st.integers(0, spaces.MOST - 1)
places = st.tuples(st.integers(0, SHARDS - 1), st.integers(0, REPLICAS - 1))


class Made:
    """Five versions, read-only, with everything of them that the test compares with."""

    def __init__(self, folder: Path) -> None:
        self.store = folder / "tiny"
        self.versions = [spaces.publish_space(self.store, number, CONFIG) for number in range(spaces.MOST)]
        self.bundles = [load(Registry(self.store).path(version)) for version in self.versions]
        self.vectors = [spaces.vectors_of(bundle) for bundle in self.bundles]
        self.users = LiveUsers.open(self.store / "users.lmdb", self.store / "events.lmdb")
        self._made: dict[tuple[object, ...], torch.Tensor] = {}
        self._order: dict[tuple[object, ...], list[int]] = {}

    def user(self, number: int, request: Request) -> torch.Tensor:
        """The user's vector as the whole version makes it, of which nothing is shared with what is tested."""
        key = (number, request.user_id, request.context["hour"])
        if key not in self._made:
            self._made[key] = self._user(number, request)
        return self._made[key]

    def _user(self, number: int, request: Request) -> torch.Tensor:
        bundle = self.bundles[number]
        expand = ExpandUser(self.users, bundle.transforms, bundle.scorer.items)
        return bundle.towers.user_side(expand.expand(self.users.get(request.user_id), request)[0])[0]

    def best(self, number: int, shard: int, request: Request, known: set[int]) -> list[int]:
        """The KEEP most similar items of one shard in one version, and of these those that the server knows."""
        key = (number, shard, request.user_id, request.context["hour"])
        if key not in self._order:
            user, vectors = self.user(number, request), self.vectors[number]
            similarity = {one: float(vectors[one] @ user) for one in vectors if _shard_of(one) == shard}
            self._order[key] = sorted(similarity, key=lambda one: (-similarity[one], one))[:KEEP]
        return [one for one in self._order[key] if one in known]


def _shard_of(item_id: int) -> int:
    return int(shards_of(torch.tensor([item_id]).numpy(), SHARDS)[0])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as servers do: threads that wait for each other's tiny pieces take most of the time
    yield Made(tmp_path_factory.mktemp("spaces"))
    torch.set_num_threads(threads)


class Rollouts(RuleBasedStateMachine):
    """Hosts that load, unload, die, restart, hang and lag; a pointer that moves; a server that follows at some time."""

    made: Made

    def __init__(self) -> None:
        super().__init__()
        made = self.made
        self.folder = Path(tempfile.mkdtemp())
        store = self.folder / "tiny"
        store.mkdir()
        (store / "versions").symlink_to(made.store / "versions")
        self.store, self.registry = store, Registry(store)
        self.registry.promote(made.versions[0], "a test", "the first")
        self.cluster = Cluster(store, made.versions, SHARDS, REPLICAS)
        self.serving = 0
        self.ever_failed = self.is_known = False
        self.num_steps = 0

    @initialize(number=numbers)
    def all_begin_with_one(self, number: int) -> None:
        for one in self.cluster.all:
            one.host.load(self.made.versions[number])
        self.look()

    def at(self, place: tuple[int, int]) -> Fragile:
        return self.cluster.fragile[place[0]][place[1]]

    @rule(place=places, number=numbers)
    def load(self, place: tuple[int, int], number: int) -> None:
        self.at(place).host.load(self.made.versions[number])
        self.is_known = False

    @rule(place=places, number=numbers)
    def replace(self, place: tuple[int, int], number: int) -> None:
        """A host that has room for one version, or was rolled back alone."""
        host = self.at(place).host
        host.load(self.made.versions[number])
        for version in host.holding().versions:
            if version != self.made.versions[number]:
                host.unload(version)
        self.is_known = False

    @rule(number=numbers)
    def roll_out_everywhere(self, number: int) -> None:
        for one in self.cluster.all:
            one.host.load(self.made.versions[number])
        self.is_known = False

    @rule(place=places)
    def follow(self, place: tuple[int, int]) -> None:
        self.at(place).host.follow()
        self.is_known = False

    @rule(place=places)
    def die(self, place: tuple[int, int]) -> None:
        self.at(place).is_dead = self.ever_failed = True

    @rule(place=places, number=st.none() | numbers)
    def restart(self, place: tuple[int, int], number: int | None) -> None:
        self.at(place).restart()
        if number is not None:
            self.at(place).host.load(self.made.versions[number])
        self.is_known = False

    @precondition(lambda self: not any(one.hangs for one in self.cluster.all))
    @rule(place=places)
    def hang(self, place: tuple[int, int]) -> None:
        """One at a time, for every request waits for it."""
        self.at(place).hangs = threading.Event()
        self.ever_failed = True

    @precondition(lambda self: any(one.hangs for one in self.cluster.all))
    @rule()
    def go_on(self) -> None:
        for one in self.cluster.all:
            hangs, one.hangs = one.hangs, None
            if hangs is not None:
                hangs.set()

    @rule(number=numbers)
    def promote_or_roll_back(self, number: int) -> None:
        version = self.made.versions[number]
        if self.registry.live() == version:
            return
        if any(event.to == version for event in self.registry.history()):
            self.registry.rollback(version, "a test", "")
        else:
            self.registry.promote(version, "a test", "")
        self.is_known = False  # which towers stay loaded may change

    @rule()
    def server_follows(self) -> None:
        self.serving = self.made.versions.index(self.registry.live() or "")

    @rule(number=numbers)
    def server_is_another_one(self, number: int) -> None:
        """One that lags by any number of versions."""
        self.serving = number

    @rule()
    def look(self) -> None:
        self.cluster.hosts.refresh()
        self.is_known = True

    @rule(place=places)
    def look_at_one(self, place: tuple[int, int]) -> None:
        self.cluster.hosts.shards[place[0]][place[1]].look(1.0)

    @rule(user=st.sampled_from([1, 2, 9]), hour=st.integers(0, 2), again=st.booleans())
    def request(self, user: int, hour: int, again: bool) -> None:
        any_hang = any(one.hangs is not None for one in self.cluster.all)
        request = Request(
            user,
            5,
            world.UNTIL + 1,
            {"hour": hour, "surface": "feed"},
            deadline_ms=60.0 if any_hang else 20_000.0,
        )
        made, bundle = self.made, self.made.bundles[self.serving]
        stage = RetrieveFromHosts(bundle, made.users, self.cluster.hosts, KEEP)
        with torch.inference_mode():
            features, _ = ExpandUser(made.users, bundle.transforms, bundle.scorer.items).expand(
                made.users.get(user), request
            )
            values = {"request": request, "record": made.users.get(user), "features": features}
            values |= {"eligible": None, "num_eligible": 1}
            for _ in range(1 + again):
                written = stage.run(values)
                self.check(request, bundle, written["candidates"], written["left_out"])

    def check(self, request: Request, bundle: Bundle, found: CandidateSet, left_out: tuple[str, ...]) -> None:
        made = self.made
        kept = found.valid[0]
        ids = bundle.scorer.items.item_ids[found.rows[0][kept]].tolist()
        similarity = found.similarity[0][kept]
        assert len(set(ids)) == len(ids)
        answered = [n for n in range(SHARDS) if not any(why.startswith(f"shard {n} of") for why in left_out)]
        assert {_shard_of(one) for one in ids} <= set(answered)
        known = set(bundle.scorer.items.item_ids.tolist())
        by_shard = {n: [one for one in ids if _shard_of(one) == n] for n in answered}
        # in which version each shard's items are the best: were it none, they would be of two
        fits = {
            n: {v for v in range(spaces.MOST) if made.best(v, n, request, known)[: len(own)] == own}
            for n, own in by_shard.items()
        }
        assert all(fits.values()), f"no version's best: {fits}"
        if len(similarity) and not bool(similarity.isnan().any()):
            number = self._only(fits, ids, similarity, request)
            user = made.user(number, request)
            expected = torch.stack([made.vectors[number][one] for one in ids]) @ user
            torch.testing.assert_close(similarity, expected)
            assert bool((similarity != 0).all())
            everything = [one for n in answered for one in made.best(number, n, request, known)]
            mine = {one: float(made.vectors[number][one] @ user) for one in everything}
            assert ids == sorted(mine, key=lambda one: (-mine[one], one))[:KEEP]
        if self.is_known and not self.ever_failed:
            towers = {bundle.version, *self.cluster.hosts.towers.loaded}
            for n in range(SHARDS):
                held = {v for one in self.cluster.fragile[n] for v in one.host.holding().versions}
                assert (n in answered) == bool(held & towers)

    def _only(self, fits: dict[int, set[int]], ids: list[int], similarity: torch.Tensor, request: Request) -> int:
        """Several versions may have the same order: the similarities say which it is."""
        for number in set.intersection(*fits.values()):
            vectors = torch.stack([self.made.vectors[number][one] for one in ids])
            if torch.allclose(vectors @ self.made.user(number, request), similarity):
                return number
        raise AssertionError("no version has these similarities")

    @invariant()
    def a_request_after_each_step_is_as_it_must_be(self) -> None:
        self.num_steps += 1
        self.request((1, 2, 9)[self.num_steps % 3], self.num_steps % 2, False)

    @invariant()
    def no_request_mixes_spaces(self) -> None:
        assert not self.cluster.mixed
        assert len(self.cluster.hosts.towers.loaded) <= 3

    def teardown(self) -> None:
        for one in self.cluster.all:
            if one.hangs is not None:
                one.hangs.set()
        self.cluster.hosts.close()
        shutil.rmtree(self.folder)


def machine(made: Made, examples: int, steps: int) -> None:
    Rollouts.made = made
    run_state_machine_as_test(
        Rollouts,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_no_request_mixes_spaces_whatever_happens_to_versions_and_hosts(made: Made) -> None:
    machine(made, examples=25, steps=30)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_no_request_mixes_spaces_in_a_thousand_roll_outs(made: Made) -> None:
    machine(made, examples=1000, steps=60)


def test_the_check_sees_a_mix(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """A caller who embeds with the tower he serves, whatever the host holds: what this is all about."""
    right = RetrieveFromHosts._search

    def wrong(self: RetrieveFromHosts, version: str, held: object, values: dict[str, object], k: int) -> object:
        made_right = right(self, version, held, values, k)  # type: ignore[arg-type]
        query = self.bundle.towers.user_side(values["features"])[0]  # type: ignore[arg-type]
        return (
            None
            if made_right is None
            else type(made_right)(
                **{name: getattr(made_right, name) for name in made_right.__slots__} | {"query": query}
            )
        )

    monkeypatch.setattr(RetrieveFromHosts, "_search", wrong)
    Rollouts.made = made
    one = Rollouts()
    try:
        one.all_begin_with_one(1)
        with pytest.raises(AssertionError):
            one.request(1, 1, False)
        with pytest.raises(AssertionError):
            one.no_request_mixes_spaces()
    finally:
        one.teardown()


def test_the_index_itself_says_what_it_was_built_with(made: Made) -> None:
    seen = set()
    for version, bundle in zip(made.versions, made.bundles, strict=True):
        said = json.loads((Registry(made.store).path(version) / "manifest.json").read_text())
        assert bundle.index.models == {"retrieval": said["files"]["retrieval.safetensors"]["sha256"][:12]}
        seen.add(bundle.index.models["retrieval"])
    assert len(seen) == spaces.MOST
