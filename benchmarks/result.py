"""What every benchmark writes: one schema for all questions, read back as strictly as it was written."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"
KEYS = ("question", "date", "commit", "hardware", "versions", "config", "ceilings", "rows")


@dataclass(frozen=True, slots=True)
class Row:
    """One measured thing.

    `n` is its size (rows, pairs, users). Times of repeated calls are percentiles in milliseconds; anything else is
    `value` in `unit`, None where it was skipped. `ratio` is this over `against`, and the unit says what is better.
    `bar` is what an issue or a doc asks for, and `holds` whether it is met.
    """

    name: str
    n: int | None = None
    p50_ms: float | None = None
    p90_ms: float | None = None
    p99_ms: float | None = None
    value: float | None = None
    unit: str = ""
    against: str = ""
    ratio: float | None = None
    bar: float | None = None
    holds: bool | None = None

    @classmethod
    def timed(
        cls, name: str, times_ms: Sequence[float], n: int | None = None, against: str = "", ratio: float | None = None
    ) -> Row:
        """The row of repeated calls' times; its value is their median."""
        p50, p90, p99 = (_short(p) for p in np.percentile(times_ms, [50, 90, 99]))
        return cls(name, n, p50, p90, p99, p50, "ms", against, None if ratio is None else _short(ratio))

    @classmethod
    def of(
        cls, name: str, value: float, unit: str, n: int | None = None, against: str = "", ratio: float | None = None
    ) -> Row:
        """The row of one number, kept to six significant digits."""
        rounded = None if ratio is None else _short(ratio)
        return cls(name, n, value=_short(value), unit=unit, against=against, ratio=rounded)

    @classmethod
    def at_most(cls, name: str, value: float, unit: str, bar: float) -> Row:
        """The row of one number that `bar` is the most of."""
        return replace(cls.of(name, value, unit), bar=bar, holds=value <= bar)

    def within(self, bar: float, of: str = "value") -> Row:
        """The same with the bar that its field `of` is to be at most."""
        found = getattr(self, of)
        assert found is not None, of
        return replace(self, bar=_short(bar), holds=bool(found <= bar))

    def over(self, bar: float) -> Row:
        """The same with the bar that its value is to be at least."""
        assert self.value is not None
        return replace(self, bar=_short(bar), holds=self.value >= bar)

    @classmethod
    def skipped(cls, name: str, why: str) -> Row:
        """The row of something this machine could not measure."""
        return cls(f"{name} (skipped: {why})")


@dataclass(frozen=True, slots=True)
class Hardware:
    """The machine: the processor's own name, the cores this process may use, its memory."""

    cpu: str
    cores: int
    memory_gib: float
    accelerator: str = ""

    @property
    def slug(self) -> str:
        """Its name in a file name."""
        words = f"{self.accelerator or self.cpu} {self.cores} cores"
        return re.sub("[^a-z0-9]+", "-", words.lower()).strip("-")


@dataclass(frozen=True, slots=True)
class Result:
    """One run of one question. `date` is UTC, ISO 8601 to the second; `commit` ends in `+` where files had changed."""

    question: str
    date: str
    commit: str
    hardware: Hardware
    versions: Mapping[str, str]
    config: Mapping[str, object]
    ceilings: Mapping[str, float]
    rows: tuple[Row, ...] = field(default=())

    @property
    def is_quick(self) -> bool:
        """Whether it was a smaller version, which is no source for the README."""
        return bool(self.config.get("quick"))

    def row(self, name: str) -> Row:
        """The row of this name; KeyError says which there are."""
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"{self.question} has no row {name!r}; it has {', '.join(repr(r.name) for r in self.rows)}")

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Result:
        """What `to_json` wrote. Raises ValueError naming a key that is missing or not of the schema."""
        plain: dict[str, Any] = json.loads(text)
        if tuple(plain) != KEYS:
            raise ValueError(f"expected the keys {', '.join(KEYS)} in this order, got {', '.join(plain)}")
        try:
            plain["hardware"] = Hardware(**plain["hardware"])
            plain["rows"] = tuple(Row(**row) for row in plain["rows"])
        except TypeError as error:
            raise ValueError(f"{plain['question']}: {error}") from None
        names = [row.name for row in plain["rows"]]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"{plain['question']}: two rows are named {twice[0]!r}")
        return cls(**plain)

    def write(self, folder: Path = RESULTS) -> Path:
        """Into `<date>_<hardware>_<question>.json` of `folder`; a later run of the same day replaces an earlier one."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.date[:10]}_{self.hardware.slug}_{self.question}.json"
        path.write_text(json.dumps(asdict(self), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        return path


def read_results(folder: Path = RESULTS) -> list[Result]:
    """Every result of `folder`, oldest first. Raises ValueError naming the file that is none."""
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            found.append(Result.from_json(path.read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from None
    return sorted(found, key=lambda result: result.date)


def table(rows: Sequence[tuple[str, Row]] | Sequence[Row]) -> str:
    """The rows as a Markdown table that is also readable as it is; empty columns are left out."""
    pairs = [row if isinstance(row, tuple) else ("", row) for row in rows]
    columns: dict[str, list[str]] = {"question": [question for question, _ in pairs]}
    columns["what"] = [row.name for _, row in pairs]
    columns["n"] = ["" if row.n is None else f"{row.n:,}" for _, row in pairs]
    columns["value"] = [f"{shown(row.value)} {row.unit}".strip() for _, row in pairs]
    columns["p90 ms"] = [shown(row.p90_ms) for _, row in pairs]
    columns["p99 ms"] = [shown(row.p99_ms) for _, row in pairs]
    columns["over"] = [f"{shown(row.ratio)} x {row.against}" if row.ratio is not None else "" for _, row in pairs]
    columns["bar"] = [shown(row.bar) for _, row in pairs]
    columns["holds"] = [{None: "", True: "yes", False: "NO"}[row.holds] for _, row in pairs]
    kept = {name: cells for name, cells in columns.items() if any(cells)}
    widths = {name: max(len(name), *(len(c) for c in cells)) for name, cells in kept.items()}
    lines = [[name.ljust(widths[name]) for name in kept], ["-" * widths[name] for name in kept]]
    lines += [[kept[name][k].ljust(widths[name]) for name in kept] for k in range(len(pairs))]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shown(number: float | None) -> str:
    """Three significant digits, or all before the point; nothing for None."""
    if number is None:
        return ""
    if abs(number) >= 1000 or number == int(number):
        return f"{number:,.0f}"
    return f"{number:#.3g}".rstrip(".")


def _short(number: float) -> float:
    return float(f"{number:.6g}")
