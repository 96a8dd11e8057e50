"""Which items stand beside the wanted ones in a sampled softmax, and how probable each of them was to stand there.

A column is a distinct item, so its log-Q is the log of the probability that it is a column at all: wanted by an
example of the batch, drawn from the catalogue (Yang et al. 2020, "Mixed Negative Sampling for Learning Two-tower
Neural Networks in Recommendations"), or in one of the batches before (Wang et al. 2021, "Cross-Batch Negative Sampling
for Training Two-Tower Recommenders").
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from prerank.types import Array


def examples_with(items: Array, examples: Array, num_items: int) -> Array:
    """In how many examples each item is, int64 [I], from pairs int [P] of an item's row and an example."""
    pairs = np.unique(np.asarray(examples, dtype=np.int64) * num_items + items)
    return np.bincount(pairs % num_items, minlength=num_items)


def uniform_items(num_items: int, wanted: int, draw: np.random.Generator) -> Tensor:
    """Rows of `wanted` distinct items of the catalogue, each set of them as probable; of all where there are fewer."""
    found = draw.choice(num_items, min(wanted, num_items), replace=False, shuffle=False)
    return torch.from_numpy(found.astype(np.int64, copy=False))


class Presence:
    """p(item is a column), exactly: a batch is so many examples of all, drawn without putting any back.

    Yi et al. stream an estimate because they see each example once. Here all examples are known before the first step,
    so how many hold an item can be counted; a streamed estimate was wrong by far for most of a training (decision 5).
    """

    def __init__(self, examples: Array, num_examples: int, uniform: int) -> None:
        """`examples` int64 [I] is how many of `num_examples` each item is in; `uniform` distinct items are drawn."""
        counts, self._place = (torch.from_numpy(a) for a in np.unique(examples, return_inverse=True))
        self._counts, self._num_examples = counts.double(), num_examples
        self._log_not_drawn = math.log1p(-uniform / len(examples)) if uniform < len(examples) else -math.inf
        self._absent: dict[int, Tensor] = {}

    def _log_absent(self, batch: int) -> Tensor:
        """log p(in none of the `batch` examples), float64, of each distinct count; kept, since sizes are two a plan."""
        if batch not in self._absent:
            total = torch.zeros_like(self._counts)
            for taken in range(batch):
                total += torch.log1p(-(self._counts / (self._num_examples - taken)).clamp_max(1))
            self._absent[batch] = total
        return self._absent[batch]

    def log_probability(self, columns: Tensor, batch: int, cached: int = 0) -> Tensor:
        """float32 [C] of rows int64 [C]: in a batch of so many examples, drawn beside it, or so in `cached` earlier.

        Earlier batches count as drawn by themselves. Those of one epoch share no example, which makes an item a column
        a little more often, by less than the share of the epoch that the batches are.
        """
        absent = self._log_absent(batch)[self._place[columns]] + self._log_not_drawn
        return (-torch.expm1((cached + 1) * absent)).log().float()


class VectorCache:
    """The item vectors of the last `batches` batches, each item once, as it was when it was last computed.

    No gradient flows into them. Vectors of the first steps change too fast to be of use a step later, so the first
    `warm_up` batches are not kept (Wang et al. 2021 warm up too).
    """

    def __init__(self, batches: int, width: int, warm_up: int) -> None:
        self.batches, self.warm_up = batches, warm_up
        self.step = 0
        self.items = torch.zeros(0, dtype=torch.int64)
        self.age = torch.zeros(0, dtype=torch.int64)
        self.vectors = torch.zeros(0, width)

    @property
    def filled(self) -> int:
        """How many batches are held."""
        return min(self.batches, max(0, self.step - self.warm_up))

    def beside(self, fresh: Tensor) -> tuple[Tensor, Tensor]:
        """The items held that are not among the rows `fresh` int64 [C]: rows int64 [S], vectors float32 [S, D]."""
        others = ~torch.isin(self.items, fresh)
        return self.items[others], self.vectors[others]

    def add(self, fresh: Tensor, vectors: Tensor) -> None:
        """A batch's distinct rows int64 [C] and their vectors [C, D]; what is too old is dropped."""
        self.step += 1
        if not self.filled:
            return
        kept = (self.age < self.batches) & ~torch.isin(self.items, fresh)
        self.items = torch.cat([fresh, self.items[kept]])
        self.age = torch.cat([torch.ones_like(fresh), self.age[kept] + 1])
        self.vectors = torch.cat([vectors.detach().float(), self.vectors[kept]])

    def state(self) -> dict[str, Tensor]:
        """Everything `load_state` needs to go on exactly."""
        held = {"items": self.items, "age": self.age, "vectors": self.vectors}
        return held | {"step": torch.tensor(self.step)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state()`."""
        self.items, self.age, self.vectors = (state[name].clone() for name in ("items", "age", "vectors"))
        self.step = int(state["step"])
