"""What is no array of JAX's is named with what to give in its place."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshwright.sharding import UserError
from meshwright.sharding.program.leaves import check_leaves, gone, not_an_array

ONES = np.ones((2, 3), np.float32)


@pytest.mark.parametrize(
    ("leaf", "says"),
    [
        (np.ma.masked_array(ONES, mask=ONES > 2), "give its filled"),
        (ONES.astype(object), "an object of type ndarray of object"),
        (ONES.astype(str), "an object of type ndarray of <U"),
        (np.zeros((2,), [("a", "f4")]), "neither an array nor a number"),
        (np.datetime64("2020-01-01"), "JAX has none of: give its numbers"),
        (np.zeros((2,), "timedelta64[D]"), "JAX has none of: give its numbers"),
        (ONES.astype(np.longdouble), "give .astype\\('float64'\\)"),
        (ONES.astype(">f4"), "another byte order than this machine's: give .astype\\('float32'\\)"),
        (SimpleNamespace(shape=(2,), dtype="torch.float32"), "no type of JAX's: give np.asarray of it"),
        (SimpleNamespace(__array__=None), "neither an array nor a number: give np.asarray of it"),
        (memoryview(b"abc"), "neither an array nor a number"),
    ],
)
def test_what_is_no_array(leaf: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        check_leaves({"x": leaf}, "batch array")


def test_a_reference_is_no_array() -> None:
    with pytest.raises(UserError, match=r"the parameter is a reference \(jax\.new_ref\)"):
        check_leaves(jax.new_ref(jnp.ones(3)), "parameter")


@pytest.mark.parametrize(
    "leaf",
    [
        *(1, 2.5, True, 1j, np.float16(1), ONES, ONES > 0, ONES.astype(jnp.bfloat16), jnp.ones(3, jnp.int4)),
        *(jax.ShapeDtypeStruct((2,), jnp.float8_e4m3fn), ONES[::-1], ONES.astype(np.complex128)),
    ],
)
def test_what_is_an_array(leaf: Any) -> None:
    assert not_an_array(leaf) is None


def test_keys_are_arrays_and_deleted_arrays_are_gone() -> None:
    assert not_an_array(jax.random.key(0)) is None
    tree = {"a": jnp.ones(3), "b": jnp.ones(3)}
    assert gone(tree) is None
    tree["b"].delete()
    assert gone(tree) == "b"
