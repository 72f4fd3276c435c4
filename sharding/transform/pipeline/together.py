"""Layers that a loss runs several times, as one loop that runs them all: a stage has its layers once.

What is chosen and what is rejected, two views of a picture, a student beside its frozen base: loops over the
same stacked parameters, none of which waits for what another gives. They become one scan, which walks what
they walk, carries what each carries and runs one layer of each in a turn: the same values, and one gradient.
Loops that wait for one another stay as they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from typing import Any

import jax
from jax import lax
from jax.extend import core

from ...program.jaxpr import Traced, context_of, run, scan_parts
from ...program.layers import is_layer_scan
from ...program.stacks import is_stack
from .layers import is_number, reached

# What gives its one operand again, which the type and shape of the result and `permutation` tell all of.
_SAME = ("convert_element_type", "transpose", "copy")


def together(traced: Traced) -> Traced:
    """Return a flat trace with loops over the same layers as one, where none waits for another."""
    count = len(jax.tree.leaves(traced.args[0]))
    while (group := _group(traced.jaxpr.jaxpr, count)) is not None:
        traced = _joined(traced, group, count)
    return traced


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _SharedLoop:
    """A scan over layers, and what it walks: each parameter as `_Origins` has it, other values themselves."""

    eqn: core.JaxprEqn
    walked: tuple[Hashable, ...]

    def shares(self, other: _SharedLoop) -> bool:
        """Whether both walk one of the parameters, equally long."""
        own = [one for one in self.walked if isinstance(one, int | tuple)]
        return self.eqn.params["length"] == other.eqn.params["length"] and bool({*own} & {*other.walked})


class _Origins:
    """What atoms are of the first arguments, equal where they are the same: a cast, a stack of some."""

    def __init__(self, jaxpr: core.Jaxpr, count: int) -> None:
        self._known: dict[Any, Hashable] = {var: n for n, var in enumerate(jaxpr.invars[:count])}
        for eqn in jaxpr.eqns:
            if (eqn.primitive.name in _SAME or is_stack(eqn)) and all(map(self._has, eqn.invars)):
                aval: Any = eqn.outvars[0].aval
                order = eqn.params.get("permutation")
                made = (eqn.primitive.name, tuple(aval.shape), str(aval.dtype), order and tuple(order))
                self._known[eqn.outvars[0]] = (*made, *(self._known[atom] for atom in eqn.invars))

    def _has(self, atom: Any) -> bool:
        return not is_number(atom) and atom in self._known

    def of(self, atom: Any) -> Hashable:
        """Return what an atom is of the arguments, itself if it is nothing of them alone."""
        return self._known[atom] if self._has(atom) else atom


def _loops(jaxpr: core.Jaxpr, origins: _Origins) -> list[_SharedLoop]:
    found = []
    for eqn in jaxpr.eqns:
        if is_layer_scan(eqn) and not eqn.params["reverse"] and not eqn.effects:
            parts = scan_parts(eqn)
            atoms = eqn.invars[parts.num_consts + parts.num_carry :]
            found.append(_SharedLoop(eqn=eqn, walked=tuple(origins.of(atom) for atom in atoms)))
    return found


def _group(jaxpr: core.Jaxpr, count: int) -> list[core.JaxprEqn] | None:
    """Return the first loops that run the same layers and do not wait for one another."""
    loops = _loops(jaxpr, _Origins(jaxpr, count))
    for n, first in enumerate(loops):
        group = [first]
        for other in loops[n + 1 :]:
            given = reached(jaxpr, {var for one in group for var in one.eqn.outvars})
            waits = any(not is_number(atom) and atom in given for atom in other.eqn.invars)
            if first.shares(other) and not waits:
                group.append(other)
        if len(group) > 1:
            return [one.eqn for one in group]
    return None


def _joined(traced: Traced, group: Sequence[core.JaxprEqn], count: int) -> Traced:
    """Return the trace with the loops of a group as one, behind what they take and ahead of all else."""
    jaxpr, origins = traced.jaxpr.jaxpr, _Origins(traced.jaxpr.jaxpr, count)
    needed = {atom for eqn in group for atom in eqn.invars if not is_number(atom)}
    before = []
    for eqn in reversed(jaxpr.eqns):
        if not needed.isdisjoint(eqn.outvars):
            before.append(eqn)
            needed.update(atom for atom in eqn.invars if not is_number(atom))
    ahead, own = {*map(id, before)}, {*map(id, group)}
    behind = [eqn for eqn in jaxpr.eqns if id(eqn) not in ahead | own]

    def again(*inputs: Any) -> list[Any]:
        values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*traced.jaxpr.consts, *inputs], strict=True))

        def value(atom: Any) -> Any:
            return atom.val if is_number(atom) else values[atom]

        def execute(eqn: core.JaxprEqn) -> None:
            with context_of(eqn):
                outs = run(eqn, [value(atom) for atom in eqn.invars])
            values.update(zip(eqn.outvars, outs, strict=True))

        for eqn in reversed(before):
            execute(eqn)
        with context_of(group[0]):
            ins = [[value(atom) for atom in eqn.invars] for eqn in group]
            for eqn, outs in zip(group, _run_together(group, ins, origins), strict=True):
                values.update(zip(eqn.outvars, outs, strict=True))
        for eqn in behind:
            execute(eqn)
        return [value(atom) for atom in jaxpr.outvars]

    shapes = [
        jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=getattr(aval, "weak_type", False))
        for aval in traced.jaxpr.in_avals
    ]
    return dataclasses.replace(
        traced, jaxpr=jax.make_jaxpr(again)(*shapes), written=traced.written or traced.jaxpr
    )


def _run_together(
    group: Sequence[core.JaxprEqn], ins: Sequence[Sequence[Any]], origins: _Origins
) -> list[list[Any]]:
    """Run loops on their inputs in one, which walks once what several walk; return what each gives."""
    walked: dict[Hashable, Any] = {}
    names: list[list[Hashable]] = []
    starts, consts = [], []
    for n, (eqn, own) in enumerate(zip(group, ins, strict=True)):
        parts = scan_parts(eqn)
        first = parts.num_consts + parts.num_carry
        consts.append(own[: parts.num_consts])
        starts.append(list(own[parts.num_consts : first]))
        atoms = enumerate(eqn.invars[first:])
        names.append([(n, place) if is_number(atom) else origins.of(atom) for place, atom in atoms])
        walked |= dict(zip(names[-1], own[first:], strict=True))

    def turn(carries: list[list[Any]], layer: list[Any]) -> tuple[list[list[Any]], list[list[Any]]]:
        at = dict(zip(walked, layer, strict=True))
        after, given = [], []
        for eqn, fixed, carry, own in zip(group, consts, carries, names, strict=True):
            outs = core.jaxpr_as_fun(scan_parts(eqn).body)(*fixed, *carry, *(at[name] for name in own))
            after.append(outs[: len(carry)])
            given.append(outs[len(carry) :])
        return after, given

    length, unroll = group[0].params["length"], group[0].params["unroll"]
    ends, given = lax.scan(turn, starts, list(walked.values()), length=length, unroll=unroll)
    return [[*end, *rest] for end, rest in zip(ends, given, strict=True)]
