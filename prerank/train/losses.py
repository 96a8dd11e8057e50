"""What the towers learn from: a softmax over the whole catalogue, or over some items with the log-Q correction.

In-batch negatives are drawn as often as they are popular, so a plain in-batch softmax learns
log p(y|x) - log p(y): it punishes what is popular. Subtracting log p(item is there) from each logit *while training*
undoes that, and the logits learnt are those of the full softmax (Yi et al. 2019, "Sampling-Bias-Corrected Neural
Modeling for Large Corpus Item Recommendations", eq. 4-6).
"""

from __future__ import annotations

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
    """The softmax over some items, with log-Q correction -> scalar.

    columns int64 [C]: distinct items, those of the batch's positives among them, ascending; logits float [B, C];
    log_q float [C] = log p(item is a column), subtracted from every column, the positive's too, and zeros leave the
    correction out; excluded int64 [B, X] as above.

    Unlike the paper's, a column stands for an item and not for an example: two examples with one item share a column,
    so an accidental hit cannot be a negative, and p(item is a column) is exact (`negatives.Presence`).
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
