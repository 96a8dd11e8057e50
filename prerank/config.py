"""funnel.toml as frozen dataclasses, in the order a request lives; `load_config` reads the one into the other.

Names of features, labels and columns are checked against each other here; whether the data has them is
`data.check`'s question. Machine facts (device, workers, ports, folders) are command-line flags, never keys.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import date, timedelta
from math import isfinite
from pathlib import Path
from typing import Annotated, Literal, TypeAlias
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from prerank._toml import Problems, columns_named, structure
from prerank.errors import ConfigError
from prerank.schema import IMPRESSION, Category, FeatureSchema, Kind, Owner, Value

Days: TypeAlias = tuple[str, str]
Tables: TypeAlias = Literal["own", "retrieval"]
"""Where a ranker's item tables come from: learned with it, or taken from the retrieval towers and left as they are."""
Crossing: TypeAlias = Literal["attention", "matches"]
"""What of user and item crosses before the layers: target attention over histories, match counts and counters."""
ItemNumber: TypeAlias = Annotated[str, Value()]
"""The type of a rule's option that names a column of the items table, one of numbers: `Config.ruled` finds it by it."""


@dataclass(frozen=True, slots=True)
class Data:
    """The three tables (Parquet or CSV; a glob is one table) and which days are for what, first and last inclusive.

    `history` is an optional fourth: events older than the log, with the log's columns where known.
    `adapter` names a reader of a public dataset that makes these tables from its own files.
    `computed` names a time column (UTC ms) of the users and items tables: when that row's features were computed.
    `labelled` names one of the log: when the row's labels were known; empty is at once, at the row's own time.
    """

    impressions: str
    items: str
    users: str
    train: Days
    validate: Days
    test: Days
    history: str = ""
    adapter: str = ""
    time: str = "time_ms"
    user_id: str = "user_id"
    item_id: str = "item_id"
    timezone: str = "UTC"
    computed: str = ""
    labelled: str = ""

    def days(self, part: Literal["train", "validate", "test"]) -> list[str]:
        """Each ISO day of one part, in order."""
        first, last = (date.fromisoformat(d) for d in getattr(self, part))
        return [(first + timedelta(days=n)).isoformat() for n in range((last - first).days + 1)]


@dataclass(frozen=True, slots=True)
class Task:
    """One thing to predict: the log's 0/1 column `label`."""

    label: str


@dataclass(frozen=True, slots=True)
class Popularity:
    """A learned popularity bias from earlier days, folded into the vectors; no half-life leaves it out.

    `events` are label columns or "impression"; each is counted with each half-life.
    """

    events: tuple[str, ...] = (IMPRESSION,)
    half_life_days: tuple[float, ...] = (0.5, 3.0)

    @property
    def num_series(self) -> int:
        """How many popularity numbers an item has."""
        return len(self.events) * len(self.half_life_days)


@dataclass(frozen=True, slots=True)
class IndexConfig:
    """How the k most similar rows are found, and what their vectors are stored as.

    "bfloat16" takes half of the bytes of "float32", "int8", with a scale a row, about a quarter; the index is exact
    over what it stores.
    """

    kind: Literal["exact"] = "exact"
    storage: Literal["float32", "bfloat16", "int8"] = "float32"


@dataclass(frozen=True, slots=True)
class Retrieval:
    """The two towers: what they learn to find, how, and how many candidates a request keeps.

    `targets` weighs the events that are positives; `relevant` is the label that recall is measured on. An example is
    a user at a moment with the next events of that day as positives, at most `group` of them.
    """

    relevant: str
    targets: Mapping[str, float] = field(default_factory=dict)
    dim: int = 64
    hidden: tuple[int, ...] = (128,)
    dropout: float = 0.1
    normalise: bool = False
    temperature: float = 1.0
    loss: Literal["softmax", "sampled_softmax"] = "softmax"
    popularity: Popularity = field(default_factory=Popularity)
    group: int = 16
    epochs: int = 4
    batch: int = 512
    learning_rate: float = 0.01
    weight_decay: float = 0.1
    keep: int = 1000
    index: IndexConfig = field(default_factory=IndexConfig)


@dataclass(frozen=True, slots=True)
class HeavyRankerConfig:
    """The teacher, and the stage after us: learned from labels, it labels what the lightweight ranker learns from.

    Its layers are `width` wide: `experts` of `cross_layers` full-rank and as many `low_rank` cross layers, and as many
    MLPs of `hidden`. `heads` of target attention look at each history. `tables` "retrieval" takes the retrieval item
    tower's tables as they are and trains them no further. `id_dropout` hides whole ids, `dropout` numbers between
    layers. `average` is the decay of the weights' moving average and `patience` how many epochs without a smaller loss
    of the validate days end the training (0: neither). `folds` teachers each leave a share of the users out, to label
    those users' own impressions, which the teacher that saw them knows too well; 0 or 1 leaves cross-fitting out.
    """

    width: int = 128
    hidden: tuple[int, ...] = (128, 64)
    experts: int = 2
    cross_layers: int = 2
    low_rank: int = 16
    crossings: tuple[Crossing, ...] = ("attention", "matches")
    heads: int = 2
    tables: Tables = "own"
    dropout: float = 0.3
    id_dropout: float = 0.3
    epochs: int = 4
    batch: int = 1024
    learning_rate: float = 0.002
    weight_decay: float = 0.1
    average: float = 0.99
    patience: int = 1
    folds: int = 2


@dataclass(frozen=True, slots=True)
class Distillation:
    """What the lightweight ranker learns from the heavy one, by KL: logged winners, and `candidates` a winner.

    Candidates are drawn from the first `among` that retrieval returns for the same user at the same time.
    `candidate_weight` is a candidate set's weight beside its winner's 1; `label_weight` adds that of the real label's
    log loss, on winners. With `candidates = 0` it learns from winners alone.
    """

    candidates: int = 8
    among: int = 1000
    candidate_weight: float = 1.0
    label_weight: float = 0.0


@dataclass(frozen=True, slots=True)
class Segments:
    """A ranker of its own for each of the values `own` of the context category `by`, and one for all others.

    Values are written as text, such as "1" or "feed". Each needs `least` impressions in the training days.
    """

    by: str
    own: tuple[str, ...]
    least: int = 10_000


MOST_TARGETED = 4096
"""The most distinct values that the items may list for one rule of targeting: each takes a bit of every item."""


@dataclass(frozen=True, slots=True)
class TargetingRule:
    """Who may see an item: those with a value that its column `item` lists or, if it `excludes`, with none of them.

    The value is of the `user`'s column or the request's `context` field, or the hour of the week in the time zone
    `schedule`: 0 is Monday from 00:00, 167 Sunday from 23:00. An item that lists nothing is for everybody.
    """

    item: str
    user: str = ""
    context: str = ""
    schedule: str = ""
    excludes: bool = False


@dataclass(frozen=True, slots=True)
class RankerConfig:
    """The lightweight ranker over the candidates, and how many winners it may return.

    `dim` is the width of a task's vectors; `hidden` are the widths of the MLPs: the towers' of two_tower, the experts'
    of mtmd, the gates' of mmoe_dcn. `experts` read a vector `width` wide. An expert of mmoe_dcn is `cross_layers` of
    full rank and as many of `low_rank`. `domain` names the context category whose values have experts in mtmd.
    `crossings` are what cross_feature lets user and item cross by, with `heads` of attention. `tables`, `average` and
    `patience` are as the heavy ranker's.
    """

    model: Literal["two_tower", "mtmd", "mmoe_dcn", "cross_feature"] = "two_tower"
    dim: int = 32
    hidden: tuple[int, ...] = (128,)
    width: int = 64
    experts: int = 4
    cross_layers: int = 2
    low_rank: int = 16
    domain: str = ""
    crossings: tuple[Crossing, ...] = ("attention", "matches")
    heads: int = 2
    tables: Tables = "own"
    dropout: float = 0.1
    epochs: int = 2
    batch: int = 2048
    learning_rate: float = 0.005
    weight_decay: float = 0.1
    average: float = 0.0
    patience: int = 0
    keep: int = 1000


@dataclass(frozen=True, slots=True)
class UtilityTerm:
    """What one expected event of a task is worth in micros: an item `value` feature, or a constant.

    `given` names the tasks that must happen before it, whose probabilities multiply its own: a purchase that is
    predicted of those who clicked is `given = ["click"]`.
    """

    value: str | float
    given: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Rules:
    """What an item must bring to win: a utility of at least `reserve_micros`, and of each task at least its `floor`."""

    reserve_micros: float | None = None
    floor: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class DiversityRule:
    """Of the items that share a value of the column this rule is named after, at most so many win; a null is no group.

    The column is one of the items table, whether or not it is a feature. `at_most = 1` is dedup.
    """

    at_most: int


@dataclass(frozen=True, slots=True)
class Metadata:
    """The items-table columns an answer carries for each winner; empty means all of them."""

    columns: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Serve:
    """Promises to callers: the default deadline and the most winners one request may ask for."""

    deadline_ms: float = 1000.0
    max_k: int = 1000


@dataclass(frozen=True, slots=True)
class Bound:
    """What a validation gate must measure: `at_least`, `at_most`, or both."""

    at_least: float | None = None
    at_most: float | None = None


@dataclass(frozen=True, slots=True)
class Config:
    """One funnel. `load_config` is the way to make one; a Config that exists has names that meet."""

    name: str
    data: Data
    features: FeatureSchema
    tasks: Mapping[str, Task]
    retrieval: Retrieval
    utility: Mapping[str, UtilityTerm]
    seed: int = 7
    segments: Segments | None = None
    targeting: Mapping[str, TargetingRule] = field(default_factory=dict)
    heavy_ranker: HeavyRankerConfig | None = None
    distillation: Distillation = field(default_factory=Distillation)
    ranker: RankerConfig = field(default_factory=RankerConfig)
    rules: Rules = field(default_factory=Rules)
    diversity: Mapping[str, DiversityRule] = field(default_factory=dict)
    metadata: Metadata = field(default_factory=Metadata)
    serve: Serve = field(default_factory=Serve)
    validate: Mapping[str, Bound] = field(default_factory=dict)

    def labels(self) -> list[str]:
        """Every 0/1 column of the log the funnel reads, each once: tasks first, then targets and histories."""
        names = [t.label for t in self.tasks.values()] + [self.retrieval.relevant, *self.retrieval.targets]
        names += self.retrieval.popularity.events
        names += [*self.features.events(), *(rate.of for rate in self.features.rates().values())]
        return [n for n in dict.fromkeys(names) if n != IMPRESSION]

    def targeted(self, owner: Owner) -> list[str]:
        """The columns of users, requests or items that the rules of [targeting] read, each once."""
        columns: list[str] = [getattr(rule, owner) for rule in self.targeting.values()]
        return [name for name in dict.fromkeys(columns) if name]

    def ruled(self) -> dict[str, tuple[str, Kind]]:
        """The columns of the items table that [rules] reads, by the key that names them, and what they must hold."""
        return columns_named(self.rules, "rules")

    def to_dict(self) -> dict[str, object]:
        """Plain JSON types, features by kind."""
        plain = asdict(self)
        plain["features"] = self.features.to_dict()
        return dict(json.loads(json.dumps(plain)))


GATES = ("retrieval_recall", "recall_over_popularity", "normalised_entropy", "calibration_error", "golden")
"""The validation gates a funnel file may bound; `lifecycle.validate` measures them."""


def load_config(path: Path) -> Config:
    """The funnel file at `path`. Raises ConfigError naming the file and every problem found."""
    try:
        plain = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such funnel file; name one with --config, or see examples/") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    return parse_config(plain, where=str(path))


def parse_config(plain: Mapping[str, object], where: str) -> Config:
    """The same from already parsed TOML; `where` names the source in errors."""
    problems = Problems()
    config = structure(plain, Config, "", problems)
    if config is not None and not problems:
        _check_names(config, problems)
    if problems or config is None:
        raise ConfigError("\n".join(f"{where}: {p}" for p in problems))
    return config


def _check_names(config: Config, problems: Problems) -> None:
    _check_days(config.data, problems)
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
    for gate, bound in config.validate.items():
        problems.known(f"validate.{gate}", gate, list(GATES), "a gate")
        if bound.at_least is None and bound.at_most is None:
            problems.add(f"validate.{gate}", "expected at_least, at_most, or both")
    _check_domain(config, problems)
    _check_segments(config, problems)
    _check_targeting(config.targeting, problems)
    _check_ranges(config, problems)


def _check_rules(config: Config, problems: Problems) -> None:
    for task, term in config.utility.items():
        others = [name for name in config.tasks if name != task]
        for name in term.given:
            problems.known(f"utility.{task}.given", name, others, "another task of [tasks]")
        if len(set(term.given)) != len(term.given):
            problems.add(f"utility.{task}.given", f"expected each task once, got {list(term.given)}")
    reserve = config.rules.reserve_micros
    if reserve is not None and not isfinite(reserve):
        problems.add("rules.reserve_micros", f"expected a finite number, got {reserve}")
    for task, floor in config.rules.floor.items():
        problems.known(f"rules.floor.{task}", task, list(config.tasks), "a task of [tasks]")
        if not 0 <= floor <= 1:
            problems.add(f"rules.floor.{task}", f"expected a probability, 0 to 1, got {floor}")
    for column, rule in config.diversity.items():
        if rule.at_most < 1:
            problems.add(f"diversity.{column}.at_most", f"expected 1 or more, got {rule.at_most}")


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
    "retrieval": ("dim", "batch", "epochs", "keep", "temperature", "learning_rate", "group"),
    "segments": ("least",),
    "heavy_ranker": ("width", "experts", "cross_layers", "low_rank", "heads", "batch", "epochs", "learning_rate"),
    "distillation": ("among",),
    "ranker": (
        *("dim", "width", "experts", "cross_layers", "low_rank", "heads"),
        *("batch", "epochs", "keep", "learning_rate"),
    ),
    "serve": ("deadline_ms", "max_k"),
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
    whole = {"ranker.patience": ranker.patience, "distillation.candidates": config.distillation.candidates}
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
