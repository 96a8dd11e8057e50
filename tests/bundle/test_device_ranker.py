"""Rankers from their programs in one kernel: interpreted here, and in torch where Triton does not serve."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from prerank.bundle.executor import DeviceRanker
from prerank.kernels import triton
from prerank.models.rankers import RANKERS, build_one_ranker
from prerank.models.segmented import SegmentedRanker
from prerank.train.examples import UserExamples, item_tensors
from tests.kernels.ways import IS_INTERPRETED

NUM_ITEMS, REQUESTS = 17, 4
CHANGED = [("cross_feature", {"crossings": ("attention",), "heads": 3}), ("cross_feature", {"crossings": ()})]


@pytest.fixture(params=["triton", "torch"])
def served(request, monkeypatch, tmp_path):
    """Who runs it."""
    if request.param == "triton" and not IS_INTERPRETED:
        pytest.skip("Triton is not installed, or runs on a GPU")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton, "serves", lambda device: request.param == "triton")


def built(world, trained, model, changed):
    options = {"width": 12, "low_rank": 3, "experts": 2, "hidden": (6,), **changed}
    config = replace(world.config, ranker=replace(world.config.ranker, model=model, **options))
    ranker = build_one_ranker(config, trained.prepared.transforms.sizes()).eval()
    for parameter in ranker.parameters():  # also those that begin at zero
        parameter.data += 0.1 * torch.randn_like(parameter)
    return ranker


def sides(world, trained, ranker, **context):
    user = UserExamples(trained.prepared, world.config.features).at(np.arange(REQUESTS)) | context
    items = {name: tensor[:NUM_ITEMS] for name, tensor in item_tensors(trained.prepared).items()}
    return ranker.user_side(user), {name: tensor.contiguous() for name, tensor in ranker.item_side(items).items()}


def assert_same(found, ranker, user_side, item_side, rows):
    expected = ranker(user_side, {name: tensor[rows] for name, tensor in item_side.items()})
    assert found.shape == (*rows.shape, len(ranker.tasks))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("model", "changed"), [*((name, {}) for name in RANKERS), *CHANGED])
@pytest.mark.usefixtures("served")
@torch.inference_mode()
def test_every_ranker_gives_what_its_forward_gives(world, trained, model, changed):
    torch.manual_seed(3)
    ranker = built(world, trained, model, changed)
    user_side, item_side = sides(world, trained, ranker)
    device, rows = DeviceRanker(ranker, item_side, torch.float32), torch.randint(0, NUM_ITEMS, (REQUESTS, 20))
    assert_same(device(user_side, rows), ranker, user_side, item_side, rows)
    # what changes in the item side is read again
    for tensor in item_side.values():
        tensor[3] = tensor[4]
    device.update(torch.tensor([3]))
    assert_same(device(user_side, rows), ranker, user_side, item_side, rows)


@pytest.mark.parametrize("surfaces", [[1, 2, 0, 1], [2, 2, 2, 2]])
@pytest.mark.usefixtures("served")
@torch.inference_mode()
def test_of_rankers_by_segment_each_request_goes_through_its_own(world, trained, surfaces):
    torch.manual_seed(4)
    by = next(iter(world.config.features.context))
    ranker = SegmentedRanker(by, [1, 2], [built(world, trained, "cross_feature", {}) for _ in range(3)]).eval()
    user_side, item_side = sides(world, trained, ranker, **{by: torch.tensor(surfaces)})
    rows = torch.randint(0, NUM_ITEMS, (REQUESTS, 20))
    assert_same(DeviceRanker(ranker, item_side, torch.float32)(user_side, rows), ranker, user_side, item_side, rows)
