"""Which version is live, and every version that ever was: one pointer, moved by rename, and an append-only history.

An event is written to the history before the pointer moves, and the next event says from where it moved. So an event
the machine stopped before carrying out is told by what came after it, and is left out when the history is read.
"""

from __future__ import annotations

import json
import os
import secrets
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from math import isfinite
from pathlib import Path
from typing import Any, Literal, TypeAlias

from prerank.bundle.durable import append_line, locked, replace_text, sync
from prerank.bundle.failpoints import reach
from prerank.bundle.in_use import unused
from prerank.bundle.manifest import CONFIG, VERSION, VERSIONS, verify
from prerank.bundle.removed import FILE as REMOVED
from prerank.bundle.removed import Removal, removals
from prerank.errors import GateFailed, RegistryError

VALIDATION = "validation.json"
ASIDE = ".removed-"
"""What the folder of a removed version is called by, until all of it is deleted."""
_LIVE = "live"
_HISTORY = "history.jsonl"
Action: TypeAlias = Literal["promote", "rollback"]


@dataclass(frozen=True, slots=True)
class Gate:
    """One validation gate: its bound in words, what was measured, and whether that holds.

    `off` is by how much it is outside of its bound, below 0 where it is too low; `live` what the live version measured
    (None: not asked, or nothing was live); `about` the feature or the day that is worst, or why it was not measured.
    """

    name: str
    bound: str
    measured: float
    holds: bool
    off: float = 0.0
    live: float | None = None
    about: str = ""

    def said(self) -> str:
        """What was expected, what was measured, and by how much that fails, as the end of a sentence."""
        how = "" if not self.off else f": {abs(self.off):.4g} too {'low' if self.off < 0 else 'high'}"
        live = "" if self.live is None else f" (live has {self.live:g})"
        about = f"; {self.about}" if self.about else ""
        return f"expected {self.bound}, measured {self.measured:g}{how}{live}{about}"

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Gate:
        """What `asdict` and JSON made of one. Raises KeyError, TypeError or ValueError for anything else."""
        live = plain.get("live")
        return cls(
            plain["name"],
            plain["bound"],
            float(plain["measured"]),
            plain["holds"] is True,
            float(plain.get("off", 0.0)),
            None if live is None else float(live),
            str(plain.get("about", "")),
        )


@dataclass(frozen=True, slots=True)
class VersionInfo:
    """One version of a store; `created` is its UTC minute in ISO form, `gates` None until it was validated."""

    version: str
    created: str
    is_live: bool
    gates: tuple[Gate, ...] | None


@dataclass(frozen=True, slots=True)
class Event:
    """The pointer moved at `time` (UTC, ISO): `source` was live before (None: nothing was) and `to` after."""

    time: str
    action: Action
    source: str | None
    to: str
    by: str
    why: str

    def to_json(self) -> str:
        """One line of history.jsonl."""
        plain = {("from" if name == "source" else name): value for name, value in asdict(self).items()}
        return json.dumps(plain, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, line: str) -> Event:
        """What `to_json` wrote. Raises ValueError, KeyError or TypeError for anything else."""
        plain = json.loads(line)
        return cls(plain["time"], plain["action"], plain["from"], plain["to"], plain["by"], plain["why"])


class Registry:
    """The versions of one funnel's `store`. Threads and processes may share one store: changes take turns."""

    def __init__(self, store: Path) -> None:
        self.store = store

    def names(self) -> list[str]:
        """Every version's id, the oldest first; nothing of them is read."""
        return sorted(path.name for path in (self.store / VERSIONS).glob("*") if VERSION.fullmatch(path.name))

    def versions(self) -> list[VersionInfo]:
        """Every published version, oldest first. Raises RegistryError for a validation.json that cannot be read."""
        live = self.live()
        return [VersionInfo(name, _minute(name), name == live, self._gates(name)) for name in self.names()]

    def live(self) -> str | None:
        """The version that serves, None before the first promote. Raises RegistryError for a damaged pointer."""
        where = self.store / _LIVE
        try:
            version = where.read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            return None
        if not VERSION.fullmatch(version):
            raise RegistryError(f"{where}: expected one version id, found {version!r}; see {_HISTORY} for the last one")
        return version

    def path(self, version: str) -> Path:
        """The folder of `version`. Raises RegistryError if there is none, which says so of one that was removed."""
        path = self.store / VERSIONS / version
        if not VERSION.fullmatch(version) or not path.is_dir():
            removed = removals(self.store).get(version)
            if removed is not None:
                raise RegistryError(f"{version} {removed.said()}; there are {self.names()}, or publish it again")
            raise RegistryError(f"{self.store}: expected one of the versions {self.names()}, got {version!r}")
        return path

    def check(self, version: str) -> None:
        """Whether `version` may be made live; nothing moves.

        Raises GateFailed unless it was validated and every gate of its configuration holds, BundleError if a file is
        not as published, RegistryError if there is no such version.
        """
        self._check_gates(version)
        verify(self.path(version))

    def promote(self, version: str, by: str, why: str) -> None:
        """Make `version` live. Raises as `check`, and RegistryError if it is live already."""
        self.check(version)
        reach("promote-verified")
        with locked(self.store):
            self.path(version)  # it may have been removed since
            self._move(version, "promote", by, why)

    def rollback(self, to: str | None, by: str, why: str) -> None:
        """Make `to` live, or without it the version before the live one; gates are not asked.

        Rolling back again goes further back, not forth. Raises RegistryError where there is nothing to go back to or
        `to` was never live, BundleError if a file is not as published.
        """
        with locked(self.store):
            chosen = to if to is not None else self._before_live()
            path = self.path(chosen)
            if all(event.to != chosen for event in self.history()):
                raise RegistryError(f"{chosen}: it was never live; promote it instead")
            verify(path)
            self._move(chosen, "rollback", by, why)

    def history(self) -> list[Event]:
        """Every promote and rollback that moved the pointer, oldest first. Raises RegistryError on a damaged line."""
        where, live = self.store / _HISTORY, self.live()
        lines = where.read_text(encoding="utf-8").splitlines(keepends=True) if where.exists() else []
        written = []
        for number, line in enumerate(lines, start=1):
            if not line.endswith("\n"):
                break  # cut while being written, so its pointer never moved
            try:
                written.append(Event.from_json(line))
            except (ValueError, KeyError, TypeError):
                raise RegistryError(f"{where}: line {number} is damaged: {line.strip()!r}; mend it by hand") from None
        live_after = [*(event.source for event in written[1:]), live]
        return [event for event, after in zip(written, live_after, strict=False) if event.to == after]

    def before_live(self) -> str | None:
        """What `rollback` goes to unless told; None where there is nothing to go back to."""
        stack = self._stack()
        return stack[-2] if len(stack) > 1 else None

    def remove(self, version: str, by: str, why: str) -> Path:
        """Take `version` out of the store, whatever state it is in; the hidden folder it is in now, for deletion.

        Raises RegistryError where it is live, a process has loaded it, or there is no such version.
        """
        with locked(self.store):
            path = self.path(version)
            if version == self.live():
                raise RegistryError(f"{version}: it is live; promote another first")
            with unused(path) as is_unused:
                if not is_unused:
                    raise RegistryError(f"{version}: a process has loaded it; end that first")
                now = datetime.now(UTC).isoformat(timespec="seconds")
                append_line(self.store / REMOVED, Removal(version, now, by, why).to_json())
                reach("clean-noted")
                aside = path.with_name(f"{ASIDE}{version}-{secrets.token_hex(4)}")
                os.replace(path, aside)
                sync(path.parent)
                reach("clean-aside")
        return aside

    def write_validation(self, version: str, gates: Sequence[Gate]) -> None:
        """Write the version's validation.json, in place of an earlier one. Raises RegistryError without a version."""
        plain = [asdict(gate) for gate in gates]
        for gate in plain:
            for name in ("measured", "off", "live"):
                if gate[name] is not None and not isfinite(gate[name]):
                    gate[name] = str(gate[name])  # JSON has no word for it
        text = json.dumps({"version": version, "gates": plain}, indent=1, allow_nan=False) + "\n"
        replace_text(self.path(version) / VALIDATION, text)

    def _gates(self, version: str) -> tuple[Gate, ...] | None:
        where = self.path(version) / VALIDATION
        if not where.exists():
            return None
        try:
            plain = json.loads(where.read_text(encoding="utf-8"))
            if plain["version"] != version:
                raise ValueError(f"it is of version {plain['version']}")
            return tuple(Gate.from_plain(gate) for gate in plain["gates"])
        except (ValueError, KeyError, TypeError) as error:
            raise RegistryError(f"{where}: cannot be read: {error!r}; validate {version} again") from None

    def _check_gates(self, version: str) -> None:
        gates = self._gates(version)
        if gates is None:
            raise GateFailed(f"{version}: it was never validated; validate it before promoting it")
        for gate in gates:
            if not gate.holds:
                raise GateFailed(f"{version}: gate {gate.name} {gate.said()}")
        config = tomllib.loads((self.path(version) / CONFIG).read_text(encoding="utf-8"))
        unmeasured = sorted(set(config.get("validate", {})) - {gate.name for gate in gates})
        if unmeasured:
            raise GateFailed(f"{version}: its configuration has the gates {unmeasured}, never measured; validate again")

    def _before_live(self) -> str:
        stack = self._stack()
        if len(stack) < 2:
            raise RegistryError(f"{self.store}: no version was live before {self.live()}; nothing to go back to")
        return stack[-2]

    def _stack(self) -> list[str]:
        """The live version last, before it what was live before, and so on: the history with rollbacks undone."""
        stack: list[str] = []
        for event in self.history():
            if event.action == "rollback" and event.to in stack:
                del stack[len(stack) - stack[::-1].index(event.to) :]
            else:
                stack.append(event.to)
        return stack

    def _move(self, version: str, action: Action, by: str, why: str) -> None:
        """Note the event, then move the pointer; the caller holds the lock."""
        live = self.live()
        if live == version:
            raise RegistryError(f"{version} is live already")
        now = datetime.now(UTC).isoformat(timespec="seconds")
        append_line(self.store / _HISTORY, Event(now, action, live, version, by, why).to_json())
        reach("promote-noted")
        replace_text(self.store / _LIVE, version + "\n")
        reach("promote-moved")


def _minute(version: str) -> str:
    return datetime.strptime(version[:13], "%Y%m%dT%H%M").replace(tzinfo=UTC).isoformat(timespec="minutes")
