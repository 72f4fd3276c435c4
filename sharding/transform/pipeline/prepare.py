"""Parameters of layers made before stages take them: one array for all layers, whatever it is made of.

What a scan over layers walks has to be a parameter, so that each stage has its own layers' part of it. What
is made of parameters alone (a stack of arrays that layers written out have each for themselves, a sum, a
mask) is made once a step, ahead of the stages, and is a parameter of what they run; its gradient goes back
through what made it.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from ...paths import by_path
from ...plans.record import ArrayPlan, Decision, DimPlan
from ...plans.specs import Spec, axes_in, axes_of, spec_of, without
from ...program.jaxpr import Traced, scan_parts, with_inputs
from ...program.program import Program
from ...program.stacks import is_stack, path_of_stack
from ...program.tracing import read
from ..accumulation.proof import rows_of
from ..accumulation.region import axes_of_rows, specs_of_rows
from ..accumulation.run import Run
from ..experts import names_of_experts
from .layers import alone, inlined, is_number, stacks_of, stored_as, whole_parameters
from .slots import STAGE
from .together import together

Array = Any


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Prepared:
    """A traced loss whose layers' parameters are arguments, and `plan` for it.

    Where some had to be made, its parameters are a dictionary by path: of the given ones those that are read
    besides, by their numbers (`kept`), and what `make` makes of all, in the order of `paths`; `sources` are
    what each is made of. Else they are the given ones.
    """

    plan: Decision
    traced: Traced
    mesh: Mesh | AbstractMesh
    make: core.ClosedJaxpr | None = None
    kept: Mapping[str, int] = dataclasses.field(default_factory=dict)
    paths: tuple[str, ...] = ()
    sources: tuple[frozenset[int], ...] = ()

    def loss(self, *args: Any) -> Any:
        """Return what the loss gives of prepared parameters."""
        found = core.jaxpr_as_fun(self.traced.jaxpr)(*jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(self.traced.result), found)

    def params(self, given: Any) -> Any:
        """Return the prepared parameters."""
        if self.make is None:
            return given
        leaves = jax.tree.leaves(given)
        made = core.jaxpr_as_fun(self.make)(*leaves)
        rows = [self.plan.params[path] for path in self.paths]
        lying = [
            lax.with_sharding_constraint(one, NamedSharding(self.mesh, PartitionSpec(*row.spec)))
            for one, row in zip(made, rows, strict=True)
        ]
        return {path: leaves[n] for path, n in self.kept.items()} | dict(zip(self.paths, lying, strict=True))

    def places(self, trained: Sequence[int]) -> list[int]:
        """Return the numbers of the prepared parameters that depend on the `trained` ones of the given."""
        learnt = {path for path, n in self.kept.items() if n in trained}
        pairs = zip(self.paths, self.sources, strict=True)
        learnt |= {path for path, own in pairs if own.intersection(trained)}
        rows = enumerate(by_path(self.traced.args[0]).items())
        return [n for n, (path, one) in rows if path in learnt and jnp.issubdtype(one.dtype, jnp.inexact)]


class PreparedRun:
    """A run of a prepared loss, of the parameters as they are given."""

    def __init__(self, prepared: Prepared, run: Run) -> None:
        self._prepared, self._run = prepared, run

    def value(self, params: Any, *others: Any) -> Any:
        """Return what the loss gives."""
        return self._run.value(self._prepared.params(params), *others)

    @property
    def is_even(self) -> bool:
        """Whether the gradient of a multiple of the loss is that multiple, see `Run`."""
        return self._run.is_even

    def value_and_grad(
        self, trained: Sequence[int], params: Any, *others: Any, cotangent: Array | None = None
    ) -> tuple[Any, Any]:
        """Return what the loss gives, and its gradients for the `trained` leaves of the parameters.

        They are of ``cotangent * loss`` if there is one.
        """
        if self._prepared.make is None:
            return self._run.value_and_grad(trained, params, *others, cotangent=cotangent)
        leaves, structure = jax.tree.flatten(params)

        def of_floats(floats: Sequence[Array]) -> dict[str, Array]:
            filled = list(leaves)
            for n, value in zip(trained, floats, strict=True):
                filled[n] = value
            return self._prepared.params(structure.unflatten(filled))

        own, pull = jax.vjp(of_floats, [leaves[n] for n in trained])
        places = self._prepared.places(trained)
        found, slopes = self._run.value_and_grad(places, own, *others, cotangent=cotangent)
        back = {path: _gradient(slopes[path], one) for path, one in own.items()}
        gradients: list[Any] = [None] * len(leaves)
        for n, one in zip(trained, pull(back)[0], strict=True):
            gradients[n] = one
        return found, jax.tree.unflatten(structure, gradients)

    def first_not_finite(self, trained: Sequence[int], params: Any, *others: Any) -> Array:
        """Return the number of where a value is first not finite."""
        own = self._prepared.params(params)
        places = trained if self._prepared.make is None else self._prepared.places(trained)
        return self._run.first_not_finite(places, own, *others)


def _gradient(found: Array | None, value: Array) -> Array:
    if found is not None:
        return found
    if jnp.issubdtype(value.dtype, jnp.inexact):
        return jnp.zeros_like(value)
    return jnp.zeros(value.shape, jax.dtypes.float0)


def prepared(plan: Decision, mesh: Mesh | AbstractMesh, traced: Traced) -> Prepared:
    """Return a traced loss whose layers' parameters are arguments, with jitted functions in their place.

    Raises UserError for a loss without layers.
    """
    flat = together(inlined(traced, but=is_stack))
    params = by_path(traced.args[0])
    program = read(flat, state=(2,) if len(traced.args) > 2 else ())
    own, count = alone(program, len(params)), len(params)
    stacks = stacks_of(program, count, plan.mesh[STAGE], plan.interleave)
    walked = [atom for one in stacks for atom in one.eqn.invars[-scan_parts(one.eqn).num_xs :]]
    experts = names_of_experts(plan, program)
    made = [
        _Made.of(plan, program, atom, tuple(params))
        for atom in dict.fromkeys(_variables(walked))
        if atom in own and stored_as(program, atom, len(params)) is None
    ]
    paths = tuple(params)
    whole = {paths[n] for n in whole_parameters(program, stacks, count)}
    if not made:
        return Prepared(plan=_unmixed(plan, traced, whole, experts), traced=flat, mesh=mesh)
    jaxpr = flat.jaxpr.jaxpr
    names = _unique([one.path for one in made], tuple(params))
    atoms = dict(zip(names, (one.atom for one in made), strict=True))
    given = {atom: core.Var(atom.aval) for atom in atoms.values()}
    outs = [atom if is_number(atom) else given.get(atom, atom) for atom in jaxpr.outvars]
    rest = _needed(jaxpr, outs, given)
    reads = set(_variables([*(atom for eqn in rest for atom in eqn.invars), *outs]))
    gone = {n for one in made for n in one.sources if jaxpr.invars[n] not in reads}
    kept = {path: n for n, path in enumerate(params) if n not in gone}
    shapes = {path: params[path] for path in kept} | {
        name: jax.ShapeDtypeStruct(atom.aval.shape, atom.aval.dtype) for name, atom in atoms.items()
    }
    variables = {path: jaxpr.invars[n] for path, n in kept.items()}
    variables |= {name: given[atom] for name, atom in atoms.items()}
    after = with_inputs(
        jaxpr,
        constvars=jaxpr.constvars,
        invars=[*(variables[path] for path in by_path(shapes)), *jaxpr.invars[len(params) :]],
        eqns=rest,
        outvars=outs,
    )
    before = with_inputs(
        jaxpr,
        constvars=jaxpr.constvars,
        invars=jaxpr.invars[: len(params)],
        eqns=_needed(jaxpr, list(given), {}),
        outvars=list(given),
    )
    ready = dataclasses.replace(
        flat, jaxpr=core.ClosedJaxpr(after, flat.jaxpr.consts), args=(shapes, *flat.args[1:])
    )
    return Prepared(
        plan=_unmixed(_plan_of(plan, program, atoms, made, kept), ready, whole, experts),
        traced=ready,
        mesh=mesh,
        make=core.ClosedJaxpr(before, flat.jaxpr.consts),
        kept=kept,
        paths=tuple(names),
        sources=tuple(one.sources for one in made),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Made:
    """What is made of parameters: its value in the program, of which, how it lies, and its gradient."""

    atom: Any
    path: str
    sources: frozenset[int]
    spec: Spec
    reduced: Spec

    @staticmethod
    def of(plan: Decision, program: Program, atom: Any, paths: Sequence[str]) -> _Made:
        """Return it; a stack lies as most of its members do."""
        jaxpr = program.scope.jaxpr
        made = {var for eqn in _needed(jaxpr, [atom], {}) for var in _variables(eqn.invars)}
        numbers = {var: n for n, var in enumerate(jaxpr.invars[: len(paths)])}
        sources = frozenset(numbers[var] for var in {*made, atom} if var in numbers)
        maker = next((eqn for eqn in jaxpr.eqns if atom in eqn.outvars), None)
        members = []
        if maker is not None and is_stack(maker):
            members = [paths[numbers[var]] for var in _variables(maker.invars) if var in numbers]
        if maker is None or len(members) < len(maker.invars):
            path = path_of_stack([paths[n] for n in sorted(sources)])
            spec, reduced = _as_source(plan, atom, [paths[n] for n in sources])
            return _Made(atom=atom, path=path, sources=sources, spec=spec, reduced=reduced)
        own = [(plan.params[path].spec, plan.moments.get(path)) for path in members]
        spec, reduced = Counter(own).most_common(1)[0][0]
        return _Made(
            atom=atom,
            path=path_of_stack(members),
            sources=sources,
            spec=(None, *spec),
            reduced=(None, *(spec if reduced is None else reduced)),
        )


def _as_source(plan: Decision, atom: Any, paths: Sequence[str]) -> tuple[Spec, Spec]:
    """Return how some layers of a stacked parameter lie, and their gradient: as it does, but for its layers.

    What is made otherwise is cut over stages alone.
    """
    shape = tuple(atom.aval.shape)
    row = plan.params[paths[0]]
    moments = plan.moments.get(paths[0], row.spec)
    if len(paths) == 1 and row.shape[1:] == shape[1:] and STAGE in axes_in(row.spec[1:]):
        return (None, *row.spec[1:]), (None, *moments[1:])
    spec = _over_stages(shape, plan.mesh)
    return spec, spec


def _over_stages(shape: Sequence[int], mesh: Mapping[str, int]) -> Spec:
    """Return the spec of what is cut over stages in its largest dimension but the layers', if any divides."""
    divided = [n for n, size in enumerate(shape) if n and size % mesh[STAGE] == 0]
    best = max(divided, key=lambda n: shape[n], default=None)
    return spec_of([(STAGE,) if n == best else () for n in range(len(shape))])


def _plan_of(
    plan: Decision, program: Program, atoms: Mapping[str, Any], made: Sequence[_Made], kept: Mapping[str, int]
) -> Decision:
    """Return the plan of the prepared loss, whose dimensions are found in what is made too."""
    rows = {path: plan.params[path] for path in kept}
    moments = {path: spec for path, spec in plan.moments.items() if path in kept}
    for (name, atom), one in zip(atoms.items(), made, strict=True):
        rows[name] = ArrayPlan(shape=tuple(atom.aval.shape), dtype=str(atom.aval.dtype), spec=one.spec)
        if one.reduced != one.spec:
            moments[name] = one.reduced
    before = {argument.path: argument.dims for argument in program.arguments if argument.position == 0}
    places: dict[int, tuple[str, int, int]] = {}
    for name, atom in atoms.items():
        for dimension, composition in enumerate(program.scope.dims_of(atom)):
            for part, dim in enumerate(composition):
                places.setdefault(dim, (name, dimension, part))
    dims: dict[str, DimPlan] = {}
    for name, row in plan.dims.items():
        if row.argument or row.path in kept:
            dims[name] = row
            continue
        composition = before[row.path][row.dimension]
        place = places.get(composition[row.part]) if row.part < len(composition) else None
        if place is not None:
            path, dimension, part = place
            dims[name] = dataclasses.replace(row, path=path, dimension=dimension, part=part)
    return dataclasses.replace(plan.decision(), params=rows, moments=moments, dims=dims, trainable=None)


def _unmixed(plan: Decision, traced: Traced, whole: Collection[str], experts: Collection[str]) -> Decision:
    """Return the plan with parameters that enter the region of rows whole over what cuts them beside others.

    Where a dimension is stored over an axis that cuts rows, or over stages, and over another as well, it is
    gathered over the first once a step, ahead of the region; its gradient is stored as before. So are over
    stages the parameters at `whole`, which each of them runs its layers with, and what a state stores.
    """
    rows = specs_of_rows(plan, traced.args[1], rows_of(traced))
    manual = (*axes_of_rows(plan, rows, experts), STAGE)
    params, moments = dict(plan.params), dict(plan.moments)
    for path, row in plan.params.items():
        entries = [
            tuple(axis for axis in axes if axis not in manual) or axes for axes in map(axes_of, row.spec)
        ]
        if path in whole:
            entries = [tuple(axis for axis in axes if axis != STAGE) for axes in entries]
        if spec_of(entries) != spec_of(map(axes_of, row.spec)):
            params[path] = dataclasses.replace(row, spec=spec_of(entries))
            moments.setdefault(path, row.spec)
    state = plan.state and {
        path: dataclasses.replace(row, spec=without(row.spec, (STAGE,))) for path, row in plan.state.items()
    }
    return dataclasses.replace(plan.decision(), params=params, moments=moments, state=state)


def _needed(jaxpr: core.Jaxpr, outs: Sequence[Any], given: Mapping[Any, Any]) -> list[core.JaxprEqn]:
    """Return the equations that give `outs`, reading what is `given` for some variables in their place."""
    live, found = set(_variables(outs)), []
    for eqn in reversed(jaxpr.eqns):
        if live.isdisjoint(eqn.outvars):
            continue
        ins = [atom if is_number(atom) else given.get(atom, atom) for atom in eqn.invars]
        live.update(_variables(ins))
        found.append(eqn.replace(invars=ins))
    return found[::-1]


def _variables(atoms: Sequence[Any]) -> list[Any]:
    return [atom for atom in atoms if not is_number(atom)]


def _unique(names: Sequence[str], taken: Sequence[str]) -> list[str]:
    """Return the names, numbered where they would stand twice."""
    found: list[str] = []
    for name in names:
        own, number = name, 1
        while own in found or own in taken:
            number += 1
            own = f"{name}#{number}"
        found.append(own)
    return found
