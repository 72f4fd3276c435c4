"""Sharding constraints as a transformation: parameters stored one way and used another."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.extend import core
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from ..program import jaxpr as generations
from ..program.jaxpr import checkpoint_again, evaluate, run, scan_again
from ..program.layers import gathering_again
from ..program.primitives import Trait, primitives
from ..program.program import Dims, Equation, Scope
from ..program.tracing import read
from .attention import AttentionKernel
from .gather import PASSING, Stored, before_gradients, gathered, learning, raw, settled, stored_like, sums_of
from .lookup import Lookup, looks_up_rows
from .scatter import Scattering

_ANCHORS = primitives(Trait.ANCHOR)

# Find the mesh axes that shard each dim of a traced program, by the dim's number.
AxesOf = Callable[[Any], Mapping[int, tuple[str, ...]]]


def constrain(
    loss: Callable[[Any, Any], Any],
    mesh: Mesh | AbstractMesh,
    axes_of: AxesOf,
    stored: Callable[[Any], Any],
    reduced: Callable[[Any], Any] | None = None,
    kernels: Mapping[str, Mapping[str, Any]] | None = None,
    platform: str = "cpu",
    steps: Mapping[str, Sequence[int]] | None = None,
) -> Callable[[Any, Any], Any]:
    """Return `loss(params, batch)` with sharding constraints wherever XLA would have to guess.

    `axes_of(program)` gives the mesh axes of every dim while computing, `stored(params)` the tree of
    PartitionSpecs in which the parameters are kept. Each parameter is gathered to its computing spec where
    it is used, layer by layer inside scans, after a cast to a smaller type; its gradient is reduced there to
    the stored spec, or to that of `reduced(params)` where optimizer states are stored otherwise. Results of
    products, convolutions and look-ups, and what a scan carries, are constrained to the specs of their dims.
    `kernels` are a plan's: calls of `ops.attention` are carried out by the one for ``attention``, if any, as
    `platform` runs it. `steps` are mesh axes over which gradients are scattered in steps of these factors,
    one after the other (`meshwright.sharding.xla.reduction`).
    Values are those of `loss`.
    """

    def constrained(params: Any, batch: Any) -> Any:
        program, shape = jax.make_jaxpr(loss, return_shape=True)(params, batch)
        named = read(program, (params, batch), shape)
        of_parameters = frozenset(dim for a in named.parameters for c in a.dims for dim in c)
        settings = (kernels or {}).get("attention")
        kernel = None if settings is None else AttentionKernel(mesh, settings, platform)
        walk = _Walk(mesh, axes_of(named), of_parameters, kernel, Scattering(mesh, steps or {}), platform)
        specs = _flat(stored(params))
        goals = specs if reduced is None else _flat(reduced(params))
        leaves = [
            Stored(leaf, tuple(spec), tuple(goal))
            for leaf, spec, goal in zip(jax.tree.leaves(params), specs, goals, strict=True)
        ]
        value, *others = walk.scope(program.consts, named.scope, [*leaves, *jax.tree.leaves(batch)])
        outputs = [before_gradients(value), *others]
        return jax.tree.unflatten(jax.tree.structure(shape), outputs)

    return constrained


class _Walk:
    def __init__(
        self,
        mesh: Mesh | AbstractMesh,
        axes: Mapping[int, tuple[str, ...]],
        of_parameters: frozenset[int],
        attention: AttentionKernel | None,
        scattering: Scattering,
        platform: str,
    ) -> None:
        self._mesh = mesh
        self._axes = axes
        self._of_parameters = of_parameters
        self._attention = attention
        self._scattering = scattering
        self._platform = platform
        self._in_loop = False
        # Behind a loop over layers. Of layers written out, one's gradients travel beside the next one's work.
        self._after_layers = False

    def scope(self, consts: Sequence[Any], scope: Scope, args: Sequence[Any]) -> list[Any]:
        """Evaluate a scope's program with constraints; stored parameters that leave it are gathered."""
        if self._attention is not None:
            self._attention.enter(scope.jaxpr)
        equations = {id(equation.eqn): equation for equation in scope.equations}
        program = core.ClosedJaxpr(scope.jaxpr, consts)
        outputs = evaluate(program, args, lambda eqn, inputs: self._visit(equations[id(eqn)], inputs))
        return [
            self._gather(output, scope.dims_of(atom))
            for output, atom in zip(outputs, scope.jaxpr.outvars, strict=True)
        ]

    def _visit(self, equation: Equation, inputs: list[Any]) -> Sequence[Any] | None:
        eqn = equation.eqn
        name = eqn.primitive.name
        if name in PASSING and isinstance(inputs[0], Stored):
            return [inputs[0].passed(eqn)]
        if self._attention is not None and name in ("jit", "name"):
            outputs = self._attention.visit(equation, inputs, self._gather, self._spec)
            if outputs is not None:
                return outputs
        if name == "jit":
            consts = generations.closed(eqn.params["jaxpr"]).consts
            return self.scope(consts, equation.scopes[0], inputs)
        if name == "scan":
            return self._scan(equation, inputs)
        if name == "remat2":
            return self._checkpoint(equation, inputs)
        outputs = self._run(equation, inputs)
        if name not in _ANCHORS:
            return outputs
        return [self._constrain(output, dims) for output, dims in zip(outputs, equation.outs, strict=True)]

    def _run(self, equation: Equation, inputs: list[Any]) -> Sequence[Any]:
        """Run an equation on stored parameters, which its gradient gathers again rather than keeps whole."""

        def use(values: list[Any]) -> list[Any]:
            rows = zip(stored_like(inputs, values), equation.ins, strict=True)
            return list(self._compute(equation, [self._gather(value, dims) for value, dims in rows]))

        moves = any(
            isinstance(value, Stored) and self._spec(dims, value.value.shape) != PartitionSpec(*value.spec)
            for value, dims in zip(inputs, equation.ins, strict=True)
        )
        if not moves:
            return use(raw(inputs))
        if self._after_layers and not self._in_loop:
            inputs = settled(inputs)
        # In a loop the barriers that keep XLA from undoing this are not needed.
        again = jax.checkpoint(use, policy=gathering_again, prevent_cse=not self._in_loop)
        return again(raw(inputs))

    def _compute(self, equation: Equation, values: list[Any]) -> Sequence[Any]:
        if looks_up_rows(equation.eqn):
            of_table, of_ids = (self._spec(d, v.shape) for d, v in zip(equation.ins, values, strict=True))
            if of_table and of_table[0] is not None:
                aval: Any = equation.eqn.outvars[0].aval
                of_rows = self._spec(equation.outs[0], aval.shape)
                return [Lookup(equation.eqn, self._mesh, of_table, of_ids, of_rows).read(*values)]
        return run(equation.eqn, values)

    def _scan(self, equation: Equation, inputs: list[Any]) -> Sequence[Any]:
        """Keep stacked parameters stored; their slices are gathered inside, one layer at a time.

        What every turn uses is gathered once before them, and its gradient, which the turns sum, reduced once
        after: an output projection whose loss goes in chunks would be reduced for each of them.
        """
        eqn, scope = equation.eqn, equation.scopes[0]
        parts = generations.scan_parts(eqn)
        first_xs = parts.num_consts + parts.num_carry
        outermost = not self._in_loop
        if outermost and any(isinstance(value, Stored) for value in inputs[: parts.num_consts]):
            inputs = settled(inputs)
        specs: list[tuple[Any, ...] | None] = []
        values = []
        summed: dict[int, Any] = {}
        for index, (value, dims) in enumerate(zip(inputs, equation.ins, strict=True)):
            if isinstance(value, Stored) and index >= first_xs:
                specs.append(value.row())
                values.append(value.value)
            else:
                specs.append(None)
                cast = _cast(scope.jaxpr, index) if isinstance(value, Stored) else None
                if cast is None:
                    values.append(self._gather(value, dims))
                    continue
                # It travels, and is read, in the smaller type; its gradient is summed as the loop sums it.
                used, sums = self._cast_once(value, dims, cast)
                values.append(used)
                summed[index] = sums

        def body(args: list[Any]) -> list[Any]:
            entering = [
                Stored(value, *spec) if spec is not None else value
                for value, spec in zip(args, specs, strict=True)
            ]
            for index, sums in summed.items():
                spec = self._spec(scope.dims_of(scope.jaxpr.invars[index]), args[index].shape)
                entering[index] = Stored(learning(args[index], sums), tuple(spec), tuple(spec))
            for index in range(parts.num_consts, first_xs):
                entering[index] = self._constrain(args[index], scope.dims_of(scope.jaxpr.invars[index]))
            self._in_loop = True
            try:
                return self.scope(parts.body.consts, scope, entering)
            finally:
                self._in_loop = not outermost

        outputs = scan_again(eqn, values, body)
        self._after_layers |= outermost and any(spec is not None for spec in specs)
        return outputs

    def _checkpoint(self, equation: Equation, inputs: list[Any]) -> Sequence[Any]:
        specs = [(value.spec, value.reduced) if isinstance(value, Stored) else None for value in inputs]
        values = raw(inputs)

        def body(args: list[Any]) -> list[Any]:
            entering = [
                Stored(value, *spec) if spec is not None else value
                for value, spec in zip(args, specs, strict=True)
            ]
            return self.scope((), equation.scopes[0], entering)

        return checkpoint_again(equation.eqn, values, body)

    def _cast_once(self, value: Stored, dims: Dims, dtype: Any) -> tuple[Any, Any]:
        """Return a parameter cast and then gathered, and the array that its gradient is summed in."""
        used, reduced = self._spec(dims, value.value.shape), PartitionSpec(*value.reduced)
        shardings = self._scattering.shardings(used, reduced)
        # The barrier keeps a compiler from casting what has travelled.
        cast = jax.lax.optimization_barrier(jax.lax.stop_gradient(value.value).astype(dtype))
        cast = jax.lax.with_sharding_constraint(cast, NamedSharding(self._mesh, used))
        # GPUs' compilers sum in the larger type whatever the type that travels.
        return cast, sums_of(value.value, shardings, dtype if self._platform == "tpu" else None)

    def _gather(self, value: Any, dims: Dims) -> Any:
        if not isinstance(value, Stored):
            return value
        used, stored = self._spec(dims, value.value.shape), PartitionSpec(*value.spec)
        reduced = PartitionSpec(*value.reduced)
        if not any((used, stored, reduced)):
            return value.value
        if not jax.numpy.issubdtype(value.value.dtype, jax.numpy.inexact):
            return jax.lax.with_sharding_constraint(value.value, NamedSharding(self._mesh, used))
        return gathered(
            value.value, NamedSharding(self._mesh, used), self._scattering.shardings(used, reduced)
        )

    def _constrain(self, value: Any, dims: Dims) -> Any:
        if not getattr(value, "ndim", 0):
            return value
        spec = self._spec(dims, value.shape)
        return jax.lax.with_sharding_constraint(value, NamedSharding(self._mesh, spec))

    def _spec(self, dims: Dims, shape: tuple[int, ...]) -> PartitionSpec:
        """Return the spec of an array while computing; an axis serves one dim, those of parameters first."""
        entries: list[Any] = [None] * len(shape)
        taken: set[str] = set()
        # Of a merged dimension only the major part can be sharded.
        majors = [(composition[0], n) for n, composition in enumerate(dims) if composition]
        for dim, n in sorted(majors, key=lambda place: place[0] not in self._of_parameters):
            axes = tuple(axis for axis in self._axes.get(dim, ()) if axis not in taken)
            if axes and shape[n] % math.prod(self._mesh.shape[axis] for axis in axes) == 0:
                taken.update(axes)
                entries[n] = axes[0] if len(axes) == 1 else axes
        while entries and entries[-1] is None:
            entries.pop()
        return PartitionSpec(*entries)


def _cast(jaxpr: core.Jaxpr, index: int) -> Any:
    """Return the smaller type that all uses of an argument cast it to, or None."""
    variable = jaxpr.invars[index]
    found = set()
    for eqn in jaxpr.eqns:
        for place in (n for n, atom in enumerate(eqn.invars) if atom is variable):
            if eqn.primitive.name == "convert_element_type":
                found.add(eqn.params["new_dtype"])
            elif eqn.primitive.name in ("remat2", "jit"):
                inner = eqn.params["jaxpr"]
                found.add(_cast(getattr(inner, "jaxpr", inner), place))
            else:
                found.add(None)
    cast = found.pop() if len(found) == 1 and variable not in jaxpr.outvars else None
    own: Any = variable.aval
    return cast if cast is not None and cast.itemsize < own.dtype.itemsize else None


def _flat(specs: Any) -> list[Any]:
    return jax.tree.leaves(specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))
