"""What the context of an event was, as one int64 a value that means the same in every version.

A vocabulary's code dies with its version, so stores keep a digest of the value itself; counters `on` a context feature
compare an event's with the request's. Not known here: which values a version knows.
"""

from __future__ import annotations

from hashlib import blake2b

from prerank.schema import FeatureSchema, column_of
from prerank.types import Given

UNKNOWN = 0
"""Of an event whose value was not given, was null, or was none that the version which loaded the log knew."""


def columns_of(schema: FeatureSchema) -> dict[str, str]:
    """The context features that counters are `on`, each with the column it reads."""
    names = dict.fromkeys(counter.on for counter in schema.interaction.values() if counter.on)
    return {name: column_of(name, schema.context[name]) for name in names}


def digest(value: Given) -> int:
    """int64 of one integer, text or boolean, never `UNKNOWN`, which is that of None; two texts agree by chance only.

    The first 8 bytes, little-endian, of BLAKE2b (RFC 7693) with an 8-byte digest, over the UTF-8 of a text or the 8
    bytes of an integer, little-endian; true is 1. Part of the stores' format.
    """
    if value is None:
        return UNKNOWN
    assert isinstance(value, str | int), "a context value is an integer, text or a boolean"
    # a lone surrogate, which JSON can spell and UTF-8 cannot, is its three bytes
    plain = (
        value.encode("utf-8", "surrogatepass") if isinstance(value, str) else (value % (1 << 64)).to_bytes(8, "little")
    )
    return int.from_bytes(blake2b(plain, digest_size=8).digest(), "little", signed=True) or 1
