"""The native kernels: a library of plain C functions, built at install where there was a compiler."""

from __future__ import annotations

import ctypes
import os
import warnings
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

INTERFACE = 11
"""PRERANK_INTERFACE of native/export.h: a library of another number is not called."""

LEVELS = ("portable", "avx2", "avx512_bf16", "amx_bf16")
"""What a processor may offer, each with all before it."""

OFF = "PRERANK_NO_NATIVE"
"""The environment variable that leaves the library out, to compare with or to rule it out."""


class NativeMissing(UserWarning):
    """The torch version of an operation serves where the native one could not be had."""


@cache
def library() -> ctypes.CDLL | None:
    """The library, or None where none was built, it is of another interface, or PRERANK_NO_NATIVE is set.

    Warns NativeMissing, once, in the first two cases.
    """
    found, why = _found()
    if why and not os.environ.get(OFF):
        warnings.warn(f"no native kernels, torch serves and is slower: {why}", NativeMissing, stacklevel=2)
    return found


def fault() -> str:
    """Why there is no library, and what to do; empty where there is one."""
    return _found()[1]


def _found() -> tuple[ctypes.CDLL | None, str]:
    """The library, or why it is not there."""
    if os.environ.get(OFF):
        return None, f"{OFF} is set"
    why = "none was built; install a C++ compiler and install prerank again"
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).parent / f"_native{suffix}"
        if not path.is_file():
            continue
        try:
            found = ctypes.CDLL(str(path))
        except OSError as error:
            why = f"it cannot be loaded ({error})"
            continue
        if found.prerank_interface() == INTERFACE:
            return found, ""
        why = f"it is of interface {found.prerank_interface()}, expected {INTERFACE}; install prerank again"
    return None, why


def level() -> str:
    """The best of LEVELS that this processor has, or "torch" where there is no library."""
    native = library()
    return "torch" if native is None else LEVELS[native.prerank_level()]


def pointer(tensor: Tensor, dtype: torch.dtype, *shape: int) -> ctypes.c_void_p:
    """The address of a contiguous CPU tensor of exactly this type and shape; native code believes what it is told."""
    assert tensor.dtype == dtype, f"expected {dtype}, got {tensor.dtype}"
    assert tuple(tensor.shape) == shape, f"expected {shape}, got {tuple(tensor.shape)}"
    assert tensor.is_contiguous()
    assert tensor.device.type == "cpu"
    return ctypes.c_void_p(tensor.data_ptr())
