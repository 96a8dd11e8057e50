"""A bundle's version on a device: loaded, held against its golden answers, and told of what changes."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from prerank.bundle.load import Bundle
from prerank.serve.device import DeviceEngine
from prerank.serve.device_buckets import Buckets
from prerank.serve.device_version import DeviceVersion, Options
from prerank.types import Features


@dataclass(frozen=True, slots=True)
class OnDevice:
    """The engine that ranks, and how versions are loaded for it; see `device_version.Options`."""

    engine: DeviceEngine
    dtype: torch.dtype | None = torch.bfloat16
    buckets: Buckets = field(default_factory=Buckets)

    def load(self, bundle: Bundle, user: Features, most_k: int) -> DeviceVersion:
        """The bundle's scorer on the device, which is told of items that change; `user` are features of anybody.

        Where the device fails the host's scorer ranks. Raises DeviceFull where it does not fit, BundleError where it is
        further from the golden answers than rounding explains.
        """
        scorer = bundle.scorer
        options = Options(most_k, self.buckets, self.dtype, fallback=scorer.rank)
        with torch.inference_mode():
            version = self.engine.load(scorer, scorer.ranker.user_side(user), options)
        try:
            bundle.check_probs(
                "the kernels of the device", lambda user, rows: version.probs(scorer.ranker.user_side(user), rows)
            )
        except BaseException:
            version.close()
            raise
        scorer.tell(version.put)
        return version
