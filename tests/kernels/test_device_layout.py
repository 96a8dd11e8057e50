from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prerank.kernels.device_layout import LEAST, cut, held_bytes, read_in_full
from prerank.kernels.layout import lifetimes, reads, writes
from prerank.kernels.program import Builder, Gather, Linear, Mix, Norm, Part, Scale, Softmax
from tests.kernels.programs import made_program

MOST = 128
EVERYTHING, NOTHING = 1 << 20, 0


@st.composite
def programs(draw):
    sizes = (draw(st.integers(low, high)) for low, high in ((1, 300), (1, 140), (1, 4), (1, 40), (1, 3)))
    return made_program(*sizes)


def whole(program, cuts):
    return [cuts.pieces(Part(number, 0, width)) for number, width in enumerate(program.widths)]


@given(program=programs())
def test_pieces_cover_each_register_once_and_in_order(program):
    for width, pieces in zip(program.widths, whole(program, cut(program, MOST, EVERYTHING)), strict=True):
        ends = [piece.start + piece.width for piece in pieces]
        assert [piece.start for piece in pieces] == [0, *ends[:-1]]
        assert ends[-1] == width


@given(program=programs(), most=st.sampled_from([16, 64, 128]))
def test_a_piece_is_one_column_or_a_power_of_two_that_matrix_units_take(program, most):
    for piece in chain.from_iterable(whole(program, cut(program, most, EVERYTHING))):
        assert piece.width <= piece.padded <= most
        assert piece.padded == 1 or (piece.padded >= LEAST and piece.padded.bit_count() == 1)
        assert piece.padded <= LEAST or 4 * piece.width >= 3 * piece.padded


@given(program=programs())
def test_what_a_step_reads_and_writes_is_whole_pieces(program):
    cuts = cut(program, MOST, EVERYTHING)
    pieces = whole(program, cuts)
    for step in program.steps:
        for part in (*writes(step), *(part for part, _ in reads(step))):
            own = cuts.pieces(part)
            assert set(own) <= set(pieces[part.register])
            assert sum(piece.width for piece in own) == part.width


@given(program=programs())
def test_what_meets_column_by_column_is_cut_alike(program):
    cuts = cut(program, MOST, EVERYTHING)

    def shapes(part):
        return [(piece.start - part.start, piece.width, piece.padded) for piece in cuts.pieces(part)]

    for step in program.steps:
        met = {Scale: ("x",), Softmax: ("x",), Linear: ("add",)}.get(type(step), ())
        parts = [getattr(step, name) for name in met if getattr(step, name) is not None]
        parts += [*step.experts] if isinstance(step, Mix) else []
        parts += [*(step.cross or ())] if isinstance(step, Linear) else []
        for part in parts:
            assert shapes(part) == shapes(step.out)


def test_a_cut_travels_through_every_step_that_meets_it():
    builder = Builder()
    x = builder.add(Gather(builder.register(40), "x"))
    weights = builder.add(Softmax(builder.register(2), builder.add(Gather(builder.register(2), "w"))))
    mixes = [builder.add(Mix(builder.register(40), weights, (x, x))) for _ in range(2)]
    late = builder.add(Mix(builder.register(16), weights, (mixes[0].columns(0, 16), mixes[1].columns(24, 16))))
    cuts = cut(builder.program(late), MOST, EVERYTHING)
    assert cuts.edges[x.register] == (0, 16, 24, 40)
    assert [piece.start for piece in cuts.pieces(mixes[0])] == [0, 16, 24]


@given(program=programs())
def test_with_room_for_all_of_it_nothing_goes_to_scratch(program):
    cuts = cut(program, MOST, EVERYTHING)
    assert not cuts.places
    assert not cuts.row + cuts.full_row
    assert cut(program, MOST, held_bytes(program, cuts)) == cuts


@given(program=programs())
def test_no_two_registers_that_are_alive_at_once_share_scratch(program):
    cuts, spans = cut(program, MOST, NOTHING), lifetimes(program)
    for one, at in cuts.places.items():
        end = at + cuts.columns(one)
        assert end <= (cuts.full_row if one in cuts.full else cuts.row)
        assert at % LEAST == 0
        for other, there in cuts.places.items():
            is_beside = one != other and (one in cuts.full) == (other in cuts.full)
            is_together = spans[one][0] <= spans[other][1] and spans[other][0] <= spans[one][1]
            assert not (is_beside and is_together) or end <= there or there + cuts.columns(other) <= at


def test_what_is_wide_or_long_lived_goes_to_scratch_and_gathered_rows_do_not():
    program = made_program(200, 40, 3, 8)
    cuts = cut(program, MOST, NOTHING)
    assert held_bytes(program, cuts) < held_bytes(program, cut(program, MOST, EVERYTHING)) / 2
    assert not set(cuts.places) & cuts.gathered
    (mix,) = [step for step in program.steps if isinstance(step, Mix)]
    assert all(cuts.is_placed(piece) for part in mix.experts for piece in cuts.pieces(part))
    (norm,) = [step for step in program.steps if isinstance(step, Norm)]
    assert norm.x.register in set(cuts.places) & cuts.full


@pytest.mark.parametrize("dim", [4, 16])
def test_tables_that_a_step_wants_in_float32_are_known(dim):
    assert read_in_full(made_program(33, 7, 3, dim)) == {"x"}
