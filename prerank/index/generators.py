"""Every generator of candidates that a funnel file may name, beside the index."""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa
from torch import Tensor

from prerank.config import Config
from prerank.errors import BundleError
from prerank.index.generator import Generator
from prerank.index.listed import Listed
from prerank.index.same import Same
from prerank.index.top import Top
from prerank.types import Features

GENERATORS: dict[str, type[Generator]] = {"top": Top, "same": Same, "list": Listed}
"""By the `kind` of a section [generators.<name>]."""


def build_generators(config: Config, features: Features, raw: pa.Table, num_rows: int) -> dict[str, Generator]:
    """Those of [generators], by name. Raises DataError as `Generator.build`."""
    return {
        name: GENERATORS[options.kind].build(options, config, features, raw, num_rows)
        for name, options in config.generators.items()
    }


def tensors_of(generators: Mapping[str, Generator]) -> dict[str, Tensor]:
    """Every buffer, by the generator's name and its own."""
    return {f"{name}.{key}": t for name, one in generators.items() for key, t in one.state_dict().items()}


def restore_generators(config: Config, tensors: Mapping[str, Tensor], num_rows: int) -> dict[str, Generator]:
    """What `tensors_of` gave. Raises BundleError where it is not of the generators of `config`."""
    found: dict[str, dict[str, Tensor]] = {name: {} for name in config.generators}
    for key, tensor in tensors.items():
        name, _, own = key.rpartition(".")
        if name not in found:
            raise BundleError(f"generators: expected those of {list(found)}, found {key!r}")
        found[name][own] = tensor
    return {
        name: GENERATORS[options.kind].restore(options, config, found[name], num_rows)
        for name, options in config.generators.items()
    }
