"""What names and numbers of a funnel file must be, beside their types: every problem, told at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from datetime import date
from math import inf, isfinite
from typing import TYPE_CHECKING
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from prerank._toml import Problems
from prerank.schema import Category, Value

if TYPE_CHECKING:
    from prerank.config import Config, Data, Days, TargetingRule

INDEX = "index"
"""What the candidates of the towers' index are said to be found by."""
MOST_SHARDS = 256
COMPARED = (
    *("retrieval_recall", "recall_over_popularity", "normalised_entropy", "calibration_error", "kl_loss"),
    *("index_recall", "latency_ms", "memory_mib"),
)
"""The validation gates that may be bounded against the live version too."""
GATES = (
    *COMPARED,
    *("golden", "finite_weights", "complete_days", "feature_coverage", "served_parity", "bf16_difference"),
    "embedding_drift",
)
"""The validation gates a funnel file may bound; `lifecycle.validate` measures them."""
AGAINST_LIVE = ("not_below_live_by", "not_above_live_by", "at_least_of_live", "at_most_of_live")
"""The bounds of a gate that are against the live version."""


def check_names(config: Config, problems: Problems) -> None:
    """Add to `problems` whatever of `config` does not meet or is out of range."""
    _check_days(config.data, problems)
    if config.data.request_id and not config.data.requests:
        problems.add("data.request_id", "expected [data].requests beside it, the log of requests with these ids")
    if not config.retrieval.targets:
        problems.add("retrieval.targets", "expected the weight of at least one event, such as { is_click = 1.0 }")
    if not config.tasks:
        problems.add("tasks", 'expected at least one task, such as click = { label = "is_click" }')
    if not config.features.item:
        problems.add("features.item", "expected at least one item feature")
    for task in config.utility:
        problems.known(f"utility.{task}", task, list(config.tasks), "a task of [tasks]")
    if not config.utility:
        problems.add("utility", "expected what at least one task is worth")
    values = [n for n, kind in config.features.item.items() if isinstance(kind, Value)]
    for task, term in config.utility.items():
        if isinstance(term.value, str):
            problems.known(f"utility.{task}.value", term.value, values, "a value of [features.item] or a number")
    _check_rules(config, problems)
    _check_gates(config, problems)
    for name in config.metadata.deferred:
        if name in config.metadata.columns:
            problems.add("metadata.deferred", f"expected columns that do not come with answers, got {name!r}")
    by, shown = config.retrieval.index.by, [*config.metadata.columns, *config.metadata.deferred]
    if by and config.metadata.columns:
        problems.known("retrieval.index.by", by, shown, "a column of [metadata]")
    _check_negatives(config, problems)
    _check_generators(config, problems)
    _check_domain(config, problems)
    _check_segments(config, problems)
    _check_targeting(config.targeting, problems)
    _check_stages(config, problems)
    _check_ranges(config, problems)


def _check_gates(config: Config, problems: Problems) -> None:
    for gate, bound in config.validate.items():
        where = f"validate.{gate}"
        problems.known(where, gate, list(GATES), "a gate")
        given = {name: number for name, number in asdict(bound).items() if number is not None}
        if not given:
            problems.add(where, f"expected at_least, at_most, or both, or one of {', '.join(AGAINST_LIVE)}")
        for name, number in given.items():
            if not isfinite(number) or (name in AGAINST_LIVE and number < 0):
                problems.add(f"{where}.{name}", f"expected a finite number, 0 or more against live, got {number}")
            if name in AGAINST_LIVE and gate in GATES and gate not in COMPARED:
                said = "already against live" if gate == "embedding_drift" else "of the version alone"
                problems.add(f"{where}.{name}", f"expected at_least or at_most: this gate is {said}")
        if gate == "kl_loss" and config.heavy_ranker is None:
            problems.add(where, "expected a [heavy_ranker] in the funnel file: it is the teacher this is measured to")


def _check_rules(config: Config, problems: Problems) -> None:
    for task, term in config.utility.items():
        others = [name for name in config.tasks if name != task]
        for name in term.given:
            problems.known(f"utility.{task}.given", name, others, "another task of [tasks]")
        if len(set(term.given)) != len(term.given):
            problems.add(f"utility.{task}.given", f"expected each task once, got {list(term.given)}")
    for key, number in _numbers(asdict(config.rules), "rules"):
        if not isfinite(number) and not key.startswith("rules.floor."):
            problems.add(key, f"expected a finite number, got {number}")
    for task, floor in config.rules.floor.items():
        problems.known(f"rules.floor.{task}", task, list(config.tasks), "a task of [tasks]")
        if not 0 <= floor <= 1:
            problems.add(f"rules.floor.{task}", f"expected a probability, 0 to 1, got {floor}")
    for column, rule in config.diversity.items():
        if rule.at_most < 1:
            problems.add(f"diversity.{column}.at_most", f"expected 1 or more, got {rule.at_most}")


def _numbers(options: Mapping[str, object], where: str) -> Iterator[tuple[str, float]]:
    """Every number by its key, of options in options too."""
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{where}.{name}")
        elif isinstance(value, float):
            yield f"{where}.{name}", value


def _check_negatives(config: Config, problems: Problems) -> None:
    retrieval = config.retrieval
    for name in ("uniform_negatives", "cached_batches"):
        number = getattr(retrieval, name)
        if number < 0:
            problems.add(f"retrieval.{name}", f"expected 0 or more, got {number}")
        elif number and retrieval.loss != "sampled_softmax":
            said = f'expected none with loss = "{retrieval.loss}", only "sampled_softmax" has them; got {number}'
            problems.add(f"retrieval.{name}", said)


_ASKS = {"top": "by", "same": "history", "list": "items"}


def _check_generators(config: Config, problems: Problems) -> None:
    histories = config.features.histories()
    of_category = [n for n, one in histories.items() if isinstance(config.features.item.get(one.of), Category)]
    for name, one in config.generators.items():
        where = f"generators.{name}"
        if name == INDEX or not name.isidentifier():
            problems.add(where, f"expected a name of letters, digits and _ other than {INDEX!r}, got {name!r}")
        if one.quota < 1:
            problems.add(f"{where}.quota", f"expected 1 or more, got {one.quota}")
        given = [key for key in _ASKS.values() if getattr(one, key)]
        if given != [_ASKS[one.kind]]:
            problems.add(where, f"expected {_ASKS[one.kind]} and no other with kind = {one.kind!r}, got {given}")
        elif one.kind == "same":
            problems.known(f"{where}.history", one.history, of_category, "a history of a category")
        elif one.kind == "list" and len(set(one.items)) != len(one.items):
            problems.add(f"{where}.items", "expected each item_id once")


def _check_domain(config: Config, problems: Problems) -> None:
    model, domain = config.ranker.model, config.ranker.domain
    if domain and model != "mtmd":
        problems.add("ranker.domain", f'expected none with model = "{model}", only "mtmd" has domains; got {domain!r}')
    elif domain:
        categories = [name for name, kind in config.features.context.items() if isinstance(kind, Category)]
        problems.known("ranker.domain", domain, categories, "a category of [features.context]")


def _check_segments(config: Config, problems: Problems) -> None:
    segments = config.segments
    if segments is None:
        return
    known = [n for n, kind in config.features.context.items() if isinstance(kind, Category) and not kind.hash]
    problems.known("segments.by", segments.by, known, "a category of [features.context] without hash")
    if not segments.own or len(set(segments.own)) != len(segments.own):
        problems.add("segments.own", f"expected at least one value, each once, got {list(segments.own)}")


def _check_targeting(rules: Mapping[str, TargetingRule], problems: Problems) -> None:
    for name, rule in rules.items():
        given = [key for key in ("user", "context", "schedule") if getattr(rule, key)]
        if len(given) != 1:
            said = " and ".join(given) or "none"
            problems.add(f"targeting.{name}", f"expected exactly one of user, context and schedule, got {said}")
        if not rule.item:
            problems.add(f"targeting.{name}.item", "expected a column of the items table, got ''")
        if rule.schedule:
            _check_zone(f"targeting.{name}.schedule", rule.schedule, problems)


def stage_names(config: Config) -> list[str]:
    """The stages that a request to this funnel may go through; `serve.wiring` declares them."""
    names = ["expand_targeting"] if config.targeting else []
    names += ["target", "expand_user", "retrieve", *(f"generate_{name}" for name in config.generators)]
    names += ["merge"] if config.generators else []
    names += ["fetch_tail"] if config.inventory.resident is not None else []
    names += ["count_events"] if config.features.interaction else []
    names += ["prepare_user", "rank", "describe"]
    return [*names, "attribute"] if config.generators else names


def _check_stages(config: Config, problems: Problems) -> None:
    names = stage_names(config)
    for name, limit in config.serve.stages.items():
        key = f"serve.stages.{name}"
        problems.known(key, name, names, "a stage of this funnel")
        if limit.deadline_ms is None and limit.at_once is None:
            problems.add(key, "expected deadline_ms, at_once, or both")
        if limit.deadline_ms is not None and not 0 < limit.deadline_ms < inf:
            problems.add(f"{key}.deadline_ms", f"expected a finite number above 0, got {limit.deadline_ms}")
        if limit.at_once is not None and limit.at_once < 1:
            problems.add(f"{key}.at_once", f"expected 1 or more, got {limit.at_once}")


def _check_zone(key: str, name: str, problems: Problems) -> None:
    try:
        ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        problems.add(key, f'expected an IANA name such as "Asia/Shanghai", got {name!r}')


def _check_days(data: Data, problems: Problems) -> None:
    _check_zone("data.timezone", data.timezone, problems)
    last = ""
    for part in ("train", "validate", "test"):
        first_last: Days = getattr(data, part)
        try:
            first, final = (date.fromisoformat(d).isoformat() for d in first_last)
        except ValueError:
            problems.add(f"data.{part}", f"expected two ISO days [first, last], got {list(first_last)}")
            return
        if first > final:
            problems.add(f"data.{part}", f"the first day {first} is after the last, {final}")
        if last and first <= last:
            problems.add(f"data.{part}", f"starts on {first}, not after the part before it, which ends on {last}")
        last = final


_POSITIVE = {
    "inventory": ("cached", "ttl_s", "fetch_ms"),
    "retrieval": ("dim", "batch", "epochs", "keep", "temperature", "learning_rate", "group"),
    "segments": ("least",),
    "heavy_ranker": ("width", "experts", "cross_layers", "low_rank", "heads", "batch", "epochs", "learning_rate"),
    "distillation": ("among",),
    "ranker": (
        *("dim", "width", "experts", "cross_layers", "low_rank", "heads"),
        *("batch", "epochs", "keep", "learning_rate"),
    ),
    "serve": ("deadline_ms", "max_k", "hosts_ms", "towers"),
}


def _check_ranges(config: Config, problems: Problems) -> None:
    retrieval, ranker = config.retrieval, config.ranker
    for section, names in _POSITIVE.items():
        for name in names:
            options = getattr(config, section)
            number = 1 if options is None else getattr(options, name)
            if not number > 0:
                problems.add(f"{section}.{name}", f"expected more than 0, got {number}")
    rates = {"retrieval.dropout": retrieval.dropout, "ranker.dropout": ranker.dropout, "ranker.average": ranker.average}
    if not 1 <= retrieval.index.shards <= MOST_SHARDS:
        problems.add("retrieval.index.shards", f"expected 1 to {MOST_SHARDS}, got {retrieval.index.shards}")
    if not 0 < retrieval.index.floor <= 1:
        problems.add("retrieval.index.floor", f"expected above 0 and at most 1, got {retrieval.index.floor}")
    resident = config.inventory.resident
    if resident is not None and resident.top < 1:
        problems.add("inventory.resident.top", f"expected 1 or more, got {resident.top}")
    whole = {
        "inventory.slack": config.inventory.slack,
        "ranker.patience": ranker.patience,
        "distillation.candidates": config.distillation.candidates,
    }
    for name in ("candidate_weight", "label_weight"):
        whole[f"distillation.{name}"] = getattr(config.distillation, name)
    if config.heavy_ranker is not None:
        heavy = config.heavy_ranker
        rates |= {f"heavy_ranker.{name}": getattr(heavy, name) for name in ("dropout", "id_dropout", "average")}
        whole |= {f"heavy_ranker.{name}": getattr(heavy, name) for name in ("patience", "folds")}
    for key, number in whole.items():
        if number < 0:
            problems.add(key, f"expected 0 or more, got {number}")
    for key, rate in rates.items():
        if not 0 <= rate < 1:
            problems.add(key, f"expected at least 0 and below 1, got {rate}")
    for half_life in retrieval.popularity.half_life_days:
        if not half_life > 0:
            problems.add("retrieval.popularity.half_life_days", f"expected more than 0 days, got {half_life}")
    for label, weight in retrieval.targets.items():
        if not weight > 0:
            problems.add(f"retrieval.targets.{label}", f"expected a weight above 0, got {weight}")
