"""Publishing streams: features and vectors that are on the disk stay there, so that rows may be larger than memory."""

import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from prerank.bundle import item_table, publish
from prerank.bundle.load import load
from tests.bundle import world

NUM_ITEMS, WIDTH = 200_000, 128
DATA_MB = NUM_ITEMS * WIDTH * 4 / 1e6  # of the features; that of the vectors is about as much
ROOM_MB = 0.8 * DATA_MB
"""Less than either is; held whole, both are there, and what is written of them once more."""


def large(folder: Path) -> world.Parts:
    """Many items, whose features and vectors are mapped from files."""
    features = world.PLAIN["features"]
    item = features["item"] | {"vector": {"kind": "embedding", "width": WIDTH}}
    retrieval = world.PLAIN["retrieval"] | {"dim": WIDTH - 1}
    settings = world.config(features=features | {"item": item}, retrieval=retrieval, inventory={"slack": 10})
    parts = world.parts(num_items=50, settings=settings)
    columns = {name: np.resize(column, (NUM_ITEMS, *column.shape[1:])) for name, column in parts.item_columns.items()}
    columns["vector"] = mapped(folder / "feature.npy")
    ids = np.arange(NUM_ITEMS)
    return world.replace(
        parts,
        item_ids=ids,
        item_columns=columns,
        item_table=pa.table({"title": ids % 100, "advertiser": ids % 50}),
        popularity=np.resize(parts.popularity, (NUM_ITEMS, parts.popularity.shape[1])),
        vectors=mapped(folder / "vectors.npy"),
    )


def mapped(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="r")


def write(path: Path, seed: int) -> None:
    out = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(NUM_ITEMS, WIDTH))
    few = np.random.default_rng(seed).normal(size=(1000, WIDTH)).astype(np.float32)
    for start in range(0, NUM_ITEMS, 1000):
        out[start : start + 1000] = few


def main(folder: Path) -> None:
    """Publish with little more memory of its own than what is taken now; mapped files are not counted."""
    parts = large(folder)
    # a piece and what the models make of it are there at once, however many items there are
    publish._ITEMS_AT_ONCE = item_table._AT_ONCE = 1 << 13
    lines = Path("/proc/self/status").read_text().splitlines()
    taken_kib = int(next(line for line in lines if line.startswith("VmData")).split()[1])
    limit = 1024 * taken_kib + int(ROOM_MB * 1e6)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    print(publish.publish(folder / "store", parts))


@pytest.mark.skipif(sys.platform != "linux", reason="counts the memory of a process as Linux does")
def test_rows_on_the_disk_are_published_in_less_memory_than_they_take(tmp_path):
    write(tmp_path / "feature.npy", 1)
    write(tmp_path / "vectors.npy", 2)
    done = subprocess.run(
        [sys.executable, "-m", "tests.bundle.test_publish_memory", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "PYTHONPATH": ":".join(sys.path)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    path = tmp_path / "store" / "versions" / done.stdout.strip()
    assert not list(path.glob(".*")), "nothing is left of what was in between"
    bundle = load(path)
    feature = bundle.scorer.items.features()["vector"]
    some = np.arange(0, NUM_ITEMS, 997)
    np.testing.assert_array_equal(feature[some].numpy(), mapped(tmp_path / "feature.npy")[some])
    np.testing.assert_array_equal(bundle.index.vectors[some].numpy(), mapped(tmp_path / "vectors.npy")[some])
    assert len(bundle.index.vectors) == NUM_ITEMS + 10


if __name__ == "__main__":
    main(Path(sys.argv[1]))
