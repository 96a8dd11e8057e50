"""What a generator of candidates promises: rows for a user, best first, found otherwise than by similarity."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Self, TypeAlias

import pyarrow as pa
from torch import Tensor, nn

from prerank.config import Config, GeneratorConfig
from prerank.types import Features

RowsOf: TypeAlias = Callable[[Tensor], Tensor]


class Generator(nn.Module, ABC):
    """One way to find candidates. Its buffers are stored with a version, and come back with it.

    It knows nothing of who may see an item: what it gives is held to the request's eligible items afterwards, so it
    gives several times as many as it is asked for, where it has them.
    """

    @classmethod
    @abstractmethod
    def build(cls, options: GeneratorConfig, config: Config, features: Features, raw: pa.Table, num_rows: int) -> Self:
        """Over the items of a version in row order: encoded features [I, ...] and raw [I], of `num_rows` rows.

        The features are those of `Config.known_of_all`.

        Raises DataError naming the key and the column that is missing or not as it must be.
        """

    @classmethod
    @abstractmethod
    def restore(cls, options: GeneratorConfig, config: Config, tensors: Mapping[str, Tensor], num_rows: int) -> Self:
        """Of the buffers of one that was built. Raises BundleError where they are not of such a one."""

    @abstractmethod
    def find(self, user: Features, quota: int, rows_of: RowsOf) -> Tensor:
        """A request's features [1, ...] -> rows int64 [n], each once, the best first.

        `rows_of` gives the rows of item_ids int64 [n], -1 for items that are not here.
        """

    def put(self, rows: Tensor, features: Features, raw: pa.Table) -> None:
        """Find rows int64 [n] from now on, of items as `build` takes them, and not for what was in these rows before.

        A row whose item left may still be found. One call at a time, while others find. Raises DataError as `build`.
        """
