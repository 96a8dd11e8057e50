"""What is said to an index host and by it, beside candidates: MessagePack, strictly read."""

from __future__ import annotations

from typing import TypeAlias

import msgspec
import numpy as np
import torch

from prerank.errors import RequestError
from prerank.serve.index_host import Held, Holding, Search

_Plain: TypeAlias = str | int | float | bool | None


class Ticket(msgspec.Struct, forbid_unknown_fields=True):
    """A `Search`."""

    version: str
    models: dict[str, str]
    query: bytes  # float32, little-endian
    k: int
    time_ms: int
    profile: dict[str, _Plain | list[_Plain]]
    context: dict[str, _Plain | list[_Plain]]
    exclude: bytes  # int64, little-endian
    values: list[str]

    @classmethod
    def of(cls, search: Search) -> Ticket:
        """As it is sent."""
        query, exclude = search.query.numpy().astype("<f4"), np.array(search.exclude, "<i8")
        said = (dict(search.profile), dict(search.context))
        return cls(
            search.version,
            dict(search.models),
            query.tobytes(),
            search.k,
            search.time_ms,
            *said,
            exclude.tobytes(),
            list(search.values),
        )

    def search(self) -> Search:
        """What was sent. Raises RequestError for numbers cut short."""
        if len(self.query) % 4 or len(self.exclude) % 8:
            raise RequestError("ticket: expected whole float32 as query and whole int64 as exclude")
        query = torch.from_numpy(np.frombuffer(self.query, "<f4").astype(np.float32))
        exclude = tuple(np.frombuffer(self.exclude, "<i8").tolist())
        said = (self.profile, self.context, exclude, tuple(self.values))
        return Search(self.version, self.models, query, self.k, self.time_ms, *said)


class HeldMessage(msgspec.Struct):
    """A `Held`."""

    models: dict[str, str]
    num_items: int
    user: list[str]
    context: list[str]


class HoldingMessage(msgspec.Struct):
    """A `Holding`."""

    number: int
    of: int
    versions: dict[str, HeldMessage]

    @classmethod
    def made_of(cls, holding: Holding) -> HoldingMessage:
        """As it is sent."""
        held = {
            v: HeldMessage(dict(o.models), o.num_items, list(o.user), list(o.context))
            for v, o in holding.versions.items()
        }
        return cls(holding.number, holding.of, held)

    def holding(self) -> Holding:
        """What was sent."""
        held = {v: Held(o.models, o.num_items, tuple(o.user), tuple(o.context)) for v, o in self.versions.items()}
        return Holding(self.number, self.of, held)


class Change(msgspec.Struct, forbid_unknown_fields=True):
    """Which version to load or unload, and the caller's right to say so."""

    version: str
    authorization: str = ""


class Refusal(msgspec.Struct):
    """Why a host did not answer, beside the message; `holding` where it does not hold what it was asked for."""

    kind: str
    holding: HoldingMessage | None = None


TICKET, CHANGE = msgspec.msgpack.Decoder(Ticket), msgspec.msgpack.Decoder(Change)
HOLDING, REFUSAL = msgspec.msgpack.Decoder(HoldingMessage), msgspec.msgpack.Decoder(Refusal)
encode = msgspec.msgpack.Encoder().encode
