"""Losses with small dimensions: all at once, one by one where some cannot be, together by one ratio."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from meshwright.sharding.program.resized import looked_up, resized
from meshwright.sharding.program.tracing import trace

HEADS = 4
SHAPES = {"table": (512, 256), "qkv": (256, 768), "up": (256, 1024), "down": (1024, 256)}
NAMES = {
    "table": ("vocab", "embed"),
    "qkv": ("embed", "heads"),
    "up": ("embed", "mlp"),
    "down": ("mlp", "out"),
}
PARAMS = {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in SHAPES.items()}
BATCH = jax.ShapeDtypeStruct((64, 128), "int32")


def loss(params: Any, tokens: Any) -> Any:
    x = params["table"][tokens]
    # The width, and how many heads it is made of.
    parts = jnp.split(x @ params["qkv"], 3, -1)
    query, key, value = (one.reshape(*x.shape[:2], HEADS, -1) for one in parts)
    x = x + (query * key * value).reshape(x.shape)
    return jnp.mean(jnp.tanh(x @ params["up"]) @ params["down"])


def sizes_of(**small: int) -> Any:
    program = trace(loss, PARAMS, BATCH, names=NAMES, rows=("batch", "sequence"))
    sizes = {dim.id: small[dim.name] for dim in program.dims if dim.name in small}
    args, taken = resized(loss, (PARAMS, BATCH), program, sizes)
    return program, args, {program.dims[dim].name: size for dim, size in taken.items()}


def test_what_a_loss_reads_off_its_arrays_becomes_small_at_once() -> None:
    program, (params, batch), taken = sizes_of(vocab=16, mlp=32, batch=4, sequence=8)
    assert taken == {"vocab": 16, "mlp": 32, "batch": 4, "sequence": 8}
    assert {name: leaf.shape for name, leaf in params.items()} == {
        "table": (16, 256),
        "qkv": (256, 768),
        "up": (256, 32),
        "down": (32, 256),
    }
    assert batch.shape == (4, 8)
    small = {dim.id: taken[dim.name] for dim in program.dims if dim.name in taken}
    assert looked_up(program, small) == 16


def test_a_width_goes_with_the_heads_that_it_is_made_of_by_one_ratio() -> None:
    program = trace(loss, PARAMS, BATCH, names=NAMES, rows=("batch", "sequence"))
    wanted = {dim.id: 8 for dim in program.dims if dim.places and dim.size > 8}
    args, _ = resized(loss, (PARAMS, BATCH), program, wanted)
    assert args[0]["qkv"].shape == (16, 48)
    assert args[0]["down"].shape == (8, 8)
    jax.eval_shape(loss, *args)


def test_a_loss_of_one_size_keeps_it() -> None:
    def fixed(params: Any, tokens: Any) -> Any:
        assert tokens.shape == (64, 128)
        assert params["up"].shape == (256, 1024)
        return loss(params, tokens)

    program = trace(fixed, PARAMS, BATCH, names=NAMES)
    wanted = {dim.id: dim.size // 2 for dim in program.dims if dim.places and dim.size > 8}
    args, taken = resized(fixed, (PARAMS, BATCH), program, wanted)
    assert (args[1].shape, args[0]["up"].shape) == ((64, 128), (256, 1024))
    assert {program.dims[dim].name for dim in taken} == {"vocab", "out"}
