"""One published version on one day of the log: what gates ask about, each measured once, when first asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from prerank.bundle.load import Bundle
from prerank.config import Config
from prerank.data.logs import Tables
from prerank.errors import DataError
from prerank.evaluate.ranking import RankingQuality, evaluate_ranking
from prerank.evaluate.retrieval import RetrievalQuality, evaluate_retrieval
from prerank.train.examples import UserExamples, item_tensors
from prerank.train.prepare import Prepared, prepare
from prerank.train.retrieval import ItemPopularity
from prerank.types import Array, Report, silent

MOST_QUESTIONS = 5_000
INDEX_QUESTIONS = 64
K = 100
_MIB = float(1 << 20)


@dataclass(frozen=True)  # no slots: what is measured is kept after the first gate that asks
class Measured:
    """A loaded version, the log as its transforms encode it, and the ISO `days` it is measured on.

    `config` is the version's own, with what makes the measure the same for every version: the relevant event, the
    seed that draws questions, and the log's columns. `home` is the funnel's folder of the store.
    """

    bundle: Bundle
    prepared: Prepared
    config: Config
    days: tuple[str, ...]
    home: Path

    @cached_property
    def retrieval(self) -> RetrievalQuality:
        """Recall of the published towers."""
        floors = ("popularity",)
        return evaluate_retrieval(self.bundle.towers, self.prepared, self.config, self.days, floors, MOST_QUESTIONS)

    @cached_property
    def ranking(self) -> RankingQuality:
        """Errors of the published ranker."""
        return evaluate_ranking(self.bundle.scorer.ranker, self.prepared, self.config, self.days)

    def worst(self, metric: str, tasks: tuple[str, ...]) -> float:
        """The largest `metric` of these tasks, of those the version has. Raises DataError where it has none of them."""
        found = [numbers[metric] for task, numbers in self.ranking.tasks.items() if task in tasks]
        if not found:
            raise DataError(f"the version predicts {list(self.ranking.tasks)}, and is asked about {list(tasks)}")
        return max(found)

    def events(self, most: int, days: tuple[str, ...] | None = None) -> Array:
        """At most so many logged events of the days, drawn with the funnel's seed, in order: int64 [B]."""
        rows = np.flatnonzero(self.prepared.of_days(self.days if days is None else days))
        if not len(rows):
            raise DataError(f"{', '.join(days or self.days)}: the log has no impression there to measure on")
        if most < len(rows):
            rows = np.sort(np.random.default_rng(self.config.seed).choice(rows, most, replace=False))
        return rows

    @cached_property
    def item_rows(self) -> Tensor:
        """The version's row of every item of the log, int64 [I]; -1 for one that it does not have."""
        return self.bundle.scorer.items.rows_of(torch.from_numpy(np.array(self.prepared.item_ids)))

    @torch.inference_mode()
    def index_recall(self) -> float:
        """Of what the towers find for users of the days, looking at all vectors, the share that the index finds.

        The vectors are computed anew, so an index of other towers, or of other items, finds something else.
        """
        events = self.events(INDEX_QUESTIONS)
        popularity = ItemPopularity(self.prepared, self.config).latest()
        vectors = self.bundle.towers.item_side(item_tensors(self.prepared), popularity)
        has_row = self.item_rows >= 0
        rows, vectors = self.item_rows[has_row], vectors[has_row]
        users = self.bundle.towers.user_side(UserExamples(self.prepared, self.config.features).at(events))
        k = min(K, len(rows))
        wanted = rows[(users @ vectors.T).topk(k).indices]
        # items that came while serving are not in the log's table; room for them, or they push others out
        more = self.bundle.scorer.items.num_items - len(rows)
        found = self.bundle.index.search(users, min(k + more, self.bundle.scorer.items.num_items), None)
        known = torch.isin(found.rows, rows) & found.valid
        hits = [
            torch.isin(one[mark][:k], right).sum() for one, mark, right in zip(found.rows, known, wanted, strict=True)
        ]
        return float(torch.stack(hits).float().mean()) / k

    def memory_mib(self) -> float:
        """What the version's weights, item rows and vectors take in memory, in MiB."""
        bundle = self.bundle
        modules = [bundle.towers, bundle.scorer, *([bundle.index] if isinstance(bundle.index, nn.Module) else [])]
        return float(sum(one.nbytes for module in modules for one in module.state_dict().values())) / _MIB

    def finite_share(self) -> tuple[float, str]:
        """The share of its tensors that hold nothing but finite numbers, and the first that does not.

        The vectors of free rows are NaN on purpose, so of an index only the published rows are asked.
        """
        published = self.bundle.scorer.items.num_published
        named = {f"towers: {name}": one for name, one in self.bundle.towers.state_dict().items()}
        named |= {f"scorer: {name}": one for name, one in self.bundle.scorer.ranker.state_dict().items()}  # type: ignore[attr-defined]
        index = self.bundle.index
        if isinstance(index, nn.Module):
            named |= {f"index: {n}": one[:published] if one.dim() else one for n, one in index.state_dict().items()}
        wrong = [name for name, one in named.items() if one.is_floating_point() and not bool(one.isfinite().all())]
        return 1.0 - len(wrong) / len(named), f"{wrong[0]} is not finite" if wrong else ""


def of_live(
    live: Bundle, asked: Config, days: tuple[str, ...], tables: Tables, home: Path, report: Report = silent
) -> Measured:
    """The live version on the same days of the same log as one with the funnel file `asked`.

    The log is encoded once more, by the live version's own transforms. Raises DataError where a column is gone that it
    reads.
    """
    retrieval = replace(live.config.retrieval, relevant=asked.retrieval.relevant)
    data = replace(asked.data, train=live.config.data.train)
    config = replace(live.config, data=data, seed=asked.seed, retrieval=retrieval)
    prepared = prepare(config, tables, home / "work", report, live.transforms)
    return Measured(live, prepared, config, days, home)


def tasks_of(*several: Measured) -> tuple[str, ...]:
    """The tasks that every one of these predicts."""
    common: Mapping[str, object] = several[0].config.tasks
    return tuple(task for task in common if all(task in one.config.tasks for one in several))
