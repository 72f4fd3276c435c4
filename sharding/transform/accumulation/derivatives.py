"""Gradients that a user wrote, traced, and whether they are linear in what comes back to them.

A part knows its own share of what comes back to a shared value alone. Where the user's rule is linear, what
it makes of the shares adds up to what it makes of the whole; where it clips, rounds to integers or gives a
number of its own, as rules that hand on new scales do, it does not.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend import core
from jax.sharding import AxisType, PartitionSpec

from ...program.jaxpr import branches, call_body, run, scan_parts
from ...program.primitives import Trait, primitives
from .values import NotInParts

_CALLS = primitives(Trait.CALL)
#: What devices of a manual region exchange.
EXCHANGES = frozenset(
    [
        *("all_gather", "all_gather_invariant", "all_to_all", "ppermute", "reduce_scatter"),
        *("pmax", "pmin", "psum", "psum_invariant"),
    ]
)
_LINEAR_EXCHANGES = EXCHANGES - {"pmax", "pmin"}
_LINEAR, _BILINEAR, _PICKING = primitives(Trait.LINEAR), primitives(Trait.BILINEAR), primitives(Trait.PICKING)
# Linear in what is written and what is written to, by the place of the first number that says where.
_WRITING = {"scatter-add": 1, "scatter-sub": 1, "scatter": 1, "dynamic_update_slice": 2}
# What has a gradient that the user, or a solver, wrote.
_OWN_GRADIENTS = frozenset({"custom_vjp_call", "custom_jvp_call", "linear_call", "custom_linear_solve"})
# Of fewer bytes a rounding is no rounding error any more.
_LEAST_BYTES, _LEAST_BITS = 2, 7


class Gradient(NamedTuple):
    """The gradient of a `custom_vjp_call`, traced.

    ahead: its operands → its results, then what is kept. back: what is kept, then the gradients of those of
    its results that are floats, as `learns` says → those of its operands that `floats` says.
    """

    ahead: core.ClosedJaxpr
    back: core.ClosedJaxpr
    kept: int
    floats: tuple[bool, ...]
    learns: tuple[bool, ...]


def written_gradient(eqn: core.JaxprEqn, moved: Sequence[bool] | None = None) -> Gradient:
    """Trace the rule that a user wrote for the gradient of `eqn`, for its operands that are `moved` or all.

    What a function closed over, or `jax.vmap` did, is among its operands, and JAX takes no gradient of it.
    Inside of a manual region it is traced as a device has it.
    """
    ins: list[Any] = [atom.aval for atom in eqn.invars]
    outs: list[Any] = [var.aval for var in eqn.outvars]
    closed_over = eqn.params.get("num_consts", 0)
    moved = [one and n >= closed_over for n, one in enumerate(moved or [True] * len(ins))]

    def forward(*arrays: Any) -> Any:
        def function(*own: Any) -> list[Any]:
            given = iter(own)
            return list(run(eqn, [next(given) if one else a for one, a in zip(moved, arrays, strict=True)]))

        return jax.vjp(function, *(a for one, a in zip(moved, arrays, strict=True) if one))

    ahead, (_, pull) = traced_within(eqn, forward, *ins)
    kept, structure = jax.tree.flatten(pull)
    kept = ahead.out_avals[len(ahead.out_avals) - len(kept) :]
    floats, learns = ([jnp.issubdtype(one.dtype, jnp.inexact) for one in some] for some in (ins, outs))
    floats = [one and other for one, other in zip(floats, moved, strict=True)]

    def backward(kept: Any, cotangents: Any) -> Any:
        given = iter(cotangents)
        filled = [
            next(given) if one else np.zeros(out.shape, jax.dtypes.float0)
            for one, out in zip(learns, outs, strict=True)
        ]
        gradients = iter(jax.tree.unflatten(structure, kept)(filled))
        found = [next(gradients) if one else None for one in moved]
        return [gradient for gradient, one in zip(found, floats, strict=True) if one]

    given = [out for out, one in zip(outs, learns, strict=True) if one]
    back, _ = traced_within(eqn, backward, kept, given)
    _check_closed(ahead, back)
    return Gradient(ahead=ahead, back=back, kept=len(kept), floats=tuple(floats), learns=tuple(learns))


class Derivative(NamedTuple):
    """The rule of a `custom_jvp_call`, traced: its operands, then the tangents of those that `floats` says →
    its results, then the tangents of those that `learns` says.
    """

    rule: core.ClosedJaxpr
    floats: tuple[bool, ...]
    learns: tuple[bool, ...]


def written_derivative(eqn: core.JaxprEqn) -> Derivative:
    """Trace the rule that a user wrote for the derivative of `eqn`; in a manual region as a device has it."""
    # As the function has them, where a manual region says over which devices values differ.
    avals: list[Any] = [atom.aval for atom in eqn.invars]
    outs: list[Any] = [var.aval for var in eqn.outvars]
    floats, learns = (tuple(jnp.issubdtype(a.dtype, jnp.inexact) for a in some) for some in (avals, outs))

    def derived(primals: Any, tangents: Any) -> Any:
        given = iter(tangents)
        filled = [
            next(given) if one else np.zeros(aval.shape, jax.dtypes.float0)
            for one, aval in zip(floats, avals, strict=True)
        ]
        found, moved = jax.jvp(lambda *own: list(run(eqn, own)), tuple(primals), tuple(filled))
        return found, [one for one, learnt in zip(moved, learns, strict=True) if learnt]

    tangents = [aval for aval, one in zip(avals, floats, strict=True) if one]
    traced, _ = traced_within(eqn, derived, avals, tangents)
    _check_closed(traced)
    return Derivative(rule=traced, floats=floats, learns=learns)


def _check_closed(*traced: core.ClosedJaxpr) -> None:
    """Refuse what reads arrays of a trace that is over, as JAX does where the loss is jitted."""
    for const in (const for one in traced for const in one.consts):
        if isinstance(const, Tracer):
            kind = f"{const.dtype}[{','.join(map(str, const.shape))}]"
            raise NotInParts(
                f"the gradient that is written for a function reads an array ({kind}) that it closes over, "
                "which jax.jit does not allow: hand it over as an argument"
            )


def traced_within(eqn: core.JaxprEqn, function: Any, *args: Any) -> tuple[core.ClosedJaxpr, Any]:
    """Trace a function as a device has it where an equation stands; return what it gives too."""
    trace = jax.make_jaxpr(function, return_shape=True)
    with eqn.ctx.manager:
        mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    manual = {name for name, kind in kinds if kind is AxisType.Manual}
    if not manual:
        return trace(*args)
    found: list[Any] = []

    def inside(one: Any) -> Any:
        found.append(trace(*args))
        return one

    avals: list[Any] = [atom.aval for atom in (*eqn.invars, *eqn.outvars)]
    region = jax.shard_map(
        inside,
        mesh=mesh.update(axis_types=(AxisType.Auto,) * len(mesh.axis_names)),
        in_specs=PartitionSpec(),
        out_specs=PartitionSpec(),
        axis_names=manual,
        check_vma=any(aval.manual_axis_type.varying for aval in avals),
    )
    jax.eval_shape(region, jax.ShapeDtypeStruct((), jnp.float32))
    return found[0]


def uneven_call(eqn: core.JaxprEqn, learnt: Mapping[int, Sequence[bool]]) -> core.JaxprEqn | None:
    """Return the operation in `eqn`, or `eqn` itself, whose gradient is not linear in what comes back.

    `learnt` has by `id` of an operation which of its operands come from parameters; of others all may.
    """
    return next((one for one in _written(eqn) if _is_uneven(one, learnt.get(id(one)))), None)


def _is_uneven(eqn: core.JaxprEqn, learnt: Sequence[bool] | None) -> bool:
    if eqn.primitive.name == "custom_jvp_call":
        return _rounds_tangents(written_derivative(eqn))
    return _rounds(eqn) or not is_linear(written_gradient(eqn, learnt))


def why_uneven(eqn: core.JaxprEqn) -> str:
    """Return why the gradient of what `uneven_call` found is not made of parts' shares."""
    if _rounds(eqn):
        bits, dtype = eqn.params.get("mantissa_bits"), eqn.params.get("new_dtype")
        what = f"a gradient is rounded to {dtype if bits is None else f'{bits} bits'}"
    elif eqn.primitive.name == "custom_jvp_call":
        what = "the derivative that is written for a function rounds what comes back"
    elif eqn.primitive.name == "custom_linear_solve":
        what = "a linear system is solved step by step for a gradient, until it is near enough"
    else:
        what = (
            "the gradient that is written for a function is not linear in what comes back (it clips, rounds "
            "or gives a number of its own)"
        )
    return f"{what}, and would be taken of each part's share"


def _written(eqn: core.JaxprEqn) -> Iterator[core.JaxprEqn]:
    if eqn.primitive.name in _OWN_GRADIENTS or _rounds(eqn):
        yield eqn
        return
    for inner in core.jaxprs_in_params(eqn.params):
        for one in inner.eqns:
            yield from _written(one)


def _rounds(eqn: core.JaxprEqn) -> bool:
    """Whether `eqn` rounds floats, and with them their gradient, to fewer bits than bfloat16 has."""
    if eqn.primitive.name == "reduce_precision":
        return eqn.params["mantissa_bits"] < _LEAST_BITS
    if eqn.primitive.name != "convert_element_type":
        return False
    given, found = (atom.aval.dtype for atom in (eqn.invars[0], eqn.outvars[0]))  # type: ignore[union-attr]
    floats = jnp.issubdtype(given, jnp.inexact) and jnp.issubdtype(found, jnp.inexact)
    return floats and found.itemsize < given.itemsize and is_coarse(found)


def is_coarse(dtype: Any) -> bool:
    """Whether a type holds floats of fewer bytes than bfloat16."""
    return bool(jnp.issubdtype(dtype, jnp.inexact)) and jnp.dtype(dtype).itemsize < _LEAST_BYTES


def _rounds_tangents(derivative: Derivative) -> bool:
    """Whether a written derivative, which is linear otherwise, rounds the tangents, not the value alone."""
    if not any(_rounds(one) for one in _all(derivative.rule.jaxpr)):
        return False
    count = sum(derivative.floats)
    given = [_Class.APART] * (len(derivative.rule.in_avals) - count) + [_Class.LINEAR] * count
    tangents = _classes(derivative.rule, given)[len(derivative.learns) :]
    return any(one not in (_Class.ZERO, _Class.LINEAR) for one in tangents)


def works_in(dtype: Any, eqn: core.JaxprEqn) -> bool:
    """Whether what an operation runs inside of itself has numbers of a type."""
    bodies = [one for jaxpr in core.jaxprs_in_params(eqn.params) for one in _all(jaxpr)]
    return any(getattr(out.aval, "dtype", None) == dtype for one in bodies for out in one.outvars)


def _all(jaxpr: core.Jaxpr) -> Iterator[core.JaxprEqn]:
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in core.jaxprs_in_params(eqn.params):
            yield from _all(inner)


class _Class(enum.Enum):
    """What a value is of what comes back."""

    ZERO = "nothing"
    APART = "does not depend on it"
    LINEAR = "linear in it"
    OTHER = "anything else"


def is_linear(gradient: Gradient) -> bool:
    """Whether what a written gradient gives is linear in what comes back to it."""
    count = len(gradient.back.in_avals) - gradient.kept
    found = _classes(gradient.back, [_Class.APART] * gradient.kept + [_Class.LINEAR] * count)
    return all(one in (_Class.ZERO, _Class.LINEAR) for one in found)


def _classes(closed: core.ClosedJaxpr, ins: Sequence[_Class]) -> list[_Class]:
    known: dict[Any, _Class] = dict.fromkeys(closed.jaxpr.constvars, _Class.APART)
    known.update(zip(closed.jaxpr.invars, ins, strict=True))

    def read(atom: Any) -> _Class:
        if isinstance(atom, core.Literal):
            value = np.asarray(atom.val)
            # What no gradient belongs to has one of a type without numbers.
            nothing = value.dtype == jax.dtypes.float0 or np.all(value == 0)
            return _Class.ZERO if nothing else _Class.APART
        return known[atom]

    for eqn in closed.jaxpr.eqns:
        known.update(zip(eqn.outvars, _of_equation(eqn, [read(atom) for atom in eqn.invars]), strict=True))
    return [read(atom) for atom in closed.jaxpr.outvars]


def _of_equation(eqn: core.JaxprEqn, ins: list[_Class]) -> list[_Class]:
    name = eqn.primitive.name
    body = call_body(eqn) if name in _CALLS else None
    if body is not None:
        return _classes(body, ins)
    if name == "scan":
        return _of_scan(eqn, ins)
    if name == "custom_linear_solve":
        return _of_solver(eqn, ins)
    if name == "linear_call":
        return _classes(eqn.params["callee"], ins)
    depends = any(one in (_Class.LINEAR, _Class.OTHER) for one in ins)
    if name == "cond" and ins[0] not in (_Class.LINEAR, _Class.OTHER):
        found = [_classes(branch, ins[1:]) for branch in branches(eqn)]
        return [_together(list(outs)) for outs in zip(*found, strict=True)]
    return [_of_operation(eqn, ins, depends=depends)] * len(eqn.outvars)


def _of_operation(eqn: core.JaxprEqn, ins: list[_Class], *, depends: bool) -> _Class:
    """Return what an operation gives that runs no program."""
    name = eqn.primitive.name
    if depends and _rounds(eqn):
        return _Class.OTHER
    if name == "convert_element_type":
        dtype: Any = eqn.outvars[0].aval.dtype  # type: ignore[union-attr]
        whole = depends and not jnp.issubdtype(dtype, jnp.inexact)
        return _Class.OTHER if whole else ins[0]
    if name in _LINEAR or name in _LINEAR_EXCHANGES:
        return _together(ins)
    if name in _WRITING:
        # Two arrays, and beside them the places, which come second or last.
        places = ins[1:2] if _WRITING[name] == 1 else ins[2:]
        arrays = [ins[0], ins[2]] if _WRITING[name] == 1 else ins[:2]
        return _picked(arrays, places)
    if name == "select_n":
        return _picked(ins[1:], ins[:1])
    if name in _PICKING:
        return _picked(ins[:1], ins[1:])
    if name in _BILINEAR or name in ("div", "triangular_solve"):
        # What is divided comes first, what is solved for last.
        last = {"div": 1, "triangular_solve": 0}.get(name)
        if _Class.ZERO in ins and name != "div":
            return _Class.ZERO
        if last is not None and ins[last] in (_Class.LINEAR, _Class.OTHER):
            return _Class.OTHER
        moving = [one for one in ins if one is not _Class.APART]
        return moving[0] if len(moving) == 1 else _Class.OTHER if depends else _Class.APART
    return _Class.OTHER if depends else _Class.APART


def _picked(arrays: Sequence[_Class], places: Sequence[_Class]) -> _Class:
    moves = any(one in (_Class.LINEAR, _Class.OTHER) for one in places)
    return _Class.OTHER if moves else _together(arrays)


def _together(ins: Sequence[_Class]) -> _Class:
    """Return what sums, choices and stacks of values are."""
    kinds = set(ins) - {_Class.ZERO}
    if not kinds:
        return _Class.ZERO
    return kinds.pop() if len(kinds) == 1 else _Class.OTHER


def _of_solver(eqn: core.JaxprEqn, ins: list[_Class]) -> list[_Class]:
    """Return what a linear system's solution is: what its solver makes of the right side."""
    counts = eqn.params["const_lengths"]
    first, last = counts.matvec + counts.vecmat, sum(counts)
    if any(one in (_Class.LINEAR, _Class.OTHER) for one in ins[:last]):
        return [_Class.OTHER] * len(eqn.outvars)
    solve = eqn.params["jaxprs"].solve
    return _classes(solve, [*ins[first : first + counts.solve], *ins[last:]])


def _of_scan(eqn: core.JaxprEqn, ins: list[_Class]) -> list[_Class]:
    parts = scan_parts(eqn)
    first, last = parts.num_consts, parts.num_consts + parts.num_carry
    carry = ins[first:last]
    while True:
        outs = _classes(parts.body, [*ins[:first], *carry, *ins[last:]])
        joined = [_together(pair) for pair in zip(carry, outs[: parts.num_carry], strict=True)]
        if joined == carry:
            return outs
        carry = joined
