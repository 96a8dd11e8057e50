"""The Triton versions of the hot operations, for CUDA devices; only what runs there imports triton."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor


@cache
def is_here() -> bool:
    """Whether triton is installed: torch for CUDA brings it, torch for CPUs does not."""
    return find_spec("triton") is not None


def serves(device: torch.device) -> bool:
    """Whether tensors on `device` are for the Triton versions; without triton, torch's serve there."""
    return device.type == "cuda" and is_here()


def launching_on(tensor: Tensor) -> AbstractContextManager[object]:
    """Within it the tensor's device is the current one, where Triton launches; a CPU tensor's launch is interpreted."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
