"""What each feature is: its name, its owner (user, context, item) and its kind.

The schema knows names and shapes, not values: vocabularies and statistics are `features.transforms`.
"""

from __future__ import annotations

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
    """A set of categories (a list column, or text split at `separator`); the first `length` members count."""

    column: str = ""
    dim: int = 16
    length: int = 8
    separator: str = ""
    hash: int = 0
    min_count: int = 1


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


Kind: TypeAlias = Category | Number | Bag | History | Embedding | Value
KINDS: dict[str, type[Kind]] = {
    "category": Category,
    "number": Number,
    "bag": Bag,
    "history": History,
    "embedding": Embedding,
    "value": Value,
}
_KIND_NAMES = {cls: name for name, cls in KINDS.items()}


def kind_name(kind: Kind) -> str:
    """The funnel file's word for this kind, such as "category"."""
    return _KIND_NAMES[type(kind)]


def column_of(name: str, kind: Kind) -> str:
    """The table column a feature reads: its `column`, or its own name."""
    assert not isinstance(kind, History), "a history reads the log, not a column"
    return kind.column or name


@dataclass(frozen=True, slots=True)
class FeatureSchema:
    """Every feature by owner, in order. Raises ConfigError where features cannot work together."""

    user: Mapping[str, Kind] = field(default_factory=dict)
    context: Mapping[str, Kind] = field(default_factory=dict)
    item: Mapping[str, Kind] = field(default_factory=dict)

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
        for name, kind in self.context.items():
            if isinstance(kind, Embedding | Value):
                raise ConfigError(
                    f"features.context.{name}: a context feature is a category, number or bag, not {kind_name(kind)}"
                )

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
        names = [column_of(n, k) for n, k in self.of(owner).items() if not isinstance(k, History)]
        return list(dict.fromkeys(names))

    def histories(self) -> dict[str, History]:
        """The history features by name."""
        return {name: kind for name, kind in self.user.items() if isinstance(kind, History)}

    def to_dict(self) -> dict[str, dict[str, dict[str, object]]]:
        """Plain JSON types; `from_dict` reads them back."""
        return {
            owner: {name: {"kind": kind_name(kind), **asdict(kind)} for name, kind in self.of(owner).items()}
            for owner in OWNERS
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Mapping[str, Mapping[str, object]]]) -> FeatureSchema:
        """The schema written by `to_dict`. Raises KeyError or TypeError on anything else."""

        def kind(options: Mapping[str, object]) -> Kind:
            chosen = KINDS[str(options["kind"])]
            return chosen(**{f.name: options[f.name] for f in fields(chosen)})  # type: ignore[arg-type]

        return cls(**{owner: {n: kind(o) for n, o in plain[owner].items()} for owner in OWNERS})

    def first_difference(self, other: FeatureSchema) -> str | None:
        """A sentence naming the first feature that is not the same in both, or None."""
        mine, theirs = self.to_dict(), other.to_dict()
        for owner in OWNERS:
            for name in list(mine[owner]) + [n for n in theirs[owner] if n not in mine[owner]]:
                a, b = mine[owner].get(name), theirs[owner].get(name)
                if a != b:
                    return f"{owner} feature {name!r}: {_show(a)} here, {_show(b)} there"
            if list(mine[owner]) != list(theirs[owner]):
                return f"{owner} features are in another order: {list(mine[owner])} here, {list(theirs[owner])} there"
        return None


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
