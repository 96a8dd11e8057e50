"""A ranker of its own for segments of traffic that have traffic enough, and one for all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from prerank.config import Config, Segments
from prerank.errors import DataError
from prerank.models.ranker import Ranker
from prerank.models.segmented import SegmentedRanker
from prerank.models.towers import TwoTower
from prerank.train.prepare import Prepared
from prerank.train.ranking import Lesson, RankerExamples, train_ranker
from prerank.types import Array, Report, silent


class Some:
    """Some of the examples, at `positions` int64 [P]."""

    def __init__(self, examples: RankerExamples, positions: Array) -> None:
        self.examples, self.positions = examples, positions

    def __len__(self) -> int:
        return len(self.positions)

    def batch(self, chosen: Array) -> Lesson:
        """The examples at positions int64 [B] among them."""
        return self.examples.batch(self.positions[chosen])


def own_codes(prepared: Prepared, segments: Segments) -> dict[str, int]:
    """The code of each value of `own`. Raises DataError for a value that no training impression had."""
    names = prepared.transforms.names("context", segments.by)
    assert names is not None, "the configuration refuses a hashed category"
    known = {str(name): code for code, name in enumerate(names, start=1)}
    missing = [value for value in segments.own if value not in known]
    if missing:
        raise DataError(
            f"segments.own: expected values of the context category {segments.by!r} seen in training, one of "
            f"{sorted(known)[:20]}, got {missing[0]!r}"
        )
    return {value: known[value] for value in segments.own}


def train_segments(
    prepared: Prepared,
    config: Config,
    folder: Path,
    identity: str,
    events: Array,
    examples: RankerExamples,
    after_epoch: Callable[[str], Callable[[Ranker], Mapping[str, float]]],
    report: Report = silent,
    towers: TwoTower | None = None,
) -> tuple[SegmentedRanker, list[dict[str, float]]]:
    """One ranker of all `examples`, which are of events int64 [P], and one of those of each of [segments] `own`.

    `after_epoch(value)` gives what to measure after an epoch of a segment's ranker, of all for "". Records are those
    of every ranker one after the other. Raises DataError naming the segments that have too few training impressions.
    """
    segments = config.segments
    assert segments is not None
    codes = own_codes(prepared, segments)
    of_event = np.asarray(prepared.events[segments.by])[events]
    places = {value: np.flatnonzero(of_event == code) for value, code in codes.items()}
    few = [f"{value!r} has {len(found):,}" for value, found in places.items() if len(found) < segments.least]
    if few:
        raise DataError(
            f"segments.own: expected at least {segments.least:,} training impressions (segments.least) of each value "
            f"of {segments.by!r}, but {', '.join(few)}; leave it to the ranker for all others"
        )
    rankers, records = [], []
    for value, learnt in {"": examples, **{v: Some(examples, found) for v, found in places.items()}}.items():
        ranker, epochs = train_ranker(
            prepared,
            config,
            folder / (f"own-{codes[value]}" if value else "all"),
            f"{identity}{f'-{codes[value]}' if value else ''}",
            after_epoch(value),
            report,
            towers=towers,
            examples=learnt,
            what=f"train the ranker of {segments.by} {value}" if value else "train the ranker of all",
        )
        rankers.append(ranker)
        records += epochs
    return SegmentedRanker(segments.by, list(codes.values()), rankers), records
