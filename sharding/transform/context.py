"""Attention over a sequence that lies over `context`: calls of `ops.attention`, all mesh axes manual."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from ..ops.attention import AttentionCall
from ..ops.context.pieces import SPLASH, PieceKernel, takes_pieces
from ..ops.context.spread import Others, Spread, attend_spread
from ..ops.context.ways import HEADS, NEIGHBOURS, RING, CallSizes, reach_of, way_of
from ..ops.kernels import block_that_divides, by_cudnn, splash, splash_kernel
from ..plans.specs import by_dimension, cut_into
from .meshes import by_device

# The axis that a plan's way is for.
CONTEXT = "context"


class SpreadLayout(NamedTuple):
    """The mesh axes of queries' batch and heads, and whether keys lie over `context` as queries do."""

    batch: tuple[str, ...]
    heads: tuple[str, ...]
    keys_cut: bool


def layout_of(query: PartitionSpec, key: PartitionSpec) -> SpreadLayout | None:
    """Return the layout of a call whose queries lie over `context` along the sequence, None for others."""
    batch, rows, heads, wide = by_dimension(tuple(query), 4)
    key_batch, key_rows, _, key_wide = by_dimension(tuple(key), 4)
    if rows != (CONTEXT,) or key_rows not in ((), (CONTEXT,)) or wide or key_wide or batch != key_batch:
        return None
    return SpreadLayout(batch=batch, heads=heads, keys_cut=bool(key_rows))


def _kv_heads(heads: int, kv_heads: int, parts: int) -> int:
    """Return a device's: where its axes do not divide them, each head of queries has a copy of its own."""
    if kv_heads == 1 or kv_heads % parts == 0:
        return max(kv_heads // parts, 1)
    return heads // parts


def spread_of(
    mesh: Mesh | AbstractMesh,
    call: AttentionCall,
    word: str,
    layout: SpreadLayout,
    query: Any,
    key: Any,
    kernel: PieceKernel | None,
    name: str | None,
) -> Spread | None:
    """Return how `call` goes over `context` where a plan's word is `word`, None where no way can.

    `kernel` works through the pieces of a ring where it can; `name` is what the result is kept under by
    rematerialisation.
    """
    parts, of_heads = mesh.shape[CONTEXT], cut_into(layout.heads, mesh.shape)
    sizes = CallSizes(
        queries=query.shape[1],
        keys=key.shape[1],
        heads=query.shape[2] // of_heads,
        kv_heads=_kv_heads(query.shape[2], key.shape[2], of_heads),
        whole=not layout.keys_cut,
    )
    way = way_of(call, word, sizes, parts)
    if way is None:
        return None
    spread = Spread(
        call=call,
        way=way,
        axis=CONTEXT,
        parts=parts,
        queries=sizes.queries,
        keys=sizes.keys,
        whole=sizes.whole,
        name=name,
    )
    rows = [size // parts // (1 + spread.balanced) for size in (sizes.queries, sizes.keys)]
    if way == RING and kernel is not None and takes_pieces(kernel, call, *rows):
        return dataclasses.replace(spread, kernel=kernel)
    return spread


def kernel_of(
    spread: Spread, kernel: PieceKernel, segments: int | None, heads: int
) -> Callable[..., Any] | None:
    """Return what carries a call out by `kernel` on what a device has of it once it came, None without one.

    `segments` is the most of a row, for kernels of packed rows; `heads` are a device's before any trade.
    """
    call, rows, before = spread.call, spread.queries // spread.parts, 0
    if spread.way == HEADS:
        rows, keys, heads = spread.queries, spread.keys, heads // spread.parts
    elif spread.way == NEIGHBOURS:
        before = reach_of(call, spread.keys, spread.parts) * rows
        keys = before + rows
    else:
        return None
    if kernel.name != SPLASH:
        return functools.partial(by_cudnn, call, segments) if spread.way == HEADS else None
    blocks = block_that_divides(rows, kernel.block_q), block_that_divides(keys, kernel.block_kv)
    if blocks[0] is None or blocks[1] is None:
        return None
    made = splash_kernel(
        call,
        queries=rows,
        keys=keys,
        heads=heads,
        row_parts=1,
        blocks=(blocks[0], blocks[1]),
        name=spread.name,
        interpret=kernel.interpret,
        before=before,
    )
    return functools.partial(splash, call, made)


def over_context(
    mesh: Mesh | AbstractMesh,
    spread: Spread,
    layout: SpreadLayout,
    arrays: Sequence[Any],
    whole: Callable[..., Any] | None = None,
) -> Any:
    """Return the result of a call's `arrays` on the whole mesh.

    `whole` carries the call out on whole sequences of a device's heads, where plain XLA does not.
    """
    call = spread.call
    query, key, value, *others = arrays
    kv_axes = layout.heads if key.shape[2] > 1 else ()
    if key.shape[2] % cut_into(kv_axes, mesh.shape):
        key, value = (jnp.repeat(x, query.shape[2] // key.shape[2], axis=2) for x in (key, value))
    ids, window = others[: call.segments], others[call.segments :]

    def local(query: Any, key: Any, value: Any, *others: Any) -> Any:
        rows, last = others[: 2 * bool(ids)], others[2 * bool(ids) :]
        return attend_spread(spread, query, key, value, Others(*(rows or (None, None)), *last), whole)

    batch, heads = layout.batch or None, layout.heads or None
    along = CONTEXT if layout.keys_cut else None
    of_queries = PartitionSpec(batch, CONTEXT, heads)
    of_keys = PartitionSpec(batch, along, kv_axes or None)
    of_ids = (PartitionSpec(batch, CONTEXT), PartitionSpec(batch, along)) if ids else ()
    in_specs = (of_queries, of_keys, of_keys, *of_ids, *(PartitionSpec(),) * len(window))
    # Ids for queries and keys alike are given twice.
    both = (ids[0], ids[-1]) if ids else ()
    return by_device(local, mesh, in_specs, of_queries)(query, key, value, *both, *window)
