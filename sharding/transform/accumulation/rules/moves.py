"""Views and moves: where the examples go when an array is reshaped, turned, cut or joined."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from ....program.jaxpr import context_of, is_extended
from ..graph import PartGraph, one_of, value_of
from ..values import SHARED, SUM, Held, Kind, NotInParts, examples


def elementwise(g: PartGraph, eqn: core.JaxprEqn, ins: list[Held]) -> list[Held]:
    """Read an operation on each position; operands may be scalars, or of size 1 where others are not."""
    v = one_of(ins)
    if any(getattr(var.aval, "ndim", None) != len(v.shape) for var in eqn.outvars):
        return same_axis(g, eqn, ins)
    ready = [
        g.shared(one)
        if one.kind is not Kind.EXAMPLES and (one.shape == () or one.shape[v.form.axis] == 1)
        else g.bring(one, v.form)
        for one in ins
    ]
    return g.bind(eqn, ready, [v.form] * len(eqn.outvars))


def gamma(g: PartGraph, eqn: core.JaxprEqn, ins: list[Held]) -> list[Held]:
    """Read draws of a gamma distribution, where each example has keys of its own."""
    _check_keys(ins[0])
    if one_of(ins).form.axis >= len(ins[0].shape):
        raise NotInParts("random_gamma draws each example's number by its place among all")
    return g.bind(eqn, [g.bring(one, one_of(ins).form) for one in ins], [one_of(ins).form])


def same_axis(g: PartGraph, eqn: core.JaxprEqn, ins: list[Held]) -> list[Held]:
    """Read an operation on leading dimensions each by itself, which adds or takes away trailing ones."""
    v = one_of(ins)
    aval: Any = eqn.outvars[0].aval
    if len(ins) != 1 or v.form.axis >= len(aval.shape) or aval.shape[v.form.axis] != v.shape[v.form.axis]:
        raise NotInParts(f"{eqn.primitive.name} works along the examples")
    return g.bind(eqn, ins, [v.form])


def drawn(g: PartGraph, eqn: core.JaxprEqn, ins: list[Held]) -> list[Held]:
    """Read what is drawn or split of random keys, of which each example has its own."""
    _check_keys(ins[0])
    return same_axis(g, eqn, ins)


def folded(g: PartGraph, eqn: core.JaxprEqn, ins: list[Held]) -> list[Held]:
    """Read numbers folded into random keys, each example's into its own."""
    _check_keys(ins[0])
    return elementwise(g, eqn, ins)


def _check_keys(keys: Held) -> None:
    """Refuse keys of which fewer give other numbers; threefry's are by themselves."""
    if "fry" not in str(keys.dtype):
        raise NotInParts(
            f"keys of {keys.dtype} for each example draw all their numbers together, where threefry's "
            "(jax.random.key(seed, impl='threefry2x32')) draw each by itself"
        )


def passing(g: PartGraph, eqn: core.JaxprEqn, ins: list[Held]) -> list[Held]:
    """Read an operation that gives each operand on as it is."""
    outs = g.bind(eqn, ins, [one.form for one in ins])
    # A maximum's gradient is told by what took it.
    return [one if one.combine != "sum" else out for one, out in zip(ins, outs, strict=True)]


def broadcast_in_dim(g: PartGraph, eqn: core.JaxprEqn, ins: list[Held]) -> list[Held]:
    """Read a broadcast."""
    v, shape = ins[0], eqn.params["shape"]
    axis = int(eqn.params["broadcast_dimensions"][v.form.axis])
    return g.bind(eqn, ins, [v.form.at(axis)], shape=g.small(shape, axis))


def reshape(g: PartGraph, eqn: core.JaxprEqn, ins: list[Held]) -> list[Held]:
    """Read a reshape: the part's factor keeps its place in the order of all elements."""
    v, sizes = _in_order(g, eqn, ins[0]), eqn.params["new_sizes"]
    before, done = math.prod(v.shape[: v.form.axis]) * v.form.pre, 1
    for axis, size in enumerate(sizes):
        if done <= before < done * size and size > 1:
            if before % done or size % (before // done * g.parts):
                break
            form = examples(axis, before // done)
            return g.bind(eqn, [v], [form], new_sizes=g.small(sizes, axis), dimensions=None)
        done *= size
    raise NotInParts(f"a reshape groups the examples so that {g.parts} parts do not come out whole")


def _in_order(g: PartGraph, eqn: core.JaxprEqn, v: Held) -> Held:
    """Return what `eqn` reshapes with its dimensions in the order that it reads them in."""
    order = eqn.params.get("dimensions")
    if order is None:
        return v
    turned = Held(tuple(v.shape[d] for d in order), v.dtype, v.form.at(list(order).index(v.form.axis)))
    return g.emit(lambda _, array: [lax.transpose(array, order)], [v], [turned])[0]


def squeeze(g: PartGraph, eqn: core.JaxprEqn, ins: list[Held]) -> list[Held]:
    """Read the removal of dimensions of size 1."""
    v = ins[0]
    dims = [d % len(v.shape) for d in eqn.params["dimensions"]]
    return g.bind(eqn, ins, [v.form.at(v.form.axis - sum(d < v.form.axis for d in dims))])


def transpose(g: PartGraph, eqn: core.JaxprEqn, ins: list[Held]) -> list[Held]:
    """Read a transposition."""
    v = ins[0]
    return g.bind(eqn, ins, [v.form.at(list(eqn.params["permutation"]).index(v.form.axis))])


def rev(g: PartGraph, eqn: core.JaxprEqn, ins: list[Held]) -> list[Held]:
    """Read a reversal of other dimensions."""
    if ins[0].form.axis in eqn.params["dimensions"]:
        raise NotInParts("the examples are reversed")
    return g.bind(eqn, ins, [ins[0].form])


def pad(g: PartGraph, eqn: core.JaxprEqn, ins: list[Held]) -> list[Held]:
    """Read padding; along the examples by as many as a part's have their like in all others."""
    v, config = ins[0], eqn.params["padding_config"]
    if v.kind is not Kind.EXAMPLES:
        raise NotInParts("an array is padded with an example")
    axis, chunk = v.form.axis, _chunk(v)
    low, high, between = config[axis]
    if between or low % chunk or high % chunk:
        raise NotInParts("padding moves the examples")
    own = [one if d != axis else (low // g.parts, high // g.parts, 0) for d, one in enumerate(config)]
    form = examples(axis, v.form.pre + (low + high) // chunk)
    return g.bind(eqn, [v, g.shared(ins[1])], [form], padding_config=tuple(own))


def slice_(g: PartGraph, eqn: core.JaxprEqn, ins: list[Held]) -> list[Held]:
    """Read a slice: of other dimensions, of as many of each part's examples, or of a few of all."""
    v, p = ins[0], eqn.params
    axis = v.form.axis
    start, limit = p["start_indices"][axis], p["limit_indices"][axis]
    step = p["strides"][axis] if p["strides"] else 1
    chunk, size = _chunk(v), v.shape[axis]
    starts, limits = list(p["start_indices"]), list(p["limit_indices"])
    if start == limit:
        return _none_of_them(g, eqn)
    if step == 1 and start % chunk == limit % chunk == 0:
        starts[axis], limits[axis] = start // g.parts, limit // g.parts
        form = examples(axis, (limit - start) // chunk)
    elif chunk // g.parts % step == 0 and start < step and limit > size - step + start:
        limits[axis] = size // g.parts
        form = v.form
    else:
        return _picked(g, eqn, v, range(start, limit, step))
    return g.bind(eqn, ins, [form], start_indices=tuple(starts), limit_indices=tuple(limits))


def _none_of_them(g: PartGraph, eqn: core.JaxprEqn) -> list[Held]:
    """Return an array without a row, which is the same for all parts."""
    out = value_of(eqn.outvars[0])
    _check_numbers(out)
    return g.emit(lambda _: [jnp.zeros(out.shape, out.dtype)], [], [out])


def _check_numbers(value: Held) -> None:
    if is_extended(value.dtype):
        raise NotInParts("one example's random key is used for all examples")


def _picked(g: PartGraph, eqn: core.JaxprEqn, v: Held, places: range) -> list[Held]:
    """Read a slice of a few examples: a sum, to which the part that holds one gives it, the others 0."""
    axis, post = v.form.axis, _chunk(v) // g.parts
    _check_numbers(v)
    if len(places) > v.shape[axis] // g.parts:
        raise NotInParts("some of the examples are cut out")
    owner = np.array([place // post % g.parts for place in places])
    own = np.array([place // (post * g.parts) * post + place % post for place in places])
    column = [len(places) if d == axis else 1 for d in range(len(v.shape))]
    starts, limits = list(eqn.params["start_indices"]), list(eqn.params["limit_indices"])
    starts[axis], limits[axis] = 0, len(places)
    strides = [one if d != axis else 1 for d, one in enumerate(eqn.params["strides"] or [1] * len(v.shape))]

    def run(index: Any, array: jax.Array) -> list[jax.Array]:
        with context_of(eqn):
            found = lax.slice(jnp.take(array, own, axis), starts, limits, strides)
            return [jnp.where((owner == index).reshape(column), found, jnp.zeros_like(found))]

    out = value_of(eqn.outvars[0])
    out.form, out.combine = SUM, "or" if out.dtype == jnp.bool_ else "sum"
    return g.emit(run, [v], [out])


def _chunk(v: Held) -> int:
    """Return how many entries along the examples there are of all parts, one after another."""
    return v.shape[v.form.axis] // v.form.pre


def concatenate(g: PartGraph, eqn: core.JaxprEqn, ins: list[Held]) -> list[Held]:
    """Read arrays laid one after another; along the examples each part has its own of every array."""
    v, axis = one_of(ins), eqn.params["dimension"]
    if axis != v.form.axis:
        return g.bind(eqn, [g.bring(one, v.form) for one in ins], [v.form])
    chunk = _chunk(v)
    pres = [one.shape[axis] // chunk for one in ins]
    if any(one.shape[axis] % chunk for one in ins):
        raise NotInParts("the examples are joined with an array of other rows")
    ready = [g.rows(one, axis, pre) if pre else g.shared(one) for one, pre in zip(ins, pres, strict=True)]
    return g.bind(eqn, ready, [examples(axis, sum(pres))])


def split(g: PartGraph, eqn: core.JaxprEqn, ins: list[Held]) -> list[Held]:
    """Read an array taken apart into some, along the examples where each gets as many of every part."""
    v, sizes = ins[0], eqn.params["sizes"]
    if eqn.params["axis"] != v.form.axis:
        return g.bind(eqn, ins, [v.form] * len(sizes))
    chunk = _chunk(v)
    if any(size % chunk for size in sizes):
        raise NotInParts("some of the examples are cut out")
    forms = [examples(v.form.axis, size // chunk) if size else SHARED for size in sizes]
    return g.bind(eqn, ins, forms, sizes=tuple(size // g.parts for size in sizes))


def dynamic_slice(g: PartGraph, eqn: core.JaxprEqn, ins: list[Held]) -> list[Held]:
    """Read a slice at a computed place of other dimensions."""
    v, sizes = ins[0], eqn.params["slice_sizes"]
    if v.kind is not Kind.EXAMPLES or sizes[v.form.axis] != v.shape[v.form.axis]:
        raise NotInParts("some of the examples are cut out")
    rest = [g.shared(one) for one in ins[1:]]
    return g.bind(eqn, [v, *rest], [v.form], slice_sizes=g.small(sizes, v.form.axis))


def dynamic_update_slice(g: PartGraph, eqn: core.JaxprEqn, ins: list[Held]) -> list[Held]:
    """Read writing at a computed place of other dimensions."""
    form = one_of(ins[:2]).form
    if ins[0].shape[form.axis] != ins[1].shape[form.axis]:
        raise NotInParts("some of the examples are written over")
    ready = [g.bring(ins[0], form), g.bring(ins[1], form), *(g.shared(one) for one in ins[2:])]
    return g.bind(eqn, ready, [form])


def along(dimension: str) -> Any:
    """Return the rule of what works along a dimension that the parameter `dimension` says."""

    def rule(g: PartGraph, eqn: core.JaxprEqn, ins: list[Held]) -> list[Held]:
        form = one_of(ins).form
        if eqn.params.get(dimension, len(ins[0].shape) - 1) == form.axis:
            raise NotInParts(f"{eqn.primitive.name} along the examples")
        return g.bind(eqn, [g.bring(one, form) for one in ins], [form] * len(eqn.outvars))

    return rule


def stack(g: PartGraph, eqn: core.JaxprEqn, ins: list[Held]) -> list[Held]:
    """Read arrays laid along a new dimension."""
    form, new = one_of(ins).form, eqn.params["axis"]
    ready = [g.bring(one, form) for one in ins]
    return g.bind(eqn, ready, [examples(form.axis + (new <= form.axis), form.pre)])


def unstack(g: PartGraph, eqn: core.JaxprEqn, ins: list[Held]) -> list[Held]:
    """Read an array taken apart along another dimension."""
    form, gone = ins[0].form, eqn.params["axis"]
    if gone == form.axis:
        raise NotInParts("the examples are taken apart one by one")
    return g.bind(eqn, ins, [examples(form.axis - (gone < form.axis), form.pre)] * len(eqn.outvars))


def tile(g: PartGraph, eqn: core.JaxprEqn, ins: list[Held]) -> list[Held]:
    """Read copies, one after another."""
    v, reps = ins[0], eqn.params["reps"]
    if len(reps) != len(v.shape):
        raise NotInParts("the examples are repeated")
    return g.bind(eqn, ins, [examples(v.form.axis, v.form.pre * reps[v.form.axis])])


def matrices(g: PartGraph, eqn: core.JaxprEqn, ins: list[Held]) -> list[Held]:
    """Read an operation on matrices in the last two dimensions."""
    form = one_of(ins).form
    last = 1 if eqn.primitive.name == "lu_pivots_to_permutation" else 2
    if form.axis >= len(one_of(ins).shape) - last:
        raise NotInParts(f"{eqn.primitive.name} of a matrix that holds several examples")
    return g.bind(eqn, [g.bring(one, form) for one in ins], [form] * len(eqn.outvars))


def triangular_solve(g: PartGraph, eqn: core.JaxprEqn, ins: list[Held]) -> list[Held]:
    """Read a solve: the system of each example, or one system whose right-hand sides are examples'."""
    matrix, right = ins
    free = len(right.shape) - (1 if eqn.params["left_side"] else 2)
    if matrix.kind is not Kind.EXAMPLES and right.form.axis == free:
        return g.bind(eqn, [g.shared(matrix), right], [right.form])
    return matrices(g, eqn, ins)


def window(g: PartGraph, eqn: core.JaxprEqn, ins: list[Held]) -> list[Held]:
    """Read a window that slides over other dimensions."""
    form, p = one_of(ins).form, eqn.params
    axis = form.axis
    plain = p["window_dimensions"][axis] == p["window_strides"][axis] == 1 and not any(p["padding"][axis])
    plain &= all(p.get(key) is None or p[key][axis] == 1 for key in ("base_dilation", "window_dilation"))
    if not plain:
        raise NotInParts(f"{eqn.primitive.name} slides a window over the examples")
    # What it begins with is a number.
    ready = [g.bring(one, form) if one.shape else g.shared(one) for one in ins]
    return g.bind(eqn, ready, [form] * len(eqn.outvars))


def fft(g: PartGraph, eqn: core.JaxprEqn, ins: list[Held]) -> list[Held]:
    """Read a Fourier transform along other dimensions."""
    v = ins[0]
    if v.form.axis >= len(v.shape) - len(eqn.params["fft_lengths"]):
        raise NotInParts("a Fourier transform along the examples")
    return g.bind(eqn, ins, [v.form])
