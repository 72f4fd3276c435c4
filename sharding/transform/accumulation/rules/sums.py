"""Sums over the examples, and what may be done to one that is not complete; products."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from ....program.primitives import Trait, primitives
from ..derivatives import is_coarse
from ..graph import PartGraph, one_of, value_of
from ..values import SUM, Held, Kind, NotInParts, examples

_LINEAR = primitives(Trait.LINEAR) - {"reduce_precision"}
_PICKING = primitives(Trait.PICKING)
_BILINEAR = primitives(Trait.BILINEAR)

# How results of parts go together; None where they do not.
REDUCTIONS = {
    "reduce_sum": "sum",
    "reduce_max": "max",
    "reduce_min": "min",
    "reduce_or": "or",
    "reduce_and": "and",
    "reduce_prod": None,
    "reduce_xor": None,
    "argmax": None,
    "argmin": None,
    # Over a dimension, as `jax.vmap` makes them where its axis has a name.
    "psum": "sum",
    "pmax": "max",
    "pmin": "min",
}


def reduce(g: PartGraph, eqn: core.JaxprEqn, ins: list[Held]) -> list[Held]:
    """Read a reduction; over the examples its result is incomplete."""
    v, axes, name = ins[0], eqn.params["axes"], eqn.primitive.name
    form = one_of(ins).form
    if form.axis not in axes:
        return g.bind(eqn, ins, [form.at(form.axis - sum(a < form.axis for a in axes))])
    combine = REDUCTIONS[name]
    if v.dtype == jnp.bool_:
        combine = {"max": "or", "min": "and"}.get(combine or "", combine)
    elif combine in ("or", "and"):
        raise NotInParts(f"{name} of the bits of {v.dtype} over the examples")
    if combine is None:
        raise NotInParts(f"{name} over the examples")
    out = g.bind(eqn, ins, [SUM], combine=combine)[0]
    return [_learnt(g, v, out, tuple(axes))] if id(eqn) in g.ties else [out]


def reduce_by(g: PartGraph, eqn: core.JaxprEqn, ins: list[Held]) -> list[Held]:
    """Read a reduction by a function of one's own, of arrays and of as many numbers that it begins with."""
    axes, form = eqn.params["dimensions"], one_of(ins).form
    if form.axis in axes:
        raise NotInParts("a reduction by a function of one's own over the examples")
    out = form.at(form.axis - sum(a < form.axis for a in axes))
    ready = [g.bring(one, form) if one.shape else g.shared(one) for one in ins]
    return g.bind(eqn, ready, [out] * len(eqn.outvars))


def _learnt(g: PartGraph, v: Held, extreme: Held, axes: tuple[int, ...]) -> Held:
    """Return a maximum over the examples whose gradient goes in equal parts to all that reach it."""
    top = _stopped(g, g.complete(extreme))
    keep = [1 if d in axes else size for d, size in enumerate(v.shape)]

    def there(array: jax.Array, top: jax.Array) -> jax.Array:
        return array == top.reshape(keep)

    def total(_: object, array: jax.Array, top: jax.Array) -> list[jax.Array]:
        return [jnp.sum(jnp.where(there(array, top), array, 0), axis=axes)]

    def count(_: object, array: jax.Array, top: jax.Array) -> list[jax.Array]:
        return [jnp.sum(there(array, top), axis=axes).astype(array.dtype)]

    def joined(_: object, top: jax.Array, total: jax.Array, count: jax.Array) -> list[jax.Array]:
        return [top + _moved(total) / count]

    summed, counted = (
        g.complete(g.emit(run, [one, top], [Held(extreme.shape, extreme.dtype, SUM)])[0])
        for run, one in ((total, v), (count, _stopped(g, v)))
    )
    return g.emit(joined, [top, summed, counted], [Held(extreme.shape, extreme.dtype)])[0]


@jax.custom_jvp
def _moved(total: jax.Array) -> jax.Array:
    """Return 0, which moves as `total` does: that may be infinite."""
    return jnp.zeros_like(total)


_moved.defjvp(lambda at, moves: (_moved(*at), moves[0]))


def _stopped(g: PartGraph, value: Held) -> Held:
    out = Held(value.shape, value.dtype, value.form)
    g.emit(lambda _, array: [lax.stop_gradient(array)], [value], [out])
    assert out.op is not None
    out.op.stops = True
    return out


def linear(g: PartGraph, eqn: core.JaxprEqn, ins: list[Held]) -> list[Held] | None:
    """Return the results of an operation on incomplete sums if it is linear in them, else None.

    Between passes a sum is completed rather than kept so wherever that saves memory or a pass.
    """
    sums = [one for one in ins if one.kind is Kind.SUM]
    if not sums or any(one.combine != "sum" for one in sums):
        return None
    here = {n for n, one in enumerate(ins) if one.kind is Kind.SUM}
    want = _linear_in(g, eqn, ins, here)
    if want is None:
        return None
    if g.cut:
        grows = sum(math.prod(value_of(var).shape) for var in eqn.outvars) > sum(
            math.prod(one.shape) for one in sums
        )
        first = sums[0]
        waits = any(one.level > first.level or one.count > first.count for one in ins)
        apart = len({(one.level, one.count) for one in sums}) > 1
        if want != here or grows or waits or apart:
            return None
    ready = [g.sum(one) if n in want else one for n, one in enumerate(ins)]
    return g.bind(eqn, ready, [SUM] * len(eqn.outvars))


def _linear_in(g: PartGraph, eqn: core.JaxprEqn, ins: list[Held], here: set[int]) -> set[int] | None:
    """Return the operands that `eqn` is linear in, all together, given which are sums."""
    name, dtype = eqn.primitive.name, ins[min(here)].dtype
    if name == "convert_element_type":
        new = eqn.params["new_dtype"]
        # Integers are totalled before they are converted; narrow floats after they were wide.
        floats = jnp.issubdtype(dtype, jnp.inexact) and jnp.issubdtype(new, jnp.inexact)
        narrows = jnp.dtype(new).itemsize < jnp.dtype(dtype).itemsize if floats else True
        return {0} if floats and not is_coarse(new) and not (g.cut and narrows) else None
    if name in _LINEAR:
        return set(range(len(ins)))
    if name in _BILINEAR:
        return here if len(here) == 1 else None
    if name == "div":
        return here if here == {0} and jnp.issubdtype(dtype, jnp.inexact) else None
    if name == "select_n":
        return None if 0 in here else set(range(1, len(ins)))
    if name in _PICKING:
        # What lies outside is filled with something that does not add up.
        fills = eqn.params.get("fill_value") not in (None, 0)
        return here if here == {0} and not fills else None
    if name == "dynamic_update_slice":
        return {0, 1} if here <= {0, 1} else None
    if name in ("scatter-add", "scatter-sub"):
        return {0, 2} if 1 not in here else None
    return None


def dot_general(g: PartGraph, eqn: core.JaxprEqn, ins: list[Held]) -> list[Held]:
    """Read a product: of examples with something shared, or summed over the examples."""
    contract, batch = eqn.params["dimension_numbers"]
    me = 0 if ins[0].kind is Kind.EXAMPLES else 1
    v, other = ins[me], ins[1 - me]
    form = v.form
    mine, theirs = list(contract[me]), list(contract[1 - me])
    if form.axis in batch[me]:
        place = list(batch[me]).index(form.axis)
        other, out = g.bring(other, form.at(batch[1 - me][place])), form.at(place)
    elif form.axis in mine:
        other, out = g.bring(other, form.at(theirs[mine.index(form.axis)])), SUM
    else:
        if other.kind is Kind.EXAMPLES:
            raise NotInParts("every example meets every other")
        other = g.shared(other)
        free = [
            [d for d in range(len(one.shape)) if d not in contract[n] and d not in batch[n]]
            for n, one in enumerate(ins)
        ]
        before = len(batch[0]) + (len(free[0]) if me else 0)
        out = form.at(before + free[me].index(form.axis))
    return g.bind(eqn, [v, other] if me == 0 else [other, v], [out])


def convolution(g: PartGraph, eqn: core.JaxprEqn, ins: list[Held]) -> list[Held]:
    """Read a convolution of each example, or one that sums over them, as a gradient's does."""
    lhs, rhs = ins
    p, spec = eqn.params, eqn.params["dimension_numbers"]
    of_lhs, of_rhs = lhs.kind is Kind.EXAMPLES, rhs.kind is Kind.EXAMPLES
    groups = p["batch_group_count"]
    if of_lhs and not of_rhs and lhs.form.axis == spec.lhs_spec[0]:
        if groups != 1:
            raise NotInParts(f"a convolution makes a row of one of each of {groups} groups of examples")
        return g.bind(eqn, [lhs, g.shared(rhs)], [examples(spec.out_spec[0], lhs.form.pre)])
    if p["feature_group_count"] != 1 or groups != 1:
        raise NotInParts("a grouped convolution over the examples is not understood")
    if of_lhs and lhs.form.axis == spec.lhs_spec[1]:
        return g.bind(eqn, [lhs, g.rows(rhs, spec.rhs_spec[1], lhs.form.pre)], [SUM])
    if of_rhs and rhs.form.axis == spec.rhs_spec[1]:
        return g.bind(eqn, [g.rows(lhs, spec.lhs_spec[1], rhs.form.pre), rhs], [SUM])
    if of_rhs and not of_lhs and rhs.form.axis == spec.rhs_spec[0]:
        return g.bind(eqn, [g.shared(lhs), rhs], [examples(spec.out_spec[1], rhs.form.pre)])
    raise NotInParts("a convolution slides over the examples")
