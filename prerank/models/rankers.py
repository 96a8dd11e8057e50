"""Every ranker a funnel file may name, and how one is built."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from prerank.config import Config
from prerank.models.cross_feature import CrossFeatureRanker
from prerank.models.mmoe_dcn import MMoEDCNRanker
from prerank.models.mtmd import MTMDRanker
from prerank.models.ranker import Ranker
from prerank.models.segmented import SegmentedRanker
from prerank.models.two_tower_ranker import TwoTowerRanker

RANKERS: dict[str, Callable[[Config, Mapping[str, int]], Ranker]] = {
    "two_tower": TwoTowerRanker,
    "mtmd": MTMDRanker,
    "mmoe_dcn": MMoEDCNRanker,
    "cross_feature": CrossFeatureRanker,
}


def build_one_ranker(config: Config, sizes: Mapping[str, int]) -> Ranker:
    """One ranker of the kind `[ranker] model` names; `sizes` are the fitted transforms' rows, keyed "owner.name"."""
    return RANKERS[config.ranker.model](config, sizes)


def build_ranker(config: Config, sizes: Mapping[str, int]) -> Ranker:
    """The whole ranker a funnel file asks for: with [segments], one a segment, whose codes come with the weights."""
    if config.segments is None:
        return build_one_ranker(config, sizes)
    own = [0] * len(config.segments.own)
    rankers = [build_one_ranker(config, sizes) for _ in range(len(own) + 1)]
    return SegmentedRanker(config.segments.by, own, rankers)
