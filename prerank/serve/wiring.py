"""Which stages a version's requests go through; what waits for what follows from their reads and writes."""

from __future__ import annotations

from concurrent.futures import Executor

import torch

from prerank.bundle.load import Bundle
from prerank.config import Serve
from prerank.serve.device_engines import LoadedVersion
from prerank.serve.expand import CountEvents, ExpandStranger, ExpandTargeting, ExpandUser
from prerank.serve.generate import Attribute, Generate, GenerateNothing, Merge, names_of
from prerank.serve.graph import Limit, RequestGraph, Stage
from prerank.serve.hosts import IndexHosts
from prerank.serve.metadata import Descriptions
from prerank.serve.retrieve_hosts import RetrieveFromHosts
from prerank.serve.stages import Describe, PrepareUser, Rank, RankBySimilarity, Retrieve, Target
from prerank.serve.tail import Locate, Tail
from prerank.serve.whole import Whole, whole_of
from prerank.stores.records import Users

_SPARE_MS = 12.0
"""To order candidates by similarity, describe the winners, and send them, on cores that others want too."""
_SHORT = (Target, Describe, Attribute)
_SHORT_WHERE_NEAR = (*_SHORT, ExpandTargeting, ExpandUser)
"""Where users are near: each is over soon, most of it under Python's lock, which threads that want it at once pass to
and fro for longer than that. Round trips overlap."""


def wire(
    bundle: Bundle,
    users: Users,
    described: Descriptions,
    tail: Tail | None,
    pool: Executor,
    hosts: IndexHosts | None = None,
    device: LoadedVersion | None = None,
    is_whole: bool = False,
) -> RequestGraph:
    """The graph from a `request` to `winners`, what is said of them, and who found them.

    It is retrieved by `hosts` and ranked on a `device`, if there are any; where it `is_whole` the device retrieves too.
    Raises SchemaMismatch where `users` lack what this version reads.
    """
    config, scorer, items = bundle.config, bundle.scorer, bundle.scorer.items
    targeting, live, keep = scorer.targeting, scorer.live, config.retrieval.keep
    quotas = {name: options.quota for name, options in config.generators.items()}
    found, keep_found = "retrieved" if quotas else "candidates", min(keep, items.num_rows)
    expand = ExpandUser(users, bundle.transforms, items, targeting)
    interaction = bundle.transforms.schema.interaction
    counting = [CountEvents(interaction)] if interaction else []
    stages: list[Stage] = [expand, *counting, PrepareUser(scorer, bool(counting)), Describe(described)]
    fallbacks: dict[str, Stage] = {ExpandUser.name: ExpandStranger(expand)}
    if is_whole:
        assert device is not None
        whole, fallbacks[Whole.name] = whole_of(bundle, device)
        stages.append(whole)
    else:
        retrieve: Stage = Retrieve(bundle.towers, bundle.index, keep_found, found)
        if hosts is not None:
            retrieve = RetrieveFromHosts(bundle, users, hosts, keep_found, found)
        ranked = "candidates" if tail is None else "located"
        stages = [Target(items, targeting, live), expand, retrieve, *stages[1:], Rank(scorer, ranked, device)]
        fallbacks[Rank.name] = RankBySimilarity(items, len(scorer.ranker.tasks), scorer.diversity)
    if targeting is not None:
        stages.append(ExpandTargeting(users, targeting))
    for name, generator in bundle.generators.items():
        stages.append(Generate(generator, name, quotas[name], items, live, keep))
        fallbacks[stages[-1].name] = GenerateNothing(name)
    if quotas:
        stages += [Merge(quotas), Attribute(names_of(quotas))]
    if tail is not None:
        stages.append(Locate(tail))
    short = _SHORT_WHERE_NEAR if users.is_near else _SHORT
    said = {"winners", "described", "user_notes", "retrieve_notes", "rank_notes"}
    if hosts is not None:
        said |= {"left_out"}
    said |= {"record", "features", "candidates"}  # what the log of requests keeps
    said |= {"counters"} if counting else set()
    return RequestGraph(
        stages,
        inputs=frozenset({"request"}),
        outputs=frozenset(said | ({"found_by"} if quotas else set())),
        answer="winners",
        short=frozenset(one.name for one in stages if isinstance(one, short)),
        heeding=frozenset({Rank.name} if scorer.is_native and device is None else ()),
        spare_ms=_SPARE_MS,
        fallbacks=fallbacks,
        patient=frozenset({ExpandUser.name}),  # a store that is late fails by its own timeout
        limits=_limits(config.serve, tail is not None),
        pool=pool,
        around=torch.inference_mode,
    )


def _limits(serve: Serve, has_tail: bool) -> dict[str, Limit]:
    limits = {name: Limit(limit.deadline_ms, limit.at_once) for name, limit in serve.stages.items()}
    if not has_tail:
        limits.pop(Locate.name, None)  # every item is resident for once
    return limits
