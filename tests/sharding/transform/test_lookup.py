"""Tables whose rows lie on different devices are looked up in, and learn, row by row."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshwright.sharding import Plan, declare

pytestmark = pytest.mark.numerics

ROWS, SEQUENCE, VOCAB, EMBED = 16, 8, 64, 24
NAMES = {"table": ("vocab", "embed"), "up": ("embed", "mlp")}
MESHES = (
    {"tensor": 8},
    {"fsdp": 4, "tensor": 2},
    {"data": 2, "fsdp": 2, "tensor": 2},
)


def params() -> dict[str, Any]:
    random = np.random.default_rng(0)
    return {
        "table": random.normal(size=(VOCAB, EMBED)).astype(np.float32),
        "up": random.normal(size=(EMBED, 32)).astype(np.float32),
    }


def batch(ids: np.ndarray[Any, Any] | None = None) -> dict[str, Any]:
    random = np.random.default_rng(1)
    found = random.integers(0, VOCAB, (ROWS, SEQUENCE), dtype=np.int32) if ids is None else ids
    return {"ids": found, "weight": random.normal(size=(ROWS, SEQUENCE, 32)).astype(np.float32)}


def loss_of(**how: Any) -> Any:
    def loss(params: Any, batch: Any) -> Any:
        rows = params["table"].at[batch["ids"]].get(**how)
        return (jnp.tanh(rows @ params["up"]) * batch["weight"]).mean()

    return loss


def planned(loss: Any, mesh: dict[str, int]) -> tuple[Plan, Any]:
    # As the planner lays a decoder's stream between its layers: cut over what cuts the table's rows.
    rules = {"sequence": "tensor", "mlp": None}
    plan = declare(loss, params(), batch(), topology="cpu:8", mesh=mesh, names=NAMES, rules=rules)
    return plan, jax.jit(jax.value_and_grad(plan.apply(loss, plan.make_mesh())))


@pytest.mark.devices(8)
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_gradients_of_a_table_cut_by_rows(mesh: dict[str, int]) -> None:
    loss = loss_of()
    plan, step = planned(loss, mesh)
    assert plan.dims["vocab"].axes == ("tensor",)
    value, gradients = step(params(), batch())
    expected, reference = jax.jit(jax.value_and_grad(loss))(params(), batch())
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for name, gradient in gradients.items():
        np.testing.assert_allclose(gradient, reference[name], rtol=1e-5, atol=1e-7, err_msg=name)


@pytest.mark.devices(8)
@pytest.mark.parametrize("how", [{"mode": "clip"}, {"mode": "fill", "fill_value": 0.0}], ids=str)
def test_ids_outside_of_the_table(how: dict[str, Any]) -> None:
    """They count as they do unsharded: read and learnt at the edge, or not at all."""
    loss = loss_of(**how)
    ids = np.random.default_rng(2).integers(-VOCAB // 2, 2 * VOCAB, (ROWS, SEQUENCE), dtype=np.int32)
    _, step = planned(loss, {"fsdp": 2, "tensor": 4})
    _, gradients = step(params(), batch(ids))
    reference = jax.jit(jax.grad(loss))(params(), batch(ids))
    assert np.abs(reference["table"]).max() > 0
    np.testing.assert_allclose(gradients["table"], reference["table"], rtol=1e-5, atol=1e-7)


@pytest.mark.numerics(False)
@pytest.mark.devices(8)
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_no_device_holds_the_whole_table_or_its_gradient(mesh: dict[str, int]) -> None:
    plan, step = planned(loss_of(), mesh)
    placed = plan.make_mesh()
    given = [
        jax.tree.map(lambda leaf, to: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=to), tree, where)
        for tree, where in (
            (params(), plan.shardings(params(), placed)),
            (batch(), plan.shardings(batch(), placed, "batch")),
        )
    ]
    program = step.lower(*given).compile().as_text()
    assert f"[{VOCAB // mesh['tensor']},{EMBED}]" in program
    assert f"[{VOCAB},{EMBED}]" not in program
