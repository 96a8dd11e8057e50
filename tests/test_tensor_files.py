"""Files of tensors: the bytes that the safetensors library would write, without all of them in memory once more."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from prerank._tensor_files import read_tensors, write_tensors

TYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.uint16, torch.int16, torch.float16, torch.bfloat16),
    *(torch.uint32, torch.int32, torch.float32, torch.uint64, torch.int64, torch.float64),
]
shapes = st.lists(st.integers(0, 3), max_size=3)
names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=5).filter(lambda name: name != "__metadata__")


def tensor(shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    num = torch.Size(shape).numel()
    return torch.arange(num).to(torch.uint8).to(dtype).reshape(shape)


@given(st.dictionaries(names, st.tuples(shapes, st.sampled_from(TYPES)), max_size=6), st.dictionaries(names, names))
def test_they_are_those_of_the_library_so_versions_keep_their_names(tmp_path_factory, said, note):
    folder = tmp_path_factory.getbasetemp()
    tensors = {name: tensor(*one) for name, one in said.items()}
    write_tensors(folder / "ours", tensors, note)
    save_file(tensors, folder / "theirs", {"prerank": json.dumps(note, sort_keys=True)})
    assert (folder / "ours").read_bytes() == (folder / "theirs").read_bytes()
    found, noted = read_tensors(folder / "ours")
    assert noted == note
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], one) for name, one in tensors.items())


def test_large_ones_are_written_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("prerank._tensor_files._AT_ONCE", 1000)
    large = torch.arange(5_000).reshape(50, 100)
    write_tensors(tmp_path / "file", {"whole": large, "turned": large.T, "weights": large.float().requires_grad_()}, {})
    found = read_tensors(tmp_path / "file")[0]
    assert torch.equal(found["whole"], large)
    assert torch.equal(found["turned"], large.T)
    assert torch.equal(found["weights"], large.float())


def test_a_file_may_be_written_anew_from_what_is_mapped_of_it(tmp_path):
    path = tmp_path / "file"
    write_tensors(path, {"rows": torch.arange(9)}, {"time": 1})
    mapped = read_tensors(path)[0]
    write_tensors(path, {"rows": mapped["rows"] + 1, "same": mapped["rows"]}, {"time": 2})
    found, note = read_tensors(path)
    assert (found["rows"].tolist(), found["same"].tolist(), note) == ([*range(1, 10)], [*range(9)], {"time": 2})
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


def test_a_type_that_the_format_lacks_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="complex64"):
        write_tensors(tmp_path / "file", {"rows": torch.zeros(1, dtype=torch.complex64)}, {})
