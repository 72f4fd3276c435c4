"""Kernels of attention, from JAX's own libraries, for what one device holds of its arrays."""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ..errors import UserError, nearest
from .attention import AttentionCall, scaled

_FACTS = Path(__file__).with_name("kernels.toml")

# Rows and columns of splash's blocks are multiples of this: the lanes of a TPU's vector registers.
LANES = 128


@functools.cache
def kernel_facts() -> Mapping[str, Mapping[str, Any]]:
    """Return kernel → what it can do, from ``kernels.toml``."""
    with _FACTS.open("rb") as file:
        return tomllib.load(file)


def check_kernels(written: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise UserError for kernels of a plan that are not known, or blocks that are none."""
    for operation, settings in written.items():
        if operation != "attention":
            raise UserError(f"kernels: {operation!r} has no kernels; known: attention")
        name, facts = str(settings.get("implementation")), kernel_facts()
        if name not in facts:
            raise UserError(
                f"kernels: attention: implementation={name!r} is no kernel; {nearest(name, facts)}"
            )
        blocks = ("block_q", "block_kv") if "blocks" in facts[name] else ()
        for key in {*settings, *blocks} - {"implementation"}:
            if key not in blocks:
                raise UserError(f"kernels: attention: {name} has no {key!r}; {nearest(key, blocks)}")
            size = settings.get(key)
            if not isinstance(size, int) or size < LANES or size % LANES:
                raise UserError(f"kernels: attention: {key}={size!r} must be a multiple of {LANES}")


def refusal(kernel: str, call: AttentionCall, query: Any, key: Any, value: Any) -> str | None:
    """Return why `kernel` cannot carry out `call` on arrays of these shapes and types, None if it can.

    The planner prices, and the step carries out, each call by what this says of it.
    """
    facts = kernel_facts()[kernel]
    queries, keys, head_dim, value_dim = query.shape[1], key.shape[1], query.shape[3], value.shape[3]
    if call.windowed:
        return "its window differs from layer to layer"
    if call.cap is not None and not facts["soft_cap"]:
        return f"it has no soft cap (cap={call.cap:g})"
    if str(query.dtype) not in facts["dtypes"]:
        return f"it takes {' or '.join(facts['dtypes'])}, not {query.dtype}"
    if head_dim != value_dim and not facts["other_value_dim"]:
        return f"it needs heads of values as wide as those of queries, not {value_dim} and {head_dim}"
    if head_dim > facts["most_head_dim"]:
        return f"its heads are at most {facts['most_head_dim']} wide, not {head_dim}"
    for name, size in (("queries", queries), ("keys", keys)):
        if size % facts["sequence_multiple"]:
            return f"it takes sequences in multiples of {facts['sequence_multiple']}, not {size} {name}"
    for name, size in (("head_dim", head_dim), ("value_dim", value_dim)):
        if size % facts["head_dim_multiple"]:
            return f"it takes heads in multiples of {facts['head_dim_multiple']}, not {name}={size}"
    return None


def block_that_divides(size: int, most: int) -> int | None:
    """Return the largest block up to `most` that divides `size`, in whole lanes; None if there is none."""
    return next(
        (block for block in range(min(most, size) // LANES * LANES, 0, -LANES) if size % block == 0), None
    )


def splash_kernel(
    call: AttentionCall,
    *,
    queries: int,
    keys: int,
    heads: int,
    row_parts: int,
    blocks: tuple[int, int],
    name: str | None,
    interpret: bool,
) -> Any:
    """Return a `SplashAttentionKernel` for `heads` query heads, to be called through `splash`.

    Args:
        call: what is asked for.
        queries: of the whole sequence, which is cut into `row_parts`.
        keys: of the whole sequence; each device has all of them.
        heads: on one device.
        row_parts: devices that the queries of a row are spread over.
        blocks: rows of queries and of keys that are worked on at a time.
        name: what the result and the logarithm of its sum are kept under by rematerialisation, if anything.
        interpret: run it on a CPU, step by step.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    shape, (rows, columns) = (queries, keys), blocks
    if not call.causal:
        mask = masks.FullMask(shape)
    elif call.window is None or call.window >= keys:
        mask = masks.CausalMask(shape, shard_count=row_parts)
    else:
        mask = masks.LocalMask(shape, window_size=(call.window - 1, 0), offset=0, shard_count=row_parts)
    return splash.make_splash_mha(
        mask=masks.MultiHeadMask([mask] * heads),
        block_sizes=splash.BlockSizes(
            block_q=rows,
            block_kv=columns,
            block_q_dkv=rows,
            block_kv_dkv=columns,
            block_q_dq=rows,
            block_kv_dq=columns,
        ),
        head_shards=1,
        q_seq_shards=row_parts,
        attn_logits_soft_cap=call.cap,
        residual_checkpoint_name=name,
        interpret=interpret,
    )


def splash(
    call: AttentionCall, kernel: Any, query: jax.Array, key: jax.Array, value: jax.Array, *ids: jax.Array
) -> jax.Array:
    """Return attention of the arrays of one device by `kernel`; shapes as `ops.attention` has them."""
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    segments = SegmentIds(ids[0], ids[-1]) if ids else None
    query, key, value = (jnp.swapaxes(x, 1, 2) for x in (scaled(query, call.scale), key, value))
    return jnp.swapaxes(jax.vmap(kernel)(query, key, value, segments), 1, 2)


def dot_product(
    call: AttentionCall,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *ids: jax.Array,
    implementation: Any = "cudnn",
) -> jax.Array:
    """Return attention of the arrays of one device by `jax.nn.dot_product_attention`.

    Segments go to it as a mask ``[batch, 1, queries, keys]``, which is in memory once for all heads.
    """
    mask = ids[0][:, None, :, None] == ids[-1][:, None, None, :] if ids else None
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        mask=mask,
        scale=call.scale,
        is_causal=call.causal,
        local_window_size=None if call.window is None else (call.window - 1, 0),
        implementation=implementation,
    )
