"""Which stages a version's requests go through; what waits for what follows from their reads and writes."""

from __future__ import annotations

from concurrent.futures import Executor

import torch

from prerank.bundle.load import Bundle
from prerank.serve.expand import ExpandTargeting, ExpandUser
from prerank.serve.generate import Attribute, Generate, Merge, names_of
from prerank.serve.graph import RequestGraph, Stage
from prerank.serve.hosts import IndexHosts
from prerank.serve.metadata import Descriptions
from prerank.serve.retrieve_hosts import RetrieveFromHosts
from prerank.serve.stages import Describe, PrepareUser, Rank, RankBySimilarity, Retrieve, Target
from prerank.serve.tail import Locate, Tail
from prerank.stores.records import Users


def wire(
    bundle: Bundle,
    users: Users,
    described: Descriptions,
    tail: Tail | None,
    pool: Executor,
    hosts: IndexHosts | None = None,
) -> RequestGraph:
    """The graph from a `request` to `winners`, what is said of them, and who found them; by `hosts` if there are any.

    Raises SchemaMismatch where `users` lack what this version reads.
    """
    config, scorer, items = bundle.config, bundle.scorer, bundle.scorer.items
    targeting, live, keep = scorer.targeting, scorer.live, config.retrieval.keep
    quotas = {name: options.quota for name, options in config.generators.items()}
    found, keep_found = "retrieved" if quotas else "candidates", min(keep, items.num_rows)
    stages: list[Stage] = [
        Target(items, targeting, live),
        ExpandUser(users, bundle.transforms, items, targeting),
        Retrieve(bundle.towers, bundle.index, keep_found, found)
        if hosts is None
        else RetrieveFromHosts(bundle, users, hosts, keep_found, found),
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
    if hosts is not None:
        said |= {"left_out"}
    return RequestGraph(
        stages,
        inputs=frozenset({"request"}),
        outputs=frozenset(said | ({"found_by"} if quotas else set())),
        answer="winners",
        fallbacks={Rank.name: RankBySimilarity(items, len(scorer.ranker.tasks), scorer.diversity)},
        pool=pool,
        around=torch.inference_mode,
    )
