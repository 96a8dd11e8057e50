"""What an interpreter cannot see of a generated kernel: that its threads meet between what they write and read."""

import re

import torch
from hypothesis import given
from hypothesis import strategies as st

from prerank.kernels.device_layout import cut
from prerank.kernels.program import Builder, Gather, Part
from prerank.kernels.triton.source import generate
from tests.kernels.test_device_layout import programs

MOST = 128
WIDTHS = {"x": 300, "q": 80, "code": 1, "bag": 3}


def touches_by_section(program, cuts):
    """Between two meetings of threads each, every touch of scratch: (is written, kind, columns)."""
    body = generate(program, cuts, WIDTHS).text
    sections, register = [[]], -1
    for line in body.splitlines():
        if "debug_barrier" in line:
            sections.append([])
        if said := re.match(r" +# \d+: r(\d+)\[", line):
            register = int(said[1])
        for place, start, depth in re.findall(r"streamed\(y, (kept\w*) \+ (\d+), \w+ \+ \d+, (\d+)", line):
            sections[-1].append((False, place, range(int(start), int(start) + int(depth))))
        for place, start, width in re.findall(r"loaded\((kept\w*) \+ (\d+), (\d+)\)", line):
            sections[-1].append((False, place, range(int(start), int(start) + int(width))))
        for place, start in re.findall(r"stored\((kept\w*) \+ (\d+), ", line):
            pieces = cuts.pieces(Part(register, 0, program.widths[register]))
            (width,) = {one.padded for one in pieces if cuts.is_placed(one) and cuts.column(one) == int(start)}
            sections[-1].append((True, place, range(int(start), int(start) + width)))
    return sections


def collide(one, other):
    return one[1] == other[1] and one[2].start < other[2].stop and other[2].start < one[2].stop


def assert_none_collide(program, budget):
    cuts = cut(program, MOST, budget)
    sections = touches_by_section(program, cuts)
    assert sum(is_written for section in sections for is_written, *_ in section) >= len(cuts.places)
    for touches in sections:
        for number, one in enumerate(touches):
            for other in touches[:number]:
                assert not (one[0] or other[0]) or not collide(one, other)


@given(program=programs(), budget=st.sampled_from([0, 400]))
def test_what_is_written_is_touched_by_nobody_else_until_all_have_met(program, budget):
    assert_none_collide(program, budget)


def test_an_answer_of_many_tasks_is_read_after_all_have_met():
    builder = Builder()
    x = builder.add(Gather(builder.register(10), "x"))
    program = builder.program(builder.linear(x, torch.zeros(70, 10), None))
    assert cut(program, MOST, 0).full_row
    assert_none_collide(program, 0)


@given(program=programs())
def test_what_fits_into_registers_touches_no_scratch(program):
    text = generate(program, cut(program, MOST, 1 << 20), WIDTHS).text
    assert "kept" not in text.split("# 0: ")[1]
    assert "debug_barrier" not in text
