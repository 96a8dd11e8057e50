"""A ranker's program says what its forward does."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from prerank.kernels.program import of_request, run
from prerank.models.rankers import RANKERS, build_ranker
from prerank.train.examples import UserExamples, item_tensors

NUM_ITEMS = 17
CHANGED = [
    ("cross_feature", {"crossings": ()}),
    ("cross_feature", {"crossings": ("attention",)}),
    ("cross_feature", {"crossings": ("matches",)}),
    ("cross_feature", {"hidden": ()}),
    ("cross_feature", {"hidden": (7, 5), "heads": 3}),
]


@pytest.mark.parametrize(("model", "changed"), [(name, {}) for name in RANKERS] + CHANGED)
def test_the_program_of_a_ranker_gives_the_logits_that_its_forward_gives(world, trained, model, changed):
    torch.manual_seed(5)
    options = {"width": 12, "low_rank": 3, "experts": 2, "hidden": (6,), **changed}
    config = replace(world.config, ranker=replace(world.config.ranker, model=model, **options))
    ranker = build_ranker(config, trained.prepared.transforms.sizes()).eval()
    for parameter in ranker.parameters():  # also those that begin at zero
        parameter.data += 0.1 * torch.randn_like(parameter)
    with torch.inference_mode():
        user = ranker.user_side(UserExamples(trained.prepared, config.features).at(np.arange(4)))
        items = ranker.item_side({name: t[:NUM_ITEMS] for name, t in item_tensors(trained.prepared).items()})
        gathered = {name: tensor.unsqueeze(0).expand(4, *tensor.shape) for name, tensor in items.items()}
        expected = ranker(user, gathered)
        program = ranker.program()
        found = torch.stack([run(program, of_request(user, number), items) for number in range(4)])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert set(program.tables()) <= set(items)
