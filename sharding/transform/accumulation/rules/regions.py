"""Manual regions of the user's own (`jax.shard_map`): what a device does of its rows, read as the rest is.

A region that cuts the examples over n devices gives each a block of them, in which the parts lie as in the
whole: of ``pre * parts * post`` entries a device has ``pre / n * parts * post``. Exchanges between devices
are of one part's values at a time, each at its place.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.sharding import PartitionSpec

from ....plans.specs import axes_of
from ....program.jaxpr import call_body, context_of
from ..graph import Body, PartGraph, formed, value_of
from ..opened import opened
from ..values import SUM, Array, Form, Held, Kind, NotInParts, examples
from .sums import reduce

# Exchanges that are linear, or a maximum of maxima; by position, so that examples stay where they are.
_LINEAR = frozenset({"psum", "psum_invariant", "ppermute"})
_EXTREMES = {"pmax": "max", "pmin": "min"}


def region(g: PartGraph, eqn: core.JaxprEqn, ins: list[Held]) -> list[Held]:
    """Read a manual region; if it does not come in parts as one, as what all its devices do together."""
    try:
        return _as_regions(g, eqn, ins)
    except NotInParts as why:
        together = opened(eqn) if g.cut else None
        if together is None:
            raise
        found = g.read(together, ins)
        if all(one.kind is Kind.MIXED for one in found):
            raise
        line = why if why.where else NotInParts(why.reason, g.where(eqn))
        g.opened.append(line)
        return found


def _as_regions(g: PartGraph, eqn: core.JaxprEqn, ins: list[Held]) -> list[Held]:
    """Return what a region for the parts gives, and one after them for what needs their sums complete."""
    inner = call_body(eqn)
    assert inner is not None
    ins = [g.shared(one) if one.kind is Kind.SUM else one for one in ins]
    specs = eqn.params["in_specs"]
    body = g.body(inner, [_of_device(eqn, one, spec) for one, spec in zip(ins, specs, strict=True)])
    return _Region(g, eqn, ins, body).read()


class _Region:
    """A region over `body`, what one device does of one part."""

    def __init__(self, g: PartGraph, eqn: core.JaxprEqn, ins: list[Held], body: Body) -> None:
        self.g, self.eqn, self.ins, self.body = g, eqn, ins, body
        # Sums that are needed complete, as they are outside.
        self.outside: dict[Held, Held] = {}

    def read(self) -> list[Held]:
        body, params = self.body, self.eqn.params
        late = [n for n, out in enumerate(body.outs) if out.kind is Kind.LATE]
        now = [n for n in range(len(body.outs)) if n not in late]
        leads = dict(zip(body.exports, self._leads(), strict=True))
        of_data = [one for one in leads if not one.heavy]
        # What counts the data alone comes before all passes, so that it has a region of its own.
        results = dict(zip(now, self._emit(now, [one for one in leads if one.heavy], leads), strict=False))
        self._emit([], of_data, leads)
        if late:
            wanted = [body.outs[n] for n in late]
            again = self._taken(wanted)
            specs = [params["out_specs"][n] for n in late]
            after = self._run(again, list(leads.values()), wanted, len(late), specs)
            ready = [self.g.complete(self.ins[n]) for n in again]
            ready += [self.g.complete(self.outside[one]) for one in leads]
            made = self.g.emit(after, ready, [value_of(self.eqn.outvars[n]) for n in late])
            results |= zip(late, made, strict=True)
        return [results[n] for n in range(len(body.outs))]

    def _emit(
        self, now: Sequence[int], sums: Sequence[Held], leads: Mapping[Held, PartitionSpec]
    ) -> list[Held]:
        """Add a region of the parts for the results `now` and for `sums`, and return these results."""
        if not now and not sums:
            return []
        targets = [*(self.body.outs[n] for n in now), *sums]
        taken = self._taken(targets)
        outs = [self._formed(n) for n in now]
        outs += [Held((self._size(leads[one]), *one.shape), one.dtype, SUM) for one in sums]
        specs = [*(self.eqn.params["out_specs"][n] for n in now), *(leads[one] for one in sums)]
        run = self._run(taken, (), targets, len(now), specs)
        found = self.g.emit(run, [self.ins[n] for n in taken], outs)
        self.outside |= zip(sums, found[len(now) :], strict=True)
        return found[: len(now)]

    def _taken(self, targets: Sequence[Held]) -> list[int]:
        needs = self.body.takes(targets)
        return [n for n, one in enumerate(self.body.ins) if one in needs]

    def _formed(self, place: int) -> Held:
        """Return result `place` as it is outside, where all devices' entries lie one after another."""
        form = self.body.outs[place].form
        value = formed(self.eqn.outvars[place], form, self.body.outs[place])
        if form.kind is Kind.EXAMPLES:
            over = _devices(self.eqn, self.eqn.params["out_specs"][place], form.axis)
            value.form = examples(form.axis, form.pre * over)
        return value

    def _leads(self) -> list[PartitionSpec]:
        """Return over which axes each sum that is needed complete differs, on a new first dimension."""
        manual = tuple(sorted(self.eqn.params["newly_manual_axes"]))
        if not self.eqn.params["check_vma"]:
            return [PartitionSpec(manual)] * len(self.body.exports)
        return [self._lead(one, manual) for one in self.body.exports]

    def _lead(self, value: Held, manual: Sequence[str]) -> PartitionSpec:
        """Return the fewest axes that JAX lets a sum out over: it knows over which it is the same."""
        taken = self._taken([value])
        arrays = [jax.ShapeDtypeStruct((), jnp.int32), *(self._part(self.ins[n]) for n in taken)]
        for count in range(len(manual) + 1):
            for axes in itertools.combinations(manual, count):
                lead = PartitionSpec(axes or None)
                with contextlib.suppress(ValueError):
                    jax.eval_shape(self._run(taken, (), [value], 0, [lead]), *arrays)
                    return lead
        raise NotInParts("a sum is needed complete inside of a manual region within another")

    def _part(self, value: Held) -> jax.ShapeDtypeStruct:
        own = value.kind is Kind.EXAMPLES
        shape = self.g.small(value.shape, value.form.axis) if own else value.shape
        return jax.ShapeDtypeStruct(shape, value.dtype)

    def _size(self, lead: PartitionSpec) -> int:
        return math.prod(self.eqn.params["mesh"].shape[axis] for axis in axes_of(lead[0]))

    def _run(
        self,
        taken: Sequence[int],
        leads: Sequence[PartitionSpec],
        targets: Sequence[Held],
        as_they_are: int,
        specs: Sequence[PartitionSpec],
    ) -> Callable[..., list[Array]]:
        """Return what runs the region for `targets`, from inputs `taken` and complete sums if it has `leads`.

        Of the results those after the first `as_they_are` get a first dimension.
        """
        body, params = self.body, self.eqn.params
        names = [body.ins[n] for n in taken]

        def run(index: Any, *arrays: Array) -> list[Array]:
            # After all parts there is no number of one.
            numbers = [] if index is None else [jnp.asarray(index)]

            def called(*own: Array) -> tuple[Array, ...]:
                number = own[0] if numbers else None
                given = own[len(numbers) :]
                known = dict(zip(names, given, strict=False))
                sums = [one[0] for one in given[len(names) :]]
                known |= dict(zip(body.leaves if leads else (), sums, strict=True))
                found = body.run(number, targets, known)
                return tuple(one if n < as_they_are else one[None] for n, one in enumerate(found))

            with context_of(self.eqn):
                over = jax.shard_map(
                    called,
                    mesh=params["mesh"],
                    in_specs=(
                        *[PartitionSpec()] * len(numbers),
                        *(params["in_specs"][n] for n in taken),
                        *leads,
                    ),
                    out_specs=tuple(specs),
                    axis_names=set(params["newly_manual_axes"]),
                    check_vma=params["check_vma"],
                )
                return list(over(*numbers, *arrays))

        return run


def _devices(eqn: core.JaxprEqn, spec: PartitionSpec, axis: int) -> int:
    """Return over how many devices a region's `spec` cuts dimension `axis`."""
    names = axes_of(spec[axis]) if axis < len(spec) else ()
    return math.prod(eqn.params["mesh"].shape[name] for name in names)


def _of_device(eqn: core.JaxprEqn, value: Held, spec: PartitionSpec) -> Held:
    """Return `value` in the form that a device has of it."""
    if value.kind is not Kind.EXAMPLES:
        return value
    over, pre = _devices(eqn, spec, value.form.axis), value.form.pre
    if pre % over:
        raise NotInParts(
            f"a manual region cuts the examples over {over} devices, each with rows of few parts"
        )
    return dataclasses.replace(value, form=examples(value.form.axis, pre // over))


def exchange(g: PartGraph, eqn: core.JaxprEqn, ins: list[Held]) -> list[Held]:
    """Read a sum, a maximum or a permutation over devices, place by place."""
    name, forms = eqn.primitive.name, [one.form for one in ins]
    kinds = {one.kind for one in ins}
    if Kind.EXAMPLES in kinds and _over_dimensions(eqn):
        return reduce(g, eqn, ins)
    if kinds <= {Kind.EXAMPLES, Kind.SHARED} and Kind.EXAMPLES in kinds:
        return g.bind(eqn, [g.shared(v) if v.kind is Kind.SHARED else v for v in ins], forms)
    combines = {one.combine for one in ins if one.kind is Kind.SUM}
    if kinds == {Kind.SUM} and len(combines) == 1:
        (combine,) = combines
        if (combine == "sum" and name in _LINEAR) or (combine == _EXTREMES.get(name) and len(ins) == 1):
            return g.bind(eqn, ins, forms, combine=combine)
    return g.whole(eqn, ins)


def _over_dimensions(eqn: core.JaxprEqn) -> bool:
    """Whether `eqn` reduces dimensions, which `jax.vmap` makes of an axis that it names."""
    axes = eqn.params.get("axes", ())
    numbered = [not isinstance(axis, str) for axis in axes]
    if any(numbered) and not (all(numbered) and len(eqn.invars) == 1):
        raise NotInParts(f"{eqn.primitive.name} over devices and a dimension at once is not understood")
    return any(numbered)


def gathered(g: PartGraph, eqn: core.JaxprEqn, ins: list[Held]) -> list[Held]:
    """Read a gather of what devices have, or a sum that is scattered over them."""
    (v,) = ins
    params = eqn.params
    scatters = eqn.primitive.name == "reduce_scatter"
    at = params["scatter_dimension" if scatters else "all_gather_dimension"]
    if v.kind is Kind.SUM and v.combine == "sum":
        return g.bind(eqn, ins, [SUM])
    if v.kind is not Kind.EXAMPLES:
        return g.whole(eqn, ins)
    axis, pre, size = v.form.axis, v.form.pre, params["axis_size"]
    if not params["tiled"]:
        if scatters and at == axis:
            raise NotInParts("the examples are scattered over devices one by one")
        moved = -(at < axis) if scatters else at <= axis
        return g.bind(eqn, ins, [examples(axis + moved, pre)])
    if at == axis and scatters and pre % size:
        raise NotInParts("the examples are scattered over devices, each with rows of few parts")
    own = pre if at != axis else pre // size if scatters else pre * size
    return g.bind(eqn, ins, [examples(axis, own)])


def traded(g: PartGraph, eqn: core.JaxprEqn, ins: list[Held]) -> list[Held]:
    """Read an exchange of one dimension's blocks for another's."""
    (v,) = ins
    if v.kind is Kind.SUM and v.combine == "sum":
        return g.bind(eqn, ins, [SUM])
    if v.kind is not Kind.EXAMPLES:
        return g.whole(eqn, ins)
    params, axis, pre = eqn.params, v.form.axis, v.form.pre
    apart, together = params["split_axis"], params["concat_axis"]
    if not params["tiled"] or apart == together == axis:
        raise NotInParts("the examples are traded among devices one by one")
    out: Form = v.form
    aval: Any = eqn.outvars[0].aval
    if axis == apart:
        over = v.shape[axis] // aval.shape[axis]
        if pre % over:
            raise NotInParts("the examples are traded among devices, each with rows of few parts")
        out = examples(axis, pre // over)
    elif axis == together:
        out = examples(axis, pre * (aval.shape[axis] // v.shape[axis]))
    return g.bind(eqn, ins, [out])
