"""A part of a loss cut at its layers: what goes into them, the layers of a stage, and what comes after.

Two programs are cut, which are one but for the number of rows: of a microbatch, for the layers, and of a
stage's share of its rows, for what is before and behind them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend import core

from ...errors import UserError
from ...program.jaxpr import scan_parts
from ...program.pieces import ProgramPiece, of_length
from ...program.program import Equation, Program
from .layers import dependent, is_number, layers_of, stored_as
from .slots import Slots


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
    share: Program, whole: Program, slots: Slots, params: int, trained: Sequence[int], data: Sequence[int]
) -> LayerCut:
    """Cut the programs of a share of a microbatch's rows, and of all of them.

    Their first `params` arguments are parameters; `trained` are the numbers of those that are trained,
    `data` of the arguments that hold rows.

    Raises UserError if a stage's layers cannot be had by themselves.
    """
    ours, theirs = layers_of(whole, params), layers_of(share, params)
    stages = slots.stages
    parts = scan_parts(ours.eqn)
    consts, first_xs = parts.num_consts, parts.num_consts + parts.num_carry
    by_params, by_data = dependent(whole, trained), dependent(whole, data)
    atoms: list[Any] = list(ours.eqn.invars)
    share_atoms: list[Any] = list(theirs.eqn.invars)
    beside = [n for n in range(first_xs, len(atoms)) if stored_as(whole, atoms[n], params) is None]
    if any(atoms[n] in by_params or atoms[n] in by_data for n in beside if not is_number(atoms[n])):
        raise UserError(
            f"stage={stages}: arrays that the layers are scanned over are computed from parameters or from "
            f"the batch, which a stage cannot do for its own layers alone, at {ours.where}"
        )
    travel = [
        n
        for n, atom in enumerate(atoms[:first_xs])
        if n >= consts or (not is_number(atom) and atom in by_params and atom in by_data)
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
        if out in used and place is None and out in dependent(whole, data):
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
