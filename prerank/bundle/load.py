"""A version from disk, whole and reproducing its golden answers, or an error; never anything between."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from prerank._tensor_files import read_tensors
from prerank.bundle import manifest
from prerank.bundle.golden import Golden
from prerank.bundle.in_use import Hold, hold
from prerank.bundle.index_files import index_of
from prerank.bundle.item_table import ItemTable
from prerank.bundle.manifest import verify as verify
from prerank.bundle.scorer import Scorer
from prerank.bundle.slack_index import SlackIndex
from prerank.business.diversity import Diversity
from prerank.business.rules import RULES, build_rules
from prerank.business.targeting import Targeting
from prerank.business.utility import Utility
from prerank.config import Config, parse_config
from prerank.errors import BundleError, ConfigError, DataError, SchemaMismatch
from prerank.features.transforms import Transforms
from prerank.index.base import Index
from prerank.index.generator import Generator
from prerank.index.generators import restore_generators
from prerank.kernels.engine import Engine
from prerank.models.ranker import Ranker
from prerank.models.rankers import build_ranker
from prerank.models.towers import TwoTower, build_towers
from prerank.schema import FeatureSchema
from prerank.stores.metadata import MetadataTable
from prerank.types import Features

_DRAWS = (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_)
_ITEMS, _RANKER, _UTILITY, _ITEM_SIDE = "items.", "ranker.", "utility.", "item_side."
_DIVERSITY, _TARGETING = "diversity.", "targeting."
_PARTS = (_ITEMS, _RANKER, _UTILITY, _ITEM_SIDE, _DIVERSITY, _TARGETING, *(f"{rule}." for rule in RULES))


@dataclass(frozen=True, slots=True)
class Bundle:
    """One version in memory, ready to serve. Weights are views of the mapped files and ask for no gradient."""

    version: str
    path: Path
    config: Config
    transforms: Transforms
    towers: TwoTower
    index: Index
    scorer: Scorer
    manifest: Mapping[str, object]
    generators: Mapping[str, Generator] = field(default_factory=dict)
    hold: Hold | None = field(default=None, compare=False, repr=False)

    def accelerate(self, engine: Engine) -> None:
        """Let `engine` rank, and searches use as many threads as it has.

        Raises BundleError if it is further from the golden answers than rounding explains.
        """
        self.scorer.accelerate(engine)
        slots_of, probs = self.scorer.items.slots_of, self.scorer.probs
        try:
            self.check_probs(f"the native kernels ({engine.level})", lambda user, rows: probs(user, slots_of(rows)))
        except BundleError:
            self.scorer.accelerate(None)
            raise
        self.index.threads = engine.threads

    def check_probs(self, of: str, probs: Callable[[Features, Tensor], Tensor]) -> None:
        """Raises BundleError if these are further off than rounding explains; see `Golden.first_far_prob`."""
        golden = _golden(self.path / manifest.GOLDEN, self.config)
        difference = golden.first_far_prob(self.scorer.ranker.tasks, probs)
        if difference:
            raise BundleError(f"{self.path}: {of} are far off: {difference}")


def load(path: Path, with_index: bool = True) -> Bundle:
    """The version in the folder `path`.

    Without its index, for who asks index hosts, its files are neither read nor checked, and need not be there: `index`
    is then of the rows of slack alone. What it would retrieve for the golden requests its hosts are asked as they load;
    here the user vectors are compared that they are asked with.

    Raises BundleError naming the first thing that is not as published: a missing, cut or changed file, a newer format,
    parts of different features, weights of another shape, or a golden request answered otherwise.
    """
    held = hold(path)
    said = verify(path, None if with_index else {*manifest.FILES, *manifest.OPTIONAL} - manifest.OF_INDEX)
    config = config_of(path / manifest.CONFIG)
    transforms = transforms_of(path, config, said)
    sizes = transforms.sizes()
    with NothingDrawn():
        towers, ranker = build_towers(config, sizes), build_ranker(config, sizes)
    fill(towers, read_tensors(path / manifest.RETRIEVAL)[0], path / manifest.RETRIEVAL)
    assert isinstance(ranker, nn.Module)

    where = path / manifest.SCORER
    tensors = read_tensors(where)[0]
    fill(ranker, below(tensors, _RANKER), where)
    items = ItemTable.from_state(below(tensors, _ITEMS))
    fault = items.first_fault(config.features, sizes)
    if fault:
        raise BundleError(f"{where}: {fault}")
    utility = Utility.build(ranker.tasks, config.utility)
    fill(utility, below(tensors, _UTILITY), where)
    rules = build_rules(ranker.tasks, config.rules, items.num_rows)
    for name in RULES:  # one that is not asked for has no weights either
        fill(rules.get(name, nn.Module()), below(tensors, f"{name}."), where)
    item_side = _item_side(tensors, ranker, items, where)
    targeting = targeting_of(path, config, said, below(tensors, _TARGETING), items.num_rows)
    try:
        diversity = _diversity(path, config, said, below(tensors, _DIVERSITY))
        scorer = Scorer(items, ranker, utility, item_side, diversity, rules, targeting).eval()
    except (BundleError, SchemaMismatch) as error:
        raise BundleError(f"{where}: {error}") from None

    index = index_of(path, config, said) if with_index else _slack_of(path, config, said, items, towers.width)
    _check_metadata(path / manifest.METADATA, config, items.num_published)
    golden = _golden(path / manifest.GOLDEN, config)
    difference = golden.first_difference(towers, index if with_index else None, scorer)
    if difference:
        raise BundleError(f"{path}: does not reproduce {difference}; publish again with this prerank")
    generators = _generators(path, config, said, items.num_rows)
    return Bundle(str(said["version"]), path, config, transforms, towers, index, scorer, said, generators, held)


class NothingDrawn(TorchFunctionMode):
    """Models are built for their shapes alone: the weights are the file's, not drawn and thrown away.

    Memory that is never written to costs nothing. The meta device would do the same, but building on it imports the
    whole of torch's compiler.
    """

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Iterable[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        if func in _DRAWS and kwargs:
            return kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def config_of(where: Path) -> Config:
    """A version's configuration. Raises BundleError for one that this prerank does not read."""
    try:
        return parse_config(tomllib.loads(where.read_text(encoding="utf-8")), str(where))
    except (ConfigError, ValueError) as error:
        raise BundleError(f"{where}: not a configuration this prerank reads: {error}") from None


def _schema_of(said: Mapping[str, object]) -> FeatureSchema | None:
    """A manifest's schema, also one written when features had fewer options; None for what is none."""
    try:
        return FeatureSchema.from_dict(said["schema"])  # type: ignore[arg-type]
    except (KeyError, TypeError, AttributeError):
        return None


def transforms_of(path: Path, config: Config, said: Mapping[str, object]) -> Transforms:
    """The fitted transforms. Raises BundleError unless they are of the features of the configuration and manifest."""
    where = path / manifest.TRANSFORMS
    try:
        transforms = Transforms.from_json(where.read_text(encoding="utf-8"))
    except (BundleError, ValueError) as error:
        raise BundleError(f"{where}: {error}") from None
    different = transforms.schema.first_difference(config.features)
    if different:
        raise BundleError(f"{where}: fitted for other features than {manifest.CONFIG} says: {different}")
    if _schema_of(said) != config.features:
        raise BundleError(f"{path / manifest.MANIFEST}: its schema is not that of {manifest.CONFIG}")
    return transforms


def below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors of one part, by their names in it."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def fill(module: nn.Module, tensors: Mapping[str, Tensor], where: Path) -> None:
    """Make `tensors` the module's own weights, uncopied, if they are exactly those it has places for."""
    wanted = module.state_dict()
    for name in [*wanted, *(name for name in tensors if name not in wanted)]:
        expected, found = _said(wanted.get(name)), _said(tensors.get(name))
        if expected != found:
            raise BundleError(f"{where}: weights {name!r}: expected {expected}, found {found}")
    module.load_state_dict(tensors, assign=True)
    module.eval().requires_grad_(False)


def _said(tensor: Tensor | None) -> str:
    return "none" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}".removeprefix("torch.")


def _item_side(tensors: Mapping[str, Tensor], ranker: Ranker, items: ItemTable, where: Path) -> dict[str, Tensor]:
    """What was stored of each item, if it has the names, types and widths the ranker makes."""
    found = below(tensors, _ITEM_SIDE)
    with torch.inference_mode():
        like = ranker.item_side({name: column[:1] for name, column in items.features().items()})
    for name in [*like, *(name for name in found if name not in like)]:
        wanted = _said(like[name].expand(items.num_slots, *like[name].shape[1:]) if name in like else None)
        if wanted != _said(found.get(name)):
            raise BundleError(f"{where}: expected {_ITEM_SIDE}{name} {wanted}, found {_said(found.get(name))}")
    unknown = [n for n in tensors if not n.startswith(_PARTS)]
    if unknown:
        raise BundleError(f"{where}: weights of no part of a scorer: {unknown}")
    return found


def _diversity(
    path: Path, config: Config, said: Mapping[str, object], tensors: Mapping[str, Tensor]
) -> Diversity | None:
    """The rules stored, if they are those of the configuration."""
    is_listed = manifest.GROUPS in manifest.files_of(path, said)
    if not config.diversity and not tensors and not is_listed:
        return None
    if set(tensors) != {"codes", "at_most"} or not is_listed:
        has = "" if is_listed else f" and no {manifest.GROUPS}"
        raise BundleError(
            f"diversity: expected codes and at_most of {list(config.diversity)}, found {sorted(tensors)}{has}"
        )
    diversity = Diversity(tensors["codes"], tensors["at_most"], _groups(path / manifest.GROUPS, list(config.diversity)))
    bounds = [rule.at_most for rule in config.diversity.values()]
    if diversity.at_most.tolist() != bounds:
        raise BundleError(f"diversity: expected at_most {bounds}, found {diversity.at_most.tolist()}")
    return diversity


def _groups(where: Path, rules: Sequence[str]) -> dict[str, pa.Array]:
    """Each rule's distinct values, mapped from the file."""
    try:
        with pa.memory_map(str(where)) as source:
            table = pa.ipc.open_file(source).read_all()
    except (pa.ArrowInvalid, OSError) as error:
        raise BundleError(f"{where}: expected an Arrow IPC file, but it is not one: {error}") from None
    if table.column_names != list(rules) or table.num_rows != 1:
        raise BundleError(f"{where}: expected one row of {list(rules)}, found {table.num_rows} of {table.column_names}")
    return {name: table.column(name).chunk(0).flatten() for name in rules}


def targeting_of(
    path: Path, config: Config, said: Mapping[str, object], tensors: Mapping[str, Tensor], num_items: int
) -> Targeting | None:
    """The rules with their values and bitmaps, or None where the configuration has none, and the version too."""
    where = path / manifest.TARGETING
    is_listed = manifest.TARGETING in manifest.files_of(path, said)
    wanted = ["bitmaps"] if config.targeting else []
    if is_listed != bool(config.targeting) or list(tensors) != wanted:
        has = "the" if is_listed else "no"
        raise BundleError(
            f"{where}: {manifest.CONFIG} has {len(config.targeting)} rules of [targeting], and there is {has} such "
            f"file, and in {manifest.SCORER} the targeting tensors {list(tensors)}; publish again"
        )
    if not wanted:
        return None
    try:
        plain = json.loads(where.read_text(encoding="utf-8"))
        return Targeting.from_plain(config.targeting, plain, tensors["bitmaps"], num_items)
    except (BundleError, ValueError, RecursionError) as error:
        raise BundleError(f"{where}: {error}") from None


def _generators(path: Path, config: Config, said: Mapping[str, object], num_rows: int) -> dict[str, Generator]:
    where = path / manifest.GENERATORS
    is_listed = manifest.GENERATORS in manifest.files_of(path, said)
    if is_listed != bool(config.generators):
        has = "the" if is_listed else "no"
        raise BundleError(
            f"{where}: {manifest.CONFIG} has {len(config.generators)} generators, and there is {has} file"
        )
    if not is_listed:
        return {}
    try:
        return restore_generators(config, read_tensors(where)[0], num_rows)
    except BundleError as error:
        raise BundleError(f"{where}: {error}") from None


def _slack_of(path: Path, config: Config, said: Mapping[str, object], items: ItemTable, width: int) -> SlackIndex:
    num = items.num_rows - items.num_published
    index = SlackIndex(items.num_published, num, width, config.retrieval.index.storage)
    index.models = {"retrieval": manifest.files_of(path, said)[manifest.RETRIEVAL].model_id}
    return index


def _check_metadata(where: Path, config: Config, num_items: int) -> None:
    try:
        metadata = MetadataTable.open(where)
        metadata.check_columns([*config.metadata.columns, *config.metadata.deferred])
    except DataError as error:
        raise BundleError(str(error)) from None
    if metadata.num_rows != num_items:
        raise BundleError(f"{where}: expected {num_items} rows, one an item, found {metadata.num_rows}")


def _golden(where: Path, config: Config) -> Golden:
    golden = Golden.from_tensors(read_tensors(where)[0])
    wanted = set(config.features.request_features())
    if set(golden.user) != wanted:
        raise BundleError(f"{where}: expected requests of the features {sorted(wanted)}, found {sorted(golden.user)}")
    return golden
