"""Rows of a table as mappings: as many as an answer has winners, each made and sent as fast as a tuple.

A dict holds its names anew, and a thousand dicts cost more than what is in them. The names are the same in all of them,
so here they are the type's, and a row holds values alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar

import msgspec


class _Row(msgspec.Struct, eq=False, gc=False):
    """A mapping by its subclass's names; msgspec writes it as a JSON object."""

    names: ClassVar[tuple[str, ...]] = ()

    def __getitem__(self, name: str) -> object:
        try:
            return getattr(self, self.__struct_fields__[self.names.index(name)])
        except ValueError:
            raise KeyError(name) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def keys(self) -> tuple[str, ...]:
        """The names, in order."""
        return self.names

    def values(self) -> list[object]:
        """What is in the row, in the order of the names."""
        return [getattr(self, field) for field in self.__struct_fields__]

    def items(self) -> list[tuple[str, object]]:
        """Both."""
        return list(zip(self.names, self.values(), strict=True))

    def get(self, name: str, default: object = None) -> object:
        """The value of a name, if there is one."""
        return self[name] if name in self.names else default

    def __eq__(self, other: object) -> bool:
        return dict(self.items()) == dict(other) if isinstance(other, Mapping) else NotImplemented

    __hash__ = None  # type: ignore[assignment]  # as a dict's

    def __repr__(self) -> str:
        return repr(dict(self.items()))


Mapping.register(_Row)


def rows_of(names: Sequence[str], columns: Sequence[Sequence[Any]]) -> list[Mapping[str, Any]]:
    """Columns of N values each, one a name -> N mappings from name to value, in order; each equals the dict of it."""
    assert len(names) == len(columns)
    assert len({len(column) for column in columns}) == 1, "columns of one length, and at least one"
    made = _type_of(tuple(names))
    if made is None:
        return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
    return list(map(made, *columns))


@lru_cache(maxsize=256)
def _type_of(names: tuple[str, ...]) -> type[Any] | None:
    """The type of such rows; None for names that msgspec does not write, as those with quotes."""
    fields = [f"f{place}" for place in range(len(names))]
    try:
        return msgspec.defstruct(
            "Row",
            [(field, Any) for field in fields],
            bases=(_Row,),
            namespace={"names": names},
            rename=dict(zip(fields, names, strict=True)),
            eq=False,
            gc=False,
        )
    except ValueError:
        return None
