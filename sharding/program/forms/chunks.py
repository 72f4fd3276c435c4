"""A region of a loss worked through a chunk of its positions at a time, in a checkpointed loop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from ..jaxpr import run
from .losses import DIVIDED, MERGED, OTHER, Region, chunks_of
from .opened import shapes
from .values import shape


def in_chunks(region: Region) -> core.ClosedJaxpr:
    """Return the program from the inputs of a region to its outputs, a chunk of positions at a time."""
    chunk, chunks = chunks_of(region)
    start, stop = region.cut
    padded, others = chunk * chunks, _others(region)

    def place(atom: Any) -> int | None:
        return _place(region.kinds[atom])

    def split(array: Any, atom: Any) -> Any:
        d = place(atom)
        assert d is not None
        merged = region.kinds[atom][d] == MERGED
        if merged:
            array = array.reshape(*array.shape[:d], others, -1, *array.shape[d + 1 :])
            d += 1
        before = 0 if array.shape[d] == region.length else start
        ends = [(0, 0)] * array.ndim
        ends[d] = (before, padded - before - array.shape[d])
        array = jnp.pad(array, ends) if any(ends[d]) else array
        # Every n-th position: a sequence sharded in contiguous parts stays sharded inside each chunk.
        array = array.reshape(*array.shape[:d], chunk, chunks, *array.shape[d + 1 :])
        array = jnp.moveaxis(array, d + 1, 0)
        # The chunks lead now.
        return (
            array.reshape(chunks, *array.shape[1:d], others * chunk, *array.shape[d + 2 :])
            if merged
            else array
        )

    def join(stacked: Any, atom: Any) -> Any:
        d = place(atom)
        assert d is not None
        merged = region.kinds[atom][d] == MERGED
        length = shape(atom)[d] // (others if merged else 1)
        if merged:
            stacked = stacked.reshape(
                chunks, *stacked.shape[1 : d + 1], others, chunk, *stacked.shape[d + 2 :]
            )
            d += 1
        array = jnp.moveaxis(stacked, 0, d + 1)
        array = array.reshape(*array.shape[:d], padded, *array.shape[d + 2 :])
        first, last = (0, region.length) if length == region.length else (start, stop)
        if (first, last) != (0, padded):
            array = jax.lax.slice_in_dim(array, first, last, axis=d)
        return array.reshape(shape(atom)) if merged else array

    def whole(*arrays: Any) -> list[Any]:
        places = [place(atom) for atom in region.inputs]
        rows = zip(arrays, region.inputs, strict=True)
        parts = [split(one, atom) for one, atom in rows if place(atom) is not None]

        def turn(carry: None, slices: Sequence[Any]) -> tuple[None, list[Any]]:
            rest = iter(slices)
            given = [one if d is None else next(rest) for one, d in zip(arrays, places, strict=True)]
            return carry, _again(region, given, chunk)

        _, found = jax.lax.scan(jax.checkpoint(turn, prevent_cse=False), None, parts)
        return [join(one, atom) for one, atom in zip(found, region.outputs, strict=True)]

    return jax.make_jaxpr(whole)(*shapes(region.inputs))


def _again(region: Region, given: Sequence[Any], chunk: int) -> list[Any]:
    """Run the equations of a region on a chunk of its positions."""
    values: dict[Any, Any] = dict(zip(region.inputs, given, strict=True))
    for eqn in region.equations:
        inputs = [atom.val if isinstance(atom, core.Literal) else values[atom] for atom in eqn.invars]
        values.update(zip(eqn.outvars, run(_of_chunk(region, eqn, chunk), inputs), strict=True))
    return [values[atom] for atom in region.outputs]


def _of_chunk(region: Region, eqn: core.JaxprEqn, chunk: int) -> core.JaxprEqn:
    """Return an equation of a region as it is on `chunk` positions."""
    kinds = region.kinds[eqn.outvars[0]]
    d = _place(kinds)
    if d is None:
        return eqn
    size = chunk if kinds[d] == DIVIDED else _others(region) * chunk
    sizes = (*shape(eqn.outvars[0])[:d], size, *shape(eqn.outvars[0])[d + 1 :])
    told = {"broadcast_in_dim": "shape", "iota": "shape", "reshape": "new_sizes"}
    if eqn.primitive.name in told:
        return eqn.replace(params={**eqn.params, told[eqn.primitive.name]: sizes})
    if eqn.primitive.name == "slice":
        starts, limits = list(eqn.params["start_indices"]), list(eqn.params["limit_indices"])
        starts[d], limits[d] = 0, size
        given = {"start_indices": tuple(starts), "limit_indices": tuple(limits)}
        return eqn.replace(params={**eqn.params, **given})
    return eqn


def _place(kinds: Sequence[str]) -> int | None:
    return next((d for d, kind in enumerate(kinds) if kind in (DIVIDED, MERGED)), None)


def _others(region: Region) -> int:
    """Return how many positions there are beside each that is divided."""
    product = region.product.outvars[0]
    rows = zip(region.kinds[product], shape(product), strict=True)
    return math.prod(size for kind, size in rows if kind == OTHER)
