"""What candidates are worth, and apart from it who of those judged wins.

The two are apart so that a request of more candidates than fit at once is judged piece by piece: the pieces `joined`
are what it would have been at once, and their winners its winners.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from prerank.business.rule import Rule
from prerank.business.utility import Utility
from prerank.kernels.greedy import greedy_top_k
from prerank.types import Features, TopK


@dataclass(frozen=True, slots=True)
class Ranked(TopK):
    """The winners, and how many valid candidates could not win.

    num_nonfinite int64 [B] had a utility or a probability that is not finite; num_below int64 [B] of the others were
    kept from it by a rule, such as a utility below the reserve or a probability below its floor; num_absent int64 [B]
    are of items that are not resident, and whose features nobody fetched.
    """

    num_nonfinite: Tensor
    num_below: Tensor
    num_absent: Tensor


@dataclass(frozen=True, slots=True)
class Known:
    """Of candidates [B, N], what is known before they are ranked.

    rows and slots int64 [B, N], 0 where there is none; valid bool [B, N], of those whose features there are; pacing
    float32 [B, N] and each of `values` [B, N] by name; num_absent int64 [B] as `Ranked` has it.
    """

    rows: Tensor
    slots: Tensor
    valid: Tensor
    pacing: Tensor
    values: Features
    num_absent: Tensor


@dataclass(frozen=True, slots=True)
class Judged:
    """Candidates [B, N] as they were judged: rows int64, utility float32, probs float32 [B, N, T], may_win bool.

    The counts int64 [B] are `Ranked`'s.
    """

    rows: Tensor
    utility: Tensor
    probs: Tensor
    may_win: Tensor
    num_nonfinite: Tensor
    num_below: Tensor
    num_absent: Tensor


def known(
    rows: Tensor,
    valid: Tensor,
    live: tuple[Tensor, Tensor, Features],
    own: Features,
    slots_of: Tensor | None = None,
) -> Known:
    """What is known of candidates of rows int64 and valid bool [B, N]; where they are not valid the row is 0.

    `live` is on bool, pacing float32 and the utility's values of those rows, [B, N] each; what `own` says of values
    [B, N] by name counts in place of the live ones. `slots_of` int64 [B, N] are their slots, -1 for what is not
    resident; without it they are the rows.
    """
    on, pacing, values = live
    valid = valid & on
    if slots_of is None:
        slots, num_absent = rows, rows.new_zeros(len(rows))
    else:
        slots, num_absent = slots_of.clamp_min(0), (valid & (slots_of < 0)).sum(1)
        valid = valid & (slots_of >= 0)
    return Known(rows, slots, valid, pacing, {**values, **own}, num_absent)


def judged(candidates: Known, probs: Tensor, utility: Utility, rules: Iterable[Rule]) -> Judged:
    """What candidates [B, N] of probs float32 [B, N, T] are worth, and which of them may win."""
    rows, rules = candidates.rows, tuple(rules)
    worth = candidates.pacing * utility(probs, candidates.values)
    for rule in rules:
        worth = rule.adjust(probs, worth, rows)
    is_finite = candidates.valid & worth.isfinite() & probs.isfinite().all(-1)
    is_enough = is_finite
    for rule in rules:
        is_enough = is_enough & rule.may_win(probs, worth, rows)
    return Judged(
        rows=rows,
        utility=worth,
        probs=probs,
        may_win=is_enough,
        num_nonfinite=(candidates.valid & ~is_finite).sum(1),
        num_below=(is_finite & ~is_enough).sum(1),
        num_absent=candidates.num_absent,
    )


def joined(pieces: Sequence[Judged]) -> Judged:
    """Pieces of the candidates of the same B requests, in order -> all of them as if judged at once."""
    return Judged(
        *(torch.cat([getattr(one, name) for one in pieces], dim=1) for name in ("rows", "utility", "probs", "may_win")),
        *(
            torch.stack([getattr(one, name) for one in pieces]).sum(0)
            for name in ("num_nonfinite", "num_below", "num_absent")
        ),
    )


def winners(candidates: Judged, names: Tensor, groups: tuple[Tensor, Tensor], item_ids: Tensor, k: int) -> Ranked:
    """The k [B, k] of highest utility of those that may win, and as many of a group as may, best first.

    Equal utilities are ordered by names int64 [B, N]. `groups` are what `business.diversity.groups_of` gives, item_ids
    int64 [I] those of every row. Where there are fewer than k the rest is not valid, with row and item_id -1.
    """
    rows, probs = candidates.rows, candidates.probs
    kept = greedy_top_k(candidates.utility, names, candidates.may_win, *groups, min(k, rows.shape[1]))
    won = kept >= 0
    kept = kept.clamp_min(0)
    rows = rows.gather(1, kept)
    missing = (0, k - kept.shape[1])
    return Ranked(
        rows=pad(rows.masked_fill(~won, -1), missing, value=-1),
        item_ids=pad(item_ids[rows].masked_fill(~won, -1), missing, value=-1),
        utility=pad(candidates.utility.gather(1, kept), missing),
        probs=pad(probs.gather(1, kept.unsqueeze(-1).expand(-1, -1, probs.shape[-1])), (0, 0, *missing)),
        valid=pad(won, missing),
        num_nonfinite=candidates.num_nonfinite,
        num_below=candidates.num_below,
        num_absent=candidates.num_absent,
    )
