"""A program over the whole batch, read as what each part does of it: equation by equation, by rules.

Sums over the examples are left incomplete as long as what is done to them is linear. Where one has to be
complete, the graph of a whole program has a total, which ends a pass over the parts; the graph of a loop's or
call's body leaves the rest for later, to be computed when the sums of all parts are there (`Body`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend import core

from ...program.around import at_once
from ...program.jaxpr import call_body, context_of, is_extended
from ...program.lines import is_ours, line_of
from .derivatives import EXCHANGES, uneven_call, why_uneven, works_in
from .prepared import OfData
from .values import (
    LATE,
    MIXED,
    SUM,
    Array,
    Form,
    Held,
    Kind,
    NotInParts,
    Task,
    evaluate,
    is_alike,
    learns,
    needed,
)

# Reads one equation: its results, given its operands.
Rule = Callable[["PartGraph", core.JaxprEqn, list[Held]], list[Held]]


class Reading(NamedTuple):
    """How a program is read: the rule of an equation, and a part's slice of what is shared along an axis."""

    rule: Callable[[core.JaxprEqn], Rule]
    slice: Callable[[PartGraph, Held, int, int], Held]


class PartGraph:
    """What is done with each of `parts` parts. `cut` says that sums may be completed here, between passes.

    `reading` says how equations are read; `ties` are those whose maximum over the examples is learnt from.
    `of_data` has what is made of the data alone before the parts.
    """

    def __init__(
        self,
        parts: int,
        reading: Reading,
        *,
        cut: bool,
        ties: frozenset[int] = frozenset(),
        of_data: OfData | None = None,
    ) -> None:
        self.parts = parts
        self.of_data = of_data
        self.reading = reading
        self.cut = cut
        self.ties = ties
        self.ops: list[Task] = []
        # Sums of a body that its later work needs complete, and what stands for them there.
        self.exports: dict[Held, Held] = {}
        self.calls: list[core.JaxprEqn] = []
        # What parts compute with parameters, as the program has it, and which of its operands these make.
        self._learning: list[core.JaxprEqn] = []
        self._learnt: dict[int, tuple[core.JaxprEqn, list[bool]]] = {}
        # Lines of what gives nothing, such as a print, which parts leave out.
        self.silent: list[str] = []
        # Why manual regions are read as what all their devices do together.
        self.opened: list[NotInParts] = []
        self._made: dict[Hashable, Held] = {}
        self._at: core.JaxprEqn | None = None

    # Operations

    def emit(
        self,
        run: Callable[..., Sequence[Array]] | None,
        ins: Sequence[Held],
        outs: Sequence[Held],
        eqn: Any = None,
    ) -> list[Held]:
        """Add an operation; what it gives needs what its operands need."""
        ins = list(ins)
        if any(value.kind is Kind.LATE for value in ins):
            if any(out.kind not in (Kind.SHARED, Kind.LATE) for out in outs):
                raise NotInParts("a sum over the examples comes back to them inside of a loop or call")
            ins = [self.complete(value) if value.inside else value for value in ins]
            for out in outs:
                out.form = LATE
        stops = eqn is not None and eqn.primitive.name == "stop_gradient"
        uneven = None if stops else next((value.uneven for value in ins if value.uneven is not None), None)
        if uneven is not None and run is not None and any(is_share(out) for out in outs):
            raise uneven
        where = self.where(self._at) if run is None and self._at is not None else ""
        op = Task(run, ins, list(outs), eqn, where)
        own = any(value.kind in (Kind.EXAMPLES, Kind.SUM) for value in (*ins, *outs))
        inside = run is not None and (own or any(value.inside for value in ins))
        for out in outs:
            out.heavy = any(value.heavy for value in ins)
            out.inside = inside and out.kind is Kind.SHARED
            out.level = max((value.level for value in ins), default=0) + (run is None and out.heavy)
            out.count = max((value.count for value in ins), default=0) + (run is None and not out.heavy)
            out.uneven = (uneven or out.uneven) if run is not None and learns(out) else None
            out.op = op
        self.ops.append(op)
        return list(outs)

    def bind(
        self,
        eqn: core.JaxprEqn,
        ins: Sequence[Held],
        forms: Sequence[Form],
        /,
        combine: str = "sum",
        **changed: Any,
    ) -> list[Held]:
        """Add `eqn` itself, with some of its parameters `changed`; `forms` are those of its results."""
        outs = [
            dataclasses.replace(value_of(var), form=form, combine=combine)
            for var, form in zip(eqn.outvars, forms, strict=True)
        ]
        return self.emit(_bound(eqn, changed), ins, outs, eqn)

    def constant(self, array: Any, aval: Any = None) -> Held:
        """Return an array that is known now, or of a trace around this one."""
        dtype = array.dtype if aval is None else aval.dtype
        return self.emit(lambda _: [array], [], [Held(tuple(np.shape(array)), dtype)])[0]

    def mixed(self, eqn: core.JaxprEqn, why: NotInParts) -> list[Held]:
        """Return results of `eqn` that parts cannot follow."""
        return [dataclasses.replace(value_of(var), form=MIXED, why=why) for var in eqn.outvars]

    # Bringing a value to the form that an operation wants

    def bring(self, value: Held, form: Form) -> Held:
        """Return `value` in `form`."""
        if form.kind is Kind.SUM:
            return self.sum(value)
        if form.kind is Kind.EXAMPLES:
            return self.moved(value, form) if form.is_moved else self.rows(value, form.axis, form.pre)
        return self.complete(value) if form.kind is Kind.LATE else self.shared(value)

    def shared(self, value: Held) -> Held:
        """Return what is the same in all parts, completing a sum."""
        if value.kind in (Kind.SHARED, Kind.LATE):
            return value
        return self.complete(value)

    def complete(self, value: Held) -> Held:
        """Return a value as it is once all parts are done."""
        if value.kind is Kind.LATE or (value.kind is Kind.SHARED and not value.inside):
            return value
        if value.kind is Kind.EXAMPLES:
            raise NotInParts("one example's value is used for all examples")
        if value.inside and is_extended(value.dtype):
            return self._key(value)
        if value.inside:
            value = self.sum(value)
        if self.cut:
            return self._once(
                ("total", value), lambda: self.emit(None, [value], [Held(value.shape, value.dtype)])[0]
            )
        if value.combine not in ("sum", "or", "and"):
            raise NotInParts(f"the {value.combine} over the examples is used inside of a loop or call")
        if value not in self.exports:
            self.exports[value] = Held(value.shape, value.dtype, LATE, heavy=value.heavy)
        return self.exports[value]

    def _key(self, value: Held) -> Held:
        """Return a random key, the same in all parts, complete: its numbers can be added up."""
        impls: list[Any] = []

        def numbers(key: Array) -> Array:
            impls.append(jax.random.key_impl(key))
            return jax.random.key_data(key)

        aval = jax.eval_shape(numbers, jax.ShapeDtypeStruct(value.shape, value.dtype))

        def make() -> Held:
            own = Held(aval.shape, aval.dtype)
            (data,) = self.emit(lambda _, key: [jax.random.key_data(key)], [value], [own])

            def wrapped(_: Any, data: Array) -> list[Array]:
                return [jax.random.wrap_key_data(data, impl=impls[0])]

            return self.emit(wrapped, [self.complete(data)], [Held(value.shape, value.dtype)])[0]

        return self._once(("key", value), make)

    def sum(self, value: Held) -> Held:
        """Return a value as a sum over parts: what all share counts in the first part only."""
        if value.kind is Kind.SUM and value.combine == "sum":
            return value
        whole = self.shared(value)
        combine = "or" if whole.dtype == jnp.bool_ else "sum"

        def first(index: Any, array: Array) -> list[Array]:
            return [jnp.where(index == 0, array, jnp.zeros_like(array))]

        return self._once(
            ("sum", whole),
            lambda: self.emit(first, [whole], [Held(whole.shape, whole.dtype, SUM, combine=combine)])[0],
        )

    def rows(self, value: Held, axis: int, pre: int) -> Held:
        """Return a part's slice of a value along `axis`."""
        if value.kind is Kind.EXAMPLES:
            if value.form.is_moved:
                raise NotInParts("examples that a sort has moved meet some that it has not")
            if (value.form.axis, value.form.pre) != (axis, pre):
                raise NotInParts("examples along one dimension meet examples along another")
            return value
        whole = self.shared(value)
        if whole.kind is Kind.LATE:
            raise NotInParts("a sum over the examples comes back to them inside of a loop or call")
        if whole.shape[axis] % (pre * self.parts):
            raise NotInParts(f"a dimension of {whole.shape[axis]} does not come in {self.parts} parts")
        return self._once(("rows", whole, axis, pre), lambda: self.reading.slice(self, whole, axis, pre))

    def moved(self, value: Held, form: Form) -> Held:
        """Return a value that is alike for all examples as one of each, in the order of `form`."""
        if value.form == form:
            return value
        if value.kind is Kind.EXAMPLES:
            raise NotInParts("examples in the order of one sort meet some in another order")
        whole = self.shared(value)
        if whole.kind is Kind.LATE or not is_alike(whole, form.axis):
            raise NotInParts("examples that a sort has moved meet what lies by their place among all")
        rows = self.rows(whole, form.axis, form.pre)
        out = Held(rows.shape, rows.dtype, form, whole=whole)
        return self.emit(lambda _, array: [array], [rows], [out])[0]

    def small(self, shape: Sequence[int], axis: int) -> tuple[int, ...]:
        """Return a shape with one dimension as a part has it."""
        return tuple(size // self.parts if d == axis else size for d, size in enumerate(shape))

    def _once(self, key: Hashable, make: Callable[[], Held]) -> Held:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    # Reading

    def read(self, closed: core.ClosedJaxpr, ins: Sequence[Held]) -> list[Held]:
        """Read a program on `ins` and return its results."""
        jaxpr = closed.jaxpr
        values: dict[Any, Held] = {
            var: self.constant(const, var.aval)
            for var, const in zip(jaxpr.constvars, closed.consts, strict=True)
        }
        values.update(zip(jaxpr.invars, ins, strict=True))

        def read(atom: Any) -> Held:
            if isinstance(atom, core.Literal):
                aval: Any = atom.aval
                return self.constant(np.asarray(atom.val, aval.dtype), aval)
            return values[atom]

        for eqn in jaxpr.eqns:
            values.update(zip(eqn.outvars, self.equation(eqn, [read(a) for a in eqn.invars]), strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def equation(self, eqn: core.JaxprEqn, ins: list[Held]) -> list[Held]:
        """Read one equation; what parts cannot follow is mixed, and an error where it is needed."""
        rule = self.reading.rule(eqn)
        body = call_body(eqn) if rule is inlined else None
        if body is not None:
            self.calls.append(eqn)
            try:
                return self.read(body, ins)
            finally:
                self.calls.pop()
        if eqn.primitive.name == "select_n" and (chosen := ins[0].numbers) is not None:
            first = int(chosen[:1].sum())
            if (chosen == first).all() and ins[1 + first].shape == value_of(eqn.outvars[0]).shape:
                # What is not taken need not come in parts.
                return [ins[1 + first]]
        for value in ins:
            if value.kind is Kind.MIXED:
                assert value.why is not None
                return self.mixed(eqn, value.why)
        self._at = eqn
        if not eqn.outvars:
            self.silent.append(f"{eqn.primitive.name} at {self.where(eqn)}")
        light = self.of_data is not None and not any(value.heavy for value in ins)
        try:
            whole = all(value.kind is Kind.SHARED for value in ins)
            if not whole and any(value.heavy for value in ins):
                self._learning.append(eqn)
                _, before = self._learnt.get(id(eqn), (eqn, [False] * len(ins)))
                learnt = [a or b.heavy for a, b in zip(before, ins, strict=True)]
                self._learnt[id(eqn)] = eqn, learnt
            outs = self.whole(eqn, ins) if whole else rule(self, eqn, ins)
        except NotInParts as refused:
            why = refused if refused.where else NotInParts(refused.reason, self.where(eqn))
            outs = [value_of(var) for var in eqn.outvars]
            if not light or self.of_data is None or not self.of_data.prepared(outs, why):
                return self.mixed(eqn, why)
        if light and self.of_data is not None:
            self.of_data.add(eqn, ins, outs)
        return outs

    def whole(self, eqn: core.JaxprEqn, ins: list[Held]) -> list[Held]:
        """Add `eqn` as it stands, on shared values."""
        ins = [self.shared(value) for value in ins]
        totals = any(value.level or value.count for value in ins)
        if self.cut and totals and any(value.inside for value in ins):
            # Beside sums that are complete; else it would take a pass only to have it.
            ins = [self.complete(value) for value in ins]
        outs = self.emit(_bound(eqn, {}), ins, [value_of(var) for var in eqn.outvars], eqn)
        learnt = [value.heavy for value in ins]
        written = uneven_call(eqn, {id(eqn): learnt}) if any(learnt) else None
        if written is not None:
            for out in outs:
                out.uneven = NotInParts(why_uneven(written), self.where(written))
        return outs

    @functools.cached_property
    def is_even(self) -> bool:
        """Whether the gradient of a multiple is that multiple: rounding and clipping are not linear in what
        comes back, and small float16 gradients are nothing.
        """
        learnt = {number: operands for number, (_, operands) in self._learnt.items()}
        halves = any(out.heavy and out.dtype == jnp.float16 for op in self.ops for out in op.outs)
        return not halves and all(
            uneven_call(eqn, learnt) is None and not works_in(jnp.float16, eqn) for eqn in self._learning
        )

    def where(self, eqn: core.JaxprEqn) -> str:
        """Return the user's lines of an equation: of the outermost call around it, and its own.

        A jitted function's trace is kept with the lines of its first call.
        """
        lines = [line_of(one) for one in (*self.calls, eqn)]
        lines = [line for line in lines if ":" in line and not is_ours(line)]
        return " in ".join(dict.fromkeys([lines[-1], lines[0]])) if lines else ""

    def body(
        self,
        closed: core.ClosedJaxpr,
        ins: Sequence[Held],
        shift: Sequence[int] | None = None,
        reading: Reading | None = None,
    ) -> Body:
        """Read what a loop, branch or call runs, on values of the forms of `ins`.

        `shift` are the dimensions that each operand loses on the way in, as a loop takes the first; `reading`
        is this graph's if not given.
        """
        inner = PartGraph(self.parts, reading or self.reading, cut=False)
        inner.calls, inner.silent, inner._learnt = list(self.calls), self.silent, self._learnt
        values = []
        for number, (var, outer) in enumerate(zip(closed.jaxpr.invars, ins, strict=True)):
            lost = shift[number] if shift else 0
            form = (
                outer.form._replace(axis=outer.form.axis - lost)
                if outer.kind is Kind.EXAMPLES
                else outer.form
            )
            values.append(
                dataclasses.replace(
                    value_of(var), form=form, heavy=outer.heavy, combine=outer.combine, uneven=outer.uneven
                )
            )
        outs = inner.read(closed, values)
        for out in outs:
            if out.kind is Kind.MIXED:
                assert out.why is not None
                raise out.why
            if out.kind is Kind.SUM and out.combine != "sum":
                raise NotInParts(f"the {out.combine} over the examples is taken inside of a loop or call")
        return Body(graph=inner, ins=values, outs=outs)


@dataclasses.dataclass(kw_only=True)
class Body:
    """A program read on values of given forms; what needs its sums complete is for `later`."""

    graph: PartGraph
    ins: list[Held]
    outs: list[Held]

    def bring(self, forms: Sequence[Form]) -> None:
        """Bring the results to the given forms."""
        self.outs = [self.graph.bring(value, form) for value, form in zip(self.outs, forms, strict=True)]

    @property
    def exports(self) -> list[Held]:
        """The sums that are needed complete."""
        return list(self.graph.exports)

    @property
    def leaves(self) -> list[Held]:
        """What stands for them once they are."""
        return list(self.graph.exports.values())

    def run(self, index: Any, targets: Sequence[Held], known: Mapping[Held, Array]) -> list[Array]:
        """Return the arrays of `targets` in part `index`."""
        return evaluate(self.graph.ops, targets, known, index)

    def takes(self, targets: Sequence[Held]) -> set[Held]:
        """Return the inputs, and the leaves, that `targets` need."""
        return needed(targets)[1]


def inlined(graph: PartGraph, eqn: core.JaxprEqn, ins: list[Held]) -> list[Held]:
    """Stand for calls whose equations are read in their place."""
    raise AssertionError(eqn.primitive.name)


def is_share(value: Held) -> bool:
    """Whether parts hold their own of a value that a gradient goes through."""
    return value.kind is not Kind.SHARED and learns(value)


def value_of(var: Any) -> Held:
    """Return a shared value of a variable's shape and type."""
    return Held(tuple(getattr(var.aval, "shape", ())), getattr(var.aval, "dtype", None))


def formed(var: Any, form: Form, *given: Held) -> Held:
    """Return a value of a variable in `form`, which each of some bodies gives as its result `given`."""
    value = value_of(var)
    value.form = form
    value.uneven = next((one.uneven for one in given if one.uneven is not None), None)
    return value


def one_of(ins: Sequence[Held]) -> Held:
    """Return the first operand that holds examples."""
    for value in ins:
        if value.kind is Kind.EXAMPLES:
            return value
    raise NotInParts("a sum over the examples is used before it is complete")


def _bound(eqn: core.JaxprEqn, changed: Mapping[str, Any]) -> Callable[..., Sequence[Array]]:
    params = {**eqn.primitive.get_bind_params(eqn.params), **changed}

    def run(_: Any, *arrays: Array) -> Sequence[Array]:
        with context_of(eqn):
            found = eqn.primitive.bind(*arrays, **params)
        return found if eqn.primitive.multiple_results else [found]

    return run


# What depends on the device, or is known within a manual region only.
_ON_DEVICES = EXCHANGES | {"axis_index", "pvary", "shard_map"}


def known_now(value: Held, most: int = 1 << 20) -> np.ndarray | None:
    """Return a shared array that depends on nothing given, or None; `most` are its elements."""
    found = _known_now(value, most)
    return None if found is None or jnp.issubdtype(found.dtype, jax.dtypes.extended) else np.asarray(found)


def _known_now(value: Held, most: int) -> Any:
    op = value.op
    if op is None or op.run is None or value.kind is not Kind.SHARED or np.prod(value.shape) > most:
        return None
    if op.eqn is not None and op.eqn.primitive.name in _ON_DEVICES:
        return None
    ins = [_known_now(one, most) for one in op.ins]
    if any(one is None for one in ins):
        return None
    with at_once():
        found = op.run(None, *ins)[op.outs.index(value)]
    return None if isinstance(found, Tracer) else found
