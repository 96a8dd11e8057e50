"""A bundle's version on a device: loaded, held against its golden answers, and told of what changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from prerank.bundle.load import Bundle
from prerank.bundle.scorer import Scorer
from prerank.serve.device_buckets import Buckets
from prerank.serve.device_engines import Engine, LoadedVersion
from prerank.serve.device_version import DeviceVersion, Options
from prerank.types import Features

_ENOUGH = 1000
"""Of so many requests the sizes say something of those to come."""


@dataclass(frozen=True, slots=True)
class OnDevice:
    """The engine that ranks, of a device or of several, and how versions are loaded; see `device_version.Options`.

    Without `buckets` a version has those that pad least of what the engine was asked, or the common ones where that was
    little.
    """

    engine: Engine
    dtype: torch.dtype | None = torch.bfloat16
    buckets: Buckets | None = None

    def load(self, bundle: Bundle, user: Features, most_k: int) -> LoadedVersion:
        """The bundle's scorer on the device, which is told of items that change; `user` are features of anybody.

        Where the device fails the host's scorer ranks. Raises DeviceFull where it does not fit, BundleError where it is
        further from the golden answers than rounding explains.
        """
        scorer = bundle.scorer
        buckets = self.buckets or _buckets(bundle, self.engine.snapshot().sizes)
        options = Options(most_k, buckets, self.dtype, fallback=scorer.rank)
        with torch.inference_mode():
            version = self.engine.load(scorer, scorer.ranker.user_side(user), options)
        try:
            for one in version.parts:
                bundle.check_probs(f"the kernels of {one.name}", _probs(scorer, one))
        except BaseException:
            version.close()
            raise
        scorer.tell(version.put)
        return version


def _probs(scorer: Scorer, version: DeviceVersion) -> Callable[[Features, Tensor], Tensor]:
    return lambda user, rows: version.probs(scorer.ranker.user_side(user), rows)


def _buckets(bundle: Bundle, seen: Mapping[int, int]) -> Buckets:
    """Of requests of the sizes `seen`, and of as many candidates as the version retrieves."""
    if sum(seen.values()) < _ENOUGH:
        return Buckets()
    config = bundle.config
    retrieved = config.retrieval.keep + sum(one.quota for one in config.generators.values())
    return Buckets.fit({**seen, retrieved: seen.get(retrieved, 0) + 1})
