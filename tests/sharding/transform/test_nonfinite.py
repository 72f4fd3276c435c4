"""Where a value of a loss is first not finite: its layer, microbatch and stage, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import draws
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshwright.sharding import Plan, declare

pytestmark = [pytest.mark.numerics, pytest.mark.devices(8)]

LAYERS, WIDTH, ROWS = 4, 8, 16


def init() -> Any:
    weights = draws.normal(jax.random.key(0), (LAYERS, WIDTH, WIDTH)) * 0.2
    return {"blocks": weights, "head": jnp.ones((WIDTH, 4))}


def batch(odd: int | None = None) -> Any:
    rows = np.random.default_rng(0).standard_normal((ROWS, 3, WIDTH)).astype(np.float32)
    mark, counted = np.zeros(ROWS, np.float32), np.ones(ROWS, np.float32)
    if odd is not None:
        mark[odd] = 1
    return {"x": rows, "mark": mark, "counted": counted}


@jax.custom_vjp
def odd_slope(x: Any, where: Any) -> Any:
    return x


odd_slope.defvjp(lambda x, where: (x, where), lambda where, g: (jnp.where(where, jnp.nan, g), None))


def failing(layer: int, backward: bool = False) -> Callable[..., Any]:
    """A loss whose `layer` overflows on rows that are marked, forward or in its gradient."""

    def loss(params: Any, batch: Any) -> Any:
        def block(carry: Any, weights: Any) -> Any:
            x, number = carry
            h = x + jnp.tanh(x @ weights)
            here = (number == layer) & (batch["mark"][:, None, None] > 0)
            h = odd_slope(h, here) if backward else jnp.where(here, jnp.inf, h)
            return (h, number + 1), None

        (x, _), _ = jax.lax.scan(block, (batch["x"], 0), params["blocks"])
        rows = jnp.square(x @ params["head"]).mean((1, 2)) * batch["counted"]
        return rows.sum() / batch["counted"].sum()

    return loss


def found(loss: Callable[..., Any], mesh: dict[str, int], rows: Any, params: Any = None, **how: Any) -> Any:
    size = int(np.prod(list(mesh.values())))
    params = init() if params is None else params
    plan: Plan = declare(loss, params, rows, topology=f"cpu:{size}", mesh=mesh, **how)
    over = plan.make_mesh(devices=jax.devices()[:size])
    placed = jax.device_put(
        (params, rows), (plan.shardings(params, over), plan.shardings(rows, over, "batch"))
    )
    return plan.first_not_finite(loss, *placed, mesh=over)


def test_a_stage_is_named_with_its_chunk_layer_and_microbatch() -> None:
    rows = batch(odd=ROWS - 1)
    said = str(found(failing(1), {"stage": 2, "data": 2}, rows, microbatches=4, interleave=2))
    assert "in the forward pass of layer 1 of 4 (from 0), microbatch 3 of 4, stage 1 of 2, chunk 0" in said


@pytest.mark.parametrize("schedule", ["1f1b", "delayed"])
def test_the_layer_of_a_gradient_is_the_last_one(schedule: str) -> None:
    one = found(failing(2, backward=True), {"stage": 2}, batch(odd=5), microbatches=4, schedule=schedule)
    assert (one.fault.work, one.fault.layer, one.fault.microbatch, one.fault.stage) == ("backward", 2, 1, 1)


@pytest.mark.once("sharding/transform/test_nonfinite.py")
def test_what_only_a_weights_gradient_has_is_said_to_be_its() -> None:
    # What a weight is read by is too large for its gradient, and for nothing else.
    @jax.custom_vjp
    def product(x: Any, weights: Any) -> Any:
        return x @ weights

    def back(kept: Any, g: Any) -> Any:
        x, weights = kept
        return g @ weights.T, jnp.einsum("btd,bte->de", jnp.where(jnp.abs(x) > 50, jnp.inf, x), g)

    product.defvjp(lambda x, weights: (product(x, weights), (x, weights)), back)

    def loss(params: Any, batch: Any) -> Any:
        x = batch["x"] * (1 + 100 * batch["mark"][:, None, None])
        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(product(x, w)), None), x, params["blocks"])
        return jnp.square(x @ params["head"]).mean()

    one = found(loss, {"stage": 2}, batch(odd=5), microbatches=4, schedule="delayed")
    assert (one.fault.work, one.fault.layer, one.fault.microbatch, one.fault.stage) == ("weights", 0, 1, 0)
    assert "in the gradient of the layers' weights of layer 0 of 4" in str(one)


def failing_in(stack: str, layer: int, backward: bool = False) -> Callable[..., Any]:
    """A loss of two stacks of layers, as `failing`."""

    def loss(params: Any, batch: Any) -> Any:
        x = batch["x"]
        for name in ("encoder", "decoder"):

            def block(carry: Any, weights: Any, own: bool = name == stack) -> Any:
                x, number = carry
                h = x + jnp.tanh(x @ weights)
                here = (number == layer) & (batch["mark"][:, None, None] > 0) & own
                return (odd_slope(h, here) if backward else jnp.where(here, jnp.inf, h), number + 1), None

            x = 0.5 * jax.lax.scan(block, (x, 0), params[name])[0][0]
        return jnp.square(x @ params["head"]).mean()

    return loss


def of_two(stack: str, layer: int, backward: bool = False, **how: Any) -> Any:
    blocks = init()["blocks"]
    params = {"encoder": jnp.concatenate([blocks, blocks[:2]]), "decoder": blocks, "head": init()["head"]}
    loss = failing_in(stack, layer, backward)
    return found(loss, {"stage": 2}, batch(odd=5), params, microbatches=4, **how)


def test_the_second_of_two_stacks_is_named() -> None:
    assert (
        "in the forward pass of layer 2 of 4 (from 0) in decoder, microbatch 1 of 4, stage 1 of 2, tick 4"
        in str(of_two("decoder", 2))
    )


@pytest.mark.slow
@pytest.mark.parametrize(("stack", "layer", "interleave"), [("encoder", 3, 2), ("decoder", 1, 1)])
def test_a_gradient_of_two_stacks_has_its_stack_and_chunk(stack: str, layer: int, interleave: int) -> None:
    one = of_two(stack, layer, True, interleave=interleave, schedule="delayed")
    each = {1: {"encoder": 3, "decoder": 2}, 2: {"encoder": 2, "decoder": 1}}[interleave][stack]
    assert (one.fault.work, one.fault.stack, one.fault.layer) == ("backward", int(stack == "decoder"), layer)
    assert (one.fault.chunk * 2 + one.fault.stage, one.fault.microbatch) == (layer // each, 1)


def test_a_plan_without_stages_tells_its_layer() -> None:
    said = str(found(failing(3), {"data": 2}, batch(odd=0)))
    assert said == "the first value that is not finite is in the forward pass of layer 3 of 4 (from 0)"


@pytest.mark.once("sharding/transform/test_nonfinite.py")
def test_what_is_no_layers_is_said() -> None:
    nothing = {**batch(), "counted": np.zeros(ROWS, np.float32)}
    assert "sums over the batch" in str(found(failing(0), {"stage": 2}, nothing, microbatches=2))
    bad = init()
    bad["blocks"] = bad["blocks"].at[1, 0, 0].set(jnp.nan)
    assert "the parameter blocks is not finite" in str(found(failing(0), {"data": 2}, batch(), bad))
    assert "every value" in str(found(failing(0), {"data": 2}, batch()))
