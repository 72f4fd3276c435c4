"""A part of a loss cut at its layers: what goes into them, the layers of a stage, and what comes after.

Two programs are cut, which are one but for the number of rows: of a microbatch, for the layers, and of a
stage's share of its rows, for what is before and behind them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from jax.extend import core

from ...errors import UserError
from ...program.jaxpr import scan_parts
from ...program.pieces import ProgramPiece, of_length
from ...program.program import Equation, Program
from .layers import dependent, is_number, layers_of, stored_as
from .slots import Slots
from .stream import CARRIED, CONSTANT, GIVEN, Travelling


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LayerCut:
    """A part's program in pieces, for one stage of several.

    enter: of a share of the rows, what travels into the layers.
    layers: of all rows of a microbatch, what a chunk's layers make of what is carried in, and give besides;
      one layer where they run one at a time.
    leave: of a share, what the whole program gives.
    stacked: what is scanned over beside parameters, for all layers, with its named dimensions (`beside`).
    items: what travels: constants and what is carried, as layers take them; then what they give besides.
    """

    enter: ProgramPiece
    layers: ProgramPiece
    leave: ProgramPiece
    stacked: ProgramPiece
    beside: tuple[Any, ...]
    items: tuple[Travelling, ...]


def cut_at_layers(
    share: Program, whole: Program, slots: Slots, params: int, trained: Sequence[int], data: Sequence[int]
) -> LayerCut:
    """Cut the programs of a share of a microbatch's rows, and of all of them.

    Their first `params` arguments are parameters; `trained` are the numbers of those that are trained,
    `data` of the arguments that hold rows, and of the part's number.

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
    used, their_outs = _used_outside(whole, ours), theirs.eqn.outvars

    def travelling(kind: str, atom: Any, dims: Any, of_share: Any, out: Any) -> Travelling:
        rows = _rows_of(atom.aval.shape, of_share.aval.shape, stages, ours.where)
        return Travelling(
            shape=tuple(atom.aval.shape),
            dtype=atom.aval.dtype,
            dims=dims,
            kind=kind,
            rows=rows,
            # What has no rows and depends on them is a sum over them, which the proof leaves incomplete.
            summed=rows is None and out in by_data,
        )

    constants = [
        n
        for n, atom in enumerate(atoms[:consts])
        if not is_number(atom) and atom in by_params and atom in by_data
    ]
    outs = ours.eqn.outvars
    given = [n for n in range(parts.num_carry, len(outs)) if outs[n] in used]
    items = [travelling(CONSTANT, atoms[n], ours.ins[n], share_atoms[n], atoms[n]) for n in constants]
    items += [
        travelling(CARRIED, atoms[n], ours.ins[n], share_atoms[n], outs[n - consts])
        for n in range(consts, first_xs)
    ]
    items += [travelling(GIVEN, outs[n], ours.outs[n], their_outs[n], outs[n]) for n in given]
    travel = [*constants, *range(consts, first_xs)]
    enter = ProgramPiece(program=share, wanted=tuple(share_atoms[n] for n in travel))
    leave = ProgramPiece(
        program=share,
        wanted=tuple(share.scope.jaxpr.outvars),
        known=tuple(their_outs[n] for n in (*range(parts.num_carry), *given)),
    )
    stacked = ProgramPiece(program=whole, wanted=tuple(atoms[n] for n in beside))
    if not slots.stored.keys().isdisjoint(enter.reads | leave.reads | stacked.reads):
        raise UserError(
            f"stage={stages}: parameters of the layers are read before or behind them too, for rows of the "
            f"batch, and no stage has those of all layers, at {ours.where}"
        )
    return LayerCut(
        enter=enter,
        layers=ProgramPiece(
            program=whole,
            wanted=tuple(outs[n] for n in (*range(parts.num_carry), *given)),
            at=of_length(ours, 1 if slots.singly else slots.each),
            operands=(*travel, *beside),
        ),
        stacked=stacked,
        beside=tuple(ours.ins[n] for n in beside),
        leave=leave,
        items=tuple(items),
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
