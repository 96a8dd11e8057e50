"""What a ranker promises."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from prerank.types import Features


class Ranker(Protocol):
    """User and items to one logit per task, split so that each side is computed as rarely as it can be.

    A side is tensors by name, whatever the ranker needs of it. An implementation is an `nn.Module`.
    """

    tasks: tuple[str, ...]

    def item_side(self, items: Features) -> dict[str, Tensor]:
        """Item features [I, ...] -> tensors [I, ...]; `publish` stores them, so no user may enter."""
        ...

    def user_side(self, user: Features) -> dict[str, Tensor]:
        """User and context features and counters [B, ...] -> tensors [B, ...]; once per request."""
        ...

    def __call__(self, user_side: Features, item_side: Features) -> Tensor:
        """The user's tensors [B, ...] and gathered items' [B, N, ...] -> logits float32 [B, N, T].

        N may be 1 in the user's place of a batch of pairs: nothing of the user is copied per candidate.
        """
        ...
