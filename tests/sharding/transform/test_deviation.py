"""A planned loss beside the plain function: what is the same, what is another by its path, narrow types."""

from __future__ import annotations

from typing import Any

import draws
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshwright.sharding import Plan, declare
from meshwright.sharding.transform import deviation
from meshwright.sharding.transform.compose import PlannedLoss

pytestmark = pytest.mark.numerics
MESH = {"data": 2, "fsdp": 2, "tensor": 2}
NAMES = {"into": ("embed", "mlp"), "out": ("mlp", "embed"), "fixed": ("embed",)}


def init() -> Any:
    first, second = jax.random.split(jax.random.key(0))
    into, out = draws.normal(first, (16, 32)) / 4, draws.normal(second, (32, 16)) / 6
    return {"into": into, "out": out, "fixed": jnp.ones((16,))}


def loss(params: Any, batch: Any, kind: str = "float32") -> Any:
    wide = jnp.tanh(batch["x"].astype(kind) @ params["into"].astype(kind))
    found = wide @ params["out"].astype(kind) * params["fixed"].astype(kind)
    return jnp.mean((found.astype(jnp.float32) - batch["y"]) ** 2)


def narrow(params: Any, batch: Any) -> Any:
    return loss(params, batch, "bfloat16")


def batch() -> Any:
    x, y = draws.normal(jax.random.key(1), (2, 16, 16))
    return {"x": np.asarray(x), "y": np.asarray(y)}


def planned(of: Any = loss) -> Plan:
    shapes = jax.eval_shape(init)
    how = {"topology": "cpu:8", "mesh": MESH, "names": NAMES, "microbatches": 2}
    return declare(of, shapes, batch(), trainable={"fixed": False}, **how)


@pytest.mark.devices(8)
def test_a_planned_loss_is_the_plain_one_to_rounding_in_each_trained_gradient() -> None:
    plan = planned()
    found = plan.deviation(loss, init(), batch())
    assert found.passes
    assert set(found.apart) == {None, "into", "out"}
    assert max(found.apart.values()) <= 1e-6
    assert found.loss == pytest.approx(float(loss(init(), batch())), rel=1e-6)


@pytest.mark.devices(8)
def test_a_gradient_that_is_another_is_the_worst_by_its_path(monkeypatch: Any) -> None:
    class Wrong(PlannedLoss):
        def value_and_grad(self, *args: Any, **how: Any) -> Any:
            value, slopes = super().value_and_grad(*args, **how)
            return value, {**slopes, "out": slopes["out"] * 1.0001}

    monkeypatch.setattr(deviation, "PlannedLoss", Wrong)
    plan = planned()
    found = deviation.deviation(plan, loss, init(), batch(), mesh=plan.make_mesh())
    assert not found.passes
    assert found.worst[0] == "out"
    assert found.apart["out"] == pytest.approx(1e-4, rel=0.01)


@pytest.mark.devices(8)
def test_narrow_types_may_be_twice_as_far_from_wide_ones_as_the_plain_function_is() -> None:
    plan = planned(narrow)
    wide = deviation.plain_gradients(plan, loss)(init(), batch())
    found = deviation.deviation(plan, narrow, init(), batch(), mesh=plan.make_mesh(), measure=wide)
    assert found.passes
    # Further away than float32 is, by the rounding of bfloat16.
    assert 1e-4 < found.apart["into"] <= found.allowed["into"] < 0.02
