"""Attention by splash, interpreted on simulated devices, against plain attention on one."""

from __future__ import annotations

import dataclasses
from typing import Any

import draws
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from meshwright.sharding import declare
from meshwright.sharding.ops import attention
from meshwright.sharding.program.jaxpr import Traces
from meshwright.sharding.transform.attention import AttentionKernel
from meshwright.sharding.transform.compose import composed
from meshwright.sharding.transform.constrain import Constrain
from meshwright.sharding.transform.gather import Scattering

pytestmark = pytest.mark.numerics

BATCH, SEQUENCE, EMBED, HEADS, HEAD_DIM, LAYERS = 4, 256, 32, 4, 16, 2
BLOCKS = {"implementation": "splash", "block_q": 128, "block_kv": 128}


def weights(kv_heads: int) -> dict[str, Any]:
    shapes = {
        "query": (EMBED, HEADS, HEAD_DIM),
        "key": (EMBED, kv_heads, HEAD_DIM),
        "value": (EMBED, kv_heads, HEAD_DIM),
        "output": (HEADS, HEAD_DIM, EMBED),
    }
    keys = jax.random.split(jax.random.key(0), len(shapes))
    pairs = zip(shapes.items(), keys, strict=True)
    return {name: 0.2 * draws.normal(key, (LAYERS, *shape)) for (name, shape), key in pairs}


NAMES = {
    "query": ("layers", "embed", "heads", "head_dim"),
    "key": ("layers", "embed", "kv_heads", "head_dim"),
    "value": ("layers", "embed", "kv_heads", "head_dim"),
    "output": ("layers", "heads", "head_dim", "embed"),
}


def batch() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "x": rng.normal(size=(BATCH, SEQUENCE, EMBED)).astype(np.float32),
        "segments": np.sort(rng.integers(0, 3, (BATCH, SEQUENCE)), axis=1).astype(np.int32),
    }


def loss_of(**options: Any) -> Any:
    def loss(params: Any, batch: Any) -> Any:
        def layer(x: Any, w: Any) -> Any:
            query, key, value = (
                jnp.einsum("bse,ehd->bshd", x, w[name]) for name in ("query", "key", "value")
            )
            out = attention(query, key, value, segment_ids=batch["segments"], **options)
            return x + jnp.einsum("bshd,hde->bse", out, w["output"]), None

        x, _ = jax.lax.scan(layer, batch["x"], params)
        return jnp.mean(jnp.sin(x) * x)

    return loss


def constrained(loss: Any, mesh: Any, axes_of: Any) -> Any:
    """Return `loss` on `mesh` with splash, its parameters stored whole."""

    def passes(program: Any, params: Any) -> list[Any]:
        whole = [PartitionSpec()] * len(program.parameters)
        return [
            Constrain(
                program,
                mesh,
                axes_of(program),
                stored=whole,
                reduced=whole,
                scattering=Scattering(mesh, {}),
                kernel=AttentionKernel(mesh, BLOCKS, "cpu", program, {}),
            )
        ]

    return composed(Traces(loss), passes)


def check(planned: Any, loss: Any, params: Any) -> None:
    """Hold loss and gradients of `planned` to those of `loss`, and see that it runs the kernel."""
    assert "splash_mha_dkv" in str(jax.make_jaxpr(jax.grad(planned))(params, batch()))
    expected = jax.jit(jax.value_and_grad(loss))(params, batch())
    got = jax.jit(jax.value_and_grad(planned))(params, batch())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, expected)


CASES = {
    "rows and heads": ({"data": 2, "fsdp": 2, "tensor": 2}, 2, "none", {"window": 100, "cap": 30.0}),
    "one kv head": ({"fsdp": 2, "tensor": 4}, 1, "full", {}),
    "rows of queries": ({"fsdp": 2, "context": 2, "tensor": 2}, 2, "none", {}),
    "its result kept by name": ({"fsdp": 4, "tensor": 2}, 4, {"output:in": "device"}, {"causal": False}),
}
# Of the other cases' kernels, rows and heads.
ALIKE = ("one kv head", "rows of queries")


@pytest.mark.devices(8)
@pytest.mark.parametrize(
    "case", [pytest.param(one, marks=pytest.mark.slow if one in ALIKE else ()) for one in CASES]
)
def test_values_and_gradients(case: str) -> None:
    mesh, kv_heads, remat, options = CASES[case]
    loss, params = loss_of(**options), weights(kv_heads)
    plan = declare(
        loss, params, batch(), topology="cpu:8", mesh=mesh, names=NAMES, remat=remat, attention="splash"
    )
    plan = dataclasses.replace(plan, kernels={"attention": BLOCKS})
    check(plan.apply(loss, plan.make_mesh()), loss, params)


@pytest.mark.once("sharding/transform/accumulation/test_region.py")
@pytest.mark.devices(8)
@pytest.mark.parametrize("axis", ["data", pytest.param("stage", marks=pytest.mark.slow)])
def test_the_kernel_runs_where_rows_are_worked_through_by_hand(axis: str) -> None:
    loss, params = loss_of(window=100), weights(2)
    mesh = {axis: 2, "context": 2, "tensor": 2}
    how = {"names": NAMES, "attention": "splash", "microbatches": 2}
    plan = declare(loss, params, batch(), topology="cpu:8", mesh=mesh, **how)
    plan = dataclasses.replace(plan, kernels={"attention": BLOCKS})
    check(plan.apply(loss, plan.make_mesh()), loss, params)


@pytest.mark.once("sharding/transform/test_attention.py")
@pytest.mark.devices(8)
def test_kv_heads_that_the_axes_of_heads_do_not_divide() -> None:
    loss, params = loss_of(), weights(2)
    devices = np.array(jax.devices()[:8]).reshape(2, 4)
    mesh = jax.sharding.Mesh(devices, ("data", "tensor"))

    def axes_of(program: Any) -> dict[int, tuple[str, ...]]:
        of_query = next(argument for argument in program.arguments if argument.path == "query")
        of_x = next(argument for argument in program.arguments if argument.path == "x")
        return {of_query.dims[2][0]: ("tensor",), of_x.dims[0][0]: ("data",)}

    planned = constrained(loss, mesh, axes_of)
    text = str(jax.make_jaxpr(planned)(params, batch()))
    assert f"[{BATCH // 2},1,{SEQUENCE},{HEAD_DIM}]" in text, "each device has one query head and its kv head"
    check(planned, loss, params)


@pytest.mark.devices(8)
def test_what_the_kernel_cannot_do_is_left_as_it_is() -> None:
    params = weights(2)
    mesh = jax.make_mesh((8,), ("data",))
    for options in ({"window": jnp.int32(50)}, {}):
        loss = loss_of(**options)
        rows = batch() if options else jax.tree.map(lambda leaf: leaf[:, :200], batch())
        planned = constrained(loss, mesh, lambda _: {})
        assert "pallas_call" not in str(jax.make_jaxpr(planned)(params, rows))
        np.testing.assert_allclose(jax.jit(planned)(params, rows), jax.jit(loss)(params, rows), rtol=1e-6)


@pytest.mark.devices(8)
def test_each_call_is_carried_out_by_what_can() -> None:
    params = weights(2)
    mesh = jax.make_mesh((8,), ("data",))
    one, other = loss_of(), loss_of(window=jnp.int32(50))

    def loss(params: Any, batch: Any) -> Any:
        return one(params, batch) + other(params, batch)

    planned = constrained(loss, mesh, lambda _: {})
    assert str(jax.make_jaxpr(planned)(params, batch())).count("pallas_call") == 1
    check(planned, loss, params)
