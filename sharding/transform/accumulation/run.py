"""A loss worked through in parts, with the value, the aux and the gradients that the whole batch gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding

from ..pipeline.staged import Staged
from ..pipeline.watch import BEHIND_SUMS, NOWHERE, are_finite
from .levels import Levels, Sweep, tail
from .proof import InParts
from .region import RowRegion
from .shared import put_together
from .values import Array, Held, Kind, Task, evaluate

# Gives a function of (parameters, a part of the batch, a state if there is one, more) with a plan's passes
# over it; the flag says whether its gradient is taken.
Planned = Callable[[Callable[..., Any], bool], Callable[..., Any]]

# Runs one part: (sums so far, gradients so far, its index, a call of the loss) to both grown, and rows.
_Part = Callable[[Any, Any, Array, "_Call"], tuple[Any, Any, Sequence[Array]]]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Call:
    """One call of a loss: its arguments, the arrays that are known of its program so far, and those made
    of the data ahead. `scale` is what comes back to the loss, 1 if not given.
    """

    args: tuple[Any, ...]
    known: dict[Held, Array]
    made: Sequence[Array] = ()
    cotangents: Sequence[Array] = ()
    scale: Array | None = None


class Run:
    """Runs what `in_parts` read, each function of a part `planned`; `whole` is the loss of all rows.

    `laid` says how the rows of parts lie, ``[parts, rows, ...]`` for each array of the batch and each that is
    prepared, where they move to their parts. With a `region` its devices work their own parts through, which
    follow one another. With stages (`staged`) a part is a stage's share of a microbatch, and `of_whole` is
    what was read of whole microbatches.
    """

    def __init__(
        self,
        read: InParts,
        planned: Planned,
        whole: Callable[[Any, Any], Any],
        region: RowRegion | None = None,
        staged: Staged | None = None,
        of_whole: InParts | None = None,
        laid: Sequence[NamedSharding] | None = None,
    ) -> None:
        self._laid = laid
        self._region = region
        self._staged, self._of_whole = staged, of_whole
        self._read = read
        self._whole = whole
        levels = read.levels
        passes = {*levels.counts, *levels.before, *levels.after, *levels.values}
        self._forward = {one: planned(self._function(_targets(one)), False) for one in passes}
        last = levels.last
        self._last = planned(self._function(_of_last(levels)), True) if last else None
        self._backward = {k: planned(self._function(self._above(k)), True) for k in levels.backward}

    def value(self, *args: Any) -> Any:
        """Return what the loss gives of (params, batch) or (params, batch, state)."""
        call = self._begin(args)
        for one in self._read.levels.counts:
            self._add(one, call)
        self._add_all("values", call)
        return self._result(call)

    @property
    def is_even(self) -> bool:
        """Whether the gradient of a multiple of the loss is that multiple."""
        return self._read.graph.is_even

    def value_and_grad(
        self, trained: Sequence[int], *args: Any, cotangent: Array | None = None
    ) -> tuple[Any, Any]:
        """Return what the loss gives, and its gradients for the `trained` leaves of the parameters.

        They are of ``cotangent * loss`` if there is one.
        """
        read, plan = self._read, self._read.levels
        call = dataclasses.replace(self._begin(args), scale=cotangent)
        sums = self._sums_of_gradients(trained, call)[0]
        self._add_all("after", call)
        if plan.scaled:
            (scale,) = self._tail_gradients((), call)[1]
            sums = [total * scale.reshape(()).astype(total.dtype) for total in sums]
        own = self._tail_gradients(trained, call)[0]
        sums = (
            [one + total.astype(one.dtype) for one, total in zip(own, sums, strict=True)]
            if sums and own
            else sums or own
        )
        gradients: list[Any] = [None] * len(read.params)
        for place, total in zip(trained, sums, strict=True):
            gradients[place] = total.astype(read.params[place].dtype)
        return self._result(call), jax.tree.unflatten(jax.tree.structure(args[0]), gradients)

    def first_not_finite(self, trained: Sequence[int], *args: Any) -> Array:
        """Return the number of where a value is first not finite, of stages that watch their layers."""
        return self._sums_of_gradients(trained, self._begin(args))[1]

    # What is known

    def _begin(self, args: tuple[Any, ...]) -> _Call:
        read, made = self._read, self._read.made(args)
        values = (*read.arguments, *read.prepared)
        leaves = zip(values, [*jax.tree.leaves(args), *made], strict=True)
        known = {value: leaf for value, leaf in leaves if value.kind is Kind.SHARED}
        return _Call(args=args, known=known, made=made)

    def _result(self, call: _Call) -> Any:
        read = self._read
        targets = [one for n, one in enumerate(read.outs) if n not in read.apart]
        found = iter(evaluate(read.graph.ops, targets, call.known, None))
        whole = jax.tree.leaves(self._whole(*call.args)) if read.apart else []
        outs = [whole[n] if n in read.apart else next(found) for n in range(len(read.outs))]
        return jax.tree.unflatten(jax.tree.structure(read.result), outs)

    # Passes

    def _sums_of_gradients(self, trained: Sequence[int], call: _Call) -> tuple[list[Array], Array]:
        """Return the sums of the parts' gradients, and where a value was first not finite."""
        plan = self._read.levels
        for one in plan.counts:
            self._add(one, call)
        self._add_all("before", call)
        if plan.last is None:
            return [], jnp.int32(NOWHERE)
        if plan.scaled:
            cotangents = [jnp.ones(plan.learnt[0].outs[0].shape, plan.learnt[0].outs[0].dtype)]
        else:
            cotangents = self._cotangents(call)
        sums, first = self._learn(trained, cotangents, call)
        return sums, jnp.where(are_finite(cotangents), first, BEHIND_SUMS)

    def _function(self, targets: Sequence[Held], read: InParts | None = None) -> Callable[..., list[Array]]:
        read = read or self._read
        totals = [op.outs[0] for op in read.graph.ops if op.is_total]

        def function(*args: Any) -> list[Array]:
            *own, (index, arrays, made) = args
            values = (*read.arguments, *read.prepared)
            known = dict(zip(values, [*jax.tree.leaves(own), *made], strict=True))
            known |= {value: array for value, array in zip(totals, arrays, strict=True) if array is not None}
            return evaluate(read.graph.ops, targets, known, index)

        return function

    def _more(self, index: Array, at: _Call) -> tuple[Array, list[Array | None], list[Array]]:
        totals = [at.known.get(op.outs[0]) for op in self._read.graph.ops if op.is_total]
        return index, totals, list(at.made)

    def _over_parts(
        self,
        one_part: _Part,
        start: Sequence[tuple[str, Array]],
        call: _Call,
        places: Sequence[int] = (),
    ) -> tuple[list[Array], list[Array], list[Array]]:
        """Run `one_part` on each; add up what it gives first and second, stack what it gives third.

        `start` has how each sum is combined, and what it begins with; gradients are of the parameters at
        `places`.
        """
        read, region = self._read, self._region
        combines, zeros = [one for one, _ in start], [zero for _, zero in start]
        if region is None:
            return self._loop(one_part, zeros, call, places, read.parts, jnp.arange(read.parts))
        leaves = [jax.tree.leaves(one) for one in call.args]
        structures = [jax.tree.structure(one) for one in call.args]
        totals = [op.outs[0] for op in read.graph.ops if op.is_total and op.outs[0] in call.known]
        own = read.parts // region.devices // region.turns
        count = len(leaves[1])

        def body(params: Any, batch: Any, state: Any, others: Any) -> Any:
            arrays, cotangents = others
            args = tuple(map(jax.tree.unflatten, structures, (params, batch[:count], state)))
            known = dict(zip(totals, arrays, strict=True))
            local = _Call(args=args, known=known, made=batch[count:], cotangents=cotangents)
            numbers = (region.number() * own + jnp.arange(own)) * region.turns + region.turn()
            sums, gradients, rows = self._loop(one_part, zeros, local, places, own, numbers)
            return list(map(region.total, combines, sums)), gradients, rows

        return region.run(
            body,
            leaves[0],
            [*leaves[1], *call.made],
            [value.kind is Kind.EXAMPLES for value in (*read.batch, *read.prepared)],
            leaves[2] if len(leaves) > 2 else (),
            ([call.known[value] for value in totals], list(call.cotangents)),
            places,
        )

    def _loop(
        self,
        one_part: _Part,
        zeros: Sequence[Array],
        call: _Call,
        places: Sequence[int],
        parts: int,
        numbers: Array,
    ) -> tuple[list[Array], list[Array], list[Array]]:
        """Run `one_part` on each of the `parts` that `call` has rows of, which have these `numbers`."""
        read = self._read
        params, batch, *state = call.args
        leaves, structure = jax.tree.flatten(batch)
        count = len(leaves)
        leaves += call.made
        cut = [n for n, value in enumerate((*read.batch, *read.prepared)) if value.kind is Kind.EXAMPLES]
        rows = [_split(leaves[n], read.pre, parts) for n in cut]
        if self._laid is not None:
            # Left to XLA they lie by part, and each turn moves those of all parts.
            rows = [
                lax.with_sharding_constraint(one, self._laid[n]) for n, one in zip(cut, rows, strict=True)
            ]
        if self._region is not None and self._region.turns > 1:
            rows = [self._own_turns(leaves[n], parts) for n in cut]

        def body(carry: Any, xs: tuple[Array, list[Array]]) -> tuple[Any, Any]:
            index, own = xs
            part = list(leaves)
            for n, leaf in zip(cut, own, strict=True):
                part[n] = leaf
            args = (params, jax.tree.unflatten(structure, part[:count]), *state)
            at = dataclasses.replace(call, args=args, made=part[count:])
            sums, gradients = carry
            sums, gradients, found = one_part(sums, gradients, index, at)
            return (sums, gradients), found

        trained = jax.tree.leaves(params)
        start = list(zeros), [_empty(trained[n]) for n in places]
        (sums, gradients), stacked = lax.scan(body, start, (numbers, rows))
        return sums, gradients, stacked

    def _own_turns(self, leaf: Array, parts: int) -> Array:
        assert self._region is not None
        split = _split(leaf, self._read.pre, parts * self._region.turns)
        turns = split.reshape(parts, self._region.turns, *split.shape[1:])
        return lax.dynamic_index_in_dim(turns, self._region.turn(), 1, keepdims=False)

    def _over_stages(
        self,
        one: Sweep,
        targets: Callable[[Levels], list[Held]],
        call: _Call,
        places: Sequence[int] = (),
    ) -> tuple[list[Array], list[Array], list[Array]]:
        """Take the parts through stages, as `_over_parts` takes them one after another."""
        read, region, staged, of_whole = self._read, self._region, self._staged, self._of_whole
        assert region is not None
        assert staged is not None
        assert of_whole is not None
        leaves = [jax.tree.leaves(one) for one in call.args]
        structures = [jax.tree.structure(one) for one in call.args]
        totals = [op.outs[0] for op in read.graph.ops if op.is_total and op.outs[0] in call.known]
        cut = [value.kind is Kind.EXAMPLES for value in read.batch]
        combines = [combine for combine, _ in _zeros(one.totals)]

        def add(sums: Any, found: Sequence[Array]) -> tuple[Any, Any]:
            return _added(one.totals, sums, found), list(found[len(one.totals) :])

        def body(params: Any, batch: Any, state: Any, others: Any) -> Any:
            arrays, cotangents = others
            at = _Call(args=(), known=dict(zip(totals, arrays, strict=True)))
            known = self._more(jnp.int32(0), at)[1]
            sums, gradients, rows = staged.run(
                self._function(targets(read.levels)),
                self._function(targets(of_whole.levels), of_whole),
                params=params,
                batch=jax.tree.unflatten(structures[1], batch),
                cut=cut,
                state=state,
                number=region.number() * staged.microbatches,
                known=known,
                places=places,
                cotangents=cotangents,
                sums=[zero for _, zero in _zeros(one.totals)],
                add=add,
            )
            return list(map(region.total, combines, sums)), gradients, rows

        combines += ["min"] if staged.watched else []
        others = [call.known[value] for value in totals], list(call.cotangents)
        state = leaves[2] if len(leaves) > 2 else ()
        return region.run(body, leaves[0], leaves[1], cut, state, others, places)

    def _add_all(self, kind: str, call: _Call) -> None:
        """Add what all passes of a kind give, ``before`` the gradient's say, to what is known."""
        for number, one in enumerate(getattr(self._read.levels, kind)):
            if self._staged is None or not is_heavy(one):
                self._add(one, call)
                continue

            def targets(levels: Levels, number: int = number) -> list[Held]:
                return _targets(getattr(levels, kind)[number])

            sums, _, rows = self._over_stages(one, targets, call)
            self._keep(one, sums[: len(one.totals)], rows, call.known)

    def _add(self, one: Sweep, call: _Call) -> None:
        """Add the totals and the rows of a pass to what is known."""
        function = self._forward[one]

        def part(sums: Any, none: Any, index: Array, at: _Call) -> tuple[Any, Any, Sequence[Array]]:
            found = function(*at.args, self._more(index, at))
            return _added(one.totals, sums, found), none, found[len(one.totals) :]

        sums, _, rows = self._over_parts(part, _zeros(one.totals), call)
        self._keep(one, sums, rows, call.known)

    def _keep(
        self, one: Sweep, sums: Sequence[Array], rows: Sequence[Array], known: dict[Held, Array]
    ) -> None:
        for op, total in zip(one.totals, sums, strict=True):
            known[op.outs[0]] = total.astype(op.outs[0].dtype)
        for value, stacked in zip(one.stacks, rows, strict=True):
            known[value] = put_together(stacked, value.form.axis, value.form.pre, value.shape)

    def _learn(
        self, places: Sequence[int], cotangents: Sequence[Array], call: _Call
    ) -> tuple[list[Array], Array]:
        """Return what `_sums_of_gradients` does; add what the pass gives besides."""
        plan = self._read.levels
        assert plan.last is not None
        assert self._last is not None
        one, function, count = plan.last, self._last, len(plan.learnt)

        def part(sums: Any, gradients: Any, index: Array, at: _Call) -> tuple[Any, Any, Sequence[Array]]:
            leaves, structure = jax.tree.flatten(at.args[0])

            def learnt(floats: list[Array]) -> tuple[list[Array], list[Array]]:
                filled = list(leaves)
                for place, leaf in zip(places, floats, strict=True):
                    filled[place] = leaf
                found = function(structure.unflatten(filled), *at.args[1:], self._more(index, at))
                return found[:count], found[count:]

            _, pull, found = jax.vjp(learnt, [leaves[n] for n in places], has_aux=True)
            (grown,) = pull(list(at.cotangents))
            return _added(one.totals, sums, found), _grown(gradients, grown), found[len(one.totals) :]

        call = dataclasses.replace(call, cotangents=cotangents)
        if self._staged is not None:
            sums, gradients, rows = self._over_stages(one, _of_last, call, places)
        else:
            sums, gradients, rows = self._over_parts(part, _zeros(one.totals), call, places)
        count = len(one.totals)
        self._keep(one, sums[:count], rows, call.known)
        return gradients, sums[count] if len(sums) > count else jnp.int32(NOWHERE)

    # Derivatives of the tail, and of sums with respect to earlier ones

    def _tail_gradients(self, places: Sequence[int], call: _Call) -> tuple[list[Array], list[Array]]:
        """Return the loss's derivatives for some parameters and the totals, each where the other stays."""
        read, plan, known = self._read, self._read.levels, call.known
        floats = [read.params[n] for n in places]
        totals = [op.outs[0] for op in plan.learnt]
        fixed = {value: array for value, array in known.items() if value not in (*floats, *totals)}
        for op in read.graph.ops:
            if op.is_total and op.outs[0] not in fixed and op.outs[0] not in totals:
                fixed[op.outs[0]] = jnp.zeros(op.outs[0].shape, op.outs[0].dtype)
        names = list(fixed)

        def loss(own: list[Array], at: list[Array]) -> Array:
            run = tail(read.graph, [*names, *floats, *totals], [read.outs[0]])
            found = run([*fixed.values(), *own, *at])[0]
            return found if call.scale is None else found * call.scale.astype(found.dtype)

        own = [known[value] for value in floats]
        at = [known.get(value, jnp.zeros(value.shape, value.dtype)) for value in totals]
        return jax.grad(loss, argnums=(0, 1))(own, at)

    def _cotangents(self, call: _Call) -> list[Array]:
        """Return the loss's full derivatives for the totals: the tail's, and through sums of later levels."""
        plan = self._read.levels
        found = dict(zip(plan.learnt, self._tail_gradients((), call)[1], strict=True))
        for level in plan.backward:
            at = [op for op in plan.learnt if op.outs[0].level == level]
            later = [found[op] for op in plan.learnt if op.outs[0].level > level]
            for op, total in zip(at, self._through(level, at, later, call), strict=True):
                found[op] = found[op] + total.astype(found[op].dtype)
        return [found[op] for op in plan.learnt]

    def _through(
        self, level: int, at: Sequence[Task], cotangents: Sequence[Array], call: _Call
    ) -> list[Array]:
        """Return the derivatives for the totals `at` a level that come through sums of later ones."""
        function = self._backward[level]

        def part(totals: Any, none: Any, index: Array, inside: _Call) -> tuple[Any, Any, Sequence[Array]]:
            def sums(arrays: list[Array]) -> list[Array]:
                moved = inside.known | {op.outs[0]: array for op, array in zip(at, arrays, strict=True)}
                return function(*inside.args, self._more(index, dataclasses.replace(inside, known=moved)))

            _, pull = jax.vjp(sums, [inside.known[op.outs[0]] for op in at])
            (grown,) = pull(list(inside.cotangents))
            return _grown(totals, grown), none, ()

        start = [("sum", _empty(op.outs[0])) for op in at]
        return self._over_parts(part, start, dataclasses.replace(call, cotangents=cotangents))[0]

    def _above(self, level: int) -> list[Held]:
        return _inputs([op for op in self._read.levels.learnt if op.outs[0].level > level])


def _inputs(totals: Sequence[Task]) -> list[Held]:
    return [op.ins[0] for op in totals]


def _targets(one: Sweep) -> list[Held]:
    return [*_inputs(one.totals), *one.stacks]


def _of_last(levels: Levels) -> list[Held]:
    assert levels.last is not None
    return [*_inputs(levels.learnt), *_targets(levels.last)]


def is_heavy(one: Sweep) -> bool:
    """Whether a pass goes through what depends on parameters."""
    return any(op.outs[0].heavy for op in one.totals) or any(value.heavy for value in one.stacks)


def _split(leaf: Array, pre: int, parts: int) -> Array:
    """Return ``[parts, rows / parts, ...]`` of rows that are ``pre * parts * post``."""
    rows, *rest = leaf.shape
    by_part = jnp.moveaxis(leaf.reshape(pre, parts, rows // (pre * parts), *rest), 1, 0)
    return by_part.reshape(parts, rows // parts, *rest)


def _wide(dtype: Any) -> Any:
    """Return the type to add up in: float32 at least."""
    narrow = jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize < 4
    return jnp.float32 if narrow else dtype


def _empty(like: Any) -> Array:
    # A parameter may be a number of Python's.
    return jnp.zeros(jnp.shape(like), _wide(jnp.result_type(like)))


def _grown(totals: Sequence[Array], more: Sequence[Array]) -> list[Array]:
    return [total + one.astype(total.dtype) for total, one in zip(totals, more, strict=True)]


_COMBINE: dict[str, Callable[[Array, Array], Array]] = {
    "sum": jnp.add,
    "max": jnp.maximum,
    "min": jnp.minimum,
    "or": jnp.logical_or,
    "and": jnp.logical_and,
}


def _zero(op: Task) -> Array:
    value, combine = op.ins[0], op.ins[0].combine
    if combine == "sum":
        return jnp.zeros(value.shape, _wide(value.dtype))
    if combine in ("or", "and"):
        return jnp.full(value.shape, combine == "and")
    if jnp.issubdtype(value.dtype, jnp.inexact):
        return jnp.full(value.shape, -jnp.inf if combine == "max" else jnp.inf, value.dtype)
    info = jnp.iinfo(value.dtype)
    return jnp.full(value.shape, info.min if combine == "max" else info.max, value.dtype)


def _zeros(totals: Sequence[Task]) -> list[tuple[str, Array]]:
    return [(op.ins[0].combine, _zero(op)) for op in totals]


def _added(totals: Sequence[Task], carry: Sequence[Array], found: Sequence[Array]) -> list[Array]:
    rows = zip(totals, carry, found, strict=False)
    return [_COMBINE[op.ins[0].combine](total, part.astype(total.dtype)) for op, total, part in rows]
