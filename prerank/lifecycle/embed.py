"""Every item's vector, made piece by piece from features that stay on the disk, in a file that an interrupted run goes
on with.

What is in memory at once is one piece, so a catalogue may be larger than that.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import torch

from prerank.bundle.durable import replace_text
from prerank.errors import TrainingError
from prerank.models.towers import TwoTower
from prerank.types import Array, Columns, Report, silent

AT_ONCE = 1 << 16


@torch.no_grad()
def embed(
    towers: TwoTower, columns: Columns, popularity: Array, folder: Path, stated: str, report: Report = silent
) -> Array:
    """Vectors float32 [I, D] of items by their encoded features [I, ...] and popularity float32 [I, S], mapped.

    They are in a file of `folder`, named after the towers' weights and `stated`, which says of which items they are;
    what is there already is not made again. Vectors of earlier towers are removed. Raises TrainingError where one is
    not finite.
    """
    assert columns, "an item has features"
    num = len(popularity)
    assert all(len(column) == num for column in columns.values())
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"vectors-{_key(towers, stated)}.npy"
    mark = path.with_suffix(".json")
    for old in folder.glob("vectors-*"):
        if old.stem != path.stem:
            old.unlink()
    towers.eval()
    done = _done(path, mark, num)
    out: Array | None = np.load(path, mmap_mode="r+") if done else None
    while done < num or out is None:
        some = slice(done, min(done + AT_ONCE, num))
        features = {name: torch.from_numpy(np.array(column[some])) for name, column in columns.items()}
        vectors = towers.item_side(features, torch.from_numpy(np.array(popularity[some], dtype=np.float32)))
        if not bool(vectors.isfinite().all()):
            raise TrainingError("the item tower gives vectors that are not finite; train again")
        if out is None:
            out = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(num, vectors.shape[1]))
        out[some] = vectors.numpy()
        assert isinstance(out, np.memmap)
        out.flush()
        done = some.stop
        replace_text(mark, json.dumps({"done": done}))  # what it says is on the disk already
        report("embed items", done, num, "items")
    mapped: Array = np.load(path, mmap_mode="r")
    return mapped


def _done(path: Path, mark: Path, num: int) -> int:
    """How many rows an earlier run left; 0 where its file is not whole."""
    try:
        done = int(json.loads(mark.read_text())["done"])
        shape = np.load(path, mmap_mode="r").shape
    except (OSError, ValueError, KeyError):
        return 0
    return done if shape[0] == num and 0 <= done <= num else 0


def _key(towers: TwoTower, stated: str) -> str:
    found = hashlib.sha256(stated.encode())
    for name, weights in sorted(towers.state_dict().items()):
        found.update(name.encode())
        found.update(weights.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]
