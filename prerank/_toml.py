"""Parsed TOML into frozen dataclasses, strictly: every bad key is told, with the nearest name."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from difflib import get_close_matches
from typing import Annotated, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from prerank.errors import ConfigError
from prerank.schema import KINDS, OWNERS, Counter, FeatureSchema, Kind

T = TypeVar("T")
_BAD = object()
_WORDS = {str: "text in quotes", int: "a whole number", float: "a number", bool: "true or false"}


class Problems:
    """A list of sentences, each naming the key it is about."""

    def __init__(self) -> None:
        self._found: list[str] = []

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def add(self, key: str, sentence: str) -> None:
        """Note one problem of one key (dotted path)."""
        self._found.append(f"{key}: {sentence}" if key else sentence)

    def known(self, key: str, name: str, names: Sequence[str], what: str) -> None:
        """Note a problem unless `name` is one of `names`."""
        if name not in names:
            choice = ", ".join(names) or "there is none"
            self.add(key, f"expected {what} ({choice}), got {name!r}{nearest(name, names)}")


def nearest(name: str, names: Sequence[str]) -> str:
    """`; did you mean "x"?` for the closest of `names`, or nothing."""
    close = get_close_matches(name, names, n=1, cutoff=0.5)
    return f'; did you mean "{close[0]}"?' if close else ""


def structure(plain: Mapping[str, object], into: type[T], path: str, problems: Problems) -> T | None:
    """`plain` as the dataclass `into`, or None with what is wrong added to `problems`."""
    before = len(problems)
    hints = get_type_hints(into)
    known = {f.name: f for f in fields(into)}  # type: ignore[arg-type]
    for name in plain:
        if name not in known:
            problems.add(_join(path, name), f"unknown key{nearest(name, list(known))}")
    chosen: dict[str, object] = {}
    for name, declared in known.items():
        key = _join(path, name)
        if name in plain:
            chosen[name] = _convert(plain[name], hints[name], key, problems)
        elif _required(declared):
            problems.add(key, f"missing; expected {_describe(hints[name])}")
    return into(**chosen) if len(problems) == before else None


def columns_named(options: object, path: str) -> dict[str, tuple[str, Kind]]:
    """The options of a dataclass, and of those in it, that name columns: their type is text annotated with a kind.

    By dotted key: the column, and the kind of what it must hold.
    """
    found: dict[str, tuple[str, Kind]] = {}
    for name, hint in get_type_hints(type(options), include_extras=True).items():
        key, given = _join(path, name), getattr(options, name)
        if is_dataclass(given):
            found |= columns_named(given, key)
        elif get_origin(hint) is Annotated:
            found[key] = given, hint.__metadata__[0]
    return found


def _convert(given: object, wanted: object, key: str, problems: Problems) -> object:
    if wanted is FeatureSchema:
        return _features(given, key, problems)
    origin = get_origin(wanted)
    if origin in (types.UnionType, Union):
        return _union(given, wanted, key, problems)
    if origin is Mapping and isinstance(given, dict):
        inner = get_args(wanted)[1]
        return {name: _convert(one, inner, _join(key, name), problems) for name, one in given.items()}
    if origin is tuple and isinstance(given, list):
        return _tuple(given, wanted, key, problems)
    if origin is Literal:
        if given in get_args(wanted):
            return given
        names = [str(a) for a in get_args(wanted)]
        near = nearest(given, names) if isinstance(given, str) else ""
        problems.add(key, f"expected one of {names}, got {given!r}{near}")
        return _BAD
    if is_dataclass(wanted) and isinstance(given, dict):
        return structure(given, cast(type[object], wanted), key, problems)
    if _is_scalar(given, wanted):
        return float(cast(float, given)) if wanted is float else given
    problems.add(key, f"expected {_describe(wanted)}, got {given!r}")
    return _BAD


def _is_scalar(given: object, wanted: object) -> bool:
    if wanted is float:
        return isinstance(given, int | float) and not isinstance(given, bool)
    if wanted is int:
        return isinstance(given, int) and not isinstance(given, bool)
    return wanted in (str, bool) and isinstance(given, cast(type, wanted))


def _union(given: object, wanted: object, key: str, problems: Problems) -> object:
    for option in get_args(wanted):
        if option is not type(None) and (
            _is_scalar(given, option) or (is_dataclass(option) and isinstance(given, dict))
        ):
            return _convert(given, option, key, problems)
    problems.add(key, f"expected {_describe(wanted)}, got {given!r}")
    return _BAD


def _tuple(given: list[object], wanted: object, key: str, problems: Problems) -> object:
    args = get_args(wanted)
    if args[-1] is not Ellipsis and len(args) != len(given):
        problems.add(key, f"expected {len(args)} entries, got {len(given)}: {given}")
        return _BAD
    inner = [args[0]] * len(given) if args[-1] is Ellipsis else list(args)
    return tuple(_convert(one, t, f"{key}[{n}]", problems) for n, (one, t) in enumerate(zip(given, inner, strict=True)))


def _features(given: object, key: str, problems: Problems) -> FeatureSchema | None:
    known = [f.name for f in fields(FeatureSchema)]
    if not isinstance(given, dict):
        problems.add(key, f"expected tables {known}, got {given!r}")
        return None
    before = len(problems)
    owners: dict[str, dict[str, Kind]] = {}
    counters: dict[str, Counter | None] = {}
    for owner, table in given.items():
        if owner not in known:
            problems.add(_join(key, owner), f"unknown key{nearest(owner, known)}")
        elif not isinstance(table, dict):
            problems.add(_join(key, owner), f"expected a table of features, got {table!r}")
        elif owner not in OWNERS:
            counters = {name: _counter(options, f"{key}.{owner}.{name}", problems) for name, options in table.items()}
        else:
            kinds = {name: _feature(options, f"{key}.{owner}.{name}", problems) for name, options in table.items()}
            owners[owner] = {name: kind for name, kind in kinds.items() if kind is not None}
    if len(problems) > before:
        return None
    try:
        return FeatureSchema(**owners, interaction={n: c for n, c in counters.items() if c is not None})
    except ConfigError as error:
        problems.add("", str(error))
        return None


def _counter(options: object, key: str, problems: Problems) -> Counter | None:
    if not isinstance(options, dict):
        problems.add(key, f"expected {{ count = ..., by = ..., window = ... }}, got {options!r}")
        return None
    return structure(options, Counter, key, problems)


def _feature(options: object, key: str, problems: Problems) -> Kind | None:
    if not isinstance(options, dict) or "kind" not in options:
        problems.add(key, f"expected {{ kind = ... }} with one of {list(KINDS)}, got {options!r}")
        return None
    name = options["kind"]
    if not isinstance(name, str) or name not in KINDS:
        near = nearest(name, list(KINDS)) if isinstance(name, str) else ""
        problems.add(f"{key}.kind", f"expected one of {list(KINDS)}, got {name!r}{near}")
        return None
    rest = {k: v for k, v in options.items() if k != "kind"}
    return structure(rest, KINDS[name], key, problems)


def _required(declared: Field[object]) -> bool:
    return declared.default is MISSING and declared.default_factory is MISSING


def _describe(wanted: object) -> str:
    origin = get_origin(wanted)
    if origin in (types.UnionType, Union):
        return " or ".join(_describe(a) for a in get_args(wanted) if a is not type(None))
    if origin is tuple:
        args = get_args(wanted)
        return f"a list of {_describe(args[0])}" if args[-1] is Ellipsis else f"a list of {len(args)} entries"
    if origin is Literal:
        return f"one of {list(get_args(wanted))}"
    return _WORDS.get(cast(type, wanted), "a table")


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
