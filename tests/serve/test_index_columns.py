"""Candidates as Arrow columns come back as they were, in fewer bytes."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prerank.serve.index_columns import SIMILARITY, batch_of, columns_of, options_of, tensors_of

int64s = st.integers(-(2**63), 2**63 - 1)
small = st.integers(0, 2**32 - 1)


def sent(batch: pa.RecordBatch, is_compressed: bool) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema, options=options_of(is_compressed)) as writer:
        writer.write_batch(batch)
    return sink.getvalue()


@given(st.one_of(st.lists(small, max_size=40), st.lists(int64s, max_size=40)), st.booleans())
def test_what_is_sent_is_what_comes(ids: list[int], is_compressed: bool):
    item_ids = torch.tensor(ids, dtype=torch.int64)
    similarity, bids = torch.randn(len(ids)), torch.arange(len(ids), dtype=torch.float64)
    batch = batch_of(columns_of(item_ids, {SIMILARITY: similarity, "bid": bids}), {"version": "v"})
    table = pa.ipc.open_stream(sent(batch, is_compressed)).read_all()
    assert table.schema.metadata == {b"version": b"v"}
    found = tensors_of(table, ("bid",))
    assert found is not None
    assert found[0].dtype == torch.int64
    assert torch.equal(found[0], item_ids)
    assert torch.equal(found[1], similarity)
    assert torch.equal(found[2]["bid"], bids)


@pytest.mark.parametrize(("largest", "kind"), [(2**32 - 1, pa.uint32()), (2**32, pa.int64())])
def test_ids_take_four_bytes_where_that_holds_them_all(largest: int, kind: pa.DataType):
    assert columns_of(torch.tensor([0, largest]), {})["item_ids"].type == kind
    assert columns_of(torch.tensor([-1, 5]), {})["item_ids"].type == pa.int64()


def test_compressed_is_fewer_bytes():
    ids = torch.from_numpy(np.random.default_rng(0).permutation(1_000_000)[:10_000])
    batch = batch_of(columns_of(ids, {SIMILARITY: torch.linspace(1, 0, 10_000)}))
    assert sent(batch, True).size < 0.9 * sent(batch, False).size


@pytest.mark.parametrize(
    "columns",
    [
        {"item_ids": pa.array([1])},
        {"item_ids": pa.array([2**63], pa.uint64()), "similarity": pa.array([1.0], pa.float32())},
        {"item_ids": pa.array(["1"]), "similarity": pa.array([1.0], pa.float32())},
        {"item_ids": pa.array([1]), "similarity": pa.array([1.0], pa.float64())},
        {"similarity": pa.array([1.0], pa.float32()), "item_ids": pa.array([1])},
        {"item_ids": pa.array([1]), "similarity": pa.array([1.0], pa.float32()), "bid": pa.array([1])},
    ],
)
def test_other_columns_are_not_taken_for_candidates(columns: dict[str, pa.Array]):
    assert tensors_of(pa.table(columns), ()) is None
