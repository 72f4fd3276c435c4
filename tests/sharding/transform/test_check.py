"""Accumulation tried on real arrays: what is the whole's passes, what is not is named with its numbers."""

from __future__ import annotations

import dataclasses
from typing import Any

import draws
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshwright.sharding import Plan, UserError, declare
from meshwright.sharding.transform import check, deviation
from meshwright.sharding.transform.compose import PlannedLoss

pytestmark = pytest.mark.numerics

ROWS, WIDTH = 64, 16


def init(key: Any, dtype: str = "float32") -> Any:
    first, second = jax.random.split(key)
    return {
        "into": (draws.normal(first, (WIDTH, 32)) / 4).astype(dtype),
        "out": (draws.normal(second, (32, WIDTH)) / 6).astype(dtype),
        # No gradient but that of rounding: the mean over the columns takes it away.
        "shift": jnp.zeros((WIDTH,), dtype),
    }


def loss(params: Any, batch: Any) -> Any:
    found = jnp.tanh(batch["x"].astype(params["into"].dtype) @ params["into"]) @ params["out"]
    found = found + jnp.mean(params["shift"]) - params["shift"].mean()
    return jnp.mean((found - batch["y"].astype(found.dtype)).astype(jnp.float32) ** 2), {
        "rows": found[:, 0].sum()
    }


def batch() -> Any:
    x, y = draws.normal(jax.random.key(1), (2, ROWS, WIDTH))
    return {"x": np.asarray(x), "y": np.asarray(y)}


def planned(dtype: str = "float32", of: Any = loss, **how: Any) -> Plan:
    shapes = jax.eval_shape(lambda key: init(key, dtype), jax.random.key(0))
    names = {"into": ("embed", "mlp"), "out": ("mlp", "embed"), "shift": ("embed",)}
    mesh = {"data": 2, "fsdp": 2, "tensor": 2}
    return declare(of, shapes, batch(), topology="cpu:8", mesh=mesh, names=names, **how)


@pytest.mark.devices(8)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_two_parts_give_is_the_whole_and_the_check_says_its_seconds(dtype: str) -> None:
    plan = planned(dtype, microbatches=4)
    found = plan.check_accumulation(loss, init(jax.random.key(0), dtype), batch())
    # Two parts of one row for each of the four that data and fsdp share the rows out to.
    assert found.rows == 8
    assert found.apart <= (1e-5 if dtype == "float32" else 0.02)
    assert found.note is None
    assert found.seconds > 0
    assert str(found).startswith("accumulation was checked on 8 rows in ")


@pytest.mark.devices(8)
def test_a_gradient_beyond_rounding_is_refused_with_its_path_and_numbers(monkeypatch: Any) -> None:
    class Wrong(PlannedLoss):
        def __init__(self, plan: Any, *others: Any) -> None:
            super().__init__(plan, *others)
            self.parts = plan.microbatches

        def value_and_grad(self, *args: Any, **how: Any) -> Any:
            found, gradients = super().value_and_grad(*args, **how)
            if self.parts == 2:
                gradients = {**gradients, "out": gradients["out"] * 1.001}
            return found, gradients

    monkeypatch.setattr(deviation, "PlannedLoss", Wrong)
    with pytest.raises(
        UserError, match=r"on 8 rows of this batch the gradient of 'out' .* by 0\.001 of itself"
    ):
        planned().check_accumulation(loss, init(jax.random.key(0)), batch())


@pytest.mark.devices(8)
def test_it_takes_as_many_rows_as_the_loss_has_written_into_it() -> None:
    def in_groups(params: Any, batch: Any) -> Any:
        assert batch["x"].shape[0] >= 32
        groups = jax.tree.map(lambda leaf: leaf.reshape(16, -1, WIDTH), batch)
        return jnp.mean(jax.vmap(lambda group: loss(params, group)[0])(groups))

    assert planned(of=in_groups).check_accumulation(in_groups, init(jax.random.key(0)), batch()).rows == 32


@pytest.mark.devices(8)
def test_the_mean_of_the_parts_is_taken_for_what_it_is() -> None:
    found = planned(microbatches=2, accumulation="by part").check_accumulation(
        loss, init(jax.random.key(0)), batch()
    )
    assert (found.rows, str(found)[:43]) == (0, "accumulation was not checked: by part it is")


@pytest.mark.devices(8)
def test_nothing_is_said_of_what_is_not_finite() -> None:
    none = {**batch(), "x": np.full((ROWS, WIDTH), np.nan, np.float32)}
    found = planned().check_accumulation(loss, init(jax.random.key(0)), none)
    assert (found.rows, found.note) == (0, "the loss or a gradient on 8 rows of this batch is not finite")


@pytest.mark.devices(8)
def test_what_would_not_fit_is_left_out_with_a_note() -> None:
    plan = planned()
    assert plan.estimate is not None
    large = dataclasses.replace(plan.estimate, memory={**plan.estimate.memory, "optimizer": 1e12})
    chip = dataclasses.replace(plan.topology.chip, nominal=False)
    topology = dataclasses.replace(plan.topology, chip=chip)
    found = check.check_accumulation(
        dataclasses.replace(plan, estimate=large, topology=topology),
        loss,
        init(jax.random.key(0)),
        batch(),
        mesh=plan.make_mesh(),
    )
    assert found.rows == 0
    assert "would need 931.3 GiB of a device's" in str(found)
