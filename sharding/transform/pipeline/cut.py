"""A part of a loss cut at its layers: what goes into them, the layers of a stage, and what comes after.

Two programs are cut, which are one but for the number of rows: of a microbatch, for the layers, and of a
stage's share of its rows, for what is before and behind them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from ...errors import UserError
from ...program.jaxpr import Traced, call_body, run, scan_parts
from ...program.layers import is_layer_scan
from ...program.pieces import ProgramPiece, of_length
from ...program.program import Equation, Program
from ...program.tracing import read
from .slots import Slots

_CALLS = ("jit", "pjit", "closed_call")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LayerCut:
    """A part's program in pieces, for one stage of several.

    enter: of a share of the rows, what travels into the layers.
    layers: of all rows of a microbatch, what a chunk's layers carry out of what is carried in; one layer
      where some slots of chunks have none of their own.
    leave: of a share, what the whole program gives.
    stacked: what is scanned over beside parameters, for all layers.
    rows: of each thing that travels, carried or a constant, the dimension that holds rows, or None.
    differs: whether it has a gradient.
    carried: whether the layers change it.
    shapes, dims: its shape and type, and its named dimensions.
    """

    enter: ProgramPiece
    layers: ProgramPiece
    leave: ProgramPiece
    stacked: ProgramPiece
    rows: tuple[int | None, ...]
    differs: tuple[bool, ...]
    carried: tuple[bool, ...]
    shapes: tuple[Any, ...]
    dims: tuple[Any, ...]


def cut_at_layers(
    share: Program, whole: Program, slots: Slots, trained: Sequence[int], data: Sequence[int]
) -> LayerCut:
    """LayerCut the programs of a share of a microbatch's rows, and of all of them.

    `trained` are the numbers of the arguments that are trained, `data` of those that hold rows.

    Raises UserError if a stage's layers cannot be had by themselves.
    """
    ours, theirs = _layers(whole, trained), _layers(share, trained)
    stages = slots.stages
    parts = scan_parts(ours.eqn)
    consts, first_xs = parts.num_consts, parts.num_consts + parts.num_carry
    by_params, by_data = _dependent(whole, trained), _dependent(whole, data)
    atoms: list[Any] = list(ours.eqn.invars)
    share_atoms: list[Any] = list(theirs.eqn.invars)
    beside = [n for n in range(first_xs, len(atoms)) if not _is_stored(whole, atoms[n], set(trained))]
    if any(atoms[n] in by_params or atoms[n] in by_data for n in beside if not _is_number(atoms[n])):
        raise UserError(
            f"stage={stages}: arrays that the layers are scanned over are computed from parameters or from "
            f"the batch, which a stage cannot do for its own layers alone, at {ours.where}"
        )
    travel = [
        n
        for n, atom in enumerate(atoms[:first_xs])
        if n >= consts or (not _is_number(atom) and atom in by_params and atom in by_data)
    ]
    shapes = tuple(atoms[n].aval for n in travel)
    rows = tuple(_rows_of(atoms[n].aval.shape, share_atoms[n].aval.shape, stages, ours.where) for n in travel)
    used = _used_outside(whole, ours)
    carries, stacked = ours.eqn.outvars[: parts.num_carry], ours.eqn.outvars[parts.num_carry :]
    if any(var in used for var in stacked):
        raise UserError(
            f"stage={stages}: what each layer gives beside its output is used after the layers, which stages "
            f"cannot hand on yet, at {ours.where}"
        )
    for n, out in enumerate(carries):
        place = rows[travel.index(consts + n)]
        if out in used and place is None and out in _dependent(whole, data):
            raise UserError(
                f"stage={stages}: the layers add up a number over the rows, which stages cannot yet, at "
                f"{ours.where}"
            )
    enter = ProgramPiece(program=share, wanted=tuple(share_atoms[n] for n in travel))
    leave = ProgramPiece(
        program=share,
        wanted=tuple(share.scope.jaxpr.outvars),
        known=tuple(theirs.eqn.outvars[: parts.num_carry]),
    )
    if not slots.stored.keys().isdisjoint(enter.reads | leave.reads):
        raise UserError(
            f"stage={stages}: parameters of the layers are read before or behind them too, for rows of the "
            f"batch, and no stage has those of all layers, at {ours.where}"
        )
    return LayerCut(
        enter=enter,
        layers=ProgramPiece(
            program=whole,
            wanted=tuple(carries),
            at=of_length(ours, 1 if slots.fills else slots.each),
            operands=(*travel, *beside),
        ),
        stacked=ProgramPiece(program=whole, wanted=tuple(atoms[n] for n in beside)),
        leave=leave,
        rows=rows,
        differs=tuple(bool(jnp.issubdtype(shape.dtype, jnp.inexact)) for shape in shapes),
        carried=tuple(n >= consts for n in travel),
        shapes=shapes,
        dims=tuple(ours.ins[n] for n in travel),
    )


def layers_and_parameters(traced: Traced, trained: Sequence[int]) -> tuple[int, frozenset[int]]:
    """Return how many layers a loss has, and the numbers of the parameters that are stacked for them.

    Raises UserError if it has none.
    """
    program = read(_without_calls(traced))
    one = _layers(program, trained)
    xs = one.eqn.invars[-scan_parts(one.eqn).num_xs :]
    found = (_stored_as(program, atom, set(trained)) for atom in xs)
    return one.eqn.params["length"], frozenset(number for number in found if number is not None)


def _without_calls(traced: Traced) -> Traced:
    """Return a trace with what jitted functions do in their place, as a part's program has it."""

    def again(closed: core.ClosedJaxpr, *inputs: Any) -> list[Any]:
        jaxpr = closed.jaxpr
        values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*closed.consts, *inputs], strict=True))

        def value(atom: Any) -> Any:
            return atom.val if isinstance(atom, core.Literal) else values[atom]

        for eqn in jaxpr.eqns:
            ins = [value(atom) for atom in eqn.invars]
            body = call_body(eqn) if eqn.primitive.name in _CALLS else None
            outs = run(eqn, ins) if body is None else again(body, *ins)
            values.update(zip(eqn.outvars, outs, strict=True))
        return [value(atom) for atom in jaxpr.outvars]

    shapes = [jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype) for var in traced.jaxpr.jaxpr.invars]
    jaxpr = jax.make_jaxpr(functools.partial(again, traced.jaxpr))(*shapes)
    return dataclasses.replace(traced, jaxpr=jaxpr)


def _layers(program: Program, trained: Sequence[int]) -> Equation:
    """Return the scan over stacked parameters that has the most of them."""
    found = [one for one in program.scope.equations if _walks_parameters(program, one, trained)]
    if not found:
        raise UserError("stages cut the layers of a scan over stacked parameters, and this loss has none")

    def size(one: Equation) -> int:
        avals: list[Any] = [atom.aval for atom in one.eqn.invars[-scan_parts(one.eqn).num_xs :]]
        return sum(math.prod(aval.shape) for aval in avals)

    return max(found, key=size)


def _walks_parameters(program: Program, one: Equation, trained: Sequence[int]) -> bool:
    if one.primitive != "scan" or not is_layer_scan(one.eqn):
        return False
    xs = one.eqn.invars[-scan_parts(one.eqn).num_xs :]
    return any(_is_stored(program, atom, set(trained)) for atom in xs)


def _is_stored(program: Program, atom: Any, trained: set[int]) -> bool:
    return _stored_as(program, atom, trained) is not None


def _stored_as(program: Program, atom: Any, trained: set[int]) -> int | None:
    """Return the parameter that an atom is, but for a cast or a transposition behind the layers."""
    makers = {var: one.eqn for one in program.scope.equations for var in one.eqn.outvars}
    while atom in makers:
        eqn = makers[atom]
        name = eqn.primitive.name
        if name == "transpose" and eqn.params["permutation"][0] != 0:
            return None
        if name not in ("convert_element_type", "transpose", "name", "copy"):
            return None
        atom = eqn.invars[0]
    return next((n for n in trained if program.scope.jaxpr.invars[n] is atom), None)


def _is_number(atom: Any) -> bool:
    return isinstance(atom, core.Literal)


def _dependent(program: Program, arguments: Sequence[int]) -> set[Any]:
    found = {program.scope.jaxpr.invars[n] for n in arguments}
    for one in program.scope.equations:
        if any(atom in found for atom in one.eqn.invars if not isinstance(atom, core.Literal)):
            found.update(one.eqn.outvars)
    return found


def _used_outside(program: Program, layers: Equation) -> set[Any]:
    atoms = [a for one in program.scope.equations if one is not layers for a in one.eqn.invars]
    atoms += program.scope.jaxpr.outvars
    return {atom for atom in atoms if not isinstance(atom, core.Literal)}


def _rows_of(whole: tuple[int, ...], share: tuple[int, ...], stages: int, where: str) -> int | None:
    """Return the dimension of what travels that holds rows: a share has fewer."""
    places = [n for n, (a, b) in enumerate(zip(whole, share, strict=True)) if a != b]
    if not places:
        return None
    if len(places) > 1 or whole[places[0]] != stages * share[places[0]]:
        raise UserError(f"stage={stages}: rows cannot be told in what the layers carry, at {where}")
    return places[0]
