"""What JAX cannot trace of a loss is one sentence with the user's line, from every door."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from meshwright.sharding import UserError, declare, plan

PARAMS, X = {"w": jnp.ones((8, 8))}, jnp.ones((16, 8))
LEFT: list[Any] = []


def branches(params: Any, x: Any) -> Any:
    return (x @ params["w"]).mean() if x.mean() > 0 else 0.0


def to_numpy(params: Any, x: Any) -> Any:
    return jnp.mean(np.asarray(x) @ params["w"])


def by_mask(params: Any, x: Any) -> Any:
    return (x @ params["w"])[x[:, 0] > 0].mean()


def over_devices(params: Any, x: Any) -> Any:
    return jax.lax.pmean((x @ params["w"]).mean(), "batch")


def laid_out(params: Any, x: Any) -> Any:
    return jax.lax.with_sharding_constraint(x @ params["w"], PartitionSpec("data")).mean()


def other_sizes(params: Any, x: Any) -> Any:
    return (x.T @ params["w"]).mean()


def of_one(params: Any) -> Any:
    return params["w"].mean()


def left_over(params: Any, x: Any) -> Any:
    jax.jit(lambda y: LEFT.append(y))(x)
    return (LEFT[-1] @ params["w"]).mean()


@pytest.mark.parametrize(
    ("loss", "says"),
    [
        (branches, "reads what is in an array"),
        (to_numpy, "reads what is in an array"),
        (by_mask, "picks elements by a mask"),
        (over_devices, "names an axis that is not there"),
        (laid_out, "by a PartitionSpec alone"),
        (other_sizes, "JAX says: dot_general requires"),
        (left_over, "another trace has left outside"),
    ],
    ids=lambda one: getattr(one, "__name__", ""),
)
def test_a_loss_that_cannot_be_traced(loss: Any, says: str) -> None:
    line = loss.__code__.co_firstlineno + (2 if loss is left_over else 1)
    for door in (
        lambda: plan(loss, PARAMS, X, topology="cpu:8"),
        lambda: declare(loss, PARAMS, X, topology="cpu:8", mesh={"data": 8}),
    ):
        with pytest.raises(UserError, match=says) as caught:
            door()
        assert f"test_untraceable.py:{line} ({loss.__name__})" in str(caught.value)


def test_a_loss_that_takes_no_batch() -> None:
    with pytest.raises(UserError, match=r"is called as loss\(params, batch\), which it does not take"):
        plan(of_one, PARAMS, X, topology="cpu:8")


def test_a_planned_loss_that_cannot_be_traced() -> None:
    one = declare(lambda p, x: (x @ p["w"]).mean(), PARAMS, X, topology="cpu:1", mesh={"data": 1})
    with pytest.raises(UserError, match="reads what is in an array"):
        one.apply(branches)(PARAMS, X)


def test_an_error_of_the_loss_s_own_is_its_own() -> None:
    def loss(params: Any, x: Any) -> Any:
        raise KeyError("no such layer")

    with pytest.raises(KeyError, match="no such layer"):
        plan(loss, PARAMS, X, topology="cpu:8")


@pytest.mark.parametrize("of_two", [lambda p, x: (x["x"] @ p["w"]).mean(), lambda p, x: (x @ p["w"]).mean()])
def test_parameters_and_batch_swapped(of_two: Any) -> None:
    batch = {"x": X} if "x" in of_two.__code__.co_consts else X
    for door in (
        lambda: plan(of_two, batch, PARAMS, topology="cpu:8", microbatches=2),
        lambda: declare(of_two, batch, PARAMS, topology="cpu:8", mesh={"data": 8}),
    ):
        with pytest.raises(UserError, match="the params and the batch look swapped"):
            door()


def test_batch_and_state_swapped() -> None:
    def loss(params: Any, batch: Any, state: Any) -> Any:
        return (batch["x"] @ params["w"]).mean(), ({}, {"count": state["count"] + 1})

    with pytest.raises(UserError, match="the batch and the state look swapped"):
        plan(loss, PARAMS, {"count": jnp.zeros(())}, state={"x": X}, topology="cpu:8")


@pytest.mark.parametrize(
    ("params", "batch", "says"),
    [
        (
            {},
            {"x": X},
            r"test_untraceable.py:\d+ \(<lambda>\) it fails with KeyError: 'w'; .* params: nothing",
        ),
        (PARAMS, None, "TypeError: 'NoneType' object is not subscriptable; .* batch: nothing"),
        (PARAMS, {"y": X}, "KeyError: 'x'; it was given params: 'w'; batch: 'y'"),
        (PARAMS, {"x": [[1.0] * 8] * 16}, "no array: give jnp.asarray of it"),
    ],
)
def test_what_a_loss_looks_up_in_vain(params: Any, batch: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        plan(lambda p, b: (b["x"] @ p["w"]).mean(), params, batch, topology="cpu:8")
