"""The exponential moving average of a model's weights while it trains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """mean = sum_s d^(t-s) w_s / sum_s d^(t-s) over the weights after each step s of t; decay d = 0 keeps nothing.

    Divided by what the shares sum to, as Adam's moments are (Kingma and Ba 2015, section 3), so that the first steps
    are no average with the weights as drawn. Buffers are not averaged.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._weights = dict(model.named_parameters()) if decay else {}
        self.mean = {name: weight.detach().clone() for name, weight in self._weights.items()}

    def update(self, step: int) -> None:
        """Take in the weights after `step`, the first being 1."""
        if not self.decay:
            return
        share = (1 - self.decay) / (1 - self.decay**step)
        for name, mean in self.mean.items():
            mean.lerp_(self._weights[name].detach(), share)

    def load(self, mean: Mapping[str, Tensor]) -> None:
        """Go on from the `mean` that another had."""
        assert mean.keys() == self._weights.keys(), "a plan's identity says whether it averages"
        self.mean = {name: mean[name].to(weight.device) for name, weight in self._weights.items()}

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """Inside, the model's weights are the mean; after, its own again."""
        own = {name: weight.detach().clone() for name, weight in self._weights.items()}
        self.give()
        try:
            yield
        finally:
            self._give(own)

    def give(self) -> None:
        """Make the mean the model's weights for good."""
        self._give(self.mean)

    @torch.no_grad()
    def _give(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self._weights[name].copy_(value)
