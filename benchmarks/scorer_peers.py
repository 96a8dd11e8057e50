"""What torch, its compiler and ONNX Runtime make of a ranker's part per candidate, with the same weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from benchmarks.machine import say
from prerank.types import Features

Version = Callable[[Tensor], object]
"""From rows int64 [1, N] to logits; the gather of the item side is part of it."""


class _Whole(nn.Module):
    """A ranker's forward over lists of tensors, for those that compile or export modules."""

    def __init__(self, ranker: nn.Module, user_names: Sequence[str], item_names: Sequence[str]) -> None:
        super().__init__()
        self.ranker, self.user_names, self.item_names = ranker, user_names, item_names

    def forward(self, user: list[Tensor], items: list[Tensor]) -> Tensor:
        sides = (dict(zip(names, side, strict=True)) for names, side in self._sides(user, items))
        out: Tensor = self.ranker(*sides)
        return out

    def _sides(self, user: list[Tensor], items: list[Tensor]) -> tuple[tuple[Sequence[str], list[Tensor]], ...]:
        return (self.user_names, user), (self.item_names, items)


def torch_versions(
    ranker: nn.Module, user_side: Features, item_side: Features, is_quick: bool
) -> Iterator[tuple[str, Version]]:
    """By name; those that take minutes to compile are left out where it should be quick."""
    whole = _Whole(ranker, list(user_side), list(item_side)).eval()
    user, tables = list(user_side.values()), list(item_side.values())
    yield "eager float32", _gathering(whole, user, tables)
    half = deepcopy(whole).bfloat16()
    half_user, half_tables = [_half(t) for t in user], [_half(t) for t in tables]
    yield "eager bfloat16", _gathering(half, half_user, half_tables)
    if is_quick:
        return
    yield "compiled", _gathering(torch.compile(half, dynamic=True), half_user, half_tables)
    if all(find_spec(name) for name in ("onnxruntime", "onnx", "onnxscript")):
        try:
            exported = _exported(whole, user, tables)
            exported(torch.arange(1_000)[None])
        except Exception as error:  # of the exporter's and the runtime's many kinds
            say(f"onnxruntime cannot run the ranker: {' '.join(str(error).split())[:200]}")
        else:
            yield "onnxruntime", exported


def _gathering(module: Callable[..., object], user: list[Tensor], tables: list[Tensor]) -> Version:
    return lambda rows: module(user, _gathered(tables, rows))


def _gathered(tables: list[Tensor], rows: Tensor) -> list[Tensor]:
    return [table[rows[0]].unsqueeze(0) for table in tables]


def _half(tensor: Tensor) -> Tensor:
    return tensor.bfloat16() if tensor.is_floating_point() else tensor


def _exported(whole: _Whole, user: list[Tensor], tables: list[Tensor]) -> Version:
    """By ONNX Runtime, in float32 and on as many threads as torch has."""
    runtime = import_module("onnxruntime")
    tables = [table if table.is_floating_point() else table.long() for table in tables]  # it has no smaller `where`
    sample = _gathered(tables, torch.arange(7)[None])
    places = {1: torch.export.Dim("candidates", min=2, max=1 << 20)}
    nothing: dict[int, object] = {}
    shapes = ([nothing for _ in user], [dict(places) for _ in sample])
    with TemporaryDirectory() as kept:
        path = Path(kept) / "ranker.onnx"
        exported = torch.onnx.export(whole, (user, sample), dynamo=True, dynamic_shapes=shapes, verbose=False)
        assert exported is not None
        exported.save(path)
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = runtime.InferenceSession(path.read_bytes(), options)
    names = [one.name for one in session.get_inputs()]

    def answer(rows: Tensor) -> object:
        given = [*user, *_gathered(tables, rows)]
        return session.run(None, {name: tensor.numpy() for name, tensor in zip(names, given, strict=True)})

    return answer
