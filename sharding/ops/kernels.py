"""Kernels of attention, from libraries, for what one device holds of its arrays."""

from __future__ import annotations

import functools
import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import UserError, nearest
from . import cudnn
from .arithmetic import check_arithmetic
from .attention import AttentionCall, scaled
from .context.order import chunks_of
from .masks import causal_of, full_of, window_of
from .products import check_products
from .segments import marked

_FACTS = Path(__file__).with_name("kernels.toml")

# Rows and columns of splash's blocks are multiples of this: the lanes of a TPU's vector registers.
LANES = 128
# Bytes of a TPU core's scalar memory, in which splash has a table of all pairs of blocks. Of 640 x 640 pairs
# (1.17 MiB) libtpu 0.0.42.1 says for v5p that they exceed it; 512 x 512 it takes.
_SCALAR_MEMORY = 1 << 20
# An entry: a byte of how a pair is worked on, and which is next, in a byte up to this number, else in two.
_IN_A_BYTE = 127


_WEIGHING = {
    "mask": "mask of each query and key",
    "bias": "bias of scores",
    "sink": "sink of weights",
    "factor": "factor of weights, as of a dropout",
}


@functools.cache
def kernel_facts() -> Mapping[str, Mapping[str, Any]]:
    """Return kernel → what it can do on the oldest chip that has it, from ``kernels.toml``."""
    with _FACTS.open("rb") as file:
        tables = tomllib.load(file)
    return {
        name: {"packs": False, **tables.get(row.get("like", ""), {}), **row} for name, row in tables.items()
    }


def facts_on(kernel: str, capability: str | None) -> Mapping[str, Any]:
    """Return what `kernel` can do on a GPU of this compute capability; None for other chips.

    >>> facts_on("cudnn", "8.0")["most_head_dim"], facts_on("cudnn", "9.0")["most_head_dim"]
    (128, 256)
    """
    facts = kernel_facts()[kernel]
    newer = "from_capability" in facts and has_capability(capability, facts["from_capability"])
    return {**facts, **facts["newer"]} if newer else facts


def has_capability(capability: str | None, least: str) -> bool:
    """Return whether a compute capability, None where there is none, is at least `least`.

    >>> has_capability("10.0", "9.0"), has_capability("8.0", "9.0"), has_capability(None, "9.0")
    (True, False, False)
    """
    if capability is None:
        return False
    return [int(part) for part in capability.split(".")] >= [int(part) for part in least.split(".")]


def gradient_scratch(facts: Mapping[str, Any], heads: int, key_heads: int, runs: int) -> float:
    """Return the bytes that a kernel's gradient works in, for each element of queries.

    A library asks for them when it is there: the gradient of queries in float32, for each of the `runs` of
    segments that a packed row may have; where heads share keys, those of each head's keys and values too.

    >>> gradient_scratch(kernel_facts()["cudnn_packed"], heads=32, key_heads=8, runs=8)
    64.0
    """
    return float(facts.get("scratch", 0)) * runs * (1 if heads == key_heads else 2)


def check_kernels(written: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise UserError for kernels of a plan that are not known, or blocks that are none."""
    for operation, settings in written.items():
        if operation == "experts":
            check_products(settings)
            continue
        if operation == "arithmetic":
            check_arithmetic(settings)
            continue
        if operation != "attention":
            raise UserError(f"kernels: {operation!r} has no kernels; known: attention, experts, arithmetic")
        name, facts = str(settings.get("implementation")), kernel_facts()
        if name not in facts:
            raise UserError(
                f"kernels: attention: implementation={name!r} is no kernel; {nearest(name, facts)}"
            )
        blocks = ("block_q", "block_kv") if "blocks" in facts[name] else ()
        needed = (*blocks, "segments") if facts[name]["packs"] else blocks
        known = (*needed, "pieces") if facts[name].get("pieces") else needed
        for key in {*settings, *needed} - {"implementation"}:
            size = settings.get(key)
            if key not in known:
                raise UserError(f"kernels: attention: {name} has no {key!r}; {nearest(key, known)}")
            if key == "pieces" and not isinstance(size, bool):
                raise UserError(f"kernels: attention: pieces={size!r} must be true or false")
            if key in blocks and (not isinstance(size, int) or size < LANES or size % LANES):
                raise UserError(f"kernels: attention: {key}={size!r} must be a multiple of {LANES}")
            if key == "segments" and (not isinstance(size, int) or isinstance(size, bool) or size < 2):
                raise UserError(f"kernels: attention: segments={size!r} must be a whole number of at least 2")


def refusal(facts: Mapping[str, Any], call: AttentionCall, query: Any, key: Any, value: Any) -> str | None:
    """Return why a kernel cannot carry out `call` on arrays of these shapes and types, None if it can.

    `facts` are the kernel's, as `facts_on` has them. The planner prices, and the step carries out, each call
    by what this says of it.
    """
    queries, keys, head_dim, value_dim = query.shape[1], key.shape[1], query.shape[3], value.shape[3]
    if call.windowed:
        return "its window differs from layer to layer"
    if call.placed is not None:
        return f"it takes no {_WEIGHING['bias']}"
    if call.given:
        return f"it takes no {' and no '.join(_WEIGHING[name] for name in call.given)}"
    if call.prefix or (call.ahead and not facts["ahead"]):
        return "it takes no mask by places that reaches ahead of a query"
    if call.precision is not None:
        return f"its products ask for precision {call.precision}"
    if call.cap is not None and not facts["soft_cap"]:
        return f"it has no soft cap (cap={call.cap:g})"
    if str(query.dtype) not in facts["dtypes"]:
        return f"it takes {' or '.join(facts['dtypes'])}, not {query.dtype}"
    if head_dim != value_dim and not facts["other_value_dim"]:
        return f"it needs heads of values as wide as those of queries, not {value_dim} and {head_dim}"
    if value_dim > head_dim and facts["other_value_dim"] == "narrower":
        return f"it needs heads of values no wider than those of queries, not {value_dim} and {head_dim}"
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


def pair_of_blocks(rows: int, keys: int, most: tuple[int, int]) -> tuple[int, int] | None:
    """Return splash's blocks of queries and of keys, up to `most`, for so many rows and keys of a device.

    None where none divides them, or where the pairs are too many for the chip's scalar memory: some 590,000
    tokens before as many, in blocks of 1024.
    """
    found = block_that_divides(rows, most[0]), block_that_divides(keys, most[1])
    if found[0] is None or found[1] is None:
        return None
    counts = rows // found[0], keys // found[1]
    entry = 1 + (1 if max(counts) <= _IN_A_BYTE else 2)
    return (found[0], found[1]) if math.prod(counts) * entry < _SCALAR_MEMORY else None


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
    before: int = 0,
    balanced: bool = False,
    sums: bool = False,
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
        before: keys that stand before the first query.
        balanced: whether rows lie over devices in balanced order, see `ops.context.order`.
        sums: whether it gives the logarithm of each row's sum too; it has no gradient then.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    shape, (rows, columns) = (queries, keys), blocks
    if not call.causal:
        mask = full_of(shape)
    elif call.ahead:
        behind = None if call.window is None or call.window >= keys else call.window - 1
        mask = window_of(shape, behind, call.ahead, before, row_parts)
    elif call.window is None or call.window >= keys:
        mask = causal_of(shape, before, row_parts)
    else:
        mask = window_of(shape, call.window - 1, 0, before, row_parts)
    if balanced and isinstance(mask, masks.CausalMask):
        # The place of each row, as the devices have them.
        chunks = np.arange(queries, dtype=np.int32).reshape(2 * row_parts, -1)
        mask.q_sequence = chunks[chunks_of(row_parts, balanced=True).reshape(-1)].reshape(-1)
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
        save_residuals=sums,
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


def by_cudnn(
    call: AttentionCall,
    most: int | None,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *ids: jax.Array,
    name: str | None = None,
) -> jax.Array:
    """Return attention of the arrays of one device by cuDNN, what its gradient reads under `name` if given.

    `ids` are those of queries and of keys. With `most`, the largest number of segments in a row, segments
    that queries and keys share go to its packed layout; else they are masks of a chunk of queries.
    """
    asked: dict[str, Any] = {"scale": call.scale, "causal": call.causal, "name": name}
    if not ids:
        return cudnn.plain(query, key, value, window=call.window, **asked)
    if most is not None and takes_packed(call):
        return cudnn.packed(marked(query, ids[0], most), key, value, ids[0], most=most, **asked)
    return cudnn.masked(query, key, value, ids[0], ids[-1], window=call.window, **asked)


def takes_packed(call: AttentionCall) -> bool:
    """Return whether cuDNN's packed layout takes a call: queries and keys of the same segments, no window."""
    return call.segments == 1 and call.window is None
