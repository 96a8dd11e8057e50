"""Tensors to and from safetensors files, the only form weights take on disk: nothing is unpickled, ever.

A read tensor is a view of the mapped file, private to this process: no copy, and writing to it leaves the file alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from prerank.errors import BundleError

_NOTE = "prerank"
_AT_ONCE = 1 << 24
_NAMES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What the format calls each type, in the order in which the safetensors library puts them into a file."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor], note: Mapping[str, object]) -> None:
    """`tensors` by name, and a `note` of JSON values; the same of both gives the same bytes.

    They are those that the safetensors library writes, which would hold all of them in memory once more. A file that is
    there is replaced: who has it mapped, maybe as these very tensors, keeps what it was.
    """
    places = list(_NAMES)
    order = sorted(tensors, key=lambda name: (places.index(tensors[name].dtype), name))
    header: dict[str, object] = {"__metadata__": {_NOTE: json.dumps(note, sort_keys=True)}}
    at = 0
    for name in order:
        tensor = tensors[name]
        end = at + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    said = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    said += b" " * (-len(said) % 8)
    written = path.with_name(f"{path.name}.part")
    with written.open("wb") as file:
        file.write(len(said).to_bytes(8, "little") + said)
        for name in order:
            plain = tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            for start in range(0, len(plain), _AT_ONCE):
                file.write(plain[start : start + _AT_ONCE].data)
    written.replace(path)


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
