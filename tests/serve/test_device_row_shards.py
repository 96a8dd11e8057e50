"""An item table split by rows over processes: what their leader answers is what one scorer of all rows does."""

import os
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist

from prerank.errors import ConfigError, DeviceFailed
from prerank.serve.device_row_shards import RowShards
from prerank.serve.device_split import split
from prerank.serve.device_streams import CpuDevice
from prerank.types import CandidateSet, ItemChange
from tests.processes import forked
from tests.serve.test_device import LIKE, NUM_ITEMS, asked, same, user, world


def in_processes(num, target, folder):
    """`target(shards, model)` in each of so many processes that are one group; all must end well."""
    processes = [forked(_joined, target, number, num, str(folder / "rendezvous")) for number in range(num)]
    try:
        for one in processes:
            one.join(120)
        assert [one.exitcode for one in processes] == [0] * num
    finally:
        for one in processes:
            one.kill()
            one.join(30)


def _joined(target, number, num, meeting):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", f"file://{meeting}", rank=number, world_size=num, timeout=timedelta(seconds=60))
    model = world()
    target(RowShards(model, CpuDevice(), LIKE), model)
    dist.destroy_process_group()


def stacked(nums, own=False):
    """Requests of so many candidates as one batch, padded with what is not valid."""
    width = max(nums)
    rows, valid = torch.full((len(nums), width), -7), torch.zeros((len(nums), width), dtype=torch.bool)
    for at, num in enumerate(nums):
        one = asked(num, num)
        rows[at, :num], valid[at, :num] = one.rows[0], one.valid[0]
    values = {"bid": torch.arange(rows.numel()).view(rows.shape).remainder(5).float()} if own else {}
    return CandidateSet(rows, torch.zeros(rows.shape), valid, values=values)


def same_answers(shards, model):
    if dist.get_rank():
        shards.follow()
        return
    every = torch.arange(NUM_ITEMS)[None]
    of_the_last = torch.arange(NUM_ITEMS - 9, NUM_ITEMS)[None]  # and none of other shards
    requests = [(asked(num, num, num % 2 == 0), user(num / 10), k) for num in (0, 1, 2, 40, 301) for k in (0, 1, 20)]
    requests += [(stacked([40, 0, 7, 300], own), {"u": torch.arange(4.0)}, 20) for own in (False, True)]
    requests += [(CandidateSet(rows, rows.float(), rows >= 0), user(0.5), 400) for rows in (every, of_the_last)]
    for candidates, side, k in requests:
        assert same(shards.rank(side, candidates, k), model.rank(side, candidates, k))
    shards.close()


def same_answers_after_changes(shards, model):
    if dist.get_rank():
        shards.follow()
        return
    generator = torch.Generator().manual_seed(1)
    for turn in range(8):
        rows = torch.randint(NUM_ITEMS, (30,), generator=generator).unique()
        changes = [ItemChange(0, on=int(row) % 3 > 0, pacing=0.5, values={"bid": turn}) for row in rows]
        model.live.change(rows.tolist(), changes)
        side = {"a": torch.full((len(rows),), float(turn)), "b": torch.zeros(len(rows), 1)}
        model.put_side(rows, side)
        model.diversity.codes[rows] = turn
        shards.put(rows)
        assert same(shards.rank(user(0.0), asked(300, turn), 20), model.rank(user(0.0), asked(300, turn), 20))
    shards.put(torch.zeros(0, dtype=torch.int64))
    assert same(shards.rank(user(0.0), asked(300), 20), model.rank(user(0.0), asked(300), 20))
    shards.close()


def refusals(shards, model):
    if dist.get_rank():
        shards.follow()
        return
    those = asked(5)
    beyond = CandidateSet(torch.full((1, 5), NUM_ITEMS), torch.zeros(1, 5), torch.ones(1, 5, dtype=torch.bool))
    unknown = CandidateSet(those.rows, those.similarity, those.valid, values={"price": torch.ones(1, 5)})
    for side, candidates, wrong in [
        (user(0.0), beyond, "rows: expected 0 to 399, got 400 to 400"),
        (user(0.0), unknown, "not as those of the version"),
        ({"u": torch.zeros(2)}, those, "not as those of the version"),
    ]:
        with pytest.raises(DeviceFailed, match=wrong):
            shards.rank(side, candidates, 3)
    # nobody was told anything, so the next one is answered
    assert same(shards.rank(user(0.0), those, 3), model.rank(user(0.0), those, 3))
    shards.close()


def a_shard_that_goes(shards, model):
    if dist.get_rank():
        os._exit(0)
    with pytest.raises(DeviceFailed, match=r"a shard of the items is gone, or failed: .*; start all of them again"):
        shards.rank(user(0.0), asked(40), 5)
    os._exit(0)  # the group does not end well any more


@pytest.mark.parametrize("num", [2, 3])
def test_the_answer_of_shards_is_that_of_one_device(tmp_path, num):
    in_processes(num, same_answers, tmp_path)


def test_what_the_leader_puts_is_known_to_every_request_after(tmp_path):
    in_processes(2, same_answers_after_changes, tmp_path)


def test_what_is_refused_is_refused_before_anybody_is_told(tmp_path):
    in_processes(2, refusals, tmp_path)


def test_a_shard_that_is_gone_fails_requests_and_says_so(tmp_path):
    in_processes(2, a_shard_that_goes, tmp_path)


def test_rows_are_split_evenly_and_each_is_somebodys():
    parts = split(10, 4)
    assert [len(range(10)[part]) for part in parts] == [2, 3, 2, 3]
    assert [row for part in parts for row in range(10)[part]] == list(range(10))
    with pytest.raises(ConfigError, match="3 rows cannot be split over 4 devices"):
        split(3, 4)


def test_a_table_some_of_whose_items_are_not_resident_is_not_split():
    model = world()
    model.items.slots = torch.from_numpy(np.arange(NUM_ITEMS, dtype=np.int32))
    with pytest.raises(ConfigError, match="only where all items are resident"):
        RowShards(model, CpuDevice(), LIKE)
