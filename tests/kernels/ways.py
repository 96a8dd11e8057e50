"""The ways in which one contract is held: in torch, in Triton's interpreter, and on a GPU where there is one."""

import os

import pytest
import torch

from prerank.kernels import triton

IS_INTERPRETED = triton.is_here() and os.environ.get("TRITON_INTERPRET") == "1"
"""As tests/conftest.py asks for where there is no GPU; where there is one the kernels are compiled and run on it."""


def on_gpu(way):
    """The same of tensors moved to a GPU."""

    def moved(*args):
        found = way(*(arg.cuda() if isinstance(arg, torch.Tensor) else arg for arg in args))
        assert found.is_cuda
        return found.cpu()

    return moved


def ways(serving, reference, by_triton, **more):
    """Parameters of a test: `serving`, which chooses for itself, is on a GPU what runs there."""
    here = pytest.mark.skipif(not IS_INTERPRETED, reason="Triton is not installed, or runs on a GPU")
    return [
        pytest.param(serving, id="serving"),
        pytest.param(reference, id="torch"),
        *(pytest.param(way, id=name) for name, way in more.items()),
        pytest.param(by_triton, id="triton, interpreted", marks=here),
        pytest.param(on_gpu(serving), id="serving, on a GPU", marks=pytest.mark.gpu),
        pytest.param(on_gpu(by_triton), id="triton, on a GPU", marks=pytest.mark.gpu),
        pytest.param(on_gpu(reference), id="torch, on a GPU", marks=pytest.mark.gpu),
    ]
