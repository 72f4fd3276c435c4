"""Attention over a sequence that lies over `context`: calls of `ops.attention`, all mesh axes manual."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from ..ops.biases import BATCH, KEYS, QUERIES
from ..ops.biases import HEADS as OF_HEADS
from ..ops.context.pairs import OfPairs
from ..ops.context.pieces import SPLASH, PieceKernel
from ..ops.context.spread import Others, Spread, attend_spread
from ..ops.context.taken import CONTEXT, Site
from ..ops.context.ways import HEADS, NEIGHBOURS, RING, reach_of
from ..ops.kernels import by_cudnn, pair_of_blocks, splash, splash_kernel
from ..plans.specs import cut_into
from .meshes import by_device


class SpreadLayout(NamedTuple):
    """The mesh axes of queries' batch and heads, and whether keys lie over `context` as queries do."""

    batch: tuple[str, ...]
    heads: tuple[str, ...]
    keys_cut: bool


def layout_of(site: Site) -> SpreadLayout:
    """Return the layout of a call whose queries lie over `context` along the sequence."""
    return SpreadLayout(batch=site.query_axes[0], heads=site.query_axes[2], keys_cut=bool(site.key_axes[1]))


def spread_of(site: Site, way: str, kernel: PieceKernel | None, name: str | None) -> Spread:
    """Return how a call goes over `context` by `way`.

    `kernel` works through the pieces of a ring, None for blocks; `name` is what the result is kept under by
    rematerialisation.
    """
    return Spread(
        call=site.call,
        way=way,
        axis=CONTEXT,
        parts=site.mesh[CONTEXT],
        queries=site.query.shape[1],
        keys=site.key.shape[1],
        whole=not site.key_axes[1],
        name=name,
        kernel=kernel if way == RING else None,
    )


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
        return functools.partial(by_cudnn, call, segments, name=spread.name) if spread.way == HEADS else None
    blocks = pair_of_blocks(rows, keys, (kernel.block_q, kernel.block_kv))
    if blocks is None:
        return None
    made = splash_kernel(
        call,
        queries=rows,
        keys=keys,
        heads=heads,
        row_parts=1,
        blocks=blocks,
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
    last = call.before_placed - 3
    first = call.segments + call.windowed
    ids, window = others[: call.segments], others[call.segments : first]
    given, of_bias = others[first:last], others[last:]

    def local(query: Any, key: Any, value: Any, *others: Any) -> Any:
        rows, last = others[: 2 * bool(ids)], others[2 * bool(ids) :]
        query_ids, key_ids = rows or (None, None)
        found = Others(query_ids, key_ids, last[0] if window else None)
        last = last[len(window) :]
        weighing = dict(zip(call.given, last, strict=False))
        sink = weighing.pop("sink", None)
        found = found._replace(sink=sink, of_pairs=OfPairs(**weighing))
        if call.placed is not None:
            parts = (tuple(call.placed.of(along, last[len(given) :])) for along in (QUERIES, KEYS, None))
            found = found._replace(of_queries=next(parts), of_keys=next(parts), of_neither=next(parts))
        return attend_spread(spread, query, key, value, found, whole)

    batch, heads = layout.batch or None, layout.heads or None
    along = CONTEXT if layout.keys_cut else None
    of_queries = PartitionSpec(batch, CONTEXT, heads)
    of_keys = PartitionSpec(batch, along, kv_axes or None)
    of_ids = (PartitionSpec(batch, CONTEXT), PartitionSpec(batch, along)) if ids else ()
    operands = () if call.placed is None else call.placed.operands
    lies = {BATCH: batch, OF_HEADS: heads, QUERIES: CONTEXT, KEYS: along}
    of_operands = (PartitionSpec(*(lies[dim[0]] if dim else None for dim in one.laid)) for one in operands)
    of_given = (_of_given(x, batch, heads) for x in given)
    of_window = (PartitionSpec(),) * len(window)
    in_specs = (of_queries, of_keys, of_keys, *of_ids, *of_window, *of_given, *of_operands)
    # Ids for queries and keys alike are given twice.
    both = (ids[0], ids[-1]) if ids else ()
    return by_device(local, mesh, in_specs, of_queries)(query, key, value, *both, *window, *given, *of_bias)


def _of_given(x: Any, batch: Any, heads: Any) -> PartitionSpec:
    """Return how an array of pairs lies, or a sink: keys whole, and all else as queries do."""
    lies = (heads,) if x.ndim == 1 else (batch, heads, CONTEXT, None)
    return PartitionSpec(*(axes if size > 1 else None for size, axes in zip(x.shape, lies, strict=True)))
