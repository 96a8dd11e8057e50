"""Items that share something with the user's past, such as the advertiser: the newest of it first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import pyarrow as pa
import torch
from torch import Tensor

from prerank.config import Config, GeneratorConfig
from prerank.errors import BundleError
from prerank.index.generator import Generator, RowsOf
from prerank.types import Features

_SPARE = 8
"""How many times the quota is looked at: those who may not see most items still find some."""


class Same(Generator):
    """The items of each code of a category, in row order: rows int64 [I], those of code c at starts[c]:starts[c + 1].

    `options.history` names the user's history, which is of that category.
    """

    rows: Tensor
    starts: Tensor

    def __init__(self, options: GeneratorConfig, config: Config, rows: Tensor, starts: Tensor) -> None:
        super().__init__()
        self._history, self._of = options.history, config.features.histories()[options.history].of
        self.register_buffer("rows", rows)
        self.register_buffer("starts", starts)
        self._later: dict[int, list[int]] = {}  # rows that came, by code
        self._code_of: dict[int, int] = {}

    @classmethod
    def build(cls, options: GeneratorConfig, config: Config, features: Features, raw: pa.Table, num_rows: int) -> Self:
        """See `Generator.build`."""
        codes = features[config.features.histories()[options.history].of].long()
        order = codes.argsort(stable=True)
        counts = torch.bincount(codes)
        return cls(options, config, order, torch.cat([counts.new_zeros(1), counts.cumsum(0)]))

    @classmethod
    def restore(cls, options: GeneratorConfig, config: Config, tensors: Mapping[str, Tensor], num_rows: int) -> Self:
        """See `Generator.restore`."""
        said = {name: (t.dtype, t.dim()) for name, t in tensors.items()}
        fits = said == {"rows": (torch.int64, 1), "starts": (torch.int64, 1)}
        if fits:
            rows, starts = tensors["rows"], tensors["starts"]
            ends = starts.tolist()
            fits = ends[0] == 0 and ends[-1] == len(rows) and ends == sorted(ends)
            fits = fits and bool(((rows >= 0) & (rows < num_rows)).all())
        if not fits:
            raise BundleError(f"generator {options.history!r}: expected rows int64 [I] and their starts, found {said}")
        return cls(options, config, rows, starts)

    def find(self, user: Features, quota: int, rows_of: RowsOf) -> Tensor:
        """Of the codes in the history, the newest first, one item each in turn; code 0, the unknown, has none."""
        past = user[self._history][0]
        codes = list(dict.fromkeys(past[past > 0].flip(0).tolist()))
        if not codes:
            return torch.zeros(0, dtype=torch.int64)
        most, found, turns = _SPARE * quota, [], []
        for code in codes:
            start, end = self._span(code)
            own = self.rows[start : min(end, start + most)]
            later = self._later.get(code)
            if later:
                own = torch.cat([torch.tensor(later[-most:][::-1]), own])
            found.append(own)
            turns.append(torch.arange(len(own)))
        rows, turn = torch.cat(found), torch.cat(turns)
        return rows[turn.argsort(stable=True)[:most]]

    def put(self, rows: Tensor, features: Features, raw: pa.Table) -> None:
        """See `Generator.put`; what came last is found first."""
        for row, code in zip(rows.tolist(), features[self._of].tolist(), strict=True):
            before = self._code_of.get(row)
            if before is not None:
                self._later[before] = [one for one in self._later[before] if one != row]
            self._code_of[row] = code
            self._later[code] = [*self._later.get(code, ()), row]  # a new list: others may read the old one

    def _span(self, code: int) -> tuple[int, int]:
        if code + 1 >= len(self.starts):
            return 0, 0
        start, end = self.starts[code : code + 2].tolist()
        return int(start), int(end)
