import os
import subprocess
import sys

import pytest
import torch

from prerank.kernels import native


def test_this_installation_has_the_native_kernels_and_a_level_is_one_of_those_named():
    assert native.library() is not None
    assert native.level() in native.LEVELS


def test_a_machine_told_to_do_without_has_none_and_says_nothing():
    code = "from prerank.kernels.native import level, library; assert library() is None; print(level())"
    told = {**os.environ, native.OFF: "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], env=told, check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() == "torch"


def test_where_none_was_built_the_warning_says_what_to_do(monkeypatch: pytest.MonkeyPatch):
    native.library.cache_clear()
    monkeypatch.delenv(native.OFF, raising=False)
    monkeypatch.setattr(native, "EXTENSION_SUFFIXES", [".nowhere"])
    try:
        with pytest.warns(native.NativeMissing, match="install a C\\+\\+ compiler"):
            assert native.library() is None
        assert native.level() == "torch"
    finally:
        native.library.cache_clear()


def test_a_library_of_another_interface_is_not_called(monkeypatch: pytest.MonkeyPatch):
    native.library.cache_clear()
    monkeypatch.setattr(native, "INTERFACE", -1)
    try:
        with pytest.warns(native.NativeMissing, match="expected -1"):
            assert native.library() is None
    finally:
        native.library.cache_clear()


def test_native_code_is_never_given_a_tensor_that_is_not_what_it_believes():
    x = torch.zeros(4, 6)
    assert native.pointer(x, torch.float32, 4, 6).value == x.data_ptr()
    for wrong in (x.double(), x[:3], torch.zeros(6, 4).T, torch.zeros(4, 6, device="meta")):
        with pytest.raises(AssertionError):
            native.pointer(wrong, torch.float32, 4, 6)
