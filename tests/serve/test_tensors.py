"""Tensors of the Open Inference Protocol, as JSON and as raw bytes."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prerank.errors import RequestError
from prerank.serve.tensors import DATATYPES, NamedTensor, from_json, from_raw, from_values, to_raw, to_values

NUMBERS = [name for name in DATATYPES if name != "BYTES"]


def example(datatype: str) -> np.ndarray:
    """The least, the most and something between, as [2, 3]."""
    dtype = DATATYPES[datatype]
    if datatype == "BOOL":
        return np.array([[True, False, True], [False, False, True]])
    info = np.finfo(dtype) if dtype.kind == "f" else np.iinfo(dtype)
    return np.array([[info.min, info.max, 0], [1, 2, 3]], dtype)


@pytest.mark.parametrize("datatype", NUMBERS)
def test_numbers_come_back_as_they_went_raw_flat_and_nested(datatype: str) -> None:
    array = example(datatype)
    tensor = NamedTensor("x", datatype, array)
    flat, nested = json.dumps(to_values(tensor)).encode(), json.dumps(array.tolist(), indent=1).encode()
    for found in (
        from_raw("x", datatype, [2, 3], to_raw(tensor)),
        from_json("x", datatype, [2, 3], flat),
        from_json("x", datatype, [2, 3], b" \n" + nested),
        from_values("x", datatype, [2, 3], to_values(tensor)),
    ):
        assert found.array.dtype == DATATYPES[datatype]
        assert found.array.flags.writeable
        np.testing.assert_array_equal(found.array, array)


def test_raw_numbers_are_little_endian_and_raw_text_has_its_length_before_it() -> None:
    assert to_raw(NamedTensor("x", "INT32", np.array([1, -2], np.int32))) == struct.pack("<ii", 1, -2)
    texts = np.array([b"ab", b""], object)
    assert to_raw(NamedTensor("x", "BYTES", texts)) == b"\x02\0\0\0ab\0\0\0\0"


@given(st.lists(st.binary(max_size=9), max_size=6))
def test_any_bytes_come_back_as_they_went(elements: list[bytes]) -> None:
    array = np.empty(len(elements), object)
    array[:] = elements
    found = from_raw("x", "BYTES", [len(elements)], to_raw(NamedTensor("x", "BYTES", array)))
    assert found.array.tolist() == elements


def test_text_of_json_is_bytes_in_its_shape() -> None:
    assert from_json("x", "BYTES", [2, 1], '[["é"], [""]]'.encode()).array.tolist() == [["é".encode()], [b""]]
    assert from_json("x", "BYTES", [2, 1], b'["a\\u0000", "b"]').array.tolist() == [[b"a\0"], [b"b"]]


@pytest.mark.parametrize(
    ("datatype", "shape", "data", "says"),
    [
        ("INT64", [2], b"[1, 2.5]", "x: expected int, got float - at data[1], for INT64 [2]"),
        ("INT64", [2], b'[1, "2"]', "x: expected int, got str - at data[1], for INT64 [2]"),
        ("INT64", [1], b"[true]", "x: expected int, got bool - at data[0], for INT64 [1]"),
        ("BOOL", [1], b"[1]", "x: expected bool, got int - at data[0], for BOOL [1]"),
        ("BYTES", [1], b"[1]", "x: expected str, got int - at data[0], for BYTES [1]"),
        ("FP32", [1], b"[null]", "x: expected float, got null - at data[0], for FP32 [1]"),
        ("INT64", [1], b"5", "x: expected array, got int, for INT64 [1]"),
        ("INT64", [2, 2], b"[[1, 2], 3]", "x: expected array, got int - at data[1], for INT64 [2, 2]"),
        ("INT64", [2, 2], b"[[1, 2], [3]]", "x: expected values in the shape [2, 2], got rows of several lengths"),
        ("BYTES", [2, 2], b'[["a", "b"], ["c"]]', "x: expected"),
        ("INT64", [2, 2], b"[1, 2, 3]", "x: expected 4 values for INT64 [2, 2], got [3]"),
        ("INT64", [4], b"[[1, 2], [3, 4]]", "x: expected 4 values for INT64 [4], got [2, 2]"),
        ("FP64", [1], b"[1e999]", "x: number out of range - at data[0], for FP64 [1]"),
        ("BYTES", [1], b'["\xff"]', "x: expected a JSON array of BYTES, got what is none"),
        ("INT64", [1], b"[99999999999999999999]", "x: expected numbers that INT64 can hold"),
        ("INT8", [1], b"[128]", "x: expected numbers that INT8 can hold"),
        ("UINT64", [1], b"[-1]", "x: expected numbers that UINT64 can hold"),
        ("INT46", [1], b"[1]", "x: expected a datatype of ["),
        ("INT64", [-1], b"[1]", "x: expected a shape of at most 8 dimensions from 0 on, got [-1]"),
        ("INT64", [1] * 9, b"[1]", "x: expected a shape of at most 8 dimensions from 0 on"),
    ],
)
def test_json_that_is_no_such_tensor_is_refused_by_name(
    datatype: str, shape: list[int], data: bytes, says: str
) -> None:
    with pytest.raises(RequestError) as raised:
        from_json("x", datatype, shape, data)
    assert str(raised.value).startswith(says)


@pytest.mark.parametrize("opening", [b"[" * 100_000, b'{"a":' * 100_000])
def test_nesting_without_end_is_refused_not_followed(opening: bytes) -> None:
    with pytest.raises(RequestError, match="x: expected"):
        from_json("x", "INT64", [1], opening)


@pytest.mark.parametrize(
    ("datatype", "shape", "content", "says"),
    [
        ("INT64", [2], b"\0" * 15, "x: expected 16 bytes for INT64 [2], got 15"),
        ("FP32", [3], b"\0" * 16, "x: expected 12 bytes for FP32 [3], got 16"),
        ("BYTES", [1], b"\x05\0\0\0abcd", "x: element 0 ends after byte 8, where the tensor ends"),
        ("BYTES", [1], b"\x05\0", "x: element 0 ends after byte 2, where the tensor ends"),
        ("BYTES", [2], b"\x01\0\0\0a", "x: expected 2 elements in all 5 bytes, got 1 in 5"),
        ("BYTES", [1], b"\x01\0\0\0a\0", "x: expected 1 elements in all 6 bytes, got 1 in 5"),
        ("BYTES", [2**31 - 1, 8], b"", "x: expected 17179869176 elements in all 0 bytes, got 0 in 0"),
    ],
)
def test_bytes_that_are_no_such_tensor_are_refused_by_name(
    datatype: str, shape: list[int], content: bytes, says: str
) -> None:
    with pytest.raises(RequestError) as raised:
        from_raw("x", datatype, shape, content)
    assert str(raised.value) == says
