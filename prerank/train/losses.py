"""What the towers learn from: a softmax over the whole catalogue, or over the batch with the log-Q correction.

In-batch negatives are drawn as often as they are popular, so a plain in-batch softmax learns
log p(y|x) - log p(y): it punishes what is popular. Subtracting log p(item in batch) from each logit *while training*
undoes that, and the logits learnt are those of the full softmax (Yi et al. 2019, "Sampling-Bias-Corrected Neural
Modeling for Large Corpus Item Recommendations", eq. 4-6).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


@dataclass(frozen=True, slots=True)
class Positives:
    """What the examples of a batch should have found, as columns over P positives; an example may have several.

    example int64 [P] position in the batch; item int64 [P] row of the catalogue; weight float [P].
    """

    example: Tensor
    item: Tensor
    weight: Tensor


def softmax_loss(logits: Tensor, positives: Positives, excluded: Tensor) -> Tensor:
    """Weighted mean over positives of -log softmax(logits of its example)[its item] over a whole catalogue -> scalar.

    logits float [B, I]; excluded int64 [B, X]: items of this user that are no negatives, padded with -1. A positive
    may not be among its example's excluded.
    """
    drop_row, drop_slot = (excluded >= 0).nonzero(as_tuple=True)
    hidden = torch.zeros_like(logits, dtype=torch.bool)
    hidden[drop_row, excluded[drop_row, drop_slot]] = True
    log_probs = logits.masked_fill(hidden, -torch.inf).log_softmax(1)
    losses = -log_probs[positives.example, positives.item]
    return (losses * positives.weight).sum() / positives.weight.sum()


def sampled_softmax_loss(
    logits: Tensor, columns: Tensor, log_q: Tensor, positives: Positives, excluded: Tensor
) -> Tensor:
    """The in-batch softmax with log-Q correction -> scalar.

    columns int64 [C]: the distinct items of the batch's positives, ascending; logits float [B, C]; log_q float [C] =
    log p(item in the batch), subtracted from every column, the positive's too; excluded int64 [B, X] as above.

    Unlike the paper's, a column stands for an item and not for an example: two examples with one item share a column,
    so an accidental hit cannot be a negative, and p(in the batch) is that column's exact probability of being there.
    """
    place = torch.searchsorted(columns, excluded.contiguous()).clamp_max(len(columns) - 1)
    own = torch.where(columns[place] == excluded, place, -1)
    in_columns = replace(positives, item=torch.searchsorted(columns, positives.item))
    return softmax_loss(logits - log_q[None, :], in_columns, own)


def bernoulli_kl(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(teacher || student) of Bernoulli probabilities, from logits of one shape -> float32 of that shape, nats.

    t log(t / s) + (1 - t) log((1 - t) / (1 - s)) with t, s the sigmoids (Hinton et al. 2015, at temperature 1), from
    log sigmoids, so that it is finite and has the right gradient, s - t, at any logit.
    """
    student, teacher = logits.float(), teacher_logits.float()
    t = teacher.sigmoid()
    less = logsigmoid(teacher) - logsigmoid(student)
    return t * less + (1 - t) * (less + student - teacher)  # log sigmoid(-x) = log sigmoid(x) - x


class StreamingFrequency:
    """p(item in a batch) from a stream of batches, in constant memory (Yi et al. 2019, algorithms 2 and 3).

    A holds the step an item's bucket was last seen, B the running mean of steps between; p = 1 / B. Of `hashes`
    independent bucketings the largest B counts, since a collision can only make an item look more frequent.
    """

    def __init__(self, buckets: int, rate: float = 0.01, hashes: int = 2, start: float = 100.0, seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.rate = rate
        self.multiplier = torch.randint(1, 2**31 - 1, (hashes, 1), generator=draw) * 2 + 1
        self.last_seen = torch.zeros(hashes, buckets)
        self.interval = torch.full((hashes, buckets), start)
        self.step = 0

    def _buckets(self, items: Tensor) -> Tensor:
        # multiply-shift hashing (Dietzfelbinger 1997); int64 wraps around, the high bits are the good ones
        mixed = (items[None, :] + 1) * self.multiplier * -7046029254386353131
        return ((mixed >> 33) & 0x7FFFFFFF) % self.interval.shape[1]

    def update(self, items: Tensor) -> None:
        """One batch of item rows int64 [B] went by; an item twice in it counts once."""
        self.step += 1
        buckets = self._buckets(torch.unique(items))
        seen = self.last_seen.gather(1, buckets)
        interval = self.interval.gather(1, buckets)
        self.interval.scatter_(1, buckets, (1 - self.rate) * interval + self.rate * (self.step - seen))
        self.last_seen.scatter_(1, buckets, float(self.step))

    def log_probability(self, items: Tensor) -> Tensor:
        """log p(item in a batch), float32 [B], of item rows int64 [B]."""
        interval = self.interval.gather(1, self._buckets(items)).amax(0)
        return -interval.clamp_min(1.0).log()

    def state(self) -> dict[str, Tensor]:
        """Everything `load_state` needs to go on exactly."""
        return {"last_seen": self.last_seen, "interval": self.interval, "step": torch.tensor(self.step)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state()`."""
        self.last_seen, self.interval = state["last_seen"].clone(), state["interval"].clone()
        self.step = int(state["step"])
