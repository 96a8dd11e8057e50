"""How a GPU holds a program's registers: cut into pieces, each one value [TILE, width] that stays on the chip.

A piece's width is a power of two, as matrix units want it, and no step reads or writes a part of a piece.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise

from prerank.kernels.layout import Use, first_free, lifetimes, padded, reads, writes
from prerank.kernels.program import Gather, Linear, Mix, Norm, Part, Program, Scale, Softmax, Step

LEAST = 16
"""Columns that a matrix unit multiplies; a piece of fewer is padded to them, but for one of a single column."""

STEP = 64
"""Columns of scratch that a product reads at once."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Columns `start` to `start + width` of a register, held as `padded` columns: a power of two, zeros behind."""

    register: int
    start: int
    width: int
    padded: int

    @property
    def name(self) -> str:
        """In generated source."""
        return f"r{self.register}_{self.start}"


@dataclass(frozen=True, slots=True)
class Cuts:
    """Where each register is cut, `edges` from 0 to its width, and which are held in float32.

    The others are held in the type that is multiplied, as no step reads them otherwise. `most` is how wide a piece is
    at most. `places` are the registers that a tile has in scratch, by their first column there, of `row` columns a
    candidate, or of `full_row` for those held in float32; `gathered` are those that stay where they are, in a table.
    """

    edges: tuple[tuple[int, ...], ...]
    full: frozenset[int]
    gathered: frozenset[int]
    most: int
    places: dict[int, int] = field(default_factory=dict)
    row: int = 0
    full_row: int = 0

    def pieces(self, part: Part) -> list[Piece]:
        """What a part is made of, in order."""
        own = [edge for edge in self.edges[part.register] if part.start <= edge <= part.start + part.width]
        assert own[0] == part.start
        assert own[-1] == part.start + part.width
        return [
            Piece(part.register, low + at, width, padded)
            for low, high in pairwise(own)
            for at, width, padded in _split(high - low, self.most)
        ]

    def columns(self, register: int) -> int:
        """Of all its pieces, padding included."""
        return sum(map(_columns, self._whole(register)))

    def column(self, piece: Piece) -> int:
        """Where a piece of a register in `places` begins in a candidate's scratch."""
        before = [one for one in self._whole(piece.register) if one.start < piece.start]
        return self.places[piece.register] + sum(map(_columns, before))

    def _whole(self, register: int) -> list[Piece]:
        return self.pieces(Part(register, 0, self.edges[register][-1]))

    def is_placed(self, piece: Piece) -> bool:
        """Whether it is in scratch."""
        return piece.register in self.places and _columns(piece) > 0


def cut(program: Program, most: int, budget: int) -> Cuts:
    """Cut at every edge of a part that a step reads or writes, and at that of what it meets column by column.

    Where a candidate would have more than `budget` bytes of values at once, what is wide or long lived goes to scratch.
    """
    edges = [{0, width} for width in program.widths]
    for part in _parts(program):
        edges[part.register] |= {part.start, part.start + part.width}
    pairs = [pair for step in program.steps for pair in _met(step)]
    before = -1
    while before != (before := sum(map(len, edges))):
        for one, other in pairs:
            for here, there in ((one, other), (other, one)):
                inside = [edge for edge in edges[here.register] if here.start < edge < here.start + here.width]
                edges[there.register] |= {edge - here.start + there.start for edge in inside}
    computed = {part.register for step in program.steps if not isinstance(step, Gather) for part in writes(step)}
    gathered = frozenset(step.out.register for step in program.steps if isinstance(step, Gather)) - computed
    cuts = Cuts(tuple(tuple(sorted(one)) for one in edges), _full(program), gathered, most)
    return cuts if held_bytes(program, cuts) <= budget else _placed(program, cuts)


def read_in_full(program: Program) -> set[str]:
    """Tables of which a step reads the rows as float32."""
    full = _full(program)
    return {step.table for step in program.steps if isinstance(step, Gather) and step.out.register in full}


def held_bytes(program: Program, cuts: Cuts) -> int:
    """Of the values that a candidate has at once, at the step where they are the most."""
    spans = lifetimes(program)
    sizes = {
        register: cuts.columns(register) * (4 if register in cuts.full else 2)
        for register in spans
        if register not in cuts.gathered and register not in cuts.places
    }
    alive = [[r for r in sizes if spans[r][0] <= number <= spans[r][1]] for number in range(len(program.steps))]
    return max(sum(sizes[r] for r in registers) for registers in alive)


def _full(program: Program) -> frozenset[int]:
    full = {part.register for step in program.steps for part, use in reads(step) if use is Use.F32}
    return frozenset(full | {program.logits.register})


def _placed(program: Program, cuts: Cuts) -> Cuts:
    """The same with a place in scratch for what is wider than a step of a product or read after the next step."""
    spans = lifetimes(program)
    places, rows = dict[int, int](), [0, 0]
    taken: tuple[list[tuple[int, int, int]], ...] = ([], [])
    for number, step in enumerate(program.steps):
        for register in {part.register for part in writes(step)} - cuts.gathered:
            size, (first, last) = cuts.columns(register), spans[register]
            if first == number and (size > STEP or (size > LEAST and last > number + 1)):
                kind = int(register in cuts.full)
                at = places[register] = first_free([one for one in taken[kind] if one[2] >= number], size)
                taken[kind].append((at, at + size, last))
                rows[kind] = max(rows[kind], at + size)
    return replace(cuts, places=places, row=padded(rows[0], STEP), full_row=padded(rows[1], STEP))


def _columns(piece: Piece) -> int:
    """Of scratch: a single column is always a value, in float32, as no matrix unit multiplies it."""
    return piece.padded if piece.padded > 1 else 0


def _parts(program: Program) -> Iterator[Part]:
    for step in program.steps:
        yield from writes(step)
        yield from (part for part, _ in reads(step))
    yield program.logits


def _met(step: Step) -> Iterator[tuple[Part, Part]]:
    """Parts of one width that a step takes column by column."""
    if isinstance(step, Linear):
        yield from ((step.out, part) for part in (step.add, *(step.cross or ())) if part is not None)
    elif isinstance(step, Mix):
        yield from ((step.out, expert) for expert in step.experts)
    elif isinstance(step, Scale | Norm | Softmax):
        yield step.out, step.x


def _split(width: int, most: int) -> Iterator[tuple[int, int, int]]:
    """A stretch of columns as pieces of powers of two, wide ones first: (start, width, padded) each.

    At most a quarter of a piece is padding, but for the last one of fewer than LEAST columns.
    """
    at = 0
    while at < width:
        left = width - at
        padded = 1 if left == 1 else max(LEAST, 1 << (left - 1).bit_length())
        while padded > most or (padded > LEAST and 4 * left < 3 * padded):
            padded //= 2
        yield at, min(left, padded), padded
        at += padded
