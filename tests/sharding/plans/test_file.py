"""Plans as files: what is wrong in one is named, in one sentence."""

from __future__ import annotations

import copy
import functools
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from meshwright.sharding import Plan, UserError, declare, plan


def loss(params: Any, x: Any) -> Any:
    return jnp.square(x @ params["w"]).mean()


@functools.cache
def written() -> dict[str, Any]:
    params, x = {"w": jax.ShapeDtypeStruct((8, 8), "float32")}, jax.ShapeDtypeStruct((16, 8), "float32")
    return declare(loss, params, x, topology="cpu:8", mesh={"fsdp": 8}).to_dict()


def row(**changes: Any) -> dict[str, Any]:
    return {"w": {"shape": [8, 8], "dtype": "float32", "spec": ["fsdp"], **changes}}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"mesh": None}, "mesh=None is not what a plan has there"),
        ({"mesh": {"fdsp": 8}}, "did you mean 'fsdp'"),
        ({"topology": None}, "'None' is not a topology"),
        ({"params": 3}, "params=3 is not what a plan has there"),
        ({"params": {"w": 1}}, "params=.* is not what a plan has there"),
        ({"params": row(dtype="float31")}, "params=.* is not what a plan has there: .*float31"),
        ({"params": row(shape=[8, -8])}, "is no shape"),
        ({"params": row(spec=[3])}, "is not what a plan has there"),
        ({"dims": []}, "dims=.* is not what a plan has there"),
        ({"notes": 3}, "notes=3 is not what a plan has there: it is no list of texts"),
        ({"origin": 3}, "origin=3 is not what a plan has there"),
        ({"estimate": {"zz": 1}}, "estimate=.* is not what a plan has there"),
        ({"microbatch": 3}, "a plan has no 'microbatch'; did you mean 'microbatches'"),
    ],
    ids=str,
)
def test_what_is_wrong_in_a_file_is_named(changes: dict[str, Any], says: str) -> None:
    assert Plan.from_dict(written()).mesh == {"fsdp": 8}
    with pytest.raises(UserError, match=says):
        Plan.from_dict({**written(), **changes})


def test_a_file_that_lacks_a_field_is_named() -> None:
    lacking = {name: value for name, value in written().items() if name != "params"}
    with pytest.raises(UserError, match="is not a plan, for it lacks 'params'"):
        Plan.from_dict(lacking)


def test_a_plan_goes_to_another_process_as_what_is_saved() -> None:
    params, x = {"w": jax.ShapeDtypeStruct((8, 8), "float32")}, jax.ShapeDtypeStruct((16, 8), "float32")
    made = plan(loss, params, x, topology="cpu:8", optimizer=optax.adam(1e-3))
    again = pickle.loads(pickle.dumps(made))
    assert again == made
    assert (again.search, again.optimizer) == (None, None)
    assert copy.deepcopy(made) is made
