"""Exchanges of a tick, those of its attention too, wait for one another on simulated devices.

Devices begin exchanges that do not in different orders, and then wait for each other for ever.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import draws
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core
from meshwright.sharding import declare

WIDTH, VOCAB, ROWS, TIME, HEADS = 8, 16, 12, 8, 2
EXCHANGES = {"ppermute", "all_to_all", "all_gather", "psum", "psum_invariant", "reduce_scatter"}


def init() -> dict[str, Any]:
    keys = iter(jax.random.split(jax.random.key(0), 8))
    layers = {name: draws.normal(next(keys), (4, WIDTH, WIDTH)) / 3 for name in ("q", "k", "v", "up")}
    return {"layers": layers, "table": draws.normal(next(keys), (VOCAB, WIDTH))}


def loss(params: Any, batch: Any) -> Any:
    def layer(x: Any, own: Any) -> Any:
        q, k, v = (
            (x @ own[name]).reshape(*x.shape[:2], HEADS, WIDTH // HEADS).swapaxes(1, 2) for name in "qkv"
        )
        scores = jax.nn.softmax(q @ k.mT)
        out = (scores @ v).swapaxes(1, 2).reshape(x.shape)
        return x + jnp.tanh((x + out) @ own["up"]), None

    x, _ = jax.lax.scan(layer, params["table"][batch["ids"]], params["layers"])
    return jnp.square(x @ params["table"].T).mean()


def within(eqn: core.JaxprEqn) -> Iterator[core.Jaxpr]:
    for one in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
        inner = getattr(one, "jaxpr", one)
        if hasattr(inner, "eqns"):
            yield inner


def exchanged(eqn: core.JaxprEqn) -> set[str]:
    """Return by what names devices exchange in an equation, of the axes in whose direction they do."""
    own = {eqn.primitive.name} & EXCHANGES
    axes = eqn.params.get("axis_name", eqn.params.get("axes", ()))
    found = {str(axis) for axis in ([axes] if isinstance(axes, str) else axes)} if own else set()
    return found.union(*(exchanged(one) for inner in within(eqn) for one in inner.eqns))


def bodies(jaxpr: core.Jaxpr) -> Iterator[core.Jaxpr]:
    for eqn in jaxpr.eqns:
        for inner in within(eqn):
            if eqn.primitive.name == "scan":
                yield inner
            yield from bodies(inner)


def not_waiting(body: core.Jaxpr) -> list[tuple[set[str], set[str]]]:
    """Return the exchanges of a body that do not wait for the one before."""
    reached: dict[Any, frozenset[int]] = {}
    found, last = [], None
    for number, eqn in enumerate(body.eqns):
        own = frozenset().union(
            *(reached.get(atom, frozenset()) for atom in eqn.invars if not isinstance(atom, core.Literal))
        )
        if names := exchanged(eqn):
            if last is not None and last[0] not in own:
                found.append((last[1], names))
            own, last = own | {number}, (number, names)
        reached.update((var, own) for var in eqn.outvars)
    return found


@pytest.mark.devices(8)
@pytest.mark.parametrize(("schedule", "way"), [("1f1b", "heads"), ("delayed", "heads")])
def test_exchanges_of_a_tick_wait_for_one_another(schedule: str, way: str) -> None:
    params = init()
    batch = {"ids": np.random.default_rng(0).integers(0, VOCAB, (ROWS, TIME)).astype(np.int32)}
    plan = declare(
        *(loss, params, batch),
        **{"topology": "cpu:8", "microbatches": 3, "context": way, "schedule": schedule},
        mesh={"stage": 2, "context": 2, "data": 2},
    )
    traced = jax.make_jaxpr(jax.value_and_grad(plan.apply(loss)))(params, batch)
    ticks = [
        body
        for body in bodies(traced.jaxpr)
        if {"stage", "context"} <= set().union(*map(exchanged, body.eqns))
    ]
    assert ticks
    for body in ticks:
        assert not not_waiting(body)
