"""Where a program's registers stand in the memory of a block: in which types they are kept, how long, and where."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum

from prerank.kernels.program import Dot, Gather, Linear, Match, Mix, Norm, Part, Program, Scale, Softmax, Step

TILE = 32
"""Rows and columns that a product is made of; registers are padded to it."""

NOT_KEPT = -1


@dataclass(frozen=True, slots=True)
class Place:
    """A register of R rows of `ld` numbers: floats from byte R * `f32`, bfloat16 from R * `bf16`, or NOT_KEPT.

    And from R * `int8`, where a product of eight bits reads it, bytes; after them a float a row, its scale.
    """

    ld: int
    f32: int = NOT_KEPT
    bf16: int = NOT_KEPT
    int8: int = NOT_KEPT


@dataclass(frozen=True, slots=True)
class Layout:
    """Every register's place, the bytes that a row of a block takes, and what must be zero before each step.

    A product reads its input to the next multiple of TILE, against weights of zero: `cleared`, by the number of a
    step, are the columns past a register's own that no step writes. `quantized`, by the number of the first step that
    multiplies it so, are registers that are whole by then and wanted as eight bits.
    """

    places: tuple[Place, ...]
    row_bytes: int
    cleared: dict[int, tuple[Part, ...]]
    quantized: dict[int, Part]


def padded(width: int, to: int = TILE) -> int:
    """Rounded up."""
    return -(-width // to) * to


class Use(Enum):
    """How a step reads: as bfloat16, which products multiply; as float32; or as whichever is kept, the latter first."""

    BF16 = 0
    F32 = 1
    ANY = 2


def reads(step: Step) -> Iterator[tuple[Part, Use]]:
    """The parts a step reads, and how."""
    if isinstance(step, Linear):
        yield step.x, Use.BF16
        yield from ((part, Use.ANY) for part in (step.add, *(step.cross or ())) if part is not None)
    elif isinstance(step, Dot):
        yield from ((part, Use.F32) for part in (step.x, step.add))
    elif isinstance(step, Mix):
        yield step.weights, Use.F32
        yield from ((part, Use.ANY) for part in step.experts)
    elif isinstance(step, Scale):
        yield step.x, Use.ANY
    elif isinstance(step, Norm | Softmax):
        yield step.x, Use.F32
    else:
        assert isinstance(step, Gather | Match)


def writes(step: Step) -> tuple[Part, ...]:
    """The parts a step writes."""
    if isinstance(step, Softmax) and step.log_sum is not None:
        return step.out, step.log_sum
    return (step.out,)


def is_quantized(step: Linear, program: Program) -> bool:
    """Whether a product may be of eight bits: it is enough for it, and it reads all of a register."""
    return step.is_coarse and step.x == Part(step.x.register, 0, program.widths[step.x.register])


def lay_out(program: Program, int8: bool = False) -> Layout:
    """A register is kept from the first step that writes it to the last that reads it; then its memory is another's.

    With `int8`, those that `is_quantized` reads are also kept so.

    What is read as float32 or bfloat16 is kept so, and what a step would take as either as bfloat16, half the bytes.
    """
    spans = lifetimes(program)
    widths, wide, narrow = list(map(padded, program.widths)), set[int](), set[int]()
    for part, use in _all_reads(program):
        (wide if use is Use.F32 else narrow).add(part.register)
        widths[part.register] = max(widths[part.register], padded(part.start + padded(part.width)))
    read_to = widths
    # rows a power of two apart would share few lines of the first cache
    widths = [ld + TILE if ld % (2 * TILE) == 0 else ld for ld in read_to]
    places = [Place(ld) for ld in widths]
    quantized: dict[int, Part] = {}
    for number, step in enumerate(program.steps):
        if int8 and isinstance(step, Linear) and is_quantized(step, program) and step.x not in quantized.values():
            quantized[number] = step.x
    coarse = {part.register for part in quantized.values()}
    taken: list[tuple[int, int, int]] = []  # (first byte, the one past the last, last step) of what is kept
    row_bytes, cleared = 0, dict[int, tuple[Part, ...]]()
    for number, step in enumerate(program.steps):
        taken = [one for one in taken if one[2] >= number]
        for part in writes(step):
            register = part.register
            first, last = spans[register]
            if first != number or places[register] != Place(widths[register]):
                continue
            for name, bytes_each, more, kept in (("f32", 4, 0, wide), ("bf16", 2, 0, narrow), ("int8", 1, 4, coarse)):
                if register in kept:
                    size = widths[register] * bytes_each + more
                    at = first_free(taken, size)
                    taken.append((at, at + size, last))
                    row_bytes = max(row_bytes, at + size)
                    places[register] = replace(places[register], **{name: at})
            past = Part(register, program.widths[register], read_to[register] - program.widths[register])
            if register in narrow and past.width:
                cleared[number] = (*cleared.get(number, ()), past)
    return Layout(tuple(places), row_bytes, cleared, quantized)


def _all_reads(program: Program) -> Iterator[tuple[Part, Use]]:
    yield from (one for step in program.steps for one in reads(step))
    yield program.logits, Use.F32


def lifetimes(program: Program) -> dict[int, tuple[int, int]]:
    """Of each register, the first step that touches it and the last; the answer's last is the number of steps."""
    spans: dict[int, tuple[int, int]] = {}
    for number, step in enumerate(program.steps):
        for part in (*writes(step), *(part for part, _ in reads(step))):
            first, _ = spans.get(part.register, (number, number))
            spans[part.register] = (first, number)
    first, _ = spans[program.logits.register]
    return spans | {program.logits.register: (first, len(program.steps))}


def first_free(taken: list[tuple[int, int, int]], size: int) -> int:
    """The first byte with `size` free from it on; `taken` are (first byte, the one past the last, last step)."""
    at = 0
    for first, end, _ in sorted(taken):
        if at + size <= first:
            break
        at = max(at, end)
    return at
