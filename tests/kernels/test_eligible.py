from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prerank.kernels import native
from prerank.kernels.eligible import (
    by_triton,
    eligible_rows,
    natively,
    num_words,
    pack_rows,
    reference,
)
from tests.kernels.ways import ways

HERE = native.LEVELS[: native.LEVELS.index(native.level()) + 1]
LEVELS = [pytest.param(partial(natively, level=level), id=level) for level in HERE]
EVERY = ways(
    eligible_rows,
    reference,
    by_triton,
    **{level: partial(natively, level=level) for level in HERE},
    operation=torch.ops.prerank.eligible_rows.default,
)
SIZES = [1, 63, 64, 65, 127, 128, 700, 65_536, 65_537, 140_001]


def made(num_items: int, num_bitmaps: int, seed: int, density: float = 0.5) -> tuple[np.ndarray, torch.Tensor]:
    """Bits bool [R, I] and the same packed, with every bit past num_items set to tempt the unwary."""
    bits = np.random.default_rng(seed).random((num_bitmaps, num_items)) < density
    padded = np.ones((num_bitmaps, 64 * num_words(num_items)), bool)
    padded[:, :num_items] = bits
    words = np.packbits(padded, axis=1, bitorder="little").view("<i8")
    return bits, torch.from_numpy(words.astype(np.int64))


def groups_of(groups: list[tuple[list[int], bool]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    chosen = torch.tensor([row for rows, _ in groups for row in rows], dtype=torch.int32)
    starts = torch.tensor(np.cumsum([0, *(len(rows) for rows, _ in groups)]), dtype=torch.int64)
    return chosen, starts, torch.tensor([inverted for _, inverted in groups], dtype=torch.bool)


def truth(bits: np.ndarray, groups: list[tuple[list[int], bool]]) -> list[int]:
    having = [{*np.flatnonzero(row).tolist()} for row in bits]
    left = set(range(bits.shape[1]))
    for rows, is_inverted in groups:
        any_of = set().union(*(having[row] for row in rows))
        left = left - any_of if is_inverted else left & any_of
    return sorted(left)


GROUPS = st.lists(st.tuples(st.lists(st.integers(0, 4), max_size=4), st.booleans()), max_size=5)


@pytest.mark.parametrize("rows_of", EVERY)
@given(
    num_items=st.integers(0, 300), groups=GROUPS, seed=st.integers(0, 99), density=st.sampled_from([0.05, 0.5, 0.95])
)
def test_a_row_is_eligible_if_every_group_has_it_as_sets_in_plain_python_say(rows_of, num_items, groups, seed, density):
    bits, bitmaps = made(num_items, 5, seed, density)
    found = rows_of(bitmaps, *groups_of(groups), num_items)
    assert found.dtype == torch.int64
    assert found.tolist() == truth(bits, groups)


@pytest.mark.parametrize("rows_of", EVERY)
@pytest.mark.parametrize("num_items", SIZES)
def test_blocks_and_words_end_where_the_items_do(rows_of, num_items):
    bits, bitmaps = made(num_items, 5, seed=num_items)
    groups = [([0, 1], False), ([2, 0], False), ([3], True)]
    assert rows_of(bitmaps, *groups_of(groups), num_items).tolist() == truth(bits, groups)


@pytest.mark.parametrize("rows_of", EVERY)
@pytest.mark.parametrize("num_items", SIZES)
def test_nothing_asked_lets_everybody_through_and_an_empty_group_nobody_unless_inverted(rows_of, num_items):
    bitmaps = made(num_items, 2, seed=1)[1]
    assert rows_of(bitmaps, *groups_of([]), num_items).tolist() == list(range(num_items))
    assert rows_of(bitmaps, *groups_of([([], True)]), num_items).tolist() == list(range(num_items))
    assert rows_of(bitmaps, *groups_of([([], False)]), num_items).tolist() == []
    assert rows_of(bitmaps[:0], *groups_of([]), num_items).tolist() == list(range(num_items))


@pytest.mark.parametrize("rows_of", EVERY)
@pytest.mark.parametrize("num_items", SIZES)
def test_bitmaps_of_all_ones_or_all_zeros_are_everybody_or_nobody_and_never_more(rows_of, num_items):
    width = num_words(num_items)
    bitmaps = torch.stack([torch.zeros(width, dtype=torch.int64), torch.full((width,), -1)])
    everybody = list(range(num_items))
    for row, inverted, expected in ((0, False, []), (0, True, everybody), (1, False, everybody), (1, True, [])):
        assert rows_of(bitmaps, *groups_of([([row], inverted)]), num_items).tolist() == expected


@pytest.mark.parametrize("rows_of", LEVELS)
@pytest.mark.parametrize("per_word", [0, 1, 7, 8, 9, 15, 16, 17, 24, 25, 63, 64])
def test_words_of_any_number_of_bits_give_as_many_rows_up_to_the_last(rows_of, per_word):
    """Also where the words before the last have few, and there is no room past the rows to write over."""
    made = np.random.default_rng(per_word)
    for counts in ([per_word] * 9, [per_word] + [0] * 70, [0] * 70 + [per_word], [64, per_word, 1, per_word]):
        rows = np.concatenate([64 * w + np.sort(made.permutation(64)[:count]) for w, count in enumerate(counts)])
        bitmap = pack_rows(torch.from_numpy(rows).long(), 64 * len(counts)).unsqueeze(0)
        assert rows_of(bitmap, *groups_of([([0], False)]), 64 * len(counts)).tolist() == rows.tolist()


@given(num_items=st.integers(1, 300), seed=st.integers(0, 99))
def test_what_is_packed_comes_out_again(num_items, seed):
    rows = torch.from_numpy(np.flatnonzero(np.random.default_rng(seed).random(num_items) < 0.5))
    bitmap = pack_rows(rows[torch.randperm(len(rows))], num_items)
    assert eligible_rows(bitmap.unsqueeze(0), *groups_of([([0], False)]), num_items).tolist() == rows.tolist()


@pytest.mark.parametrize("row", [-1, 65])
def test_a_row_past_the_items_is_not_packed(row):
    with pytest.raises(IndexError, match=f"rows: expected 0 to 64, got {row} to {row}"):
        pack_rows(torch.tensor([row]), 65)


@pytest.mark.parametrize("rows_of", EVERY)
@pytest.mark.parametrize("row", [-1, 2])
def test_a_bitmap_there_is_not_is_refused_before_a_kernel_sees_it(rows_of, row):
    bitmaps = made(70, 2, seed=1)[1]
    with pytest.raises(IndexError, match="chosen: expected 0 to 1, got"):
        rows_of(bitmaps, *groups_of([([0, row], False)]), 70)


@pytest.mark.parametrize("rows_of", EVERY)
@pytest.mark.parametrize("starts", [[0], [0, 2, 1], [1, 1, 2], [0, 1, 3], [0, -1, 2], [0, 1, 1, 2]])
def test_starts_that_do_not_split_what_is_chosen_are_refused(rows_of, starts):
    bitmaps = made(70, 2, seed=1)[1]
    chosen, _, inverted = groups_of([([0], False), ([1], False)])
    with pytest.raises(ValueError, match="expected starts that split 2 bitmaps into 2 groups, got"):
        rows_of(bitmaps, chosen, torch.tensor(starts), inverted, 70)


@pytest.mark.parametrize("rows_of", EVERY)
def test_tensors_of_another_type_or_width_are_our_own_mistake(rows_of):
    bitmaps = made(70, 2, seed=1)[1]
    chosen, starts, inverted = groups_of([([0], False)])
    for wrong in (
        (bitmaps.int(), chosen, starts, inverted, 70),
        (bitmaps, chosen.long(), starts, inverted, 70),
        (bitmaps, chosen, starts.int(), inverted, 70),
        (bitmaps, chosen, starts, inverted.int(), 70),
        (bitmaps, chosen, starts, inverted, 129),
        (bitmaps, chosen, starts, inverted, 64),
    ):
        with pytest.raises(AssertionError):
            rows_of(*wrong)


def test_without_the_library_torch_answers_the_same(monkeypatch: pytest.MonkeyPatch):
    bits, bitmaps = made(700, 3, seed=4)
    groups = [([0], False), ([1, 2], True)]
    monkeypatch.setattr(native, "library", lambda: None)
    assert eligible_rows(bitmaps, *groups_of(groups), 700).tolist() == truth(bits, groups)


class Asked(torch.nn.Module):
    def forward(self, bitmaps, chosen, starts, inverted):
        return eligible_rows(bitmaps, chosen, starts, inverted, 700) * 2


def test_an_exported_program_has_it_as_one_operation_with_as_many_rows_as_there_are():
    bits, bitmaps = made(700, 3, seed=4)
    groups = [([0], False), ([1, 2], True)]
    exported = torch.export.export(Asked(), (bitmaps, *groups_of(groups)))
    assert "torch.ops.prerank.eligible_rows" in exported.graph_module.code
    for asked in (groups, [([1], False), ([0, 2], True)]):
        found = exported.module()(bitmaps, *groups_of(asked))
        assert found.tolist() == [2 * row for row in truth(bits, asked)]


def test_the_operation_is_what_the_compiler_is_told_it_is():
    bitmaps = made(700, 3, seed=4)[1]
    arguments = (bitmaps, *groups_of([([0], False), ([1, 2], True)]), 700)
    torch.library.opcheck(torch.ops.prerank.eligible_rows.default, arguments)
