"""Which stages a version's requests go through; what waits for what follows from their reads and writes."""

from __future__ import annotations

from concurrent.futures import Executor

import torch

from prerank.bundle.load import Bundle
from prerank.serve.expand import ExpandTargeting, ExpandUser
from prerank.serve.generate import Attribute, Generate, Merge, names_of
from prerank.serve.graph import RequestGraph, Stage
from prerank.serve.metadata import Descriptions
from prerank.serve.stages import Describe, PrepareUser, Rank, RankBySimilarity, Retrieve, Target
from prerank.serve.tail import Locate, Tail
from prerank.stores.records import Users


def wire(bundle: Bundle, users: Users, described: Descriptions, tail: Tail | None, pool: Executor) -> RequestGraph:
    """The graph from a `request` to `winners`, what is said of them, and who found them.

    Raises SchemaMismatch where `users` lack what this version reads.
    """
    config, scorer, items = bundle.config, bundle.scorer, bundle.scorer.items
    targeting, live, keep = scorer.targeting, scorer.live, config.retrieval.keep
    quotas = {name: options.quota for name, options in config.generators.items()}
    stages: list[Stage] = [
        Target(items, targeting, live),
        ExpandUser(users, bundle.transforms, items, targeting),
        Retrieve(bundle.towers, bundle.index, min(keep, items.num_rows), "retrieved" if quotas else "candidates"),
        PrepareUser(scorer),
        Rank(scorer, "candidates" if tail is None else "located"),
        Describe(described),
    ]
    if targeting is not None:
        stages.append(ExpandTargeting(users, targeting))
    for name, generator in bundle.generators.items():
        stages.append(Generate(generator, name, quotas[name], items, live, keep))
    if quotas:
        stages += [Merge(quotas), Attribute(names_of(quotas))]
    if tail is not None:
        stages.append(Locate(tail))
    said = {"winners", "described", "user_notes", "retrieve_notes", "rank_notes"}
    said |= {"record", "features", "candidates"}  # what the log of requests keeps
    return RequestGraph(
        stages,
        inputs=frozenset({"request"}),
        outputs=frozenset(said | ({"found_by"} if quotas else set())),
        answer="winners",
        fallbacks={Rank.name: RankBySimilarity(items, len(scorer.ranker.tasks), scorer.diversity)},
        pool=pool,
        around=torch.inference_mode,
    )
