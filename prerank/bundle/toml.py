"""Plain values as TOML, for the one file of a version that people read; the standard library only reads it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def to_toml(plain: Mapping[str, object]) -> str:
    """Text that `tomllib` reads back as `plain`, less its None values, which TOML has no word for.

    Tables of tables get a header each; a table of plain values inside one is written on one line.
    """
    return "\n".join(_lines(plain, ())).strip() + "\n"


def _lines(table: Mapping[str, object], path: tuple[str, ...]) -> Iterator[str]:
    known = {name: value for name, value in table.items() if value is not None}
    below = {n: v for n, v in known.items() if isinstance(v, Mapping) and (not path or _has_tables(v))}
    if path:
        yield f"\n[{'.'.join(_key(part) for part in path)}]"
    for name, value in known.items():
        if name not in below:
            yield f"{_key(name)} = {_value(value)}"
    for name, inner in below.items():
        yield from _lines(inner, (*path, name))


def _has_tables(table: Mapping[str, object]) -> bool:
    return any(isinstance(value, Mapping) for value in table.values())


def _key(name: str) -> str:
    return name if _BARE_KEY.fullmatch(name) else _text(name)


def _value(value: object) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case int() | float():
            return repr(value)
        case str():
            return _text(value)
        case list() | tuple():
            return f"[{', '.join(_value(one) for one in value)}]"
        case Mapping():
            pairs = [f"{_key(n)} = {_value(v)}" for n, v in value.items() if v is not None]
            return f"{{ {', '.join(pairs)} }}" if pairs else "{}"
    raise AssertionError(f"TOML has no {type(value).__name__}")


def _text(text: str) -> str:
    # a TOML basic string escapes as JSON does, and DEL besides
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007F")
