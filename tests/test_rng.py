"""Random streams."""

import zlib

import jax
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jaxvla import rng

_COUNTERS = st.lists(st.integers(0, 2**31 - 1), max_size=3)


def _bits(key: jax.Array) -> tuple[int, ...]:
    return tuple(np.asarray(jax.random.key_data(key)).ravel().tolist())


def test_a_stream_is_fold_in_of_the_role_then_of_counters():
    root = rng.root_key(7)
    expected = jax.random.fold_in(root, zlib.crc32(b"simulation") & 0x7FFFFFFF)
    assert _bits(rng.stream(root, "simulation")) == _bits(expected)
    expected = jax.random.fold_in(jax.random.fold_in(expected, 3), 5)
    assert _bits(rng.stream(root, "simulation", 3, 5)) == _bits(expected)


@given(_COUNTERS, _COUNTERS, st.sampled_from(["simulation", "learning", "init"]))
def test_streams_differ_by_role_and_counters(one: list[int], other: list[int], role: str):
    root = rng.root_key(0)
    same = _bits(rng.stream(root, role, *one)) == _bits(rng.stream(root, role, *other))
    assert same == (one == other)
    assert _bits(rng.stream(root, role, *one)) != _bits(rng.stream(root, "other", *one))


def test_traced_counters_give_the_same_keys():
    root = rng.root_key(1)
    traced = jax.jit(lambda i: rng.stream(root, "serving", i))(np.int32(9))
    assert _bits(traced) == _bits(rng.stream(root, "serving", 9))
