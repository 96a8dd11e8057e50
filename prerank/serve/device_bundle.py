"""A bundle's version on a device: loaded, held against its golden answers, and told of what changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from prerank._tensor_files import read_tensors
from prerank.bundle.golden import Golden
from prerank.bundle.load import Bundle
from prerank.bundle.manifest import GOLDEN
from prerank.bundle.scorer import Scorer
from prerank.errors import BundleError, NotOnDevice
from prerank.index.exact import ExactIndex
from prerank.serve.device_buckets import Buckets
from prerank.serve.device_engines import Engine, LoadedVersion, Part
from prerank.serve.device_options import Options
from prerank.serve.device_retrieval import Retrieval
from prerank.serve.whole import IN_ITS_PLACE, whole_of
from prerank.types import Features, Request

_ENOUGH = 1000
"""Of so many requests the sizes say something of those to come."""


@dataclass(frozen=True, slots=True)
class OnDevice:
    """The engine that ranks, of a device or of several, and how versions are loaded; see `device_version.Options`.

    Without `buckets` a version has those that pad least of what the engine was asked, or the common ones where that was
    little. `whole` lets the device find the candidates too, from where there is nothing but a user.
    """

    engine: Engine
    dtype: torch.dtype | None = torch.bfloat16
    buckets: Buckets | None = None
    whole: bool = False

    def load(self, bundle: Bundle, user: Features, most_k: int, has_hosts: bool = False) -> LoadedVersion:
        """The bundle's scorer on the device, which is told of items that change; `user` are features of anybody.

        Where the device fails the host's scorer ranks. Raises DeviceFull where it does not fit, BundleError where it is
        further from the golden answers than rounding explains, NotOnDevice where it should find candidates and cannot.
        """
        scorer = bundle.scorer
        buckets = self.buckets or _buckets(bundle, self.engine.snapshot().sizes)
        retrieval = retrieval_of(bundle, has_hosts) if self.whole else None
        options = Options(most_k, buckets, self.dtype, fallback=scorer.rank, retrieval=retrieval)
        with torch.inference_mode():
            version = self.engine.load(scorer, scorer.ranker.user_side(user), options)
        try:
            for one in version.parts:
                bundle.check_probs(f"the kernels of {one.name}", _probs(scorer, one))
                if self.whole:
                    _check_found(bundle, one)
        except BaseException:
            version.close()
            raise
        scorer.tell(version.put)
        return version


def _probs(scorer: Scorer, version: Part) -> Callable[[Features, Tensor], Tensor]:
    return lambda user, rows: version.probs(scorer.ranker.user_side(user), rows)


def retrieval_of(bundle: Bundle, has_hosts: bool) -> Retrieval:
    """How a device finds the candidates of a version. Raises NotOnDevice where it cannot, with why, and what to do."""
    config, items, index = bundle.config, bundle.scorer.items, bundle.index
    limited = [name for name in config.serve.stages if name in IN_ITS_PLACE]
    if has_hosts:
        why = "index hosts retrieve"
    elif config.generators:
        why = f"it has candidate generators beside its index ({', '.join(config.generators)})"
    elif items.slots is not None:
        why = "not all of its items are resident"
    elif not isinstance(index, ExactIndex):
        why = f"its index is {config.retrieval.index.kind} in {config.retrieval.index.shards} shards, not exact in one"
    elif limited:
        why = f"[serve.stages] limits {', '.join(limited)}, which would be one stage"
    else:
        return Retrieval(bundle.scorer.targeting, index, min(config.retrieval.keep, items.num_rows))
    raise NotOnDevice(f"--device-whole: {bundle.version}: {why}; leave --device-whole out, and the device only ranks")


def _check_found(bundle: Bundle, version: Part) -> None:
    """Raises BundleError where golden users would not be found the candidates that the host finds them now."""
    whole, _ = whole_of(bundle, version)
    golden = Golden.from_tensors(read_tensors(bundle.path / GOLDEN)[0])
    targeting = bundle.scorer.targeting
    context, profile = ({} if targeting is None else targeting.example(owner) for owner in ("context", "user"))
    values = {"request": Request(0, 1, 0, context), "profile": profile}
    for number in range(len(golden.answers.won)):
        user = {name: column[number : number + 1] for name, column in golden.user.items()}
        with torch.inference_mode():
            difference = whole.first_difference({**values, "features": user})
        if difference:
            raise BundleError(f"{bundle.path}: {version.name} finds others: golden user {number}: {difference}")


def _buckets(bundle: Bundle, seen: Mapping[int, int]) -> Buckets:
    """Of requests of the sizes `seen`, and of as many candidates as the version retrieves."""
    if sum(seen.values()) < _ENOUGH:
        return Buckets()
    config = bundle.config
    retrieved = config.retrieval.keep + sum(one.quota for one in config.generators.values())
    return Buckets.fit({**seen, retrieved: seen.get(retrieved, 0) + 1})
