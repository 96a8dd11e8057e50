"""What each feature is: its name, its owner (user, context, item) and its kind; and what is counted between the two.

The schema knows names and shapes, not values: vocabularies and statistics are `features.transforms`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from math import isfinite
from typing import Literal, TypeAlias

from prerank.errors import ConfigError

Owner: TypeAlias = Literal["user", "context", "item"]
OWNERS: tuple[Owner, ...] = ("user", "context", "item")
IMPRESSION = "impression"
"""The event every row of the log is; a label column names a narrower one."""


@dataclass(frozen=True, slots=True)
class Category:
    """One of many names (integer, string or boolean): a learned vector of width `dim` each.

    `hash` > 0 replaces the vocabulary by that many hash buckets; `min_count` sends rarer values to the unknown one.
    """

    column: str = ""
    dim: int = 16
    hash: int = 0
    min_count: int = 1


@dataclass(frozen=True, slots=True)
class Number:
    """A quantity, standardised; `log` takes sign(x) log(1 + |x|) first. Missing is the mean."""

    column: str = ""
    log: bool = False


@dataclass(frozen=True, slots=True)
class Bag:
    """A set of categories (a list column, or text split at `separator`); the first `length` members count.

    A user's bag may be `of` a hashed category of [features.item] with the same `hash`: a ranker that crosses features
    then knows whether the candidate's own is among the members.
    """

    column: str = ""
    dim: int = 16
    length: int = 8
    separator: str = ""
    hash: int = 0
    min_count: int = 1
    of: str = ""


@dataclass(frozen=True, slots=True)
class History:
    """The item feature `of` of this user's last `length` items with the event `events`, oldest first.

    `events` is a label column of the log, or "impression" for every item shown.
    """

    of: str
    events: str = IMPRESSION
    length: int = 50


@dataclass(frozen=True, slots=True)
class Embedding:
    """A vector of `width` numbers made elsewhere, taken as it is; missing is zeros."""

    width: int
    column: str = ""


@dataclass(frozen=True, slots=True)
class Value:
    """A number kept exactly as it came, for rules and utility; no model sees it. Missing is `missing`."""

    column: str = ""
    missing: float = 0.0


@dataclass(frozen=True, slots=True)
class Rate:
    """How often an item's impressions had the label `of`, in the log's days before: log odds over those of all items.

    With `by`, a category of [features.item], of all items with the same value. Drawn towards 0, all items' rate, by
    `prior` impressions. `history` begins with what is older than the training days, the history table's events too,
    where the label is known. A number for models; the published version holds that of the whole log.
    """

    of: str
    by: str = ""
    prior: float = 20.0
    history: bool = False


Kind: TypeAlias = Category | Number | Bag | History | Embedding | Value | Rate
DERIVED = (History, Rate)
"""The kinds that are made of the log, and read no column of their owner's table."""
KINDS: dict[str, type[Kind]] = {
    "category": Category,
    "number": Number,
    "bag": Bag,
    "history": History,
    "embedding": Embedding,
    "value": Value,
    "rate": Rate,
}
_UNITS_MS = {"s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_DURATION = re.compile(r"([1-9][0-9]{0,5})([smhd])")


@dataclass(frozen=True, slots=True)
class Counter:
    """How many of this user's events `count` lately had the candidate's own `by`.

    `count` is a label column of the log, or "impression"; `by` a category or bag of [features.item], such as
    "advertiser_id". An empty `by` counts the events on any item, which is then a feature of the user alone. Lately is
    either a `window`, a duration before the moment such as "90s", "30m", "1h" or "7d", or since the user's `last` so
    many impressions. With `on`, a category of [features.context], only events count whose context had the value that
    the request has, and `last` is of such impressions. With a `by` no more than the latest `length` of those events
    count (of a bag, members). A `share` is how many of the impressions lately those events are, as log odds.
    """

    count: str = IMPRESSION
    by: str = ""
    on: str = ""
    window: str = ""
    last: int = 0
    length: int = 50
    share: bool = False

    @property
    def window_ms(self) -> int:
        """The window in milliseconds. Raises ConfigError for what is no duration."""
        found = _DURATION.fullmatch(self.window)
        if not found:
            raise ConfigError(f'window = {self.window!r}: expected a duration such as "90s", "30m", "1h" or "7d"')
        return int(found[1]) * _UNITS_MS[found[2]]


_KIND_NAMES = {cls: name for name, cls in KINDS.items()}


def kind_name(kind: Kind) -> str:
    """The funnel file's word for this kind, such as "category"."""
    return _KIND_NAMES[type(kind)]


def column_of(name: str, kind: Kind) -> str:
    """The table column a feature reads: its `column`, or its own name."""
    assert not isinstance(kind, History | Rate), "it is made of the log, not of a column"
    return kind.column or name


@dataclass(frozen=True, slots=True)
class FeatureSchema:
    """Every feature by owner, in order, and the counters. Raises ConfigError where features cannot work together."""

    user: Mapping[str, Kind] = field(default_factory=dict)
    context: Mapping[str, Kind] = field(default_factory=dict)
    item: Mapping[str, Kind] = field(default_factory=dict)
    interaction: Mapping[str, Counter] = field(default_factory=dict)

    def __post_init__(self) -> None:
        seen: dict[str, Owner] = {}
        for owner, name, kind in self:
            if name in seen and not (seen[name] != "item" and owner == "item"):
                raise ConfigError(
                    f"features.{owner}.{name}: the name is taken by features.{seen[name]}.{name}; choose another"
                )
            seen.setdefault(name, owner)
            if "." in name or not name:
                raise ConfigError(f"features.{owner}.{name!r}: expected a name without dots")
            _check_ranges(f"features.{owner}.{name}", kind)
            if isinstance(kind, History):
                self._check_history(owner, name, kind)
            if isinstance(kind, Rate):
                self._check_rate(owner, name, kind)
            if isinstance(kind, Bag) and kind.of:
                self._check_bag(owner, name, kind)
        for name, kind in self.context.items():
            if isinstance(kind, Embedding | Value):
                raise ConfigError(
                    f"features.context.{name}: a context feature is a category, number or bag, not {kind_name(kind)}"
                )
        for name, counter in self.interaction.items():
            self._check_counter(name, counter, seen)

    def _check_counter(self, name: str, counter: Counter, seen: Mapping[str, Owner]) -> None:
        key = f"features.interaction.{name}"
        if name in seen:
            raise ConfigError(f"{key}: the name is taken by features.{seen[name]}.{name}; choose another")
        if "." in name or not name:
            raise ConfigError(f"features.interaction.{name!r}: expected a name without dots")
        if counter.length < 1:
            raise ConfigError(f"{key}.length = {counter.length}: expected at least 1")
        if bool(counter.window) == bool(counter.last) or counter.last < 0:
            raise ConfigError(
                f"{key}: expected a window (a duration) or last (a number of impressions), one of the two, got "
                f"window = {counter.window!r} and last = {counter.last}"
            )
        try:
            _ = counter.window and counter.window_ms
        except ConfigError as error:
            raise ConfigError(f"{key}.{error}") from None
        if counter.share and (counter.by or counter.count == IMPRESSION):
            raise ConfigError(
                f'{key}: share = true: expected a label to count, such as count = "is_click", and no `by`, got '
                f"count = {counter.count!r} and by = {counter.by!r}; a share is a label's among all impressions"
            )
        on = self.context.get(counter.on)
        if counter.on and not (isinstance(on, Category) and not on.hash):
            known = [other for other, kind in self.context.items() if isinstance(kind, Category) and not kind.hash]
            raise ConfigError(
                f"{key}.on = {counter.on!r}: expected a category of [features.context] without hash, one of {known}"
            )
        if counter.by and not isinstance(self.item.get(counter.by), Category | Bag):
            known = [other for other, kind in self.item.items() if isinstance(kind, Category | Bag)]
            raise ConfigError(
                f"{key}.by = {counter.by!r}: expected a category or bag of [features.item], one of {known}"
            )

    def _check_bag(self, owner: Owner, name: str, kind: Bag) -> None:
        of = self.item.get(kind.of)
        if owner == "item" or not kind.hash or not isinstance(of, Category) or of.hash != kind.hash:
            hashed = {n: k.hash for n, k in self.item.items() if isinstance(k, Category) and k.hash}
            raise ConfigError(
                f"features.{owner}.{name}.of = {kind.of!r}: expected, for a bag of hash = {kind.hash}, "
                f"a category of [features.item] with the same hash ({hashed}), and a bag of the user or context"
            )

    def _check_rate(self, owner: Owner, name: str, kind: Rate) -> None:
        key = f"features.{owner}.{name}"
        if owner != "item":
            raise ConfigError(f"{key}: only an item has a rate; move it to [features.item], or count with a counter")
        if not kind.prior > 0:
            raise ConfigError(f"{key}.prior = {kind.prior}: expected more than 0 impressions")
        if kind.by and not isinstance(self.item.get(kind.by), Category):
            known = [other for other, one in self.item.items() if isinstance(one, Category)]
            raise ConfigError(f"{key}.by = {kind.by!r}: expected a category of [features.item], one of {known}")

    def _check_history(self, owner: Owner, name: str, kind: History) -> None:
        if owner != "user":
            raise ConfigError(f"features.{owner}.{name}: only a user has a history; move it to [features.user]")
        if not isinstance(self.item.get(kind.of), Category):
            known = [other for other, k in self.item.items() if isinstance(k, Category)]
            raise ConfigError(
                f"features.user.{name}.of = {kind.of!r}: expected a category of [features.item], one of {known}"
            )

    def __iter__(self) -> Iterator[tuple[Owner, str, Kind]]:
        for owner in OWNERS:
            for name, kind in self.of(owner).items():
                yield owner, name, kind

    def of(self, owner: Owner) -> Mapping[str, Kind]:
        """The features of one owner."""
        found: Mapping[str, Kind] = getattr(self, owner)
        return found

    def columns(self, owner: Owner) -> list[str]:
        """The table columns this owner's features read, each once."""
        names = [column_of(n, k) for n, k in self.of(owner).items() if not isinstance(k, DERIVED)]
        return list(dict.fromkeys(names))

    def request_features(self) -> list[str]:
        """The names of what is encoded for a request: user and context features and counters, in order."""
        return [*self.user, *self.context, *self.interaction]

    def events(self) -> list[str]:
        """The events that histories and counters read, each once: label columns, or "impression"."""
        found = [h.events for h in self.histories().values()] + [c.count for c in self.interaction.values()]
        return list(dict.fromkeys(found))

    def rates(self) -> dict[str, Rate]:
        """The rates by name."""
        return {name: kind for name, kind in self.item.items() if isinstance(kind, Rate)}

    def lasting(self) -> FeatureSchema:
        """Without rates and counters, which a day, or a minute, changes."""
        item = {name: kind for name, kind in self.item.items() if not isinstance(kind, Rate)}
        return FeatureSchema(self.user, self.context, item)

    def histories(self) -> dict[str, History]:
        """The history features by name."""
        return {name: kind for name, kind in self.user.items() if isinstance(kind, History)}

    def to_dict(self) -> dict[str, dict[str, dict[str, object]]]:
        """Plain JSON types; `from_dict` reads them back."""
        kinds: dict[str, dict[str, dict[str, object]]] = {
            owner: {name: {"kind": kind_name(kind), **asdict(kind)} for name, kind in self.of(owner).items()}
            for owner in OWNERS
        }
        return {**kinds, _INTERACTION: {name: asdict(counter) for name, counter in self.interaction.items()}}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Mapping[str, Mapping[str, object]]]) -> FeatureSchema:
        """The schema written by `to_dict`, also of when there were fewer options: those it does not say are as usual.

        Raises KeyError or TypeError on anything else.
        """

        def kind(options: Mapping[str, object]) -> Kind:
            chosen = KINDS[str(options["kind"])]
            return chosen(**{f.name: options[f.name] for f in fields(chosen) if f.name in options})  # type: ignore[arg-type]

        counters = {name: Counter(**options) for name, options in plain[_INTERACTION].items()}  # type: ignore[arg-type]
        owners = {owner: {n: kind(o) for n, o in plain[owner].items()} for owner in OWNERS}
        return cls(**owners, interaction=counters)

    def first_difference(self, other: FeatureSchema) -> str | None:
        """A sentence naming the first feature that is not the same in both, or None."""
        mine, theirs = self.to_dict(), other.to_dict()
        for owner in mine:
            for name in list(mine[owner]) + [n for n in theirs[owner] if n not in mine[owner]]:
                a, b = mine[owner].get(name), theirs[owner].get(name)
                if a != b:
                    return f"{owner} feature {name!r}: {_show(a)} here, {_show(b)} there"
            if list(mine[owner]) != list(theirs[owner]):
                return f"{owner} features are in another order: {list(mine[owner])} here, {list(theirs[owner])} there"
        return None


_INTERACTION = "interaction"
_LEAST = {"dim": 1, "length": 1, "width": 1, "min_count": 1, "hash": 0}


def _check_ranges(key: str, kind: Kind) -> None:
    options = asdict(kind)
    for name, least in _LEAST.items():
        if name in options and options[name] < least:
            raise ConfigError(f"{key}.{name} = {options[name]}: expected at least {least}")
    if options.get("hash") and options.get("min_count", 1) > 1:
        raise ConfigError(f"{key}: hash and min_count do not go together; a hash has no rare values to leave out")
    if not isfinite(options.get("missing", 0.0)):
        raise ConfigError(f"{key}.missing = {options['missing']}: expected a finite number")


def _show(options: Mapping[str, object] | None) -> str:
    return "absent" if options is None else ", ".join(f"{k}={v}" for k, v in options.items())
