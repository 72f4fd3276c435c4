"""Layers that a loss runs several times over stages: chosen and rejected rows, adapters beside their base."""

from __future__ import annotations

from typing import Any

import draws
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshwright.sharding import declare

WIDTH, VOCAB, ROWS, LAYERS = 16, 32, 16, 5


def init(scanned: bool) -> Any:
    keys = iter(jax.random.split(jax.random.key(0), 20))

    def normal(*shape: int) -> Any:
        return draws.normal(next(keys), shape) / shape[-2] ** 0.5

    layers = {"up": normal(LAYERS, WIDTH, WIDTH), "down": normal(LAYERS, WIDTH, WIDTH)}
    adapters = {"a": normal(LAYERS, WIDTH, 2), "b": normal(LAYERS, 2, WIDTH)}
    if not scanned:
        layers, adapters = (
            [jax.tree.map(lambda leaf, n=n: leaf[n], some) for n in range(LAYERS)]
            for some in (layers, adapters)
        )
    return {"base": layers, "adapters": adapters, "table": 4 * normal(VOCAB, WIDTH)}


def batch() -> Any:
    rng = np.random.default_rng(0)
    return {
        name: rng.integers(0, VOCAB, (ROWS, length)).astype(np.int32)
        for name, length in (("chosen", 8), ("rejected", 6))
    }


def preference(params: Any, batch: Any) -> Any:
    """A policy that is a base and adapters, the base alone beside it, on rows of two lengths."""

    def score(params: Any, adapters: Any, ids: Any) -> Any:
        def layer(x: Any, own: Any) -> Any:
            base, adapter = own
            h = jnp.cumsum(x, 1) / (1 + jnp.arange(x.shape[1]))[:, None]
            h = h @ base["up"] + (0 if adapter is None else h @ adapter["a"] @ adapter["b"])
            return x + jnp.tanh(h) @ base["down"], jnp.square(h).mean()

        x, sizes = params["table"][ids], []
        if isinstance(params["base"], dict):
            x, sizes = jax.lax.scan(layer, x, (params["base"], adapters))
        else:
            for own in zip(params["base"], adapters or [None] * LAYERS, strict=True):
                x, size = layer(x, own)
                sizes.append(size)
        each = jax.nn.log_softmax(x[:, :-1] @ params["table"].T)
        return jnp.take_along_axis(each, ids[:, 1:, None], -1).sum((1, 2)), jnp.stack([*sizes])

    fixed = jax.lax.stop_gradient(params)
    names = ("chosen", "rejected")
    ours, sizes = zip(*(score(params, params["adapters"], batch[name]) for name in names), strict=True)
    theirs = [score(fixed, None, batch[name])[0] for name in names]
    margin = ours[0] - ours[1] - theirs[0] + theirs[1]
    return -jax.nn.log_sigmoid(0.1 * margin).mean() + 0.01 * sizes[0].sum(), {"margin": margin.mean()}


@pytest.mark.once("sharding/program/test_repeats.py")
@pytest.mark.numerics
@pytest.mark.devices(4)
@pytest.mark.parametrize(
    ("scanned", "mesh", "how"),
    [
        (True, {"stage": 2}, {"microbatches": 2}),
        pytest.param(
            *(False, {"stage": 2, "fsdp": 2}, {"microbatches": 4, "interleave": 2}), marks=pytest.mark.slow
        ),
    ],
    ids=["scanned", "written out"],
)
def test_layers_that_run_several_times_are_one_loop(
    scanned: bool, mesh: dict[str, int], how: dict[str, Any]
) -> None:
    params, size = init(scanned), int(np.prod(list(mesh.values())))
    plan = declare(preference, params, batch(), topology=f"cpu:{size}", mesh=mesh, **how)
    whole = plan.make_mesh(devices=jax.devices()[:size])
    placed = jax.device_put(
        (params, batch()), (plan.shardings(params, whole), plan.shardings(batch(), whole, "batch"))
    )
    slope = jax.value_and_grad(plan.apply(preference, mesh=whole), has_aux=True)
    (found, aux), gradients = jax.device_get(jax.jit(slope)(*placed))
    (wanted, plain), expected = jax.jit(jax.value_and_grad(preference, has_aux=True))(params, batch())
    assert abs(found - wanted) < 1e-6 * abs(wanted)
    assert abs(aux["margin"] - plain["margin"]) < 1e-5 * abs(plain["margin"])
    for ours, own in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(ours - own) < 1e-5 * np.linalg.norm(own)
