"""Tensors to and from safetensors files, the only form weights take on disk: nothing is unpickled, ever.

A read tensor is a view of the mapped file, private to this process: no copy, and writing to it leaves the file alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from prerank.errors import BundleError

_NOTE = "prerank"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], note: Mapping[str, object]) -> None:
    """`tensors` by name, and a `note` of JSON values; the same of both gives the same bytes."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # one key only: safetensors writes several in no order
    save_file(plain, path, metadata={_NOTE: json.dumps(note, sort_keys=True)})


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, object]]:
    """What `write_tensors` wrote. Raises BundleError where the file is missing, truncated or of another kind."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
            metadata = file.metadata() or {}
        note = json.loads(metadata[_NOTE])
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise BundleError(f"{path}: expected a safetensors file, but it cannot be read: {error}") from None
    except KeyError:
        raise BundleError(f"{path}: a safetensors file, but not one prerank wrote; publish the version again") from None
    if not isinstance(note, dict):
        raise BundleError(f"{path}: expected a note of JSON values in its header, found {note!r}")
    return tensors, note
