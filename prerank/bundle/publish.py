"""Trained parts to one immutable version on disk, wholly there or not at all."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import torch
from torch import Tensor, nn

import prerank
from prerank._tensor_files import write_tensors
from prerank.bundle import manifest
from prerank.bundle.durable import locked, sync
from prerank.bundle.failpoints import reach
from prerank.bundle.golden import Golden
from prerank.bundle.index_build import build_index, refuse_nonfinite, tensors_of_columns
from prerank.bundle.index_files import save_index
from prerank.bundle.item_table import ItemTable
from prerank.bundle.manifest import FileEntry
from prerank.bundle.parts import Parts as Parts
from prerank.bundle.residency import room_for
from prerank.bundle.scorer import Scorer
from prerank.bundle.scratch import Scratch
from prerank.bundle.toml import to_toml
from prerank.business.diversity import Diversity
from prerank.business.rules import fit_rules
from prerank.business.targeting import Targeting
from prerank.business.utility import Utility
from prerank.config import Config
from prerank.errors import BundleError, DataError, SchemaMismatch
from prerank.index.generators import build_generators, tensors_of
from prerank.models.ranker import Ranker
from prerank.stores.metadata import MetadataTable, write_metadata
from prerank.types import Array

_ITEMS_AT_ONCE = 1 << 16
_ABANDONED_S = 3600.0
_TEMPORARY = ".tmp-"
ITEMS_UNTIL = "items_until_ns"
"""The parent that says until when whole items came, or left, that a version was made with, in UTC nanoseconds."""


def publish(store: Path, parts: Parts) -> str:
    """The id of the version made of `parts` in the funnel's `store`; the same content again is the version there is.

    The id is the UTC minute and 12 hex digits of the files' content. Nothing is visible before all of it is on disk.
    Raises SchemaMismatch, DataError or BundleError where the parts do not fit each other or hold what is not finite.
    """
    _check(parts)
    versions = store / manifest.VERSIONS
    with locked(store):
        _sweep(versions)
    with _temporary(versions) as folder:
        num_items = _write_files(folder, parts)
        written = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        files = {name: FileEntry.of(folder / name) for name in written}
        now, content = datetime.now(UTC), manifest.content_id(files)
        version = f"{now:%Y%m%dT%H%M}-{content}"
        said = {
            "version": version,
            "created": now.isoformat(timespec="seconds"),
            "prerank": prerank.__version__,
            "torch": torch.__version__,
            "num_items": num_items,
            "parents": dict(parts.parents),
            "schema": parts.config.features.to_dict(),
            "metrics": dict(parts.metrics),
        }
        manifest.write_manifest(folder, said, files)
        for path in [*folder.rglob("*"), folder]:
            sync(path)
        reach("publish-written")
        with locked(store):
            for existing in versions.glob(f"*-{content}"):
                manifest.verify(existing)
                return existing.name
            os.replace(folder, versions / version)
            reach("publish-renamed")
            sync(versions)
    return version


def _check(parts: Parts) -> None:
    """Refuse before anything is computed or written."""
    different = parts.transforms.schema.first_difference(parts.config.features)
    if different:
        raise SchemaMismatch(f"the transforms were fitted for other features than the configuration's: {different}")
    for name, model in {"towers": parts.towers, "ranker": parts.ranker}.items():
        assert isinstance(model, nn.Module)
        model.eval()
        for key, weights in model.state_dict().items():
            refuse_nonfinite(weights, f"{name}: weights {key!r}")
    if parts.ranker.tasks != tuple(parts.config.tasks):
        raise SchemaMismatch(f"the ranker predicts {parts.ranker.tasks}, and the tasks are {tuple(parts.config.tasks)}")
    num_items = len(parts.item_ids)
    for what, rows in {
        "item_table": parts.item_table.num_rows,
        "popularity": len(parts.popularity),
        "vectors": num_items if parts.vectors is None else len(parts.vectors),
    }.items():
        if rows != num_items:
            raise DataError(f"publish: {what} has {rows} rows for {num_items} item_ids")
    schema = parts.config.features
    wanted, given = schema.request_features(), list(parts.golden_user)
    if set(wanted) != set(given):
        raise SchemaMismatch(f"the golden requests have the features {given}, and the user side reads {wanted}")
    if not wanted or not all(len(column) for column in parts.golden_user.values()):
        raise BundleError("publish: expected at least one golden request, got none")
    try:
        json.dumps([parts.metrics, parts.parents], allow_nan=False)
    except (TypeError, ValueError) as error:
        raise BundleError(f"publish: expected metrics and parents of finite JSON values: {error}") from None


def _write_files(folder: Path, parts: Parts) -> int:
    """Every file but the manifest; returns how many items there are."""
    config, scratch = parts.config, Scratch(folder)
    raw = _in_order(parts.item_table, parts.order())
    room = room_for(config, parts.transforms.sizes(), parts.item_ids, parts.item_table)
    popularity = parts.popularity if room.slack else None
    items = ItemTable.build(parts.item_ids, parts.item_columns, room, popularity, scratch.empty)
    fault = items.first_fault(config.features, parts.transforms.sizes())
    if fault:
        raise SchemaMismatch(f"{fault}; encode the items with the transforms published")
    keep = min(config.retrieval.keep, items.num_published)
    index = build_index(parts, items, raw, keep, scratch.empty)
    diversity = Diversity.build(config.diversity, raw, room.slack) if config.diversity else None
    tasks, targeting = parts.ranker.tasks, _targeting(parts)
    utility, rules = Utility.build(tasks, config.utility), fit_rules(tasks, config.rules, raw, items.num_rows)
    side = _item_side(parts.ranker, items, scratch)
    scorer = Scorer(items, parts.ranker, utility, side, diversity, rules, targeting).eval()
    for name, tensor in side.items():
        refuse_nonfinite(tensor, f"the ranker's item side {name!r}")
    golden = Golden.ask(
        tensors_of_columns(parts.golden_user), parts.towers, index, scorer, keep, min(config.ranker.keep, keep)
    )

    (folder / manifest.CONFIG).write_text(to_toml(config.to_dict()), encoding="utf-8")
    (folder / manifest.TRANSFORMS).write_text(parts.transforms.to_json(), encoding="utf-8")
    write_tensors(folder / manifest.RETRIEVAL, parts.towers.state_dict(), {})
    reach("publish-half-written")
    write_tensors(folder / manifest.SCORER, scorer.state_dict(), {})
    if targeting is not None:
        plain = json.dumps(targeting.to_plain(), ensure_ascii=False, indent=1)
        (folder / manifest.TARGETING).write_text(plain + "\n", encoding="utf-8")
    if config.generators:
        known = {name: items.of_every_row(name)[: items.num_published] for name in config.known_of_all()}
        generators = build_generators(config, known, raw, items.num_rows)
        write_tensors(folder / manifest.GENERATORS, tensors_of(generators), {})
    if diversity is not None:
        _write_groups(folder / manifest.GROUPS, diversity.values)
    write_tensors(folder / manifest.GOLDEN, golden.to_tensors(), {})
    save_index(index, folder, {"retrieval": FileEntry.of(folder / manifest.RETRIEVAL).model_id})
    _write_metadata(folder / manifest.METADATA, raw, config)
    return items.num_published


def _targeting(parts: Parts) -> Targeting | None:
    """The rules fitted in row order, or None where there are none. Raises DataError for columns that do not fit."""
    rules, table = parts.config.targeting, parts.targeting
    if not rules:
        return None
    slack = parts.config.inventory.slack
    if table is None or table.num_rows != len(parts.item_ids):
        found = "none" if table is None else f"{table.num_rows} rows"
        wanted = parts.config.targeted("item")
        raise DataError(f"publish: [targeting] reads the columns {wanted} of {len(parts.item_ids)} items, got {found}")
    ordered = _in_order(table, parts.order())
    return Targeting.fit(rules, {name: ordered[name] for name in ordered.column_names}, len(parts.item_ids), slack)


@torch.no_grad()
def _item_side(ranker: Ranker, items: ItemTable, scratch: Scratch) -> dict[str, Tensor]:
    """What the ranker makes of every slot [S, ...]."""
    features, num, side = items.features(), items.num_slots, dict[str, Tensor]()
    for start in range(0, num, _ITEMS_AT_ONCE):
        some = slice(start, min(start + _ITEMS_AT_ONCE, num))
        for name, made in ranker.item_side({name: column[some] for name, column in features.items()}).items():
            if name not in side:
                side[name] = scratch.empty((num, *made.shape[1:]), made.dtype)
            side[name][some] = made
    return side


def _write_metadata(path: Path, raw: pa.Table, config: Config) -> None:
    """What answers show of the `raw` items, which may have more: columns that only a rule reads."""
    kept = config.metadata.columns and (*config.metadata.columns, *config.metadata.deferred)
    shown = [name for name in kept if name in raw.column_names] or raw.column_names
    write_metadata(path, raw.select(shown), config.metadata.needed_of(shown))
    MetadataTable.open(path).check_columns([*config.metadata.columns, *config.metadata.deferred])


def _write_groups(path: Path, values: Mapping[str, pa.Array]) -> None:
    """Each rule's distinct values, a list in the one row of its column: a list of each is of its own length."""
    table = pa.table({name: pa.array([one], pa.large_list(one.type)) for name, one in values.items()})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def _in_order(table: pa.Table, order: Array) -> pa.Table:
    """The rows of `table` at the places int64 [I]; the table itself where that is their order."""
    return table if bool((order[1:] > order[:-1]).all()) else table.take(pa.array(order))


@contextmanager
def _temporary(versions: Path) -> Iterator[Path]:
    """A folder beside the versions that is gone afterwards, unless renamed."""
    folder = versions / f"{_TEMPORARY}{secrets.token_hex(8)}"
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        if folder.exists():
            shutil.rmtree(folder)


def _sweep(versions: Path) -> None:
    """Remove what publishes killed over an hour ago left; a younger one may be at work."""
    for folder in versions.glob(f"{_TEMPORARY}*"):
        if time.time() - folder.stat().st_mtime > _ABANDONED_S:
            shutil.rmtree(folder)
