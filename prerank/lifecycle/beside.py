"""A version beside the one that is live: how fast they answer the same way, and how far their spaces drifted apart."""

from __future__ import annotations

import os
import time

import numpy as np
import torch
from torch import Tensor

from prerank._tensor_files import read_tensors
from prerank.bundle.golden import Golden
from prerank.bundle.load import Bundle
from prerank.bundle.manifest import GOLDEN
from prerank.errors import BundleError, DataError
from prerank.kernels.engine import Engine
from prerank.kernels.native import level, library
from prerank.lifecycle.measured import Measured
from prerank.train.examples import UserExamples, item_tensors
from prerank.types import CandidateSet, Features

ROUNDS = 5
_DRIFT_USERS, _DRIFT_ITEMS = 256, 2_000


@torch.inference_mode()
def latencies_ms(*several: Bundle) -> list[float]:
    """Of each version, the median milliseconds from a golden request's features to its winners, in turns.

    As a server does it: the user's side, the search for `keep` candidates, and the ranker on native threads, one a
    core, where there are some.
    """
    engine = None if library() is None or level() == "portable" else Engine(len(os.sched_getaffinity(0)))
    asked = [Golden.from_tensors(read_tensors(one.path / GOLDEN)[0]).user for one in several]
    took: list[list[float]] = [[] for _ in several]
    try:
        for one in several:
            one.scorer.accelerate(engine)
        for turn in range(ROUNDS + 1):
            for place, (bundle, users) in enumerate(zip(several, asked, strict=True)):
                for n in range(len(next(iter(users.values())))):
                    user = {name: column[n : n + 1] for name, column in users.items()}
                    start = time.perf_counter()
                    _answer(bundle, user)
                    if turn:  # the first is to warm up
                        took[place].append((time.perf_counter() - start) * 1000.0)
    finally:
        for one in several:
            one.scorer.accelerate(None)
        if engine is not None:
            engine.close()
    return [float(np.median(one)) for one in took]


def _answer(bundle: Bundle, user: Features) -> None:
    found = bundle.index.search(bundle.towers.user_side(user), bundle.config.retrieval.keep, None)
    candidates = CandidateSet(found.rows, torch.zeros(found.rows.shape), found.rows >= 0)
    bundle.scorer(user, candidates, min(bundle.config.ranker.keep, found.rows.shape[1]))


@torch.inference_mode()
def embedding_drift(ours: Measured, live: Measured) -> float:
    """1 - the mean over users of the correlation, over items, of what both find similar: 0 is the same, 1 unrelated.

    Similarities and not vectors, for two trainings may turn the whole space and change nothing; without popularity,
    which hides what the towers do. Raises DataError where both do not see the same log.
    """
    if len(ours.prepared.events["day"]) != len(live.prepared.events["day"]):
        raise DataError("the live version sees another log than this one; measure both on the same tables")
    events = ours.events(_DRIFT_USERS)
    num_items = len(ours.prepared.item_ids)
    draw = np.random.default_rng(ours.config.seed)
    items = np.sort(draw.choice(num_items, min(_DRIFT_ITEMS, num_items), replace=False))
    first, second = (_similarities(one, events, torch.from_numpy(items)) for one in (ours, live))
    together = (first * second).sum(1) / (first.norm(dim=1) * second.norm(dim=1)).clamp_min(1e-12)
    return 1.0 - float(together.mean())


def _similarities(measured: Measured, events: np.ndarray, items: Tensor) -> Tensor:
    """Of users [B] and items [N], less each user's mean: float32 [B, N]."""
    towers = measured.bundle.towers
    users = towers.user_vectors(UserExamples(measured.prepared, measured.config.features).at(events))
    vectors = towers.item_vectors({name: column[items] for name, column in item_tensors(measured.prepared).items()})
    if not bool(users.isfinite().all()) or not bool(vectors.isfinite().all()):
        raise BundleError(f"{measured.bundle.version}: its towers give vectors that are not finite; train again")
    found = users @ vectors.T
    return found - found.mean(dim=1, keepdim=True)
