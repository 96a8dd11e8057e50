"""Programs run natively: a thread a core, blocks of candidates, every register in the core's own cache.

The torch `program.run` is the same arithmetic and the reference; this one multiplies in bfloat16, adds in float32.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from prerank.kernels import native, ranges
from prerank.kernels.layout import NOT_KEPT, TILE, Layout, is_quantized, lay_out, padded
from prerank.kernels.pages import in_large_pages
from prerank.kernels.program import (
    Dot,
    Gather,
    Linear,
    Match,
    Mix,
    Norm,
    OfUser,
    Part,
    Program,
    Scale,
    Softmax,
    Step,
)
from prerank.kernels.quantized import CoarseWeight
from prerank.kernels.stop import current
from prerank.kernels.work import program_work
from prerank.types import Features

_Data = TypeVar("_Data", ctypes.c_void_p, ctypes.c_int64, "_Table", "_Step", "_Register", "_Slot")
_MOST_EXPERTS = 16
_MOST_ROWS = 256
_SECOND_CACHE = Path("/sys/devices/system/cpu/cpu0/cache/index2/size")
_OPERATIONS = {Gather: 0, Scale: 1, Linear: 2, Norm: 3, Softmax: 4, Mix: 5, Match: 6, Dot: 7}
_CLEAR, _OUTPUT, _QUANTIZE = 8, 9, 10
_INT8 = "avx512_bf16"  # the level that has products of eight bits; tiles are as fast without
_VECTOR, _MATRIX, _CODES = 0, 1, 2


class _Part(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int64) for name in ("reg", "start", "width"))


class _Register(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int64) for name in ("ld", "f32", "bf16", "int8"))


class _Step(ctypes.Structure):
    _fields_ = (
        ("operation", ctypes.c_int64),
        *((name, _Part) for name in ("out", "x", "add", "x0", "x1", "extra")),
        *((name, ctypes.c_int64) for name in ("activation", "table", "weight_slot", "bias_slot")),
        *((name, ctypes.c_void_p) for name in ("weight", "bias", "scale", "coarse", "begin")),
        ("eps", ctypes.c_double),
        ("num_experts", ctypes.c_int64),
        ("experts", _Part * _MOST_EXPERTS),
    )


class _Table(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("width", "bytes")),
    )


class _Program(ctypes.Structure):
    _fields_ = (
        ("steps", ctypes.c_void_p),
        ("num_steps", ctypes.c_int64),
        ("registers", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("row_bytes", "block", "num_tasks")),
    )


class _Asked(ctypes.Structure):
    _fields_ = (
        ("rows", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("slots", "lengths", "logits", "stop")),
    )


class _Slot(ctypes.Structure):
    _fields_ = (
        *(
            (name, ctypes.c_int64)
            for name in ("kind", "source", "offset", "rows", "depth", "row_step", "column_step", "bytes")
        ),
        ("factor", ctypes.c_double),
        ("target", ctypes.c_int64),
    )


class Engine:
    """`threads` worker threads, each pinned to a core where there are enough; programs and requests share them.

    `level` is one of `native.LEVELS` that this processor has, its best unless given. The threads are `nicer` than who
    makes them, in steps of niceness: who shares their cores has a turn sooner. With `int8`, products for which eight
    bits are enough (`Linear.is_coarse`) are of eight bits at a level that has them, which `int8` says then: AVX-512
    without tiles. Raises ValueError for another level, and RuntimeError where there is no native library
    (`native.library` says why).
    """

    def __init__(
        self, threads: int, level: str | None = None, is_pinned: bool = True, nicer: int = 0, int8: bool = False
    ) -> None:
        library = native.library()
        if library is None:
            raise RuntimeError("no native kernels here: program.run is the same in torch")
        best = native.level()
        self.level = best if level is None else level
        if self.level not in native.LEVELS[: native.LEVELS.index(best) + 1] or threads < 1:
            raise ValueError(f"expected at least one thread and a level up to {best!r}, got {threads} and {level!r}")
        self.threads, self.int8 = threads, int8 and self.level == _INT8
        library.prerank_engine_make.restype = ctypes.c_void_p
        made = library.prerank_engine_make(
            ctypes.c_int64(threads),
            ctypes.c_int32(is_pinned),
            ctypes.c_int32(native.LEVELS.index(self.level)),
            ctypes.c_int32(nicer),
        )
        self.handle = ctypes.c_void_p(made)
        self.library = library
        self._finalizer = weakref.finalize(self, library.prerank_engine_free, self.handle)

    def close(self) -> None:
        """End the threads; what they were asked before is finished."""
        self._finalizer()


class NativeProgram:
    """A program with the item side's tables it reads, [I, ...] each, ready to run.

    Gathered tables are float32 or bfloat16 [I, W], matched ones whole numbers [I] or [I, M], all contiguous on the CPU.
    They are used where they are, but for float32 ones that no step needs in full: of those a bfloat16 copy is made.
    """

    def __init__(self, program: Program, item_side: Features, engine: Engine) -> None:
        self.engine = engine
        self.num_tasks = program.logits.width
        self._kept: list[Tensor] = []
        self._copies: list[tuple[Tensor, Tensor]] = []
        self._slots: dict[tuple[int, OfUser], int] = {}
        self._shapes: list[tuple[int, int]] = []  # rows and depth by slot
        names, layout = program.tables(), lay_out(program, engine.int8)
        full = {
            step.table
            for step in program.steps
            if isinstance(step, Gather) and layout.places[step.out.register].f32 != NOT_KEPT
        }
        self._tables = _array(_Table, len(names))(*(self._table(item_side[name], name in full) for name in names))
        self._source, self._row_bytes = program, sum(table.width * table.bytes for table in self._tables)
        self.num_items = len(item_side[names[0]])
        steps = self._steps(program, layout, {name: number for number, name in enumerate(names)})
        self._step_array = _array(_Step, len(steps))(*steps)
        self._registers = _array(_Register, len(layout.places))(
            *(_Register(place.ld, place.f32, place.bf16, place.int8) for place in layout.places)
        )
        block = min(_MOST_ROWS, max(TILE, _cache_bytes() // layout.row_bytes // TILE * TILE))
        self._program = _Program(
            ctypes.addressof(self._step_array),
            len(steps),
            ctypes.addressof(self._registers),
            layout.row_bytes,
            block,
            self.num_tasks,
        )
        self._binding: _Binding | None = None

    def __call__(self, user: Features, rows: Tensor) -> Tensor:
        """One request's user side (`program.of_request`) and rows int64 [N] -> logits float32 [N, T].

        Raises IndexError for a row that the tables do not have, Cancelled where the `stop.current` is set before all is
        done. Threads may call at once; the GIL is not held.
        """
        logits = torch.empty(len(rows), self.num_tasks)
        if not len(rows):
            return logits
        low, high = (int(x) for x in rows.aminmax())
        if low < 0 or high >= self.num_items:
            raise IndexError(f"rows: expected 0 to {self.num_items - 1}, got {low} to {high}")
        rows = rows.contiguous()
        binding = self._binding
        if binding is None or not binding.fits(user):
            binding = self._binding = _Binding(self._slots, self._shapes, user)
        memory, slots, lengths = binding.bind(self.engine.library, user)
        stop = current()
        asked = _Asked(
            native.pointer(rows, torch.int64, len(rows)),
            len(rows),
            ctypes.addressof(slots),
            ctypes.addressof(lengths),
            logits.data_ptr(),
            stop.address,
        )
        with ranges.kernel("native program", lambda: program_work(self._source, self._row_bytes, len(rows))):
            self.engine.library.prerank_engine_run(
                self.engine.handle, ctypes.byref(self._program), self._tables, ctypes.byref(asked)
            )
        del memory  # until here the threads read it
        stop.check()
        return logits

    def update(self, rows: Tensor) -> None:
        """Read rows int64 [n] of the item side again, which changed; a request of such a row must not be running."""
        with torch.inference_mode():
            for source, copy in self._copies:
                copy[rows] = source[rows].bfloat16()

    def _table(self, tensor: Tensor, is_full: bool) -> _Table:
        if tensor.dtype == torch.float32 and not is_full:
            source, tensor = tensor, tensor.bfloat16()
            in_large_pages(tensor.data_ptr(), tensor.nbytes)
            self._copies.append((source, tensor))
        assert tensor.is_contiguous()
        assert tensor.device.type == "cpu"
        assert tensor.dim() in (1, 2)
        assert not tensor.is_floating_point() or tensor.dtype in (torch.float32, torch.bfloat16)
        self._kept.append(tensor)
        width = tensor.shape[1] if tensor.dim() == 2 else 1
        return _Table(tensor.data_ptr(), width, tensor.element_size())

    def _steps(self, program: Program, layout: Layout, tables: Mapping[str, int]) -> list[_Step]:
        steps = []
        for number, step in enumerate(program.steps):
            for past in layout.cleared.get(number, ()):
                steps.append(_step(_CLEAR, out=past))
            if number in layout.quantized:
                steps.append(_step(_QUANTIZE, x=layout.quantized[number]))
            steps.append(self._step(step, tables))
        return [*steps, _step(_OUTPUT, x=program.logits)]

    def _step(self, step: Step, tables: Mapping[str, int]) -> _Step:
        made = _step(_OPERATIONS[type(step)], out=step.out)
        if isinstance(step, Gather | Match):
            made.table = tables[step.table]
        else:
            made.x = _part(step.x if not isinstance(step, Mix) else None)
        if isinstance(step, Match):
            made.weight_slot = self._slot(_CODES, step.codes, 0, 0)
        elif isinstance(step, Scale):
            made.weight_slot = self._slot(_VECTOR, step.by, step.out.width, 1)
        elif isinstance(step, Dot):
            made.weight_slot = self._slot(_VECTOR, step.by, step.x.width, 1)
            made.bias_slot, made.add = self._slot(_VECTOR, step.bias, 1, 1), _part(step.add)
        elif isinstance(step, Linear):
            self._linear(made, step)
        elif isinstance(step, Norm):
            made.scale, made.bias, made.eps = self._vector(step.weight), self._vector(step.bias), step.eps
        elif isinstance(step, Softmax):
            made.extra = _part(step.log_sum)
        elif isinstance(step, Mix):
            assert len(step.experts) <= _MOST_EXPERTS
            made.extra, made.num_experts = _part(step.weights), len(step.experts)
            made.experts = (_Part * _MOST_EXPERTS)(*map(_part, step.experts))
        return made

    def _linear(self, made: _Step, step: Linear) -> None:
        made.add, made.activation = _part(step.add), int(step.activation == "gelu")
        if step.cross is not None:
            made.x0, made.x1 = map(_part, step.cross)
        if isinstance(step.weight, OfUser):
            made.weight_slot = self._slot(_MATRIX, step.weight, step.out.width, step.x.width)
        elif self.engine.int8 and is_quantized(step, self._source):
            self._coarse(made, CoarseWeight.of(step.weight))
        else:
            made.weight = self._packed(step.weight)
        if isinstance(step.bias, OfUser):
            made.bias_slot = self._slot(_VECTOR, step.bias, step.out.width, 1)
        elif step.bias is not None:
            made.bias = self._vector(step.bias)

    def _coarse(self, made: _Step, weight: CoarseWeight) -> None:
        packed, begin = weight.packed(), weight.begin()
        self._kept += [packed, begin]
        made.coarse, made.begin, made.scale = packed.data_ptr(), begin.data_ptr(), self._vector(weight.scale)

    def _slot(self, kind: int, asked: OfUser, rows: int, depth: int) -> int:
        if (kind, asked) not in self._slots:
            self._slots[kind, asked] = len(self._slots)
            self._shapes.append((rows, depth))
        return self._slots[kind, asked]

    def _vector(self, values: Tensor) -> int:
        kept = torch.zeros(padded(len(values)))
        kept[: len(values)] = values
        self._kept.append(kept)
        return kept.data_ptr()

    def _packed(self, weight: Tensor) -> int:
        rows, depth = weight.shape
        packed = torch.empty(padded(rows) * padded(depth), dtype=torch.int16)
        source = weight.float().contiguous()
        self.engine.library.prerank_pack(
            native.pointer(source, torch.float32, rows, depth),
            *map(ctypes.c_int64, (rows, depth, depth, 1)),
            ctypes.c_float(1.0),
            native.pointer(packed, torch.int16, len(packed)),
        )
        self._kept.append(packed)
        return packed.data_ptr()


@cache
def _cache_bytes() -> int:
    """What a block's registers may take of a core's second cache: the weights that stream by want room beside them."""
    size = 1 << 20
    with suppress(OSError, ValueError):
        size = int(_SECOND_CACHE.read_text().strip().removesuffix("K")) << 10
    return size * 5 // 8


class _Binding:
    """How a request's tensors become slots, found once for the shapes they have."""

    def __init__(
        self, slots: Mapping[tuple[int, OfUser], int], shapes: Sequence[tuple[int, int]], user: Features
    ) -> None:
        self.names = list(dict.fromkeys(asked.name for _, asked in slots))
        self.like = {name: _like(user[name]) for name in self.names}
        self.num = len(slots)
        self.size = 0
        made = [self._slot(kind, asked, shapes[number], user) for (kind, asked), number in slots.items()]
        self.slots = _array(_Slot, self.num)(*made)

    def fits(self, user: Features) -> bool:
        """Whether these tensors are laid out as those it was made for."""
        return all(_like(user[name]) == like for name, like in self.like.items())

    def bind(
        self, library: ctypes.CDLL, user: Features
    ) -> tuple[Tensor, ctypes.Array[ctypes.c_void_p], ctypes.Array[ctypes.c_int64]]:
        """The request's memory, the address of each slot in it, and its length."""
        memory = torch.empty(self.size // 8 + 8, dtype=torch.int64)
        start = -memory.data_ptr() % 64
        sources = _array(ctypes.c_void_p, len(self.names))(*(user[name].data_ptr() for name in self.names))
        slots, lengths = _array(ctypes.c_void_p, self.num)(), _array(ctypes.c_int64, self.num)()
        at = ctypes.c_void_p(memory.data_ptr() + start)
        library.prerank_bind(self.slots, ctypes.c_int64(self.num), sources, at, slots, lengths)
        return memory, slots, lengths

    def _slot(self, kind: int, asked: OfUser, shape: tuple[int, int], user: Features) -> _Slot:
        whole, found = user[asked.name], asked.view(user)
        rows, depth = shape
        if kind == _CODES:
            rows, depth = found.numel(), max(16, 1 << (2 * found.numel()).bit_length())
            assert found.dim() == 1
            assert not found.is_floating_point()
        else:
            assert whole.dtype == torch.float32
            assert found.numel() == rows * depth, f"{asked}: expected {rows} by {depth}, got {tuple(found.shape)}"
        row_step, column_step = (found.stride(0), found.stride(1)) if found.dim() == 2 else (depth, 1)
        if found.dim() == 1 and (kind == _CODES or depth == 1):
            row_step = found.stride(0)
        elif found.dim() == 1:
            assert rows == 1
            column_step = found.stride(0)
        offset = found.storage_offset() - whole.storage_offset()
        target = self.size
        bytes_of = {_VECTOR: 4 * padded(rows), _MATRIX: 2 * padded(rows) * padded(depth), _CODES: 8 * depth}
        self.size += padded(bytes_of[kind], 64)
        source = self.names.index(asked.name)
        return _Slot(
            kind, source, offset, rows, depth, row_step, column_step, whole.element_size(), asked.factor, target
        )


@cache
def _array(kind: type[_Data], length: int) -> type[ctypes.Array[_Data]]:
    """Made once: a type refers to itself, and would be garbage of every version and every shape of request."""
    return kind * length


def _like(tensor: Tensor) -> tuple[object, ...]:
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.device.type


def _part(part: Part | None) -> _Part:
    return _Part(-1, 0, 0) if part is None else _Part(part.register, part.start, part.width)


def _step(operation: int, out: Part | None = None, x: Part | None = None) -> _Step:
    nothing = _part(None)
    made = _Step(operation, _part(out), _part(x), nothing, nothing, nothing, nothing)
    made.table = made.weight_slot = made.bias_slot = -1
    return made
