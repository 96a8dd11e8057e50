import torch
from hypothesis import given
from hypothesis import strategies as st

from prerank.serve.device_memory import Field, Layout

DTYPES = [torch.bool, torch.int8, torch.bfloat16, torch.float32, torch.int64]
shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@given(st.lists(st.tuples(shapes, st.sampled_from(DTYPES)), min_size=1, max_size=6), st.data())
def test_fields_stand_side_by_side_and_one_copy_of_the_first_brings_those_and_no_more(kinds, data):
    layout = Layout([Field(f"f{n}", shape, dtype) for n, (shape, dtype) in enumerate(kinds)])
    here, there = torch.zeros(layout.num_bytes + 7, dtype=torch.uint8), torch.zeros(layout.num_bytes, dtype=torch.uint8)
    for n, view in enumerate(layout.views(here).values()):
        view.fill_(n + 1)
    last = data.draw(st.integers(0, len(kinds) - 1))
    end = layout.end_of(f"f{last}")
    there[:end].copy_(here[:end])
    for n, (view, (shape, dtype)) in enumerate(zip(layout.views(there).values(), kinds, strict=True)):
        assert (view.shape, view.dtype) == (shape, dtype)
        assert torch.equal(view, torch.full(shape, n + 1 if n <= last else 0).to(dtype))
