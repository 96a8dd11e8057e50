"""What serving makes of requests of the log, beside what training saw of them; and what the native kernels round.

The requests are impressions of the newest day, asked again as a server would be: the user from the user store, the
context from the log's raw row, everything cut before the impression's own moment.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from prerank.data.logs import Tables
from prerank.errors import DataError
from prerank.kernels.engine import Engine
from prerank.kernels.native import level, library
from prerank.lifecycle.coverage import filled
from prerank.lifecycle.measured import Measured
from prerank.lifecycle.user_shelves import open_users
from prerank.serve.expand import ExpandUser
from prerank.stores.records import Users
from prerank.train.examples import UserExamples
from prerank.train.prepare import SERVED
from prerank.types import Array, Features, Given, Request

NUM_REQUESTS = 512
_CANDIDATES = 64


@dataclass(frozen=True, slots=True)
class Served:
    """Of B impressions, events int64 [B]: features as served and as trained on [B, ...], and the items' slots [B]."""

    events: Array
    served: Features
    trained: Features
    slots: Tensor


def serve_again(measured: Measured, tables: Tables, redis: str | None = None) -> Served:
    """The impressions of the newest day, NUM_REQUESTS of them, of items that are resident, through serving.

    Users are looked up at the url `redis`, or in the store's file. Raises DataError where there is no user store, or
    none of the impressions can be asked again, and StoreFailed for a Redis that does not answer.
    """
    with open_users(measured.home, measured.config.name, redis) as users:
        return _serve_again(measured, tables, users)


def _serve_again(measured: Measured, tables: Tables, users: Users) -> Served:
    bundle, prepared, log = measured.bundle, measured.prepared, measured.prepared.events
    events = measured.events(NUM_REQUESTS)
    if SERVED in log:  # what a log of requests has was trained on as it was served, whatever the store says now
        events = events[np.asarray(log[SERVED][events]) < 0]
    slots = bundle.scorer.items.slots_of(measured.item_rows[torch.from_numpy(log["item"][events].astype(np.int64))])
    raw = _raw(measured, tables, events)
    context = measured.config.features.columns("context")
    requests: dict[int, Request] = {}
    for place, event in enumerate(events.tolist()):
        row = raw.get(_key(measured, event))
        if row is not None and int(slots[place]) >= 0:
            user_id, time_ms, _ = _key(measured, event)
            requests[place] = Request(user_id, 1, time_ms, {name: row[name] for name in context})
    if not requests:
        raise DataError(f"{', '.join(measured.days)}: none of {len(events)} impressions is of a resident item")
    expand = ExpandUser(users, bundle.transforms, bundle.scorer.items)
    found = [expand.expand(users.get(one.user_id), one)[0] for one in requests.values()]
    kept = np.array(list(requests))
    served = {name: torch.cat([one[name] for one in found]) for name in found[0]}
    trained = UserExamples(prepared, measured.config.features).at(events[kept])
    return Served(events[kept], served, trained, slots[torch.from_numpy(kept)])


@torch.inference_mode()
def parity(measured: Measured, served: Served) -> tuple[float, str]:
    """The largest difference of a probability between serving and training, and the feature that differs most often.

    Training's is computed of the log's features and a fresh item side, serving's of the store's and the stored side.
    """
    scorer, slots = measured.bundle.scorer, served.slots.unsqueeze(1)
    one_by_one = range(len(served.events))
    ours = torch.cat([scorer.probs(_at(served.served, n), slots[n : n + 1]) for n in one_by_one])
    items = {name: column[served.slots] for name, column in scorer.items.features().items()}
    side = {name: column.unsqueeze(1) for name, column in scorer.ranker.item_side(items).items()}
    theirs = scorer.ranker(scorer.ranker.user_side(served.trained), side).float().sigmoid()
    difference = float((ours - theirs).abs().max())
    shares = {name: _differing(column, served.trained[name]) for name, column in served.served.items()}
    name = max(shares, key=lambda one: shares[one])
    return difference, f"{name} differs in {shares[name]:.1%} of requests" if shares[name] else ""


def served_coverage(measured: Measured, served: Served) -> dict[str, float]:
    """The share of the requests on which each feature is filled as it is served, the items' as they are stored."""
    items = {name: column[served.slots] for name, column in measured.bundle.scorer.items.features().items()}
    return filled({**served.served, **items}, measured.config.features)


@torch.inference_mode()
def bf16_difference(measured: Measured) -> tuple[float, str]:
    """The largest difference of a probability between the native kernels, in bfloat16, and torch in float32."""
    if library() is None or level() == "portable":
        return 0.0, "no native kernels here: torch serves in float32"
    scorer, events = measured.bundle.scorer, measured.events(_CANDIDATES)
    user = UserExamples(measured.prepared, measured.config.features).at(events)
    draw = torch.Generator().manual_seed(measured.config.seed)
    slots = torch.randint(scorer.items.num_slots, (len(events), _CANDIDATES), generator=draw)
    by_torch = torch.cat([scorer.probs(_at(user, n), slots[n : n + 1]) for n in range(len(events))])
    engine = Engine(1)
    try:
        scorer.accelerate(engine)
        natively = torch.cat([scorer.probs(_at(user, n), slots[n : n + 1]) for n in range(len(events))])
    finally:
        scorer.accelerate(None)
        engine.close()
    return float((natively - by_torch).nan_to_num(nan=torch.inf).abs().max()), ""


def _at(features: Features, place: int) -> Features:
    return {name: column[place : place + 1] for name, column in features.items()}


def _differing(ours: Tensor, theirs: Tensor) -> float:
    return (
        float((ours.to(theirs.dtype) != theirs).flatten(1).any(1).float().mean())
        if ours.dim() > 1
        else float((ours.to(theirs.dtype) != theirs).float().mean())
    )


def _key(measured: Measured, event: int) -> tuple[int, int, int]:
    prepared, log = measured.prepared, measured.prepared.events
    user, item = prepared.user_ids[log["user"][event]], prepared.item_ids[log["item"][event]]
    return int(user), int(log["time_ms"][event]), int(item)


def _raw(measured: Measured, tables: Tables, events: Array) -> Mapping[tuple[int, int, int], Mapping[str, Given]]:
    """The raw log rows of events by user_id, time and item_id; those that the log has twice left out."""
    data, log = measured.config.data, measured.prepared.events
    keys = [data.user_id, data.time, data.item_id]
    columns = [*keys, *measured.config.features.columns("context")]
    wanted = pa.array(np.unique(measured.prepared.user_ids[log["user"][events]]))
    found: dict[tuple[int, int, int], Mapping[str, Given]] = {}
    times: Counter[tuple[int, int, int]] = Counter()
    for batch in tables.impressions(columns, list(measured.days)):
        ids = batch.column(data.user_id)
        for row in batch.filter(pc.is_in(ids, value_set=wanted.cast(ids.type))).to_pylist():
            key = (row[keys[0]], row[keys[1]], row[keys[2]])
            found[key] = row
            times[key] += 1
    return {key: row for key, row in found.items() if times[key] == 1}
