"""A request the straightforward way: candidates' features from the store, objects with all metadata, Python rules."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from benchmarks.served_world import COLUMNS, T0_MS
from prerank.bundle.load import Bundle
from prerank.schema import column_of
from prerank.serve.expand import ExpandUser
from prerank.stores.metadata import MetadataTable
from prerank.stores.tail import LmdbTail
from prerank.stores.users import UserStore
from prerank.types import Array, Features, Given, Request

AT_MOST = 5


@dataclass(frozen=True, slots=True)
class Naive:
    """The models of a version with nothing of its engine: eager float32, and rows of objects between the stages."""

    bundle: Bundle
    users: UserStore
    features: LmdbTail
    metadata: MetadataTable
    vectors: Tensor
    lists: dict[str, Array]

    @classmethod
    def open(cls, store: Path, bundle: Bundle, items: pa.Table) -> Naive:
        """Over the same stores; what targeting asks is held as numpy arrays."""
        LmdbTail.write(store / "naive.lmdb", items, "item_id", COLUMNS)
        return cls(
            bundle,
            UserStore.open(store / "users.lmdb"),
            LmdbTail.open(store / "naive.lmdb"),
            MetadataTable.open(bundle.path / "metadata.arrow"),
            bundle.index.vectors.float(),  # type: ignore[attr-defined]
            {"country": items["country"].to_numpy(zero_copy_only=False)},
        )

    def ask(self, user: int, keep: int, k: int, is_dot: bool = False) -> list[dict[str, Given]]:
        """The k winners of `keep` candidates; `is_dot` ranks by the two towers instead of the ranker."""
        request = Request(user, k, T0_MS, {"surface": "a"})
        user_features = self._user(request)  # the heavy expansion, then the light one
        profile = self.users.profile(user) or {}
        candidates = self.retrieve(user_features, str(profile.get("country")), keep)
        rows = torch.tensor([[int(str(one["row"])) for one in candidates]])
        if is_dot:
            scores = np.array([one["similarity"] for one in candidates], np.float64)
        else:
            scores = self._probs(user_features, rows)[0, :, 0].numpy()
        return self._rules(candidates, scores, k)

    def retrieve(self, user_features: Features, country: str, keep: int) -> list[dict[str, Given]]:
        """Candidates as objects with all their metadata."""
        eligible = torch.from_numpy(np.flatnonzero(self.lists["country"] == country))
        query = self.bundle.towers.user_side(user_features)
        similarity = (query @ self.vectors[eligible].T)[0]
        best = similarity.topk(min(keep, len(eligible)))
        rows = eligible[best.indices].numpy()
        described = self.metadata.take(rows)
        return [
            {"row": row, "similarity": value, **said}
            for row, value, said in zip(rows.tolist(), best.values.tolist(), described, strict=True)
        ]

    def _user(self, request: Request) -> Features:
        expand = ExpandUser(self.users, self.bundle.transforms, self.bundle.scorer.items)
        return expand.expand(self.users.get(request.user_id), request)[0]

    def _probs(self, user_features: Features, rows: Tensor) -> Tensor:
        """Each candidate's features fetched and transformed, and the whole ranker over them."""
        scorer, schema = self.bundle.scorer, self.bundle.config.features
        fetched = self.features.get(scorer.items.item_ids[rows[0]].tolist())
        columns = [column_of(name, kind) for name, kind in schema.item.items()]
        table = pa.table({name: pa.array([(one or {}).get(name) for one in fetched]) for name in columns})
        encoded = self.bundle.transforms.encode("item", table)
        items = {name: torch.from_numpy(np.array(column)) for name, column in encoded.items()}
        side = {name: tensor[None] for name, tensor in scorer.ranker.item_side(items).items()}
        probs: Tensor = scorer.ranker(scorer.ranker.user_side(user_features), side).sigmoid()
        return probs

    def _rules(self, candidates: list[dict[str, Given]], scores: Array, k: int) -> list[dict[str, Given]]:
        """Utility, order and caps, an object at a time."""
        for one, score in zip(candidates, scores.tolist(), strict=True):
            one["utility"] = score * float(str(one["bid_micros"]))
        held: Counter[Given] = Counter()
        won: list[dict[str, Given]] = []
        for one in sorted(candidates, key=lambda one: -float(str(one["utility"]))):
            advertiser = one["advertiser"]
            assert not isinstance(advertiser, list)
            if held[advertiser] < AT_MOST:
                held[advertiser] += 1
                won.append(one)
                if len(won) == k:
                    break
        return won
