"""A program as the source of one Triton kernel: a line or two for each piece of each step.

A piece is a value, in registers, or in the tile's scratch, or still in its table, as `kernels.device_layout` decided.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from prerank.kernels.device_blocks import ONE, Block, Blocks, Span
from prerank.kernels.device_layout import STEP, Cuts, Piece
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
    Weight,
)
from prerank.kernels.triton.words import said

_HEAD = '''\
"""A ranker's program of {num_steps} steps as one kernel. Generated: `prerank.kernels.triton.source` says how."""

import triton
import triton.language as tl

from prerank.kernels.triton.steps import column, filled, gathered, gelu, largest, loaded, matched, multiplied, put
from prerank.kernels.triton.steps import raised, spread, stored, streamed, total, vector


@triton.jit(do_not_specialize=["first", "tiles", "num", "num_items"])
def program(
    first,
    tiles,
    num,
    num_items,
    rows,
    kept,
    kept_full,
    user,
    codes,
    weights,
    vectors,
    logits,
{tables}
    NUMBER: tl.constexpr,
    TILE: tl.constexpr,
    CODES: tl.constexpr,
):
    """rows int64 [B, num] -> logits float32 [B, num, {num_tasks}]; `first` is the launch's first tile."""
    number = (tl.program_id(0) + first).to(tl.int64)
    request = number // tiles
    places = number % tiles * TILE + tl.arange(0, TILE)
    inside = places < num
    at = tl.load(rows + request * num + places, mask=inside, other=-1)
    is_row = (at >= 0) & (at < num_items)
    user += request * {user_size}
    codes += request * {num_matches} * CODES
    lanes = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    kept += lanes * {row}
    kept_full += lanes * {full_row}
'''


@dataclass(frozen=True, slots=True)
class Source:
    """The kernel's text, and what it reads: blocks of weights, of vectors in float32, and of the user's, and codes."""

    text: str
    weights: Blocks
    vectors: Blocks
    user: Blocks
    codes: tuple[OfUser, ...]


def generate(program: Program, cuts: Cuts, widths: Mapping[str, int]) -> Source:
    """`widths` are the columns of each table, one of a table [I]."""
    return _Writer(program, cuts, widths).source()


class _Writer:
    def __init__(self, program: Program, cuts: Cuts, widths: Mapping[str, int]) -> None:
        self.program, self.cuts, self.widths = program, cuts, widths
        self.tables = {name: f"table_{number}" for number, name in enumerate(program.tables())}
        self.weights, self.vectors, self.user = Blocks(), Blocks(), Blocks()
        self.codes: list[OfUser] = []
        self.gathers: dict[int, list[Gather]] = {}
        self.is_touched = False

    def source(self) -> Source:
        lines = []
        for number, step in enumerate(self.program.steps):
            lines += ["", f"# {number}: {said(step)}", *self._separated(list(self._lines(step)))]
        lines += ["", "# the answer", *self._separated(list(self._answer()))]
        head = _HEAD.format(
            num_steps=len(self.program.steps),
            tables="\n".join(f"    {kept},  # {name}" for name, kept in self.tables.items()),
            num_tasks=self.program.logits.width,
            user_size=max(1, self.user.size),
            num_matches=max(1, len(self.codes)),
            row=self.cuts.row,
            full_row=self.cuts.full_row,
        )
        text = head + "".join(f"    {line}\n" if line else "\n" for line in lines)
        return Source(text, self.weights, self.vectors, self.user, tuple(self.codes))

    def _separated(self, lines: list[str]) -> list[str]:
        """Threads read what others wrote to scratch, and write where others read, only after they met."""
        touches = any("kept" in line for line in lines)
        met = ["tl.debug_barrier()"] if touches and self.is_touched else []
        self.is_touched = touches or self.is_touched
        return [*met, *lines]

    def _lines(self, step: Step) -> Iterator[str]:
        if isinstance(step, Linear):
            return self._linear(step)
        if isinstance(step, Gather):
            return self._gather(step)
        if isinstance(step, Scale):
            return self._scale(step)
        if isinstance(step, Dot):
            return self._dot(step)
        if isinstance(step, Norm):
            return self._norm(step)
        if isinstance(step, Softmax):
            return self._softmax(step)
        if isinstance(step, Mix):
            return self._mix(step)
        return self._match(step)

    def _gather(self, step: Gather) -> Iterator[str]:
        if step.out.register in self.cuts.gathered:
            self.gathers[step.out.register] = [*self.gathers.get(step.out.register, ()), step]
        else:
            yield from (self._put(out, self._row_of(step, out)) for out in self.cuts.pieces(step.out))

    def _row_of(self, step: Gather, piece: Piece) -> str:
        table, start = self.tables[step.table], piece.start - step.out.start
        return f"gathered({table} + {start}, at, is_row, {self.widths[step.table]}, {piece.width}, {piece.padded})"

    def _scale(self, step: Scale) -> Iterator[str]:
        for out, x in self._pairs(step.out, step.x):
            yield self._put(out, f"{self._got(x)} * {self._vector(step.by, Span.of(out, step.out))}")

    def _dot(self, step: Dot) -> Iterator[str]:
        (out,), (add,) = self.cuts.pieces(step.out), self.cuts.pieces(step.add)
        terms = [
            f"total({self._got(x)} * {self._vector(step.by, Span.of(x, step.x))})" for x in self.cuts.pieces(step.x)
        ]
        yield self._put(out, " + ".join([*terms, self._vector(step.bias, ONE), self._got(add)]))

    def _linear(self, step: Linear) -> Iterator[str]:
        for number, out in enumerate(self.cuts.pieces(step.out)):
            own = Span.of(out, step.out)
            if step.bias is None:
                yield f"y = tl.zeros((TILE, {out.padded}), tl.float32)"
            else:
                yield f"y = filled({self._placed(step.bias, ONE, own, self.vectors)}, TILE, {out.padded})"
            for run in self._runs(step.x):
                at, *_ = [self._placed(step.weight, Span.of(x, step.x), own, self.weights) for x in run]
                depth = sum(x.padded for x in run)
                if self._is_wide(run[0]) and depth > STEP:
                    yield f"y = streamed(y, {self._at(run[0])}, {at}, {depth}, NUMBER)"
                else:
                    yield f"y = multiplied(y, {self._got(run[0])}, {at}, NUMBER)"
            result = "y"
            if step.cross is not None:
                x0, x1 = (self._got(self.cuts.pieces(part)[number]) for part in step.cross)
                result = f"{x0} * y + {x1}"
            elif step.add is not None:
                result = f"y + {self._got(self.cuts.pieces(step.add)[number])}"
            yield self._put(out, f"gelu({result})" if step.activation == "gelu" else result)

    def _runs(self, part: Part) -> list[list[Piece]]:
        """A part's pieces, those that are wide and one after another in scratch together."""
        runs: list[list[Piece]] = []
        for piece in self.cuts.pieces(part):
            if runs and self._is_wide(piece) and self._is_wide(runs[-1][-1]):
                runs[-1].append(piece)
            else:
                runs.append([piece])
        return runs

    def _is_wide(self, piece: Piece) -> bool:
        return self.cuts.is_placed(piece) and piece.padded % STEP == 0

    def _norm(self, step: Norm) -> Iterator[str]:
        xs = self.cuts.pieces(step.x)
        yield f"mean = ({' + '.join(f'total({self._got(x)})' for x in xs)}) / {step.x.width}"
        yield f"var = ({' + '.join(f'spread({self._got(x)}, mean, {x.width})' for x in xs)}) / {step.x.width}"
        yield f"scale = tl.rsqrt(var + {step.eps!r})"
        for out, x in self._pairs(step.out, step.x):
            own = Span.of(out, step.out)
            weight, bias = self._vector(step.weight, own), self._vector(step.bias, own)
            yield self._put(out, f"({self._got(x)} - mean) * scale * {weight} + {bias}")

    def _softmax(self, step: Softmax) -> Iterator[str]:
        pairs = self._pairs(step.out, step.x)
        for number, (_, x) in enumerate(pairs):
            found = f"largest({self._got(x)}, {x.width})"
            yield f"top = {found if number == 0 else f'tl.maximum(top, {found})'}"
        yield from (f"e{x.start} = raised({self._got(x)}, top, {x.width})" for _, x in pairs)
        yield f"summed = {' + '.join(f'total(e{x.start})' for _, x in pairs)}"
        for out, x in pairs:
            yield self._put(out, f"e{x.start} / summed")
        if step.log_sum is not None:
            (out,) = self.cuts.pieces(step.log_sum)
            yield self._put(out, "top + tl.log(summed)")

    def _mix(self, step: Mix) -> Iterator[str]:
        number = 0
        for piece in self.cuts.pieces(step.weights):
            for own in range(piece.width):
                yield f"w{number} = column({self._got(piece)}, {own})"
                number += 1
        experts = [self.cuts.pieces(expert) for expert in step.experts]
        for place, out in enumerate(self.cuts.pieces(step.out)):
            yield self._put(out, " + ".join(f"w{e} * {self._got(expert[place])}" for e, expert in enumerate(experts)))

    def _match(self, step: Match) -> Iterator[str]:
        (out,) = self.cuts.pieces(step.out)
        table, members = self.tables[step.table], self.widths[step.table]
        yield self._put(out, f"matched({table}, at, is_row, {members}, codes + {len(self.codes)} * CODES, CODES)")
        self.codes.append(step.codes)

    def _answer(self) -> Iterator[str]:
        width = self.program.logits.width
        yield f"logits += (request * num + places) * {width}"
        for piece in self.cuts.pieces(self.program.logits):
            start = piece.start - self.program.logits.start
            yield f"put(logits + {start}, {self._got(piece)}, is_row, inside, {piece.width})"

    def _put(self, piece: Piece, value: str) -> str:
        """The line that computes a piece."""
        if self.cuts.is_placed(piece):
            return f"stored({self._at(piece)}, {value})"
        is_full = piece.register in self.cuts.full or piece.padded == 1
        return f"{piece.name} = {value}" if is_full else f"{piece.name} = tl.cast({value}, NUMBER)"

    def _got(self, piece: Piece) -> str:
        """A piece that was computed, or that stays in its table."""
        if self.cuts.is_placed(piece):
            return f"loaded({self._at(piece)}, {piece.padded})"
        for step in self.gathers.get(piece.register, ()):
            if step.out.start <= piece.start < step.out.start + step.out.width:
                return self._row_of(step, piece)
        return piece.name

    def _at(self, piece: Piece) -> str:
        """Where it is in scratch."""
        return f"{'kept_full' if piece.register in self.cuts.full else 'kept'} + {self.cuts.column(piece)}"

    def _pairs(self, one: Part, other: Part) -> list[tuple[Piece, Piece]]:
        return list(zip(self.cuts.pieces(one), self.cuts.pieces(other), strict=True))

    def _vector(self, source: Weight, span: Span) -> str:
        return f"vector({self._placed(source, ONE, span, self.vectors)}, {span.padded})"

    def _placed(self, source: Weight, inputs: Span, outputs: Span, of_weights: Blocks) -> str:
        name, blocks = ("user", self.user) if isinstance(source, OfUser) else (self._name(of_weights), of_weights)
        return f"{name} + {blocks.add(Block(source, inputs, outputs))}"

    def _name(self, blocks: Blocks) -> str:
        return "weights" if blocks is self.weights else "vectors"
