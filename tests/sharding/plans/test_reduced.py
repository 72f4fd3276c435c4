"""Plans brought down to simulated devices: every axis is there, what divided still does, nothing else."""

from __future__ import annotations

import jax
import pytest
from meshwright.sharding import Plan, declare
from meshwright.sharding.plans.reduced import reduced, reduced_mesh, reduction_of


@pytest.mark.parametrize(
    ("mesh", "expected"),
    [
        ({"stage": 16, "data": 4, "fsdp": 8}, {"stage": 2, "data": 2, "fsdp": 2}),
        ({"data": 4, "fsdp": 8, "tensor": 8, "stage": 2}, {"data": 2, "fsdp": 2, "tensor": 2, "stage": 2}),
        ({"context": 64, "data": 8}, {"context": 4, "data": 2}),
        ({"data": 3}, {"data": 3}),
        ({"tensor": 2}, {"tensor": 2}),
    ],
)
def test_every_axis_stays_and_few_devices_do(mesh: dict[str, int], expected: dict[str, int]) -> None:
    assert reduced_mesh(mesh, {}) == expected


def test_an_axis_keeps_the_devices_that_its_kind_needs() -> None:
    mesh = {"data": 4, "fsdp": 4, "context": 8}
    assert reduced_mesh(mesh, {"context": 4}) == {"data": 2, "fsdp": 2, "context": 4}
    assert reduced_mesh({**mesh, "context": 2}, {"context": 4})["context"] == 2


def stacked(layers: int, rows: int, **how: object) -> Plan:
    def loss(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        return (jax.lax.scan(lambda x, w: (x @ w, None), x, params["w"])[0] ** 2).mean()

    params = {"w": jax.ShapeDtypeStruct((layers, 64, 64), "float32")}
    x = jax.ShapeDtypeStruct((rows, 64), "float32")
    mesh = {"stage": 8, "data": 4}
    return declare(loss, params, x, topology="cpu:32", mesh=mesh, names={"w": ("layers", None, None)}, **how)


def test_weights_that_are_delayed_have_ticks_with_all_work() -> None:
    plan = stacked(32, 4 * 16 * 8, microbatches=16, schedule="delayed")
    assert reduction_of(plan, 32).microbatches == 8


@pytest.mark.parametrize(
    ("layers", "microbatches", "chunks", "expected"),
    [(32, 16, 2, (8, 4, 2)), (30, 16, 1, (7, 4, 1)), (32, 12, 1, (8, 5, 1)), (32, 2, 1, (8, 2, 1))],
)
def test_layers_and_parts_that_stages_divide_or_not_stay_so(
    layers: int, microbatches: int, chunks: int, expected: tuple[int, int, int]
) -> None:
    plan = stacked(layers, 4 * microbatches * 8, microbatches=microbatches, interleave=chunks)
    how = reduction_of(plan, layers)
    assert (how.layers, how.microbatches, how.interleave) == expected
    small = {"w": jax.ShapeDtypeStruct((how.layers, 8, 8), "float32")}
    made = reduced(plan, how, small, jax.ShapeDtypeStruct((how.rows, 8), "float32"))
    assert made.mesh == {"stage": 4, "data": 2}
    assert str(made.topology) == "cpu:8"
    assert made.params["w"].spec == plan.params["w"].spec
