"""Estimates of processes that hash strings in other ways."""

from __future__ import annotations

import os
import sys

from meshwright.sharding.processes import start

# Moments over three axes: what is reduced once a step has three rows that hide beside one another.
_CHILD = """
import jax
import jax.numpy as jnp
from meshwright.sharding import Topology
from meshwright.sharding.cost import Candidate, Pricer
from meshwright.sharding.program import trace

def loss(params, batch):
    layer = lambda x, w: (x + jnp.tanh(x @ w), None)
    return jnp.sum(jax.lax.scan(layer, batch, params)[0].astype(jnp.float32))

shape = jax.ShapeDtypeStruct
program = trace(loss, shape((4, 256, 256), jnp.bfloat16), shape((64, 256), jnp.bfloat16))
axes = ("data", "fsdp", "context")
over = {a.index: ((), axes, ()) for a in program.parameters}
layout = Candidate(mesh=dict.fromkeys(axes, 2), dims={program.batch_dims[0]: axes}, optimizer=over)
for topology in ("h100:8", "2*v5p:2x2x1"):
    found = Pricer(program, Topology.parse(topology)).price(layout)
    print(found.step_seconds.hex(), *(f"{item}={seconds.hex()}" for item, seconds in found.time.items()))
"""


def test_an_estimate_is_the_same_to_its_last_digit_in_each_process() -> None:
    pipes = {"stdout": -1, "stderr": -1, "text": True}
    children = [
        start([sys.executable, "-c", _CHILD], env={**os.environ, "PYTHONHASHSEED": seed}, **pipes)
        for seed in ("0", "1", "2")
    ]
    printed = [child.communicate(timeout=100) for child in children]
    assert all("all_gather/fsdp" in out for out, _ in printed), printed[0][1][-2000:]
    assert len({out for out, _ in printed}) == 1
