"""A part of a loss cut at its layers: what goes into them, the layers of a stage, and what comes after.

Several stacks of layers are cut one behind another: what is behind one leads into the next. Two programs are
cut, which are one but for the number of rows: of a microbatch, for the layers, and of a stage's share of its
rows, for what is before and behind them.
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
from .layers import behind, dependent, is_number, stacked_parameters, stored_as, walking
from .slots import Slots
from .stream import CARRIED, CONSTANT, GIVEN, PASSED, Travelling


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LayerCut:
    """A part's program in pieces, for one stage of several: those of one stack of layers.

    enter: of a share of the rows, what travels into the layers.
    layers: of all rows of a microbatch, what a chunk's layers make of what is carried in, and give besides;
      one layer where they run one at a time.
    leave: of a share, what enters the next stack of layers, behind the last what the whole program gives.
    stacked: what is scanned over beside parameters, for all layers, with its named dimensions (`beside`).
    items: what travels: constants and what is carried, as layers take them; then what they give besides, and
      what is passed by them.
    """

    enter: ProgramPiece
    layers: ProgramPiece
    leave: ProgramPiece
    stacked: ProgramPiece
    beside: tuple[Any, ...]
    items: tuple[Travelling, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _CutStack:
    """One stack of layers in both programs.

    `taken` are the numbers of its operands that travel, `beside` of those that are walked beside parameters,
    `given` of its results that are read behind it, all that is carried first.
    """

    slots: Slots
    ours: Equation
    theirs: Equation
    constants: tuple[int, ...]
    carried: tuple[int, ...]
    beside: tuple[int, ...]
    given: tuple[int, ...]

    @property
    def taken(self) -> tuple[int, ...]:
        return (*self.constants, *self.carried)

    @property
    def enters(self) -> tuple[Any, ...]:
        """What it takes, in the program of a share."""
        return tuple(self.theirs.eqn.invars[n] for n in self.taken)

    @property
    def ends(self) -> tuple[Any, ...]:
        """What it gives, in the program of a share."""
        return tuple(self.theirs.eqn.outvars[n] for n in self.given)


def cut_at_layers(
    share: Program,
    whole: Program,
    sharers: int,
    stacks: Sequence[Slots],
    params: int,
    trained: Sequence[int],
    data: Sequence[int],
) -> tuple[LayerCut, ...]:
    """Cut the programs of a share of a microbatch's rows, and of all of them, at each of the `stacks`.

    The rows are in the shares of so many `sharers`. The first `params` arguments are parameters; `trained`
    are the numbers of those that are trained, `data` of the arguments that hold rows, and of the part's
    number.

    Raises UserError if a stage's layers cannot be had by themselves.
    """
    by_params, by_data = dependent(whole, trained), dependent(whole, data)
    found: list[_CutStack] = []
    for slots in stacks:
        ours, theirs = (walking(one, params, slots.stored.keys()) for one in (whole, share))
        by_params |= behind(whole, [one.ours for one in found])
        found.append(_stack(whole, slots, ours, theirs, params, by_params & by_data))
    passed = _passed(share, found)
    enter = ProgramPiece(program=share, wanted=found[0].enters)
    cuts: list[LayerCut] = []
    for n, one in enumerate(found):
        last = n == len(found) - 1
        wanted = share.scope.jaxpr.outvars if last else (*found[n + 1].enters, *passed[n + 1])
        leave = ProgramPiece(program=share, wanted=tuple(wanted), known=(*one.ends, *passed[n]))
        atoms = one.ours.eqn.invars
        cut = LayerCut(
            enter=enter,
            layers=ProgramPiece(
                program=whole,
                wanted=tuple(one.ours.eqn.outvars[n] for n in one.given),
                at=of_length(one.ours, 1 if one.slots.singly else one.slots.each),
                operands=(*one.taken, *one.beside),
            ),
            stacked=ProgramPiece(program=whole, wanted=tuple(atoms[n] for n in one.beside)),
            beside=tuple(one.ours.ins[n] for n in one.beside),
            leave=leave,
            items=_items(one, sharers, found[:n], passed[n], by_data),
        )
        cuts.append(cut)
        enter = leave
    _check_reads(found, cuts, whole, params)
    return tuple(cuts)


def _stack(
    whole: Program, slots: Slots, ours: Equation, theirs: Equation, params: int, learns: set[Any]
) -> _CutStack:
    """Return a stack; of its constants those travel that are among what `learns`, others are made again."""
    parts, atoms, outs = scan_parts(ours.eqn), ours.eqn.invars, ours.eqn.outvars
    consts, first_xs = parts.num_consts, parts.num_consts + parts.num_carry
    used = _used_outside(whole, ours)
    constants = enumerate(atoms[:consts])
    return _CutStack(
        slots=slots,
        ours=ours,
        theirs=theirs,
        constants=tuple(n for n, atom in constants if not is_number(atom) and atom in learns),
        carried=tuple(range(consts, first_xs)),
        beside=tuple(n for n in range(first_xs, len(atoms)) if stored_as(whole, atoms[n], params) is None),
        given=(
            *range(parts.num_carry),
            *(n for n in range(parts.num_carry, len(outs)) if outs[n] in used),
        ),
    )


def _passed(share: Program, found: Sequence[_CutStack]) -> list[tuple[Any, ...]]:
    """Return of each stack what others before it give that is read behind it."""
    passed: list[tuple[Any, ...]] = []
    for n in range(len(found)):
        before = [end for one in found[:n] for end in one.ends]
        read: set[Any] = set()
        for later in range(n, len(found)):
            last = later == len(found) - 1
            wanted = share.scope.jaxpr.outvars if last else found[later + 1].enters
            known = [end for one in found[: later + 1] for end in one.ends]
            read |= ProgramPiece(program=share, wanted=tuple(wanted), known=tuple(known)).reads_known
        passed.append(tuple(end for end in before if end in read))
    return passed


def _items(
    one: _CutStack, sharers: int, earlier: Sequence[_CutStack], passed: Sequence[Any], by_data: set[Any]
) -> tuple[Travelling, ...]:
    ours, theirs, where = one.ours.eqn, one.theirs.eqn, one.ours.where

    def travelling(kind: str, atom: Any, dims: Any, of_share: Any, out: Any) -> Travelling:
        rows = _rows_of(atom.aval.shape, of_share.aval.shape, sharers, where)
        return Travelling(
            shape=tuple(atom.aval.shape),
            dtype=atom.aval.dtype,
            dims=dims,
            kind=kind,
            rows=rows,
            # What has no rows and depends on them is a sum over them, which the proof leaves incomplete.
            summed=rows is None and out in by_data,
        )

    def operand(kind: str, n: int, out: Any) -> Travelling:
        return travelling(kind, ours.invars[n], one.ours.ins[n], theirs.invars[n], out)

    def result(kind: str, of: _CutStack, n: int) -> Travelling:
        out = of.ours.eqn.outvars[n]
        return travelling(kind, out, of.ours.outs[n], of.theirs.eqn.outvars[n], out)

    found = [operand(CONSTANT, n, ours.invars[n]) for n in one.constants]
    found += [operand(CARRIED, n, out) for n, out in zip(one.carried, ours.outvars, strict=False)]
    found += [result(GIVEN, one, n) for n in one.given[len(one.carried) :]]
    found += [
        result(PASSED, of, n)
        for of in earlier
        for n, end in zip(of.given, of.ends, strict=True)
        if end in passed
    ]
    return tuple(found)


def _check_reads(found: Sequence[_CutStack], cuts: Sequence[LayerCut], program: Program, params: int) -> None:
    """Raise UserError if parameters of layers are read by anything but those layers."""
    for one, own in zip(found, cuts, strict=True):
        pieces = [piece for cut in cuts for piece in (cut.enter, cut.leave, cut.stacked)]
        pieces += [cut.layers for cut in cuts if cut is not own]
        if any(not one.slots.stored.keys().isdisjoint(piece.reads) for piece in pieces):
            nearest = _nearest(one, program, params)
            raise UserError(
                f"stage={one.slots.stages}: parameters of the layers are read before or behind them too, for "
                f"rows of the batch, and no stage has those of all layers, at {one.ours.where}{nearest}"
            )


def _nearest(one: _CutStack, program: Program, params: int) -> str:
    """Return what is nearest of layers that run several times, and why they are not one loop, or nothing."""
    own = one.slots.stored.keys()
    runs = [
        other
        for other in program.scope.equations
        if other.primitive == "scan" and not own.isdisjoint(stacked_parameters(program, other, params))
    ]
    if len(runs) < 2:
        return ""
    if any(not behind(program, [run]).isdisjoint(_variables(other)) for run in runs for other in runs):
        return f"; they run {len(runs)} times, each on what the run before gives: nearest is no stage"
    types = dict.fromkeys(str(atom.aval.dtype) for run in runs for atom in _carried(run))
    if len(types) > 1:
        return f"; they run {len(runs)} times, in {' and '.join(types)}: nearest is one type for all of them"
    return f"; they run {len(runs)} times, not alike: nearest is one loop over the layers that does all of it"


def _variables(layers: Equation) -> list[Any]:
    return [atom for atom in layers.eqn.invars if not is_number(atom)]


def _carried(layers: Equation) -> Sequence[Any]:
    """Return what layers hand on that is no whole number."""
    carry: list[Any] = layers.eqn.outvars[: scan_parts(layers.eqn).num_carry]
    return [atom for atom in carry if atom.aval.dtype.kind not in "iub"]


def _used_outside(program: Program, layers: Equation) -> set[Any]:
    atoms = [a for one in program.scope.equations if one is not layers for a in one.eqn.invars]
    atoms += program.scope.jaxpr.outvars
    return {atom for atom in atoms if not isinstance(atom, core.Literal)}


def _rows_of(whole: tuple[int, ...], share: tuple[int, ...], sharers: int, where: str) -> int | None:
    """Return the dimension of what travels that holds rows: a share has fewer."""
    places = [n for n, (a, b) in enumerate(zip(whole, share, strict=True)) if a != b]
    if not places:
        return None
    if len(places) > 1 or whole[places[0]] != sharers * share[places[0]]:
        raise UserError(
            f"rows of the batch cannot be told in what the layers carry through stages, at {where}"
        )
    return places[0]
