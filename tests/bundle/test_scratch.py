"""What is in between as a version is made: on the disk where it is large, gone afterwards, and the same either way."""

import pytest
import torch

from prerank.bundle import scratch
from prerank.bundle.publish import publish
from prerank.bundle.scratch import Scratch
from tests.bundle import world


def test_what_is_large_is_in_a_file_without_a_name_and_what_is_small_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(scratch, "IN_MEMORY", 1000)
    for dtype in (torch.int8, torch.bfloat16, torch.float32, torch.int64):
        large = Scratch(tmp_path).empty((50, 40), dtype)
        large[:] = torch.arange(40).to(dtype)
        assert (large.shape, large.dtype) == ((50, 40), dtype)
        assert torch.equal(large[49], torch.arange(40).to(dtype))
        assert not list(tmp_path.iterdir())
    nowhere = Scratch(tmp_path / "nowhere")
    assert nowhere.empty((2, 0, 3), torch.float32).shape == (2, 0, 3)
    assert nowhere.empty((9,), torch.int64).shape == (9,)
    with pytest.raises(RuntimeError, match="No such file"):
        nowhere.empty((1000,), torch.int64)


@pytest.mark.parametrize("inventory", [{}, {"slack": 5}, {"resident": {"top": 100, "by": "bid"}, "slack": 7}])
@pytest.mark.parametrize("storage", ["float32", "int8"])
def test_a_version_made_of_files_is_the_one_made_in_memory(tmp_path, monkeypatch, inventory, storage):
    retrieval = world.PLAIN["retrieval"] | {"index": {"storage": storage}}
    parts = world.parts(settings=world.config(inventory=inventory, retrieval=retrieval))
    parts = world.replace(parts, item_table=parts.item_table.append_column("bid", [parts.item_columns["bid"]]))
    in_memory = publish(tmp_path / "one", parts)
    monkeypatch.setattr(scratch, "IN_MEMORY", 1)
    monkeypatch.setattr("prerank.bundle.item_table._AT_ONCE", 64)
    version = publish(tmp_path / "other", parts)
    assert version[-12:] == in_memory[-12:]
    assert not list((tmp_path / "other" / "versions" / version).rglob(".*"))
