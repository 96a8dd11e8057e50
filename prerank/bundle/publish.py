"""Trained parts to one immutable version on disk, wholly there or not at all."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

import prerank
from prerank._tensor_files import write_tensors
from prerank.bundle import manifest
from prerank.bundle.durable import locked, sync
from prerank.bundle.failpoints import reach
from prerank.bundle.golden import Golden
from prerank.bundle.index_files import keys_of, new_index, save_index
from prerank.bundle.item_table import ItemTable
from prerank.bundle.manifest import FileEntry
from prerank.bundle.residency import room_for
from prerank.bundle.scorer import Scorer
from prerank.bundle.toml import to_toml
from prerank.business.diversity import Diversity
from prerank.business.rules import fit_rules
from prerank.business.targeting import Targeting
from prerank.business.utility import Utility
from prerank.config import Config, IndexConfig
from prerank.errors import BundleError, DataError, SchemaMismatch
from prerank.features.transforms import Transforms
from prerank.index.base import Index
from prerank.index.generators import build_generators, tensors_of
from prerank.models.ranker import Ranker
from prerank.models.towers import TwoTower
from prerank.stores.metadata import MetadataTable
from prerank.types import Array, Columns

_ITEMS_AT_ONCE = 1 << 16
_ABANDONED_S = 3600.0
_TEMPORARY = ".tmp-"
ITEMS_UNTIL = "items_until_ns"
"""The parent that says until when whole items came, or left, that a version was made with, in UTC nanoseconds."""


@dataclass(frozen=True, slots=True)
class Parts:
    """What a version is made of. Of I items in any order, and of G golden requests:

    item_ids int64 [I]; item_columns encoded [I, ...]; item_table raw [I], what answers show and what the rules read;
    popularity float32 [I, S];
    golden_user encoded user and context features and counters [G, ...]. `parents` names what it was made from,
    `metrics` what was measured; neither changes what the version is. Both models are left in eval mode.
    `targeting` are the raw columns [I] that the rules of [targeting] read. `vectors` float32 [I, D] are what the towers
    give of the items, made before; None lets `publish` make them. `asked_user` are as `golden_user`, of more requests:
    what the index is measured with, where it is (None: with those of `golden_user`).
    """

    config: Config
    transforms: Transforms
    towers: TwoTower
    ranker: Ranker
    item_ids: Array
    item_columns: Columns
    item_table: pa.Table
    popularity: Array
    golden_user: Columns
    parents: Mapping[str, str]
    metrics: Mapping[str, object]
    targeting: pa.Table | None = None
    vectors: Array | None = None
    asked_user: Columns | None = None


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
            _refuse_nonfinite(weights, f"{name}: weights {key!r}")
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


def _refuse_nonfinite(numbers: Tensor, what: str) -> None:
    if not numbers.is_floating_point() or not numbers.numel() or all(bool(end.isfinite()) for end in numbers.aminmax()):
        return
    wrong = (~numbers.isfinite()).nonzero()
    raise BundleError(f"{what}: {len(wrong)} are not finite, the first at {wrong[0].tolist()}; train again")


def _write_files(folder: Path, parts: Parts) -> int:
    """Every file but the manifest; returns how many items there are."""
    config = parts.config
    raw = parts.item_table.take(pa.array(_order(parts.item_ids)))
    room = room_for(config, parts.transforms.sizes(), parts.item_ids, parts.item_table)
    items = ItemTable.build(parts.item_ids, parts.item_columns, room, parts.popularity if room.slack else None)
    fault = items.first_fault(config.features, parts.transforms.sizes())
    if fault:
        raise SchemaMismatch(f"{fault}; encode the items with the transforms published")
    keep = min(config.retrieval.keep, items.num_published)
    index = _index(parts, items, raw, keep)
    diversity = Diversity.build(config.diversity, raw, room.slack) if config.diversity else None
    tasks, targeting = parts.ranker.tasks, _targeting(parts)
    utility, rules = Utility.build(tasks, config.utility), fit_rules(tasks, config.rules, raw, items.num_rows)
    scorer = Scorer(items, parts.ranker, utility, diversity=diversity, rules=rules, targeting=targeting).eval()
    for name, side in scorer.item_side.tensors().items():
        _refuse_nonfinite(side, f"the ranker's item side {name!r}")
    golden = Golden.ask(_tensors(parts.golden_user), parts.towers, index, scorer, keep, min(config.ranker.keep, keep))

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
    ordered = table.take(pa.array(_order(parts.item_ids)))
    return Targeting.fit(rules, {name: ordered[name] for name in ordered.column_names}, len(parts.item_ids), slack)


@torch.no_grad()
def _index(parts: Parts, items: ItemTable, raw: pa.Table, keep: int) -> Index:
    """Over the item tower's vectors, ready for as many as a request keeps."""
    chosen = parts.config.retrieval.index
    index = new_index(chosen, _vectors(parts, items), _shard_keys(chosen, items, raw))
    query = parts.towers.user_side(_tensors(parts.golden_user if parts.asked_user is None else parts.asked_user))
    index.prepare(query, keep, chosen.floor)
    return index


def _shard_keys(chosen: IndexConfig, items: ItemTable, raw: pa.Table) -> Array:
    """What tells the shard of each item, int64 [n]."""
    if chosen.shards == 1 or not chosen.by:
        return items.item_ids[: items.num_published].numpy()
    if chosen.by not in raw.column_names:
        raise DataError(f"publish: retrieval.index.by: the items have {raw.column_names}, not {chosen.by!r}")
    return keys_of(raw[chosen.by].to_pylist())


def _tensors(columns: Columns) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.array(column)) for name, column in columns.items()}


@torch.no_grad()
def _vectors(parts: Parts, items: ItemTable) -> Tensor:
    """The item tower's vectors float32 [C, D] in row order; those of the slack, NaN, are found by nobody."""
    order = _order(parts.item_ids)
    vectors: Tensor | None = None
    for start in range(0, len(order), _ITEMS_AT_ONCE):
        some = order[start : start + _ITEMS_AT_ONCE]
        made = _made(parts, some) if parts.vectors is None else torch.from_numpy(np.array(parts.vectors[some]))
        if vectors is None:
            vectors = torch.full((items.num_rows, made.shape[1]), torch.nan)
        vectors[start : start + len(some)] = made
    assert vectors is not None, "a version has items"
    _refuse_nonfinite(vectors[: len(order)], "the item vectors")
    return vectors


def _made(parts: Parts, some: Array) -> Tensor:
    """What the towers give of items int64 [n]."""
    features = {name: torch.from_numpy(np.asarray(column[some])) for name, column in parts.item_columns.items()}
    return parts.towers.item_side(features, torch.from_numpy(np.asarray(parts.popularity[some], dtype=np.float32)))


def _write_metadata(path: Path, raw: pa.Table, config: Config) -> None:
    """What answers show of the `raw` items, which may have more: columns that only a rule reads."""
    kept = config.metadata.columns and (*config.metadata.columns, *config.metadata.deferred)
    shown = [name for name in kept if name in raw.column_names] or raw.column_names
    table = raw.select(shown).combine_chunks().replace_schema_metadata(None)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=max(table.num_rows, 1))
    MetadataTable.open(path).check_columns([*config.metadata.columns, *config.metadata.deferred])


def _write_groups(path: Path, values: Mapping[str, pa.Array]) -> None:
    """Each rule's distinct values, a list in the one row of its column: a list of each is of its own length."""
    table = pa.table({name: pa.array([one], pa.large_list(one.type)) for name, one in values.items()})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def _order(item_ids: Array) -> Array:
    """The places of ascending item_ids, which are the rows of a version."""
    return np.argsort(item_ids, kind="stable")


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
