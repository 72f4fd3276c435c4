"""What is timed on one device: products, attention, elementwise work and sums, optimizer, the host's link."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .loops import Clock

# One timed row of plain values, such as {"kind": "product", "rows": 8192, …, "seconds": 1e-3}.
Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """What to time on a kind of device.

    products:  rows, columns and contraction; those with an odd number tell what odd widths cost.
    attention: batch, sequence, heads, heads of keys and a head's width.
    elements:  of arrays for elementwise work and for the optimizer.
    """

    dtype: str
    products: tuple[tuple[int, int, int], ...]
    attention: tuple[tuple[int, int, int, int, int], ...]
    elements: int


_ACCELERATOR = Sizes(
    dtype="bfloat16",
    products=(
        (16384, 8192, 8192),
        (16384, 8192, 2048),
        (16384, 2048, 8192),
        (16384, 4096, 4096),
        (16384, 512, 2048),
        (16384, 768, 768),
        (16384, 3072, 768),
        (4096, 50304, 768),
        (4096, 50257, 768),
        (4096, 2047, 2047),
    ),
    attention=((8, 4096, 32, 8, 64), (4, 4096, 32, 8, 128), (32, 1024, 32, 8, 64), (2, 8192, 32, 8, 128)),
    elements=2**27,
)
# A simulated device is a share of a processor: what is small is timed in little time.
_CPU = Sizes(
    dtype="float32",
    products=((1024, 1024, 1024), (1024, 512, 256), (512, 256, 512), (512, 128, 128), (1024, 509, 256)),
    attention=((2, 256, 4, 2, 64), (1, 512, 4, 2, 64)),
    elements=2**20,
)


def sizes_for(platform: str) -> Sizes:
    """Return what to time on devices of a platform."""
    return _CPU if platform == "cpu" else _ACCELERATOR


def _random(*shape: int, dtype: str) -> jax.Array:
    return jax.random.normal(jax.random.key(sum(shape)), shape, jnp.dtype(dtype))


def products(clock: Clock, sizes: Sizes) -> Iterator[Row]:
    """Yield products by size."""
    for rows, columns, contraction in sizes.products:
        left, right = (_random(*s, dtype=sizes.dtype) for s in ((rows, contraction), (contraction, columns)))
        seconds = clock.seconds(lambda a, b: a @ b, left, right)
        if seconds is not None:
            shape = {"rows": rows, "columns": columns, "contraction": contraction}
            yield {"kind": "product", "dtype": sizes.dtype, **shape, "seconds": seconds}


def attention(clock: Clock, sizes: Sizes, implementation: Literal["xla", "cudnn"]) -> Iterator[Row]:
    """Yield causal attention, forward and backward, by shape; `implementation` is one of `jax.nn`'s."""
    for batch, sequence, heads, kept, width in sizes.attention:
        shapes = [(batch, sequence, count, width) for count in (heads, kept, kept)]
        arrays = [_random(*shape, dtype=sizes.dtype) for shape in shapes]

        def forward(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
            return jax.nn.dot_product_attention(
                query, key, value, is_causal=True, implementation=implementation
            )

        def total(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
            return forward(query, key, value).astype(jnp.float32).sum()

        for gradient, function in ((False, forward), (True, jax.grad(total, (0, 1, 2)))):
            seconds = clock.seconds(function, *arrays)
            if seconds is not None:
                shape = {"batch": batch, "keys": sequence, "heads": heads, "width": width}
                how = {"implementation": implementation, "gradient": gradient}
                yield {"kind": "attention", **how, **shape, "seconds": seconds}


def elementwise(clock: Clock, sizes: Sizes) -> Iterator[Row]:
    """Yield elementwise work and sums over rows, with the bytes that each moves."""
    shape = (sizes.elements // 1024, 1024)
    for dtype in dict.fromkeys((sizes.dtype, "float32")):
        one, other = _random(*shape, dtype=dtype), _random(*shape, dtype=dtype)
        for name, function, arrays, times in (
            ("elementwise", lambda a, b: a * 2 + b, (one, other), 3),
            ("sum of rows", lambda a: a.astype(jnp.float32).sum(-1), (one,), 1),
        ):
            seconds = clock.seconds(function, *arrays)
            if seconds is not None:
                moved = times * one.nbytes
                yield {"kind": name, "dtype": dtype, "bytes": moved, "seconds": seconds}


def optimizer(clock: Clock, sizes: Sizes) -> Iterator[Row]:
    """Yield an update of AdamW in float32: parameters and two moments read and written, gradients read."""
    params = {name: _random(sizes.elements // 4096, 1024, dtype="float32") for name in "abc"}
    adam = optax.adamw(1e-3)
    state, gradients = adam.init(params), jax.tree.map(lambda x: 0.1 * x, params)

    def update(params: Any, state: Any, gradients: Any) -> Any:
        changes, state = adam.update(gradients, state, params)
        return optax.apply_updates(params, changes), state

    seconds = clock.seconds(update, params, state, gradients)
    if seconds is not None:
        elements = sum(one.size for one in params.values())
        yield {"kind": "optimizer", "bytes": 7 * 4 * elements, "seconds": seconds}


def host_transfers(clock: Clock, sizes: Sizes) -> Iterator[Row]:
    """Yield copies from the host to a device and back; no efficiency is fitted to them."""
    array = np.zeros(sizes.elements, np.uint8)
    device = jax.local_devices()[0]
    for name in ("to device", "to host"):
        if not clock.left:
            return
        # A fresh array each time: what was copied before is kept on the host.
        there = jax.block_until_ready(jax.device_put(array, device) + np.uint8(1))
        start = time.perf_counter()
        if name == "to device":
            jax.block_until_ready(jax.device_put(array, device))
        else:
            np.asarray(there)
        yield {"kind": name, "bytes": array.nbytes, "seconds": time.perf_counter() - start}
