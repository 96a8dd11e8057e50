"""Every ranker a funnel file may name, trained, published and served; and what is peculiar to each."""

from dataclasses import replace
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch

from prerank.bundle.load import load
from prerank.config import Config, RankerConfig
from prerank.evaluate.ranking import evaluate_ranking
from prerank.lifecycle.build import load_users, publish_trained
from prerank.models.layers import VECTORS
from prerank.models.mmoe_dcn import MMoEDCNRanker
from prerank.models.mtmd import DomainExperts, MTMDRanker
from prerank.models.rankers import RANKERS, build_ranker
from prerank.serve.funnel import Funnel
from prerank.train.examples import UserExamples, item_tensors
from prerank.train.ranking import train_ranker
from prerank.types import Request

DOMAIN = "surface"
SMALL = {"width": 12, "low_rank": 3, "experts": 2}
CASES = [(name, "") for name in RANKERS] + [("mtmd", DOMAIN)]


def asking(config: Config, model: str, domain: str = "") -> Config:
    return replace(config, ranker=replace(config.ranker, model=model, domain=domain, **SMALL))


@pytest.fixture
def mtmd(world, trained) -> MTMDRanker:
    torch.manual_seed(4)
    ranker = build_ranker(asking(world.config, "mtmd", DOMAIN), trained.prepared.transforms.sizes())
    assert isinstance(ranker, MTMDRanker)
    return ranker.eval()


@pytest.fixture
def users(world, trained) -> dict[str, torch.Tensor]:
    """Eight users, the first four in domain 1, the others in domain 2."""
    found = UserExamples(trained.prepared, world.config.features).at(np.arange(8))
    return found | {DOMAIN: torch.tensor([1] * 4 + [2] * 4)}


def test_a_funnel_file_may_name_every_ranker_and_no_other():
    assert get_args(get_type_hints(RankerConfig)["model"]) == tuple(RANKERS)


@pytest.mark.parametrize(("model", "domain"), CASES)
def test_a_ranker_is_trained_published_loaded_and_recommends(world, trained, tmp_path, model, domain):
    config, prepared = asking(world.config, model, domain), trained.prepared
    ranker, records = train_ranker(prepared, config, tmp_path / "run", "one epoch")
    assert len(records) == 1
    assert isinstance(ranker, RANKERS[model])
    home, tables = tmp_path / "store", world.tables()
    version = publish_trained(replace(trained, config=config, ranker=ranker), tables, home, {})
    load_users(config, tables, prepared, home)

    bundle = load(home / "versions" / version)
    assert bundle.config == config
    for name, weights in ranker.state_dict().items():
        assert torch.equal(weights, bundle.scorer.ranker.state_dict()[name]), name
    with Funnel.open(home, version) as funnel:
        moment = int(prepared.events["time_ms"][-1])
        user_id = int(prepared.user_ids[prepared.events["user"][-1]])
        answer = funnel.recommend(Request(user_id, 5, moment, {"surface": "feed", "hour": 9}))
    assert not answer.degraded
    assert len(answer.winners) == 5
    assert all(0 < p < 1 for winner in answer.winners for p in winner.prob.values())


@pytest.mark.parametrize(("model", "domain"), CASES)
def test_a_ranker_learns_more_than_the_training_rate(world, trained, tmp_path, model, domain):
    """The training days' own log loss, below that of predicting their rate for all."""
    config = asking(world.config, model, domain)
    config = replace(config, ranker=replace(config.ranker, batch=128, epochs=2))
    ranker, _ = train_ranker(trained.prepared, config, tmp_path, "two epochs")
    found = evaluate_ranking(ranker, trained.prepared, config, config.data.days("train")).tasks["click"]
    assert found["log_loss"] < found["rate_log_loss"]


@pytest.mark.parametrize(("model", "domain"), CASES)
def test_every_weight_of_a_ranker_is_learned(world, trained, model, domain):
    """All but the experts of domains nobody is in, which training leaves alone."""
    config, prepared = asking(world.config, model, domain), trained.prepared
    ranker = build_ranker(config, prepared.transforms.sizes()).eval()
    events = np.arange(256)
    user = ranker.user_side(UserExamples(prepared, config.features).at(events))
    items = {n: c[prepared.events["item"][events]] for n, c in item_tensors(prepared).items()}
    item_side = {n: side[:, None] for n, side in ranker.item_side(items).items()}
    ranker(user, item_side).square().sum().backward()
    weights = {name: one for name, one in ranker.named_parameters() if one.numel()}
    idle = {name for name, one in weights.items() if one.grad is None or not one.grad.any()}
    absent = set(range(prepared.transforms.sizes()[f"context.{DOMAIN}"])) - set(prepared.events[DOMAIN][events])
    assert {name for name in idle if "domains" not in name} == set()
    assert {int(name.split(".experts.")[1].split(".")[0]) for name in idle} == (absent if domain else set())


def test_a_domain_has_experts_of_its_own_and_no_other_user_feels_them(mtmd, users):
    before = mtmd.user_side(users)[VECTORS]
    with torch.no_grad():
        for weights in mtmd.user_tower.domains.experts[2].parameters():
            weights.add_(0.5)
    after = mtmd.user_side(users)[VECTORS]
    assert torch.equal(after[:4], before[:4])
    assert ((after - before)[4:].abs().sum(-1) > 0).all()


def test_the_same_vector_in_two_domains_becomes_two_user_sides(mtmd):
    """The embedding of the domain is not what tells them apart."""
    x = torch.randn(1, SMALL["width"]).expand(2, -1)
    one, two = mtmd.user_tower(x, torch.tensor([1, 2]))
    assert not torch.allclose(one, two)
    with torch.no_grad():
        mtmd.user_tower.domains.experts[2].load_state_dict(mtmd.user_tower.domains.experts[1].state_dict())
    one, two = mtmd.user_tower(x, torch.tensor([1, 2]))
    torch.testing.assert_close(one, two)


def test_each_row_is_given_to_the_expert_of_its_domain():
    torch.manual_seed(0)
    experts = DomainExperts(4, 5, (6,), 0.0)
    x, domain = torch.randn(7, 5), torch.tensor([3, 0, 1, 3, 1, 0, 3])
    expected = torch.stack([experts.experts[int(d)](row) for row, d in zip(x, domain, strict=True)])
    torch.testing.assert_close(experts(x, domain), expected)


def test_the_unknown_domain_learns_from_all_at_the_dropout_rate():
    torch.manual_seed(0)
    experts = DomainExperts(2, 3, (), 0.25)
    with torch.no_grad():
        for expert, value in zip(experts.experts, (0.0, 1.0), strict=True):
            expert[-1].weight.zero_()
            expert[-1].bias.fill_(value)
    x, domain = torch.zeros(4000, 3), torch.ones(4000, dtype=torch.int64)
    assert experts.train()(x, domain).mean().item() == pytest.approx(0.75, abs=0.03)
    assert experts.eval()(x, domain).mean().item() == 1.0


def test_no_domain_enters_the_item_side(mtmd, world, trained):
    items = {n: c[:6] for n, c in item_tensors(trained.prepared).items()}
    assert mtmd.item_tower.domains is None
    plain = build_ranker(asking(world.config, "mtmd"), trained.prepared.transforms.sizes()).eval()
    kept = {n: w for n, w in mtmd.state_dict().items() if n.startswith("item_")}
    plain.load_state_dict(kept, strict=False)
    torch.testing.assert_close(plain.item_side(items), mtmd.item_side(items))


def test_a_task_feels_its_own_expert_and_gate_and_no_other_tasks(world, trained):
    """Two tasks: a change of the second's expert, gate or head moves no logit of the first."""
    config = asking(world.config, "mtmd")
    config = replace(config, tasks={"click": config.tasks["click"], "again": config.tasks["click"]})
    ranker = build_ranker(config, trained.prepared.transforms.sizes()).eval()
    user = UserExamples(trained.prepared, config.features).at(np.arange(3))
    items = {n: c[:5] for n, c in item_tensors(trained.prepared).items()}

    def logits() -> torch.Tensor:
        item_side = {n: side.expand(3, -1, -1) for n, side in ranker.item_side(items).items()}
        return ranker(ranker.user_side(user), item_side)

    before = logits()
    with torch.no_grad():
        for tower in (ranker.user_tower, ranker.item_tower):
            for part in (tower.own[1], tower.gates[1], tower.heads.heads[1]):
                for weights in part.parameters():
                    weights.add_(torch.randn_like(weights))
    after = logits()
    torch.testing.assert_close(after[..., 0], before[..., 0])
    assert not torch.allclose(after[..., 1], before[..., 1])


def test_every_gate_of_a_ranker_sums_to_one_over_all_its_experts(mtmd, world, trained):
    crossing = build_ranker(asking(world.config, "mmoe_dcn"), trained.prepared.transforms.sizes())
    assert isinstance(crossing, MMoEDCNRanker)
    x = torch.randn(9, SMALL["width"])
    shared = SMALL["experts"]
    wanted = {crossing.user_tower: shared, crossing.item_tower: shared}
    wanted |= {mtmd.user_tower: shared + 2, mtmd.item_tower: shared + 1}
    for tower, num_experts in wanted.items():
        assert len(tower.gates) == len(world.config.tasks)
        for gate in tower.gates:
            weights = gate.eval().weights(x)
            assert weights.shape == (9, num_experts)
            torch.testing.assert_close(weights.sum(-1), torch.ones(9))


def test_an_mmoe_dcn_tower_is_its_formula(world, trained):
    config = asking(world.config, "mmoe_dcn")
    ranker = build_ranker(config, trained.prepared.transforms.sizes()).eval()
    items = {n: c[:6] for n, c in item_tensors(trained.prepared).items()}
    x, tower = ranker.item_input(items), ranker.item_tower
    weights = tower.gates[0].weights(x).detach().numpy()
    mix = sum(weights[:, [e]] * tower.experts[e](x).detach().numpy() for e in range(SMALL["experts"]))
    head = tower.heads.heads[0]
    expected = mix @ head.weight.detach().numpy().T + head.bias.detach().numpy()
    np.testing.assert_allclose(ranker.item_side(items)[VECTORS].detach(), expected, rtol=1e-4, atol=1e-6)
