"""Views and moves: where the examples go when an array is reshaped, turned, cut or joined."""

from __future__ import annotations

import math
from typing import Any

from jax.extend import core

from ..graph import PartGraph, one_of
from ..values import Held, Kind, NotInParts, examples


def elementwise(g: PartGraph, eqn: core.JaxprEqn, ins: list[Held]) -> list[Held]:
    """Read an operation on each position; operands may be scalars, or of size 1 where others are not."""
    v = one_of(ins)
    if any(getattr(var.aval, "ndim", None) != len(v.shape) for var in eqn.outvars):
        return same_axis(g, eqn, ins)
    ready = [
        g.shared(one)
        if one.kind is not Kind.EXAMPLES and (one.shape == () or one.shape[v.form.axis] == 1)
        else g.rows(one, v.form.axis, v.form.pre)
        for one in ins
    ]
    return g.bind(eqn, ready, [v.form] * len(eqn.outvars))


def same_axis(g: PartGraph, eqn: core.JaxprEqn, ins: list[Held]) -> list[Held]:
    """Read an operation on leading dimensions each by itself, which adds or takes away trailing ones."""
    v = one_of(ins)
    aval: Any = eqn.outvars[0].aval
    if len(ins) != 1 or v.form.axis >= len(aval.shape) or aval.shape[v.form.axis] != v.shape[v.form.axis]:
        raise NotInParts(f"{eqn.primitive.name} works along the examples")
    return g.bind(eqn, ins, [v.form])


def passing(g: PartGraph, eqn: core.JaxprEqn, ins: list[Held]) -> list[Held]:
    """Read an operation that gives each operand on as it is."""
    return g.bind(eqn, ins, [one.form for one in ins])


def broadcast_in_dim(g: PartGraph, eqn: core.JaxprEqn, ins: list[Held]) -> list[Held]:
    """Read a broadcast."""
    v, shape = ins[0], eqn.params["shape"]
    axis = int(eqn.params["broadcast_dimensions"][v.form.axis])
    return g.bind(eqn, ins, [examples(axis, v.form.pre)], shape=g.small(shape, axis))


def reshape(g: PartGraph, eqn: core.JaxprEqn, ins: list[Held]) -> list[Held]:
    """Read a reshape: the part's factor keeps its place in the order of all elements."""
    v, sizes = ins[0], eqn.params["new_sizes"]
    if eqn.params.get("dimensions") is not None:
        raise NotInParts("reshape with an order of its own")
    before, done = math.prod(v.shape[: v.form.axis]) * v.form.pre, 1
    for axis, size in enumerate(sizes):
        if done <= before < done * size and size > 1:
            if before % done or size % (before // done * g.parts):
                break
            return g.bind(eqn, ins, [examples(axis, before // done)], new_sizes=g.small(sizes, axis))
        done *= size
    raise NotInParts(f"a reshape groups the examples so that {g.parts} parts do not come out whole")


def squeeze(g: PartGraph, eqn: core.JaxprEqn, ins: list[Held]) -> list[Held]:
    """Read the removal of dimensions of size 1."""
    v = ins[0]
    dims = [d % len(v.shape) for d in eqn.params["dimensions"]]
    return g.bind(eqn, ins, [examples(v.form.axis - sum(d < v.form.axis for d in dims), v.form.pre)])


def transpose(g: PartGraph, eqn: core.JaxprEqn, ins: list[Held]) -> list[Held]:
    """Read a transposition."""
    v = ins[0]
    return g.bind(eqn, ins, [examples(list(eqn.params["permutation"]).index(v.form.axis), v.form.pre)])


def rev(g: PartGraph, eqn: core.JaxprEqn, ins: list[Held]) -> list[Held]:
    """Read a reversal of other dimensions."""
    if ins[0].form.axis in eqn.params["dimensions"]:
        raise NotInParts("the examples are reversed")
    return g.bind(eqn, ins, [ins[0].form])


def pad(g: PartGraph, eqn: core.JaxprEqn, ins: list[Held]) -> list[Held]:
    """Read padding of other dimensions."""
    v = ins[0]
    if v.kind is not Kind.EXAMPLES:
        raise NotInParts("an array is padded with an example")
    if tuple(eqn.params["padding_config"][v.form.axis]) != (0, 0, 0):
        raise NotInParts("padding moves the examples")
    return g.bind(eqn, [v, g.shared(ins[1])], [v.form])


def slice_(g: PartGraph, eqn: core.JaxprEqn, ins: list[Held]) -> list[Held]:
    """Read a slice of other dimensions."""
    v, p = ins[0], eqn.params
    axis = v.form.axis
    step = p["strides"][axis] if p["strides"] else 1
    if p["start_indices"][axis] or p["limit_indices"][axis] != v.shape[axis] or step != 1:
        raise NotInParts("some of the examples are cut out")
    return g.bind(eqn, ins, [v.form], limit_indices=g.small(p["limit_indices"], axis))


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
    """Read copies along other dimensions."""
    v = ins[0]
    if len(eqn.params["reps"]) != len(v.shape) or eqn.params["reps"][v.form.axis] != 1:
        raise NotInParts("the examples are repeated")
    return g.bind(eqn, ins, [v.form])


def matrices(g: PartGraph, eqn: core.JaxprEqn, ins: list[Held]) -> list[Held]:
    """Read an operation on matrices in the last two dimensions."""
    form = one_of(ins).form
    last = 1 if eqn.primitive.name == "lu_pivots_to_permutation" else 2
    if form.axis >= len(one_of(ins).shape) - last:
        raise NotInParts(f"{eqn.primitive.name} of a matrix that holds several examples")
    return g.bind(eqn, [g.bring(one, form) for one in ins], [form] * len(eqn.outvars))


def window(g: PartGraph, eqn: core.JaxprEqn, ins: list[Held]) -> list[Held]:
    """Read a window that slides over other dimensions."""
    form, p = one_of(ins).form, eqn.params
    axis = form.axis
    plain = p["window_dimensions"][axis] == p["window_strides"][axis] == 1 and not any(p["padding"][axis])
    plain &= all(p.get(key) is None or p[key][axis] == 1 for key in ("base_dilation", "window_dilation"))
    if not plain:
        raise NotInParts(f"{eqn.primitive.name} slides a window over the examples")
    return g.bind(eqn, [g.bring(one, form) for one in ins], [form] * len(eqn.outvars))


def fft(g: PartGraph, eqn: core.JaxprEqn, ins: list[Held]) -> list[Held]:
    """Read a Fourier transform along other dimensions."""
    v = ins[0]
    if v.form.axis >= len(v.shape) - len(eqn.params["fft_lengths"]):
        raise NotInParts("a Fourier transform along the examples")
    return g.bind(eqn, ins, [v.form])
