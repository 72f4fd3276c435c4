"""A graph network: messages along edges, summed at nodes by segment_sum."""

from __future__ import annotations

import draws
import jax
import jax.numpy as jnp

from zoo.case import Case, Keys


def graph_net(scale: int = 1) -> Case:
    """Two rounds of messages on one graph of 64 nodes and 256 edges; every node has a target."""
    nodes, edges, features, hidden = 64, 256, 8, 32 * scale

    def init(key: jax.Array) -> dict:
        k = Keys(key)
        return {
            "embed": k.normal(features, hidden),
            "rounds": [
                {
                    "message": k.normal(2 * hidden, 2 * hidden),
                    "bias": jnp.zeros(2 * hidden),
                    "update": k.normal(2 * hidden, hidden),
                }
                for _ in range(2)
            ],
            "head": k.normal(hidden, 8),
        }

    def data(key: jax.Array) -> dict:
        a, b, c, d = jax.random.split(key, 4)
        return {
            "nodes": draws.normal(a, (nodes, features)),
            "senders": jax.random.randint(b, (edges,), 0, nodes),
            "receivers": jax.random.randint(c, (edges,), 0, nodes),
            "targets": draws.normal(d, (nodes, 8)),
        }

    def loss(params: dict, data: dict) -> jax.Array:
        x = data["nodes"] @ params["embed"]
        for p in params["rounds"]:
            pairs = jnp.concatenate([x[data["senders"]], x[data["receivers"]]], axis=-1)
            messages = jax.nn.relu(pairs @ p["message"] + p["bias"])
            x = x + jax.ops.segment_sum(messages, data["receivers"], nodes) @ p["update"]
        return jnp.mean((x @ params["head"] - data["targets"]) ** 2)

    return Case(loss=loss, init=init, data=data, mixes=True)
