"""Layers that a loop takes by number, walked as a scan walks them.

``lax.fori_loop(0, layers, lambda n, x: layer(x, w[n]), x)`` and a scan over ``jnp.arange(layers)`` read one
layer of a stacked parameter in each turn, and the program says which one: the numbers come of a counter or of
numbers that are walked, and of nothing else. Such a parameter becomes one that the scan walks. The values are
the same; the dimension of layers is known for one, a layer is gathered as it is needed, and gradients come a
layer at a time, where each turn added to those of all layers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.extend import core

from ..jaxpr import Traced, call_body, context_of, run, run_around, scan_parts
from ..layers import is_layer_scan
from ..lines import line_of
from ..primitives import Trait, primitives
from .flat import is_opened
from .lookups import TakenLayers, Turns, evaluated, fit, steps_of

_CHECKPOINTS = primitives(Trait.CHECKPOINT)


def walked(traced: Traced) -> Traced:
    """Return `traced` with parameters that loops over layers take by number as what these walk.

    The same arguments, results and values. A program without such a loop is returned as it is.
    """
    params = len(jax.tree.leaves(traced.args[0])) if traced.args else 0
    lines: dict[str, None] = {}
    origins = [_Sources(params=n < params, data=n >= params) for n in range(len(traced.jaxpr.in_avals))]
    if not _has_numbered(traced.jaxpr, origins):
        return traced
    shapes = [
        jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=getattr(aval, "weak_type", False))
        for aval in traced.jaxpr.in_avals
    ]
    jaxpr = jax.make_jaxpr(lambda *args: _run(traced.jaxpr, args, origins, lines))(*shapes)
    note = (
        f"layers that a loop takes by number are walked by it: {', '.join(lines)}; recognise= without "
        "'layers' leaves them as they are written"
    )
    return dataclasses.replace(traced, jaxpr=jaxpr, notes=(*traced.notes, note))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sources:
    """Whether a value depends on parameters and on data, and the whole numbers that it is, if known."""

    params: bool = False
    data: bool = False
    numbers: Turns | None = None


_Read = Callable[[Any], _Sources]


def _origins(closed: core.ClosedJaxpr, given: Sequence[_Sources]) -> tuple[dict[Any, _Sources], _Read]:
    """Return where values of a program come from, filled as it is gone through, and what reads them."""
    known: dict[Any, _Sources] = dict(zip(closed.jaxpr.invars, given, strict=True))
    for var, const in zip(closed.jaxpr.constvars, closed.consts, strict=True):
        whole = isinstance(const, (jax.Array, np.ndarray)) and const.ndim == 1 and const.dtype.kind == "i"
        known[var] = _Sources(numbers=np.asarray(const) if whole else None)
    return known, lambda atom: _Sources() if isinstance(atom, core.Literal) else known[atom]


def _told(eqn: core.JaxprEqn, ins: Sequence[_Sources]) -> _Sources:
    numbers = None
    params = eqn.params
    if eqn.primitive.name == "iota" and not eqn.invars and len(params["shape"]) == 1:
        counted = np.arange(params["shape"][0])
        dtype = np.dtype(params["dtype"])
        numbers = counted if dtype.kind == "i" and counted.size and fit(counted, dtype) else None
    return _Sources(params=any(o.params for o in ins), data=any(o.data for o in ins), numbers=numbers)


def _inside(eqn: core.JaxprEqn) -> core.ClosedJaxpr | None:
    """Return the program of a call that is gone into."""
    return call_body(eqn) if is_opened(eqn) or eqn.primitive.name in _CHECKPOINTS else None


def _has_numbered(closed: core.ClosedJaxpr, given: Sequence[_Sources]) -> bool:
    known, origin = _origins(closed, given)
    for eqn in closed.jaxpr.eqns:
        ins = [origin(atom) for atom in eqn.invars]
        body = _inside(eqn)
        if is_layer_scan(eqn) and _NumberedLoop.of(eqn, ins).steps:
            return True
        if body is not None and _has_numbered(body, ins):
            return True
        known.update(dict.fromkeys(eqn.outvars, _told(eqn, ins)))
    return False


def _run(
    closed: core.ClosedJaxpr, args: Sequence[Any], given: Sequence[_Sources], lines: dict[str, None]
) -> list[Any]:
    """Run a program, its loops that take layers by number as ones that walk them; note their `lines`."""
    known, origin = _origins(closed, given)
    jaxpr = closed.jaxpr
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*closed.consts, *args], strict=True))

    def value(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else values[atom]

    for eqn in jaxpr.eqns:
        ins, own = [value(atom) for atom in eqn.invars], [origin(atom) for atom in eqn.invars]
        body = _inside(eqn)
        loop = _NumberedLoop.of(eqn, own) if is_layer_scan(eqn) else None
        with context_of(eqn):
            if loop is not None and loop.steps:
                lines[line_of(eqn)] = None
                outs = loop.run(ins)
            elif body is not None and _has_numbered(body, own):
                inner = functools.partial(_run, body, given=own, lines=lines)
                outs = run_around(eqn, ins, inner)
            else:
                outs = run(eqn, ins)
        values.update(zip(eqn.outvars, outs, strict=True))
        known.update(dict.fromkeys(eqn.outvars, _told(eqn, own)))
    return [value(atom) for atom in jaxpr.outvars]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["value"], meta_fields=["turns"])
@dataclasses.dataclass(frozen=True, kw_only=True)
class _TurnNumber:
    """A whole number of a turn, which is `turns` in each."""

    value: Any
    turns: tuple[int, ...]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["layers"], meta_fields=["steps"])
@dataclasses.dataclass(frozen=True, kw_only=True)
class _LayersByStep:
    """What stands for a stacked parameter in a turn: one of its layers for each of the `steps`."""

    layers: tuple[Any, ...]
    steps: tuple[TakenLayers, ...]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["value"], meta_fields=[])
@dataclasses.dataclass(frozen=True, kw_only=True)
class _OneLayer:
    """A layer with a first dimension of 1, which `value` does without."""

    value: Any


def _plain(value: Any) -> Any:
    if isinstance(value, _OneLayer):
        return lax.expand_dims(value.value, [0])
    return value.value if isinstance(value, _TurnNumber) else value


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _NumberedLoop:
    """A scan over layers: the numbers that its inputs are in each turn, and what is taken by such.

    `steps` has, by the place of a constant, in what steps its layers are taken, if that is all it is for.
    """

    eqn: core.JaxprEqn
    numbers: Sequence[Turns | None]
    steps: Mapping[int, tuple[TakenLayers, ...]]

    @classmethod
    def of(cls, eqn: core.JaxprEqn, ins: Sequence[_Sources]) -> _NumberedLoop:
        parts, length = scan_parts(eqn), eqn.params["length"]
        consts, first_xs = parts.num_consts, parts.num_consts + parts.num_carry
        numbers: list[Turns | None] = [None] * len(ins)
        for n in range(first_xs, len(ins)):
            numbers[n] = ins[n].numbers
        for n in range(consts, first_xs):
            numbers[n] = _counted(eqn, parts.body.jaxpr, consts, n, length)
        stacks = {
            n: {}
            for n, (var, own) in enumerate(zip(parts.body.jaxpr.invars[:consts], ins, strict=False))
            if own.params and not own.data and getattr(var.aval, "ndim", 0)
        }
        if not stacks or not any(one is not None for one in numbers):
            return cls(eqn=eqn, numbers=numbers, steps={})
        marks = {parts.body.jaxpr.invars[n]: n for n in stacks}
        left = {**stacks}
        _look(parts.body, numbers, [marks.get(var) for var in parts.body.jaxpr.invars], left)
        return cls(eqn=eqn, numbers=numbers, steps={n: tuple(own) for n, own in left.items() if own})

    def run(self, ins: Sequence[Any]) -> list[Any]:
        """Run the scan, which walks what it takes by number."""
        parts = scan_parts(self.eqn)
        consts, first_xs = parts.num_consts, parts.num_consts + parts.num_carry
        layers = {n: tuple(one.of(ins[n]) for one in steps) for n, steps in self.steps.items()}

        def turn(carry: list[Any], slices: tuple[list[Any], Any]) -> tuple[list[Any], list[Any]]:
            own, taken = slices
            given = [*ins[:consts], *carry, *own]
            for n, one in taken.items():
                given[n] = _LayersByStep(layers=one, steps=self.steps[n])
            for n, turns in enumerate(self.numbers):
                if turns is not None:
                    given[n] = _TurnNumber(value=given[n], turns=tuple(turns.tolist()))
            outs = [*map(_plain, _turn(parts.body, given))]
            return outs[: parts.num_carry], outs[parts.num_carry :]

        params = self.eqn.params
        end, rows = lax.scan(
            turn,
            list(ins[consts:first_xs]),
            (list(ins[first_xs:]), layers),
            length=params["length"],
            reverse=params["reverse"],
            unroll=params["unroll"],
        )
        return [*end, *rows]


def _counted(eqn: core.JaxprEqn, body: core.Jaxpr, consts: int, place: int, length: int) -> Turns | None:
    """Return what a carry is in each turn if it counts from a number that is written."""
    start, var, out = eqn.invars[place], body.invars[place], body.outvars[place - consts]
    aval: Any = var.aval
    if not isinstance(start, core.Literal) or aval.shape or aval.dtype.kind != "i":
        return None
    maker = next((one for one in body.eqns if out in one.outvars), None)
    if maker is None or maker.primitive.name != "add" or var not in maker.invars:
        return None
    step = next((atom for atom in maker.invars if isinstance(atom, core.Literal)), None)
    if step is None:
        return None
    turns = int(start.val) + int(step.val) * np.arange(length)
    if not fit(turns, aval.dtype):
        return None
    return turns[::-1] if eqn.params["reverse"] else turns


def _look(
    closed: core.ClosedJaxpr,
    numbers: Sequence[Turns | None],
    stacks: Sequence[int | None],
    left: dict[int, dict[TakenLayers, None]],
) -> list[Turns | None]:
    """Note in `left` how a turn takes what is at the places `stacks`, without what it does more with.

    Returns the numbers that the program's results are in each turn.
    """
    jaxpr = closed.jaxpr
    known: dict[Any, Turns | None] = dict(zip(jaxpr.invars, numbers, strict=True))
    places = {var: n for var, n in zip(jaxpr.invars, stacks, strict=True) if n is not None}
    length = next((len(one) for one in numbers if one is not None), 0)

    def number(atom: Any) -> Turns | None:
        return _written(atom, length) if isinstance(atom, core.Literal) else known.get(atom)

    for eqn in jaxpr.eqns:
        given = [number(atom) for atom in eqn.invars]
        own = [None if isinstance(atom, core.Literal) else places.get(atom) for atom in eqn.invars]
        body = _inside(eqn)
        if body is not None and any(one is not None for one in (*own, *given)):
            outs = _look(body, given, own, left)
        else:
            steps = None if own[:1] in ([], [None]) else steps_of(eqn, given)
            for at, place in enumerate(own):
                if place is None:
                    continue
                if at == 0 and steps is not None and place in left:
                    left[place][steps] = None
                else:
                    left.pop(place, None)
            outs = [evaluated(eqn, given)] * len(eqn.outvars)
        known.update(zip(eqn.outvars, outs, strict=True))
    for atom in jaxpr.outvars:
        if not isinstance(atom, core.Literal) and atom in places:
            left.pop(places[atom], None)
    return [number(atom) for atom in jaxpr.outvars]


def _turn(closed: core.ClosedJaxpr, inputs: Sequence[Any]) -> list[Any]:
    """Run a turn's program on inputs of which some are `_TurnNumber` or `_LayersByStep`."""
    jaxpr = closed.jaxpr
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*closed.consts, *inputs], strict=True))
    length = next((len(one.turns) for one in inputs if isinstance(one, _TurnNumber)), 0)

    def value(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else values[atom]

    def number(atom: Any) -> Turns | None:
        if isinstance(atom, core.Literal):
            return _written(atom, length)
        own = values[atom]
        return np.array(own.turns) if isinstance(own, _TurnNumber) else None

    def told(atom: Any) -> Any:
        """Return a value for a program within, which has to know written numbers, as `_look` does."""
        turns = _written(atom, length) if isinstance(atom, core.Literal) else None
        return value(atom) if turns is None else _TurnNumber(value=atom.val, turns=tuple(turns.tolist()))

    for eqn in jaxpr.eqns:
        body = _inside(eqn)
        ins = [value(atom) if body is None else told(atom) for atom in eqn.invars]
        with context_of(eqn):
            if body is not None and any(isinstance(one, (_TurnNumber, _LayersByStep)) for one in ins):
                outs = run_around(eqn, ins, functools.partial(_turn, body))
            elif ins and isinstance(ins[0], _LayersByStep):
                steps = steps_of(eqn, [number(atom) for atom in eqn.invars])
                layer = ins[0].layers[ins[0].steps.index(steps)]
                outs = [_OneLayer(value=layer) if eqn.primitive.name == "dynamic_slice" else layer]
            elif ins and isinstance(ins[0], _OneLayer) and _drops_first(eqn):
                outs = [ins[0].value]
            else:
                outs = list(run(eqn, [*map(_plain, ins)]))
                turns = evaluated(eqn, [number(atom) for atom in eqn.invars])
                if turns is not None:
                    outs = [_TurnNumber(value=outs[0], turns=tuple(turns.tolist()))]
        values.update(zip(eqn.outvars, outs, strict=True))
    return [value(atom) for atom in jaxpr.outvars]


def _written(atom: core.Literal, length: int) -> Turns | None:
    """Return a whole number that is written, in each turn; None where no turns are known."""
    aval: Any = atom.aval
    whole = length > 0 and not aval.shape and aval.dtype.kind in "ib"
    return np.full(length, int(atom.val)) if whole else None


def _drops_first(eqn: core.JaxprEqn) -> bool:
    """Whether an equation takes the first dimension, of 1, away and does nothing else."""
    name, given, out = eqn.primitive.name, eqn.invars[0].aval, eqn.outvars[0].aval
    drops = tuple(eqn.params["dimensions"] or ()) == (0,) if name == "squeeze" else name == "reshape"
    return drops and out.shape == given.shape[1:]  # type: ignore[attr-defined]
