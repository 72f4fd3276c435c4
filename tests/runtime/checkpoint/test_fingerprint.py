"""A fingerprint depends on every bit and its place, and on nothing else."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from meshwright.runtime.checkpoint import fingerprints

pytestmark = pytest.mark.numerics


def of(*arrays: object) -> list[str]:
    return fingerprints([jnp.asarray(array) for array in arrays]).hex()


@pytest.mark.devices(8)
def test_is_the_same_on_any_mesh() -> None:
    array = np.random.default_rng(0).normal(size=(16, 8, 24)).astype(np.float32)
    seen = set()
    for count, spec in [(1, ()), (8, ("x",)), (8, (None, "x")), (8, (None, None, "x")), (4, ()), (2, ("x",))]:
        mesh = Mesh(np.array(jax.devices()[:count]), ("x",))
        seen.update(fingerprints([jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))]).hex())
    assert len(seen) == 1


@pytest.mark.devices(1)
@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16", "float16", "int8", "uint32", "bool", "float8_e4m3fn", "complex64"]
)
def test_any_flipped_bit_changes_it(dtype) -> None:
    array = np.asarray(jnp.arange(2).reshape(1, 2).astype(dtype))
    whole = of(array)[0]
    places = range(8 * array.nbytes) if dtype != "bool" else range(0, 8 * array.nbytes, 8)
    changed = []
    for bit in places:
        raw = bytearray(array.tobytes())
        raw[bit // 8] ^= 1 << bit % 8
        changed.append(np.frombuffer(bytes(raw), array.dtype).reshape(array.shape))
    found = of(*changed)
    assert whole not in found
    assert len(set(found)) == len(found)


@pytest.mark.devices(1)
def test_any_two_elements_that_swap_places_change_it() -> None:
    # A sign apart, equal up to a power of two, and small integers: what a linear sum would miss.
    array = np.array([1.0, -1.0, 2.0, -2.0, 0.0, -0.0, 1.5, 3.0], np.float32)
    swapped = []
    for i in range(len(array)):
        for j in range(i):
            other = array.copy()
            other[[i, j]] = other[[j, i]]
            swapped.append(other)
    found = of(array, *swapped)
    assert len(set(found)) == len(found)


@pytest.mark.devices(1)
def test_zeros_of_different_shapes_and_rolled_arrays_differ() -> None:
    array = np.arange(24, dtype=np.int32).reshape(4, 6)
    found = of(
        array, np.roll(array, 1, 0), np.roll(array, 1, 1), array[::-1], array.reshape(6, 4).T.reshape(4, 6)
    )
    assert len(set(found)) == len(found)


@pytest.mark.devices(1)
def test_half_words_of_a_random_array_are_spread_evenly() -> None:
    # Adding one array after another must reach all bits of both words.
    arrays = [np.full((5,), value, np.float32) for value in range(64)]
    words = np.array([[int(text[:8], 16), int(text[8:], 16)] for text in of(*arrays)], np.uint64)
    for column in words.T:
        share = [np.mean((column >> np.uint64(bit)) & np.uint64(1)) for bit in range(32)]
        assert min(share) > 0.25
        assert max(share) < 0.75
