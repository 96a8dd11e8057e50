"""Names to rows: the vocabulary finds what it learnt, the hash is the documented one for ever."""

import subprocess
import sys
from hashlib import blake2b

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prerank.features.vocabulary import Buckets, Vocabulary, hash_text, splitmix64

INT64 = st.integers(-(2**63), 2**63 - 1)


@given(st.dictionaries(INT64, st.integers(1, 5)), st.lists(INT64), st.integers(1, 4))
def test_integers_get_their_place_in_ascending_order_and_others_zero(counts, asked, min_count):
    vocabulary = Vocabulary.learn("integer", counts, min_count)
    known = sorted(v for v, n in counts.items() if n >= min_count)
    asked = asked + list(counts)
    found = vocabulary.of_integers(np.array(asked, dtype=np.int64))
    assert found.tolist() == [known.index(v) + 1 if v in known else 0 for v in asked]
    assert vocabulary.size == len(known) + 1


@given(st.dictionaries(st.text(), st.integers(1, 5)), st.lists(st.text()), st.integers(1, 4))
def test_texts_get_their_place_in_ascending_order_and_others_zero(counts, asked, min_count):
    vocabulary = Vocabulary.learn("text", counts, min_count)
    known = sorted(v for v, n in counts.items() if n >= min_count)
    asked = [*asked, *counts, None]
    assert vocabulary.of_texts(asked).tolist() == [known.index(v) + 1 if v in known else 0 for v in asked]


def test_texts_that_differ_by_a_trailing_nul_are_two():
    assert Vocabulary("text", ["a", "a\0"]).of_texts(["a\0", "a", "a\0\0"]).tolist() == [2, 1, 0]


def test_splitmix64_is_the_published_generator():
    # the first outputs of the reference generator from seed 0 and from the seed of its own next state
    states = np.array([0, 0x9E3779B97F4A7C15 - 2**64], dtype=np.int64)
    assert [hex(h) for h in splitmix64(states)] == ["0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4"]


def test_the_text_hash_is_eight_bytes_of_blake2b():
    assert hash_text("café") == int.from_bytes(blake2b("café".encode(), digest_size=8).digest(), "little")
    assert isinstance(hash_text("\ud800"), int)  # a lone surrogate, as JSON can spell


def test_hashes_are_the_same_in_another_process():
    script = (
        "from prerank.features.vocabulary import *; print(Buckets('text', 10**6).of_texts(['a', 'ü', '']).tolist())"
    )
    said = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "5"}
    )
    assert said.stdout.strip() == str(Buckets("text", 10**6).of_texts(["a", "ü", ""]).tolist())


@pytest.mark.parametrize("num", [1, 7, 1000])
def test_buckets_are_one_to_their_number_and_all_used_alike(num):
    buckets = Buckets("integer", num)
    rows = buckets.of_integers(np.arange(-50_000, 50_000))
    assert rows.min() == 1
    assert rows.max() == num == buckets.size - 1
    counts = np.bincount(rows)[1:]
    assert abs(counts - 100_000 / num).max() < 6 * np.sqrt(100_000 / num) + 1
    assert set(Buckets("text", num).of_texts([str(n) for n in range(20_000)])) == set(range(1, num + 1))
    assert Buckets("text", num).of_texts([None]).tolist() == [0]
