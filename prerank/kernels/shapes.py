"""Tensors are refused before a kernel sees them: kernels believe what they are told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
"""The types that kernels multiply, each summed in float32."""


def check_shapes(operation: str, expected: Mapping[str, tuple[Tensor, torch.dtype, Sequence[str]]]) -> None:
    """Each name's tensor must be of its type, with an axis a letter, on the device of the first; a letter is one size.

    Raises ValueError that names the first that is not.
    """
    device = next(iter(expected.values()))[0].device
    sizes: dict[str, int] = {}
    for name, (tensor, dtype, letters) in expected.items():
        fits = tensor.dtype == dtype and tensor.dim() == len(letters) and tensor.device == device
        found = dict(zip(letters, tensor.shape, strict=fits))
        if not fits or any(sizes.get(letter, size) != size for letter, size in found.items()):
            wanted = ", ".join(f"{a}={sizes[a]}" if a in sizes else a for a in letters)
            raise ValueError(
                f"{operation}: expected {name} {_name(dtype)} [{wanted}] on {device}, got "
                f"{_name(tensor.dtype)} {list(tensor.shape)} on {tensor.device}"
            )
        sizes |= found


def check_float(operation: str, name: str, tensor: Tensor) -> None:
    """Raises ValueError where the tensor is of no type of FLOATS."""
    if tensor.dtype not in FLOATS:
        known = ", ".join(map(_name, FLOATS))
        raise ValueError(f"{operation}: expected {name} to be one of {known}, got {_name(tensor.dtype)}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
