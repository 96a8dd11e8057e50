"""funnel.toml as frozen dataclasses, in the order a request lives; `load_config` reads the one into the other.

Names of features, labels and columns are checked against each other here; whether the data has them is
`data.check`'s question. Machine facts (device, workers, ports, folders) are command-line flags, never keys.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date, timedelta
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from prerank._funnel_checks import AGAINST_LIVE, check_names
from prerank._funnel_checks import GATES as GATES
from prerank._funnel_checks import INDEX as INDEX
from prerank._toml import Problems, columns_named, structure
from prerank.errors import ConfigError
from prerank.schema import IMPRESSION, FeatureSchema, Kind, Owner, Value

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
    `requests` is a server's log of requests: what was served is what is trained on, for impressions of a request in it.
    They are the user's of the same time, or those with its id in the log's column `request_id`, if there is one.
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
    requests: str = ""
    request_id: str = ""

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
class Resident:
    """The items whose features are kept in memory: the `top` of largest value in the items' number column `by`.

    A null is the smallest; of equal items those of smaller item_id. All others are the tail.
    """

    top: int
    by: ItemNumber


@dataclass(frozen=True, slots=True)
class Inventory:
    """Which items' features are in memory, and the room beside them.

    `slack` is how many rows are free for items that come or change while a version serves. The tail, if `resident`
    leaves one, is fetched as requests ask for it: `cached` items of it are kept at once, each for `ttl_s` seconds, and
    a request waits `fetch_ms` milliseconds for what is not.
    """

    resident: Resident | None = None
    slack: int = 0
    cached: int = 16_384
    ttl_s: float = 300.0
    fetch_ms: float = 5.0


@dataclass(frozen=True, slots=True)
class GeneratorConfig:
    """Candidates beside those of the index, at most `quota` that are not among them.

    "top": the items with the largest numbers, or times, in the items' column `by`. "same": items that share the value
    that the user's `history` is of with one in it, the newest first. "list": `items`, by item_id, in this order.
    """

    kind: Literal["top", "same", "list"]
    quota: int
    by: str = ""
    history: str = ""
    items: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class IndexConfig:
    """How the k most similar rows are found, and what their vectors are stored as.

    "bfloat16" takes half of the bytes of "float32", "int8", with a scale a row, about a quarter; similarities are those
    of what is stored. "exact" looks at every eligible item; "hnsw", which needs prerank[hnsw], searches a graph where
    that is measured, when a version is published, to be faster and to find on average at least `floor` of the best.

    Where index hosts have a shard each, items that share a value of the column `by`, one that answers may show, are in
    one shard; without it their item_id says in which. An index of each of so many `shards` is published, each a file: a
    host of one of so many maps no other.
    """

    kind: Literal["exact", "hnsw"] = "exact"
    storage: Literal["float32", "bfloat16", "int8"] = "float32"
    floor: float = 0.98
    shards: int = 1
    by: str = ""


@dataclass(frozen=True, slots=True)
class Retrieval:
    """The two towers: what they learn to find, how, and how many candidates a request keeps.

    `targets` weighs the events that are positives; `relevant` is the label that recall is measured on. An example is
    a user at a moment with the next events of that day as positives, at most `group` of them.

    "softmax" has the whole catalogue as negatives. "sampled_softmax" has what the batch's other examples want, as many
    as `uniform_negatives` drawn from the catalogue, and the items of the `cached_batches` batches before, as their
    vectors were then; it corrects for how probable each of them was. "in_batch_softmax" has the batch's and corrects
    nothing, so what is popular comes out too low: it is there to be compared with.
    """

    relevant: str
    targets: Mapping[str, float] = field(default_factory=dict)
    dim: int = 64
    hidden: tuple[int, ...] = (128,)
    dropout: float = 0.1
    normalise: bool = False
    temperature: float = 1.0
    loss: Literal["softmax", "sampled_softmax", "in_batch_softmax"] = "softmax"
    uniform_negatives: int = 0
    cached_batches: int = 0
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
    `candidate_weight` is a candidate set's weight beside its winner's 1: winners are labelled by teachers that saw less
    (`[heavy_ranker] folds`). `label_weight` adds that of the real label's log loss, on winners. With `candidates = 0`
    it learns from winners alone.
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
    """What is kept of the items table to be shown: `columns` come with answers, `deferred` ones are asked for later.

    No `columns` means all that are not deferred; with some, those that are neither are not kept.
    """

    columns: tuple[str, ...] = ()
    deferred: tuple[str, ...] = ()

    def needed_of(self, kept: Sequence[str]) -> tuple[str, ...]:
        """Which of the columns that are `kept` come with answers."""
        return self.columns or tuple(name for name in kept if name not in self.deferred)


@dataclass(frozen=True, slots=True)
class StageLimit:
    """What one stage of a request may take: `deadline_ms` of its own from its start, and so many of it `at_once`."""

    deadline_ms: float | None = None
    at_once: int | None = None


@dataclass(frozen=True, slots=True)
class Serve:
    """Promises to callers: the default deadline and the most winners one request may ask for; limits of `stages`.

    Where the index is on hosts of its own, a request waits `hosts_ms` milliseconds for them, and the user towers of
    `towers` versions stay loaded, for hosts that have another version than the one that serves.
    """

    deadline_ms: float = 1000.0
    max_k: int = 1000
    hosts_ms: float = 50.0
    towers: int = 3
    stages: Mapping[str, StageLimit] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Bound:
    """What a validation gate must measure: absolute, against what the live version measures on the same day, or both.

    `not_below_live_by` and `not_above_live_by` are in the gate's own unit, `at_least_of_live` and `at_most_of_live`
    are shares of what live measures. Where nothing is live, those against it hold.
    """

    at_least: float | None = None
    at_most: float | None = None
    not_below_live_by: float | None = None
    not_above_live_by: float | None = None
    at_least_of_live: float | None = None
    at_most_of_live: float | None = None

    @property
    def is_against_live(self) -> bool:
        """Whether the live version is to be measured too."""
        return any(getattr(self, name) is not None for name in AGAINST_LIVE)


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
    inventory: Inventory = field(default_factory=Inventory)
    generators: Mapping[str, GeneratorConfig] = field(default_factory=dict)
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

    def numbers(self) -> dict[str, tuple[str, Kind]]:
        """Those of `ruled`, and those that publishing alone reads."""
        return self.ruled() | columns_named(self.inventory, "inventory")

    def item_columns(self) -> list[str]:
        """The columns of the items table that a version reads of an item, each once; those that answers show beside."""
        names = [*self.features.columns("item"), *self.targeted("item"), *self.diversity]
        names += [*self.metadata.columns, *self.metadata.deferred]
        names += [column for column, _ in self.ruled().values()]
        names += [one.by for one in self.generators.values() if one.by]
        return list(dict.fromkeys(names))

    def known_of_all(self) -> frozenset[str]:
        """The item features that are read of items that are not resident too: of a user's past, and worths."""
        read = {history.of for history in self.features.histories().values()}
        read |= {counter.by for counter in self.features.interaction.values() if counter.by}
        values = {name for name, kind in self.features.item.items() if isinstance(kind, Value)}
        return frozenset(read | values)

    def to_dict(self) -> dict[str, object]:
        """Plain JSON types, features by kind."""
        plain = asdict(self)
        plain["features"] = self.features.to_dict()
        return dict(json.loads(json.dumps(plain)))


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
        check_names(config, problems)
    if problems or config is None:
        raise ConfigError("\n".join(f"{where}: {p}" for p in problems))
    return config
