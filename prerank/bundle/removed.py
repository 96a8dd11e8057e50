"""Which versions were removed from a store, when, by whom and why: lines that are only ever added."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from prerank.errors import RegistryError

FILE = "removed.jsonl"


@dataclass(frozen=True, slots=True)
class Removal:
    """`version` was removed at `time` (UTC, ISO)."""

    version: str
    time: str
    by: str
    why: str

    def said(self) -> str:
        """As the end of a sentence."""
        return f"was removed on {self.time} by {self.by}{': ' if self.why else ''}{self.why}"

    def to_json(self) -> str:
        """One line of the file."""
        return json.dumps(asdict(self), ensure_ascii=False) + "\n"


def removals(store: Path) -> dict[str, Removal]:
    """Every version that was removed, or was about to be, by its id. Raises RegistryError on a damaged line.

    A line is written first, so a version that is still there was not removed; and one cut while being written says
    nothing.
    """
    where = store / FILE
    lines = where.read_text(encoding="utf-8").splitlines(keepends=True) if where.exists() else []
    found = {}
    for number, line in enumerate(lines, start=1):
        if not line.endswith("\n"):
            break
        try:
            one = Removal(**json.loads(line))
        except (ValueError, TypeError):
            raise RegistryError(f"{where}: line {number} is damaged: {line.strip()!r}; mend it by hand") from None
        found[one.version] = one
    return found
