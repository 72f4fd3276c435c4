"""Over three torus axes gradients are scattered in two steps, a plane of two equal ones first."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from meshwright.sharding import Topology, plan
from meshwright.sharding.hardware.arrange import arrange
from meshwright.sharding.verify.verify import verify
from meshwright.sharding.xla.options import options_for
from meshwright.sharding.xla.reduction import reduction_steps


@pytest.mark.parametrize(
    ("text", "mesh", "steps"),
    [
        ("v5p:4x4x4", {"fsdp": 64}, {"fsdp": (16, 4)}),
        ("v5p:4x4x8", {"fsdp": 128}, {"fsdp": (16, 8)}),
        ("v4:8x4x4", {"data": 1, "fsdp": 128}, {"fsdp": (16, 8)}),
        ("2*v5p:8x8x16", {"data": 2, "fsdp": 1024}, {"fsdp": (64, 16)}),
        # No two axes alike, a part of the torus, no wraparound, two axes only, two devices a chip, no torus.
        ("v5p:4x8x16", {"fsdp": 512}, {}),
        ("v5p:4x4x4", {"fsdp": 16, "tensor": 4}, {}),
        ("v5p:2x2x4", {"fsdp": 16}, {}),
        ("v5e:16x16", {"fsdp": 256}, {}),
        ("tpu7x:4x4x4", {"fsdp": 128}, {}),
        ("h100:4x8", {"fsdp": 32}, {}),
    ],
)
def test_steps(text, mesh, steps):
    assert reduction_steps(mesh, Topology.parse(text)) == steps


@pytest.mark.parametrize("text", ["v5p:4x4x8", "v4:8x4x4", "v5p:4x8x4"])
def test_each_step_stays_on_its_torus_axes(text):
    topology = Topology.parse(text)
    mesh = {"fsdp": topology.num_devices}
    first, second = reduction_steps(mesh, topology)["fsdp"]
    where = np.stack(np.unravel_index(arrange(mesh, topology).reshape(first, second), topology.shape))
    extents = sorted(len(np.unique(row)) for row in where[:, :, 0])
    assert extents == [1, 4, 4]
    assert sorted(len(np.unique(row)) for row in where[:, 0, :]) == [1, 1, second]


def test_a_compiler_that_scatters_over_all_axes_at_once_needs_no_steps():
    topology = Topology.parse("v5p:4x4x4")
    options = options_for(topology)
    assert reduction_steps({"fsdp": 64}, topology, options) == {}
    part = dict(list(options.items())[:-1])
    assert reduction_steps({"fsdp": 64}, topology, part) == {"fsdp": (16, 4)}


def loss(params, batch):
    def layer(x, weights):
        hidden = jax.nn.silu(x @ weights["up"].astype(x.dtype))
        return x + hidden @ weights["down"].astype(x.dtype), None

    x, _ = jax.lax.scan(layer, batch["x"], params)
    return jnp.square(x.astype(jnp.float32)).mean()


@pytest.mark.slow
@pytest.mark.parametrize("offloaded", [False, True])
def test_libtpu_scatters_and_never_reduces_the_whole(offloaded):
    """Two layers of 4096 x 14336 on 64 v5p: a plane, then the last axis; with SparseCores all at once."""
    width, hidden = 4096, 14_336
    params = {
        "up": jax.ShapeDtypeStruct((2, width, hidden), "float32"),
        "down": jax.ShapeDtypeStruct((2, hidden, width), "float32"),
    }
    batch = {"x": jax.ShapeDtypeStruct((64, 4096, width), "bfloat16")}
    optimizer = optax.sgd(1e-3)
    made = plan(loss, params, batch, topology="v5p:4x4x4", optimizer=optimizer, mesh={"fsdp": 64})
    options = options_for(Topology.parse("v5p:4x4x4")) if offloaded else {}
    made = dataclasses.replace(made, compiler_options=options)
    proof = verify(made, loss, params, batch, optimizer, use_cache=False, quick=True).proof
    assert proof is not None
    matrix = 2 * width * hidden
    moved = dict.fromkeys(("all_gather", "all_reduce", "reduce_scatter"), 0.0)
    for one in proof.collectives:
        moved[one.kind] = moved.get(one.kind, 0.0) + one.bytes
    # Two matrices a layer, gathered forward and backward, in bfloat16.
    assert moved["all_gather"] == pytest.approx(8 * matrix, rel=0.01)
    assert moved["all_reduce"] < 0.01 * matrix
    # A sixteenth is left after the plane, a sixty-fourth after the last axis.
    left = 1 / 64 if offloaded else 1 / 16 + 1 / 64
    assert moved["reduce_scatter"] == pytest.approx(4 * matrix * left, rel=0.01)
    large = [one for one in proof.collectives if one.bytes > 0.01 * matrix]
    assert all(one.asynchronous == offloaded for one in large)
    # All six links: the whole of an array over each of them in a sixth of the time.
    link = 90e9
    for one in large:
        if one.kind == "all_gather":
            assert one.bytes / one.seconds > 4 * link


@pytest.mark.slow
def test_what_a_loop_sums_is_reduced_once_after_it_over_three_torus_axes():
    """A projection on a vocabulary, its loss in eight chunks on 64 v5p: its gradient was reduced in each."""
    width, vocab, chunks = 1024, 32_768, 8

    def chunked(params, batch):
        def add(total, x):
            logits = (x @ params["head"].astype(x.dtype)).astype(jnp.float32)
            return total + jax.nn.logsumexp(logits, axis=-1).sum(), None

        split = jnp.moveaxis(batch["x"].reshape(len(batch["x"]), -1, chunks, width), 2, 0)
        return jax.lax.scan(jax.checkpoint(add), jnp.zeros(()), split)[0]

    params = {"head": jax.ShapeDtypeStruct((width, vocab), "float32")}
    batch = {"x": jax.ShapeDtypeStruct((64, 1024, width), "bfloat16")}
    optimizer = optax.sgd(1e-3)
    made = plan(chunked, params, batch, topology="v5p:4x4x4", optimizer=optimizer, mesh={"fsdp": 64})
    proof = verify(made, chunked, params, batch, optimizer, use_cache=False).proof
    assert proof is not None
    table = 2 * width * vocab
    reduced = [one for one in proof.collectives if "reduce" in one.kind and one.bytes > 0.01 * table]
    assert sum(one.bytes for one in reduced) <= 1.01 * table
    assert all(one.count == 1 for one in reduced)
