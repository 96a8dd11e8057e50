"""The ranker that sees how this user met this item: its split arithmetic, its crossings, what only they can learn."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils._python_dispatch import TorchDispatchMode

from prerank.config import Config, parse_config
from prerank.metrics.classification import auc
from prerank.models.cross_feature import CrossFeatureRanker
from prerank.models.rankers import build_ranker

ADVERTISERS, TOPICS, LENGTH, WIDTH = 400, 9, 5, 8
SIZES = {
    "user.country": 4,
    "user.visited": ADVERTISERS,
    "context.surface": 3,
    "item.advertiser": ADVERTISERS,
    "item.topics": TOPICS,
}
PLAIN = {
    "name": "meeting",
    "data": {
        "impressions": "i",
        "items": "t",
        "users": "u",
        "train": ["2026-01-01", "2026-01-02"],
        "validate": ["2026-01-03", "2026-01-03"],
        "test": ["2026-01-04", "2026-01-04"],
    },
    "features": {
        "user": {
            "country": {"kind": "category", "dim": 4},
            "seen": {"kind": "history", "of": "advertiser", "length": LENGTH},
            "visited": {"kind": "bag", "of": "advertiser", "dim": 4, "length": 3, "hash": ADVERTISERS - 1},
        },
        "context": {"surface": {"kind": "category", "dim": 4}},
        "item": {
            "advertiser": {"kind": "category", "dim": WIDTH, "hash": ADVERTISERS - 1},
            "topics": {"kind": "bag", "dim": 4, "length": 3},
            "price": {"kind": "number"},
        },
        "interaction": {
            "shown_1h": {"window": "1h"},
            "topics_1d": {"count": "is_click", "by": "topics", "window": "1d", "length": LENGTH},
            "advertiser_9": {"by": "advertiser", "last": 9, "length": LENGTH},
        },
    },
    "tasks": {"click": {"label": "is_click"}, "like": {"label": "is_like"}},
    "retrieval": {"relevant": "is_click", "targets": {"is_click": 1.0}},
    "ranker": {"model": "cross_feature", "width": WIDTH, "dim": WIDTH, "hidden": [8], "experts": 2, "low_rank": 3},
    "utility": {"click": {"value": 1.0}},
}
CROSSINGS = [(), ("attention",), ("matches",), ("attention", "matches")]


def config(**options) -> Config:
    made = parse_config(PLAIN, "test")
    return replace(made, ranker=replace(made.ranker, **options))


def drawn(**options) -> CrossFeatureRanker:
    """With every weight drawn: some are zeros when new."""
    torch.manual_seed(0)
    ranker = build_ranker(config(**options), SIZES)
    assert isinstance(ranker, CrossFeatureRanker)
    with torch.no_grad():
        for weights in ranker.parameters():
            weights.normal_(std=0.3)
    return ranker.eval()


def users(num, seed=0):
    draw = torch.Generator().manual_seed(seed)

    def codes(low, high, *shape):
        return torch.randint(low, high, shape, generator=draw, dtype=torch.int32)

    return {
        "country": codes(0, 4, num),
        "surface": codes(0, 3, num),
        "seen": codes(-1, 12, num, LENGTH),
        "visited": codes(-1, 12, num, 3),
        "shown_1h": codes(0, 30, num),
        "topics_1d": codes(-1, TOPICS, num, LENGTH),
        "advertiser_9": codes(-1, 12, num, LENGTH),
    }


def items(num, seed=1):
    draw = torch.Generator().manual_seed(seed)
    return {
        "advertiser": torch.randint(0, 12, (num,), generator=draw),
        "topics": torch.randint(-1, TOPICS, (num, 3), generator=draw),
        "price": torch.randn(num, generator=draw),
    }


def gathered(item_side, rows):
    return {name: side[rows] for name, side in item_side.items()}


@pytest.mark.parametrize("crossings", CROSSINGS)
def test_logits_of_gathered_sides_are_those_of_each_pair_alone(crossings):
    ranker, user, item = drawn(crossings=crossings), users(3), items(20)
    rows = torch.randint(0, 20, (3, 7), generator=torch.Generator().manual_seed(2))
    logits = ranker(ranker.user_side(user), gathered(ranker.item_side(item), rows))
    assert logits.shape == (3, 7, 2)
    for b in range(3):
        alone = {name: column[b : b + 1] for name, column in user.items()}
        for n in range(7):
            one = {name: column[rows[b, n : n + 1]] for name, column in item.items()}
            item_side = {name: side[None] for name, side in ranker.item_side(one).items()}
            torch.testing.assert_close(ranker(ranker.user_side(alone), item_side)[0, 0], logits[b, n])


@pytest.mark.parametrize("crossings", CROSSINGS)
def test_a_candidate_does_not_feel_the_others(crossings):
    ranker = drawn(crossings=crossings)
    user, item = ranker.user_side(users(2)), ranker.item_side(items(20))
    few = ranker(user, gathered(item, torch.tensor([[4, 5], [6, 7]])))
    more = ranker(user, gathered(item, torch.tensor([[9, 4, 0, 5, 4], [1, 6, 3, 7, 2]])))
    torch.testing.assert_close(more[:, [1, 3]], few)
    torch.testing.assert_close(more[0, 4], more[0, 1])


class Largest(TorchDispatchMode):
    """The most numbers any operation gave."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = out if isinstance(out, tuple | list) else [out]
        self.numel = max([self.numel, *(one.untyped_storage().nbytes() // one.itemsize for one in given)])
        return out


def test_nothing_of_a_user_is_copied_per_candidate():
    """With a long history no operation makes a key or a value for each of the candidates, only a weight a head."""
    num, length, heads = 300, 100, 2
    plain = config(heads=heads)
    seen = replace(plain.features.user["seen"], length=length)
    features = replace(plain.features, user={**plain.features.user, "seen": seen})
    ranker = build_ranker(replace(plain, features=features), SIZES).eval()
    user = ranker.user_side(users(1) | {"seen": torch.ones(1, length, dtype=torch.int32)})
    item_side = gathered(ranker.item_side(items(20)), torch.zeros(1, num, dtype=torch.int64))
    width = user["key_seen"].shape[-1] * heads
    with torch.inference_mode(), Largest() as largest:
        ranker(user, item_side)
    assert num * length <= largest.numel < num * length * width


def test_no_user_enters_the_item_side_and_no_item_the_users():
    ranker, user, item = drawn(), users(3), items(4)
    attention = {f"{part}_seen" for part in ("key", "value", "bias")}
    codes = {f"codes_{name}" for name in ("seen", "topics_1d", "advertiser_9", "visited")}
    assert {name: len(side) for name, side in ranker.user_side(user).items()} == dict.fromkeys(
        ("x", *attention, *codes), 3
    )
    assert {name: len(side) for name, side in ranker.item_side(item).items()} == dict.fromkeys(
        ("x", "query_seen", "of_advertiser", "of_topics"), 4
    )


@pytest.mark.parametrize(
    ("crossings", "width"), [((), 0), (("attention",), 6), (("matches",), 4), (("attention", "matches"), 10)]
)
def test_each_crossing_is_as_wide_as_it_says(crossings, width):
    """Attention: two heads, each a quarter of the table's width and one; matches: a history, two counters, a bag."""
    ranker = drawn(crossings=crossings, heads=2)
    assert ranker.meeting.width == width
    assert ranker.crossed.in_features == ranker.meeting.width + 8
    user, item = ranker.user_side(users(2)), gathered(ranker.item_side(items(6)), torch.zeros(2, 5, dtype=torch.int64))
    if width:
        assert ranker.meeting(user, item).shape == (2, 5, width)
    assert ranker(user, item).shape == (2, 5, 2)


@pytest.mark.parametrize("crossings", [("attention",), ("matches",), ("attention", "matches")])
def test_without_histories_counters_and_bags_of_an_item_feature_nothing_crosses_and_the_ranker_works(crossings):
    plain = config(crossings=crossings)
    user = {"country": plain.features.user["country"]}
    bare = replace(plain, features=replace(plain.features, user=user, interaction={}))
    ranker = build_ranker(bare, SIZES).eval()
    item_side = gathered(ranker.item_side(items(6)), torch.zeros(2, 5, dtype=torch.int64))
    assert set(item_side) == {"x"}
    assert ranker(ranker.user_side(users(2)), item_side).shape == (2, 5, 2)


@pytest.mark.parametrize("name", ["seen", "visited", "topics_1d", "advertiser_9", "shown_1h", "country", "surface"])
def test_every_feature_of_the_user_moves_the_logits(name):
    ranker, user = drawn(), users(1)
    item_side = gathered(ranker.item_side(items(12)), torch.arange(12)[None])
    before = ranker(ranker.user_side(user), item_side)
    changed = user | {name: torch.where(user[name] == 1, 2, 1).int()}
    assert not torch.allclose(ranker(ranker.user_side(changed), item_side), before)


def test_it_is_its_formula():
    """x = norm(x_u + x_i + W [x_u * x_i; c]), experts of x mixed by the task's gate, an MLP; written with numpy."""
    ranker = drawn()
    user, item = ranker.user_side(users(2)), gathered(ranker.item_side(items(6)), torch.tensor([[0, 1], [4, 5]]))
    c = ranker.meeting(user, item).detach().numpy()
    of_user, of_item = user["x"].detach().numpy()[:, None], item["x"].detach().numpy()
    met = np.concatenate([of_user * of_item, c], axis=-1)
    x = of_user + of_item + met @ ranker.crossed.weight.detach().numpy().T
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + ranker.norm.eps)
    of_x = torch.from_numpy(x) * ranker.norm.weight.detach() + ranker.norm.bias.detach()
    for task in range(2):
        weights = ranker.gates[task].weights(of_x).detach().numpy()
        mix = sum(weights[..., [e]] * ranker.experts[e](of_x).detach().numpy() for e in range(2))
        expected = ranker.heads[task](torch.from_numpy(mix))[..., 0].detach().numpy()
        np.testing.assert_allclose(ranker(user, item)[..., task].detach(), expected, rtol=1e-3, atol=1e-4)


# a world in which a click happens exactly where the candidate's advertiser is among the user's


def meetings(num, seed, among):
    """One candidate a user, half of them of an advertiser in `among`, and whether it is; all else is noise."""
    draw = np.random.default_rng(seed)
    met = draw.integers(1, ADVERTISERS, (num, LENGTH)).astype(np.int32)
    candidate = np.where(draw.random(num) < 0.5, met[:, 2], draw.integers(1, ADVERTISERS, num))
    click = (met == candidate[:, None]).any(1)
    user = users(num, seed) | {"seen": torch.full((num, LENGTH), -1), "advertiser_9": torch.full((num, LENGTH), -1)}
    item = items(num, seed) | {"advertiser": torch.from_numpy(candidate)}
    return user | {among: torch.from_numpy(met)}, item, torch.from_numpy(click).float()


def logits_of(ranker, user, item):
    item_side = {name: side[:, None] for name, side in ranker.item_side(item).items()}
    return ranker(ranker.user_side(user), item_side)[:, 0, 0]


def learned(options, among) -> float:
    """The AUC on users nobody saw, after four passes over 4000 of them."""
    torch.manual_seed(0)
    ranker = build_ranker(config(**options), SIZES)
    assert isinstance(ranker, nn.Module)
    optimiser = torch.optim.Adam(ranker.parameters(), lr=0.01)
    user, item, click = meetings(4000, 1, among)
    for _ in range(4):
        for rows in torch.randperm(4000).split(200):
            taken = ({name: column[rows] for name, column in side.items()} for side in (user, item))
            loss = binary_cross_entropy_with_logits(logits_of(ranker, *taken), click[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    ranker.eval()
    user, item, click = meetings(2000, 2, among)
    with torch.inference_mode():
        return auc(click.numpy(), logits_of(ranker, user, item).numpy())


@pytest.mark.parametrize("among", ["seen", "advertiser_9"])
def test_it_learns_from_users_that_what_they_met_is_clicked_and_two_towers_of_the_same_width_cannot(among):
    assert learned({"crossings": ("matches",)}, among) > 0.99
    assert learned({"crossings": ("attention", "matches")}, among) > 0.99
    assert learned({"model": "two_tower"}, among) < 0.75
