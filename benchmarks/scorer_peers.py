"""What torch, its compilers and ONNX Runtime make of a ranker's part per candidate, with the same weights.

Compilers are given one number of candidates at a time and the gather of the item side with the rest, each faster than
not. A candidate dimension that is not fixed is refused, or silently fixed where `torch.onnx` exports: counting a user's
codes is cut into pieces by how many candidates there are (`count_matches`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from benchmarks.result import Row
from prerank.types import Features

Version = Callable[[Tensor], Tensor]
"""From rows int64 [1, N] to logits [1, N, T]; the gather of the item side is part of it."""
CHUNK = 2_000
COMPILERS = ("torch.compile", "AOTInductor", "ONNX Runtime")
"""What the names of those that compile begin with."""
BAR, BAR_AT = round(1 / 1.4, 4), 10_000
_OFF = 0.1  # of a logit: bfloat16's rounding stays far below, another graph does not


class _Whole(nn.Module):
    """A ranker's forward over lists of tensors, for those that compile or export modules."""

    def __init__(self, ranker: nn.Module, user_names: Sequence[str], item_names: Sequence[str]) -> None:
        super().__init__()
        self.ranker, self.user_names, self.item_names = ranker, user_names, item_names

    def forward(self, user: list[Tensor], items: list[Tensor]) -> Tensor:
        named = (self.user_names, user), (self.item_names, items)
        out: Tensor = self.ranker(*(dict(zip(names, side, strict=True)) for names, side in named))
        return out


class _Gathering(_Whole):
    """The same from whole tables [I, ...] and rows int64 [1, N]."""

    def forward(self, user: list[Tensor], tables: list[Tensor], rows: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(user, _gathered(tables, rows))


class Peers:
    """One user's side and the item side of all items, in float32 and in bfloat16; a version for any number of rows."""

    def __init__(self, ranker: nn.Module, user_side: Features, item_side: Features) -> None:
        self.names = list(user_side), list(item_side)
        self.full = _Gathering(ranker, *self.names).eval()
        self.half = deepcopy(self.full).bfloat16()
        self.chunk: Version | None = None
        self.full_sides = list(user_side.values()), list(item_side.values())
        self.half_sides = tuple([_half(tensor) for tensor in side] for side in self.full_sides)

    def of(self, num: int, is_quick: bool) -> Iterator[tuple[str, Version | Row]]:
        """By name, for `num` rows: what answers, or the row that says why it cannot; few where it should be quick."""
        yield "eager float32", partial(_called, self.full, self.full_sides)
        yield "eager bfloat16", partial(_called, self.half, self.half_sides)
        makes: dict[str, Callable[[], Version]] = {}
        if not is_quick:
            makes["torch.compile bfloat16"] = self._compiled
            makes["AOTInductor float32"] = partial(self._ahead, num, is_half=False)
        if not is_quick or num <= CHUNK:
            makes["AOTInductor bfloat16"] = partial(self._ahead, num, is_half=True)
            makes["ONNX Runtime float32"] = partial(self._exported, num)
        if not is_quick and num > CHUNK:
            makes[f"AOTInductor bfloat16 in chunks of {CHUNK:,}"] = self._ahead_in_chunks
        for name, make in makes.items():
            yield name, self._tried(f"{name}, {num:,} candidates", make, num)

    def _tried(self, name: str, make: Callable[[], Version], num: int) -> Version | Row:
        if name.startswith("ONNX") and not all(find_spec(one) for one in ("onnxruntime", "onnx", "onnxscript")):
            return Row.skipped(name, "not installed")
        rows = torch.randint(len(self.full_sides[1][0]), (1, num))
        try:
            version = make()
            found = version(rows)
        except Exception as error:  # of the compilers', the exporter's and the runtime's many kinds
            first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
            return Row(f"{name} (cannot run: {type(error).__name__}: {first})")
        some = rows[:, :1_000]
        off = float((found[:, :1_000].float() - _called(self.full, self.full_sides, some)).abs().max())
        assert off < _OFF, f"{name}: logits are {off} off, and so it ran something else"
        return version

    def _compiled(self) -> Version:
        torch.compiler.reset()  # or the sizes before would make this one's dynamic
        return partial(_called, torch.compile(self.half, dynamic=False), self.half_sides)

    def _ahead(self, num: int, is_half: bool) -> Version:
        module, sides = (self.half, self.half_sides) if is_half else (self.full, self.full_sides)
        program = torch.export.export(module, (*sides, torch.arange(num)[None]))
        with TemporaryDirectory() as kept:
            package = torch._inductor.aoti_compile_and_package(program, package_path=f"{kept}/ranker.pt2")
            return partial(_called, torch._inductor.aoti_load_package(package), sides)

    def _ahead_in_chunks(self) -> Version:
        self.chunk = self.chunk or self._ahead(CHUNK, is_half=True)
        chunk = self.chunk
        return lambda rows: torch.cat([chunk(some) for some in torch.split(rows, CHUNK, 1)], dim=1)

    def _exported(self, num: int) -> Version:
        """On as many threads as torch has; it gathers no faster than torch does."""
        runtime = import_module("onnxruntime")
        user, tables = self.full_sides
        tables = [table if table.is_floating_point() else table.long() for table in tables]  # it has no smaller `where`
        whole = _Whole(self.full.ranker, *self.names).eval()
        sample = _gathered(tables, torch.arange(num)[None])
        with TemporaryDirectory() as kept:
            path = Path(kept) / "ranker.onnx"
            exported = torch.onnx.export(whole, (user, sample), dynamo=True, verbose=False)
            assert exported is not None
            exported.save(path)
            options = runtime.SessionOptions()
            options.intra_op_num_threads = torch.get_num_threads()
            session = runtime.InferenceSession(path.read_bytes(), options)
        names = [one.name for one in session.get_inputs()]

        def answer(rows: Tensor) -> Tensor:
            given = [*user, *_gathered(tables, rows)]
            named = {name: tensor.numpy() for name, tensor in zip(names, given, strict=True)}
            return torch.from_numpy(session.run(None, named)[0])

        return answer


def best_rows(medians: Mapping[tuple[str, int], float], num: int) -> Iterator[Row]:
    """The native program over the fastest of those that compile, with the bar at 10,000 candidates."""
    found = {name: ms for (name, size), ms in medians.items() if size == num and name.startswith(COMPILERS)}
    what = "native over the best of torch.compile, AOTInductor, ONNX Runtime"
    if not found:
        yield Row.skipped(f"{what}, {num:,} candidates", "none was tried")
        return
    best = min(found, key=found.__getitem__)
    ratio = medians["native", num] / found[best]
    row = Row.of(f"{what}, {num:,} candidates", ratio, "times", num, best, ratio)
    yield replace(row, bar=BAR, holds=ratio <= BAR) if num == BAR_AT else row


def _called(module: Callable[..., Tensor], sides: Sequence[list[Tensor]], rows: Tensor) -> Tensor:
    return module(*sides, rows)


def _gathered(tables: list[Tensor], rows: Tensor) -> list[Tensor]:
    return [table[rows[0]].unsqueeze(0) for table in tables]


def _half(tensor: Tensor) -> Tensor:
    return tensor.bfloat16() if tensor.is_floating_point() else tensor
