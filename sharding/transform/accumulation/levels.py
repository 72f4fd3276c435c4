"""In which passes over the parts a program's sums are computed, and its gradient.

Let T be the sums over the examples that have to be complete: T = Σ over parts of t(params, part, T'), with
T' those of earlier levels, and loss = tail(params, T). By the chain rule

- the gradient of T is the derivative of the tail, and of later sums, which costs a pass backward where there
  are any;
- that of the parameters is Σ over parts of (gradient of T) · ∂t/∂params, in one pass for all sums, and the
  tail's own.

What those derivatives read has to be there before: the sums that t takes, and those that the derivative of
the tail depends on. That of a mean is a number, so there is none; that of a masked mean is one over a count,
which data alone give. If all that parameters reach is one number, its gradient is added up and multiplied at
the end.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from .graph import PartGraph
from .values import Array, Held, Kind, NotInParts, Task, evaluate, learns, needed

# Elements of sums that later passes need, which every device holds.
MOST_CARRIED = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
    """One pass over the parts: the totals it adds up, and the per-example results it gives."""

    totals: tuple[Task, ...] = ()
    stacks: tuple[Held, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Levels:
    """The passes of a program, in order.

    counts: passes over the data alone.
    before: passes whose sums the gradient needs; `backward`: levels whose sums' own gradients cost a pass.
    last: the pass that takes the gradient, None if no parameter reaches the loss through a sum.
    after: passes for what is only looked at. learnt: the totals that the gradient goes through.
    scaled: the one number's gradient is multiplied at the end.
    values: the passes of the program without a gradient.
    """

    counts: tuple[Sweep, ...]
    before: tuple[Sweep, ...]
    backward: tuple[int, ...]
    last: Sweep | None
    after: tuple[Sweep, ...]
    learnt: tuple[Task, ...]
    scaled: bool
    values: tuple[Sweep, ...]

    @property
    def forward(self) -> int:
        """Passes through the model without its gradient."""
        return len(self.before) + len(self.after)

    @property
    def passes(self) -> int:
        """Passes that use parameters."""
        return self.forward + len(self.backward) + (self.last is not None)


def totals_under(values: Iterable[Held]) -> set[Task]:
    """Return the totals that `values` take, and not through other totals."""
    return {one.op for one in needed(values)[1] if one.op is not None}


def levels(
    graph: PartGraph,
    params: Sequence[Held],
    shared: Sequence[Held],
    loss: Held,
    others: Sequence[Held],
) -> Levels:
    """Return the passes that give `loss`, its gradient and the `others`, which are complete or of examples.

    Raises NotInParts if later passes need too many numbers of earlier ones.
    """
    outs = [loss, *others]
    stacks = tuple(dict.fromkeys(one for one in others if one.kind is Kind.EXAMPLES))
    wanted = _closure(totals_under(outs))
    learnt = _learnt(graph, params, loss)
    order = [op for op in graph.ops if op.is_total and op in wanted]
    reads = _read_by_derivatives(graph, params, shared, loss, learnt)
    taken = {under for op in learnt for under in totals_under(op.ins)}
    of_heavy = {under for op in order if op.outs[0].heavy for under in totals_under(op.ins)}
    scaled = _is_one_number(learnt, reads, taken) and graph.is_even
    first = _closure(taken if scaled else reads | taken)
    early = _closure(
        {
            op
            for op in first | of_heavy | totals_under(stacks) | (set() if scaled else reads)
            if not op.outs[0].heavy
        }
    )
    early |= {under for op in order if not op.outs[0].heavy for under in totals_under(op.ins)}
    counts = _by_level([op for op in order if op in early], lambda op: op.outs[0].count)
    heavy = [op for op in order if op.outs[0].heavy]
    known = max((_level(op) for op in first if op.outs[0].heavy), default=0)
    before = _by_level([op for op in heavy if _level(op) <= known], _level)
    rest = [op for op in order if not op.outs[0].heavy and op not in early]
    stack_level = max((op.outs[0].level for op in totals_under(stacks)), default=0)
    reach = known + 1 if learnt else known
    last = None
    if learnt:
        now = stacks if stack_level <= known else ()
        last = Sweep(totals=(*(op for op in heavy if _level(op) == reach), *rest), stacks=now)
    later = [op for op in heavy if _level(op) > reach]
    after = _with_stacks(
        _by_level(later, _level),
        [] if last else rest,
        () if last and last.stacks else stacks,
        stack_level,
        reach,
    )
    held = sum(math.prod(op.outs[0].shape) for op in (*first, *taken))
    if held > MOST_CARRIED:
        worst = max((*first, *taken), key=lambda op: math.prod(op.outs[0].shape))
        raise NotInParts(f"sums of {held} numbers are needed before the gradients", worst.where)
    backward = sorted({_level(op) for op in taken if op in learnt}, reverse=True)
    return Levels(
        counts=counts,
        before=before,
        backward=tuple(backward),
        last=last,
        after=after,
        learnt=tuple(op for op in order if op in learnt),
        scaled=scaled,
        values=_with_stacks(_by_level(heavy, _level), rest, stacks, stack_level, 0),
    )


def tail(
    graph: PartGraph, known: Sequence[Held], targets: Sequence[Held]
) -> Callable[[Sequence[Array]], list[Array]]:
    """Return the function of the arrays of `known` that gives `targets`, after all parts."""
    return lambda arrays: evaluate(graph.ops, targets, dict(zip(known, arrays, strict=True)), None)


def _is_complex(value: Held) -> bool:
    return jnp.issubdtype(value.dtype, jnp.complexfloating)


def _level(op: Task) -> int:
    return op.outs[0].level


def _closure(totals: set[Task]) -> set[Task]:
    found, left = set[Task](), list(totals)
    while left:
        op = left.pop()
        if op not in found:
            found.add(op)
            left += totals_under(op.ins)
    return found


def _by_level(totals: Sequence[Task], level: Callable[[Task], int]) -> tuple[Sweep, ...]:
    numbers = sorted({level(op) for op in totals})
    return tuple(Sweep(totals=tuple(op for op in totals if level(op) == number)) for number in numbers)


def _with_stacks(
    passes: Sequence[Sweep], rest: Sequence[Task], stacks: tuple[Held, ...], level: int, done: int
) -> tuple[Sweep, ...]:
    """Add what no sum waits for to the last pass, or to one more."""
    if not rest and not stacks:
        return tuple(passes)
    if not passes or done + len(passes) <= level:
        return (*passes, Sweep(totals=tuple(rest), stacks=stacks))
    final = passes[-1]
    return (*passes[:-1], Sweep(totals=(*final.totals, *rest), stacks=stacks))


def _learnt(graph: PartGraph, params: Sequence[Held], loss: Held) -> set[Task]:
    """Return the totals that the gradient of `loss` goes through, all the way to a parameter."""
    moved = {value for value in params if learns(value)}
    for op in graph.ops:
        if not op.stops_gradient and any(value in moved for value in op.ins):
            moved.update(out for out in op.outs if learns(out))
    found, seen, left = set[Task](), set[Held](), [loss]
    while left:
        value = left.pop()
        if value in seen or value not in moved or value.op is None:
            continue
        seen.add(value)
        if value.op.is_total:
            found.add(value.op)
        left += value.op.ins
    return found


def _read_by_derivatives(
    graph: PartGraph,
    params: Sequence[Held],
    shared: Sequence[Held],
    loss: Held,
    learnt: set[Task],
) -> set[Task]:
    """Return the totals that the derivative of the tail with respect to the `learnt` ones depends on."""
    totals = [op for op in graph.ops if op in totals_under([loss])]
    own = [op for op in totals if op in learnt]
    if not own:
        return set()
    values = [
        *params,
        *shared,
        *(op.outs[0] for op in totals if op not in learnt),
        *(op.outs[0] for op in own),
    ]
    run = tail(graph, values, [loss])

    def derivative(*arrays: Array) -> Any:
        fixed, at = arrays[: -len(own)], arrays[-len(own) :]
        return jax.grad(lambda *at: run([*fixed, *at])[0], argnums=tuple(range(len(own))))(*at)

    jaxpr = jax.make_jaxpr(derivative)(*(jax.ShapeDtypeStruct(v.shape, v.dtype) for v in values)).jaxpr
    live = {var for var in jaxpr.outvars if not isinstance(var, core.Literal)}
    for eqn in reversed(jaxpr.eqns):
        if any(var in live for var in eqn.outvars):
            live.update(var for var in eqn.invars if not isinstance(var, core.Literal))
    return {
        value.op
        for var, value in zip(jaxpr.invars, values, strict=True)
        if var in live and value.op is not None and value.op.is_total
    }


def _is_one_number(learnt: set[Task], reads: set[Task], taken: set[Task]) -> bool:
    waits = any(op.outs[0].heavy for op in reads)
    # A complex number's gradient is two: what comes of its real part, and of its imaginary one.
    one = [op for op in learnt if math.prod(op.outs[0].shape) == 1 and not _is_complex(op.outs[0])]
    alone = len(learnt) == len(one) == 1
    return waits and alone and not any(op.outs[0].heavy for op in taken)
