"""Walk a jaxpr once, relating the dimensions of every array by the rule of every operation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from jax.extend import core

from ..ops.experts import experts_call, outline
from .factors import Factors, Seq
from .jaxpr import branches, call_body, context_of, counted_trips, scan_parts, while_parts
from .op_rules import builtin_rules, users_rule, whole_rule
from .op_rules.rule import Kind, Op, OpRule, Shape
from .primitives import Trait, primitives

# The factors of one array, dimension by dimension, before they are resolved.
Raw = tuple[Seq, ...]


@dataclasses.dataclass(slots=True)
class RawEquation:
    """An equation whose factors are not resolved yet.

    `local` are the sequences of the rule's factors; `torn` those that could not be laid over each other.
    """

    eqn: core.JaxprEqn
    rule: OpRule
    local: list[Seq]
    torn: frozenset[int]
    ins: list[Raw]
    outs: list[Raw]
    scopes: list[RawScope]
    trips: int | None = 1


@dataclasses.dataclass(slots=True)
class RawScope:
    """A jaxpr at one call, with the raw dims of its variables there."""

    jaxpr: core.Jaxpr
    dims: dict[core.Var, Raw]
    equations: list[RawEquation]
    outs: list[Raw]


_NOTHING = OpRule((), (), (), ())


def shape_of(atom: Any) -> Shape:
    """Return the shape of a variable or literal; tokens and references have none."""
    return getattr(atom.aval, "shape", ())


class Walk:
    """The state of one walk: the factors found so far, and which of them are kin."""

    def __init__(self) -> None:
        self.factors = Factors()
        self.kin: list[tuple[Seq, Seq]] = []
        self.unknown: dict[str, list[core.JaxprEqn]] = {}
        self._rules = builtin_rules()
        self._fresh = self.factors.new

    def fresh(self, shape: Sequence[int]) -> Raw:
        """Return dims related to nothing."""
        return tuple([self._fresh(size) for size in shape])

    def scope(self, jaxpr: core.Jaxpr, ins: Sequence[Raw]) -> RawScope:
        """Walk `jaxpr` called with arrays of the dims `ins`."""
        env: dict[core.Var, Raw] = {var: self.fresh(shape_of(var)) for var in jaxpr.constvars}
        env.update(zip(jaxpr.invars, ins, strict=True))
        equations: list[RawEquation] = []
        for eqn in jaxpr.eqns:
            operands = [
                self.fresh(shape_of(atom)) if isinstance(atom, core.Literal) else env[atom]
                for atom in eqn.invars
            ]
            raw = self._equation(eqn, operands)
            equations.append(raw)
            env.update(zip(eqn.outvars, raw.outs, strict=True))
        outs = [
            self.fresh(shape_of(atom)) if isinstance(atom, core.Literal) else env[atom]
            for atom in jaxpr.outvars
        ]
        return RawScope(jaxpr, env, equations, outs)

    def _equation(self, eqn: core.JaxprEqn, ins: list[Raw]) -> RawEquation:
        name = eqn.primitive.name
        users = users_rule(name, eqn.params)
        if users is None and (walker := _CONTROL.get(name)) is not None:
            return walker(self, eqn, ins)
        op = Op(
            name,
            tuple([shape_of(atom) for atom in eqn.invars]),
            tuple([shape_of(var) for var in eqn.outvars]),
            eqn.params,
        )
        if users is not None:
            described = users(op)
            described.check(op)
            return self._apply(eqn, op, described, ins)
        rule = self._rules.get(name)
        if rule is None:
            self.unknown.setdefault(name, []).append(eqn)
            rule = whole_rule
        return self._apply(eqn, op, rule(op), ins)

    def _apply(self, eqn: core.JaxprEqn, op: Op, rule: OpRule, ins: list[Raw]) -> RawEquation:
        """Lay a rule over the operands' dims, and compose the results' from its factors."""
        local: list[Seq | None] = [None] * len(rule.sizes)
        torn: set[int] = set()
        for seqs, dims in zip(ins, rule.ins, strict=True):
            for seq, place in zip(seqs, dims, strict=True):
                if not place:
                    continue
                pieces = [seq]
                if len(place) > 1:
                    pieces = self.factors.cut(seq, [rule.sizes[k] for k in place])
                    if pieces is None:
                        torn.update(place)
                        continue
                for k, piece in zip(place, pieces, strict=True):
                    known = local[k]
                    if known is None:
                        local[k] = piece
                    elif known != piece and not self.factors.unite(known, piece):
                        torn.add(k)
        done = [self._fresh(rule.sizes[k]) if seq is None else seq for k, seq in enumerate(local)]
        outs = [
            tuple(
                [
                    done[place[0]]
                    if len(place) == 1
                    else tuple([f for k in place for f in done[k]])
                    if place or size == 1
                    else self._fresh(size)
                    for place, size in zip(dims, shape, strict=True)
                ]
            )
            for dims, shape in zip(rule.outs, op.outs, strict=True)
        ]
        self.kin += [(done[a], done[b]) for a, b in rule.kin]
        return RawEquation(eqn, rule, done, frozenset(torn), ins, outs, [])

    def _same(self, left: Sequence[Raw], right: Sequence[Raw]) -> None:
        """Unite arrays that are one: a loop's carry before and after, the arms of a condition."""
        for a, b in zip(left, right, strict=True):
            for x, y in zip(a, b, strict=True):
                if x != y:
                    self.factors.unite(x, y)

    def _call(self, eqn: core.JaxprEqn, ins: list[Raw]) -> RawEquation:
        body = call_body(eqn)
        mixture = experts_call(eqn)
        if mixture is not None:
            # How long its loops are depends on the data: what stands for it has the same work.
            with context_of(eqn):
                body = outline(mixture, *(atom.aval for atom in eqn.invars))
        assert body is not None
        inner = self.scope(body.jaxpr, ins)
        return RawEquation(eqn, _NOTHING, [], frozenset(), ins, inner.outs, [inner])

    def _scan(self, eqn: core.JaxprEqn, ins: list[Raw]) -> RawEquation:
        scan = scan_parts(eqn)
        length = int(eqn.params["length"])
        first_xs = scan.num_consts + scan.num_carry
        carry = ins[scan.num_consts : first_xs]
        steps = [raw[0] for raw in ins[first_xs:]]
        step = steps[0] if steps else self._fresh(length)
        for other in steps[1:]:
            self.factors.unite(step, other)
        inner = self.scope(scan.body.jaxpr, [*ins[:first_xs], *(raw[1:] for raw in ins[first_xs:])])
        self._same(carry, inner.outs[: scan.num_carry])
        outs = [*inner.outs[: scan.num_carry], *((step, *raw) for raw in inner.outs[scan.num_carry :])]
        rule = _step_rule(
            length, [len(raw) for raw in ins], first_xs, [len(raw) for raw in outs], scan.num_carry
        )
        return RawEquation(eqn, rule, [step] if rule.kinds else [], frozenset(), ins, outs, [inner], length)

    def _while(self, eqn: core.JaxprEqn, ins: list[Raw]) -> RawEquation:
        parts = while_parts(eqn)
        cond_consts = ins[: parts.num_cond_consts]
        body_consts = ins[parts.num_cond_consts : parts.num_cond_consts + parts.num_body_consts]
        carry = ins[parts.num_cond_consts + parts.num_body_consts :]
        cond = self.scope(parts.cond.jaxpr, [*cond_consts, *carry])
        body = self.scope(parts.body.jaxpr, [*body_consts, *carry])
        self._same(carry, body.outs)
        trips = counted_trips(eqn)
        return RawEquation(eqn, _NOTHING, [], frozenset(), ins, body.outs, [cond, body], trips)

    def _cond(self, eqn: core.JaxprEqn, ins: list[Raw]) -> RawEquation:
        arms = [self.scope(arm.jaxpr, ins[1:]) for arm in branches(eqn)]
        for other in arms[1:]:
            self._same(arms[0].outs, other.outs)
        return RawEquation(eqn, _NOTHING, [], frozenset(), ins, arms[0].outs, arms)


def _step_rule(length: int, ins: list[int], first_xs: int, outs: list[int], first_ys: int) -> OpRule:
    """Return the rule that shows only the dimension a scan walks: it leads the stacked arrays."""
    if length == 1:
        return _NOTHING

    def places(ranks: list[int], first: int) -> tuple[tuple[tuple[int, ...], ...], ...]:
        return tuple(
            tuple((0,) if n >= first and dim == 0 else () for dim in range(rank))
            for n, rank in enumerate(ranks)
        )

    kinds: tuple[Kind, ...] = ("scan",)
    return OpRule(kinds, (length,), places(ins, first_xs), places(outs, first_ys))


_CONTROL: dict[str, Callable[[Walk, core.JaxprEqn, list[Raw]], RawEquation]] = {
    "scan": Walk._scan,
    "while": Walk._while,
    "cond": Walk._cond,
    **dict.fromkeys(primitives(Trait.CALL), Walk._call),
}
