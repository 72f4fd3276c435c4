"""Where arrays lie: constraints wherever XLA would have to guess, look-ups in tables that are cut by rows.

Parameters are stored one way and used another (`storage`, `lookup`); what they wait for is here too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from ..ops.arithmetic import is_short, looked_up, zeros_for
from ..ops.experts import ExpertsCall, experts_call
from ..plans.specs import axes_in, axes_of, by_dimension, cut_into, spec_of, while_computing, without
from ..program.aside import aside
from ..program.jaxpr import Body, Go, Pass, scan_parts
from ..program.lookups import MANY_ROWS, looks_up_rows
from ..program.primitives import Trait, primitives
from ..program.program import Dims, Equation, Program, Scope
from ..program.stacks import is_stack
from .attention import AttentionKernel
from .convolution import convolved_in_groups
from .experts import BY_TILES, NOWHERE, Multiplier, on_mesh, own_experts
from .gather import NOTHING, ByHand, Scattering, StoredParameter, elementwise, learning
from .lookup import lookup_by_columns, lookup_summed_by_device
from .meshes import by_device, constraint, is_manual
from .picks import picked
from .storage import Storage, cast_of_uses

_ANCHORS = primitives(Trait.ANCHOR)
_CHECKPOINTS = primitives(Trait.CHECKPOINT)
_ELEMENTWISE = primitives(Trait.ELEMENTWISE)

_Mode = jax.lax.GatherScatterMode


class Constrain(Pass):
    """Lays out the arrays of `program` on `mesh`.

    `axes` are the mesh axes of every dim while computing, by its number; `stored` the specs in which the
    parameters, and after them the state, are kept, and `reduced` those of their gradients and moments, in the
    order of `program.stored`. Each parameter is gathered to its computing spec where it is used, layer by
    layer inside scans, after a cast to a smaller type; its gradient is reduced there. Results of products,
    convolutions and look-ups, and what a scan carries, are constrained to the specs of their dims.
    `scattering` says over which axes gradients go in steps; calls of `ops.attention` are carried out by
    `kernel`, if there is one, products of experts by `multiplier`; XLA decides how the dims in `unsaid` lie;
    `reduces_cast` says whether a gradient's sum is reduced in the smaller type it is cast to
    (`xla.compiler.Compiler`), `sums_wide` whether those of a table's rows are summed in float32; `on_cpu`
    says that nothing shorter is scattered. The axes of `by_hand` are manual around the program; `mesh` and
    `axes` are what is left to XLA, `around` has those by hand that dims lie over.
    """

    def __init__(
        self,
        program: Program,
        mesh: Mesh | AbstractMesh,
        axes: Mapping[int, tuple[str, ...]],
        *,
        stored: Sequence[PartitionSpec],
        reduced: Sequence[PartitionSpec],
        scattering: Scattering,
        kernel: AttentionKernel | None = None,
        unsaid: Collection[int] = (),
        reduces_cast: bool = False,
        by_hand: ByHand = NOTHING,
        multiplier: Multiplier = BY_TILES,
        sums_wide: bool = False,
        on_cpu: bool = False,
        around: Mapping[int, tuple[str, ...]] = NOWHERE,
    ) -> None:
        self._by_hand, self._multiplier, self._sums_wide = by_hand, multiplier, sums_wide
        self._on_cpu, self._around = on_cpu, around
        self._storage = Storage(mesh, self._spec, scattering, by_hand, reduces_cast)
        self._used = self._storage.used
        self._program = program
        self._unsaid = frozenset(unsaid)
        self._mesh = mesh
        self._axes = axes
        self._stored = [(tuple(spec), tuple(goal)) for spec, goal in zip(stored, reduced, strict=True)]
        self._kernel = kernel
        self._of_parameters = frozenset(dim for a in program.parameters for c in a.dims for dim in c)
        self._aside = aside(program)
        self._in_loop = False
        # Behind a loop over layers. Of layers written out, one's gradients travel beside the next one's work.
        self._after_layers = False

    def begin(self, scope: Scope, inputs: list[Any]) -> list[Any]:
        """Take what the program has stored as it is."""
        if scope is not self._program.scope:
            return inputs
        taken = list(inputs)
        for argument, specs in zip(self._program.stored, self._stored, strict=True):
            taken[argument.index] = StoredParameter(inputs[argument.index], *specs)
        return taken

    def end(self, scope: Scope, outputs: list[Any]) -> list[Any]:
        """Gather the parameters that leave a scope, but for what only the new state needs."""
        beside = self._aside.outs.get(scope, (False,) * len(outputs))
        found = [
            output if alone else self._gather(output, scope.dims_of(atom))
            for output, atom, alone in zip(outputs, scope.jaxpr.outvars, beside, strict=True)
        ]
        if scope is not self._program.scope:
            return found
        kept = [one.value if isinstance(one, StoredParameter) else one for one in found]
        return [before_gradients(kept[0]), *kept[1:]]

    def lying(self, value: Any, dims: Dims) -> tuple[Any, PartitionSpec]:
        """Return a value as it is computed with, and how it lies."""
        found = self._gather(value, dims)
        return found, self._spec(dims, jnp.shape(found))

    def visit(self, equation: Equation, inputs: list[Any], go: Go) -> Sequence[Any]:
        """Run an equation on gathered parameters and constrain what it gives."""
        name = equation.primitive
        if inputs and isinstance(inputs[0], StoredParameter):
            passed = inputs[0].passed(equation.eqn)
            if passed is not None:
                return [passed]
        if equation.index in self._aside.equations and name in _ELEMENTWISE:
            where_stored = elementwise(equation.eqn, inputs, self._mesh, self._by_hand)
            if where_stored is not None:
                return [where_stored]
        if self._kernel is not None and name in ("jit", "name"):
            outputs = self._kernel.visit(equation, inputs, self._gather, self._spec)
            if outputs is not None:
                return outputs
        if is_stack(equation.eqn) and all(isinstance(value, StoredParameter) for value in inputs):
            return [self._storage.stacked(equation.eqn, inputs)]
        if (mixture := experts_call(equation.eqn)) is not None:
            return [self._experts(mixture, equation, inputs)]
        if equation.scopes and name == "scan":
            return self._scan(equation, inputs, go)
        if equation.scopes and (name == "jit" or name in _CHECKPOINTS):
            return go(inputs)
        outputs = self._run(equation, inputs, go)
        if name not in _ANCHORS:
            return outputs
        return [self._constrain(output, dims) for output, dims in zip(outputs, equation.outs, strict=True)]

    def _run(self, equation: Equation, inputs: list[Any], go: Go) -> Sequence[Any]:
        """Run an equation on stored parameters, which its gradient gathers again rather than keeps whole."""

        def use(inputs: list[Any]) -> list[Any]:
            rows = zip(inputs, equation.ins, strict=True)
            return list(self._compute(equation, [self._gather(value, dims) for value, dims in rows], go))

        if looks_up_rows(equation.eqn) and isinstance(inputs[0], StoredParameter):
            table, ids = inputs[0], self._gather(inputs[1], equation.ins[1])
            used, of_ids = self._used(table, equation.ins[0]), self._spec(equation.ins[1], ids.shape)
            if ids.size // cut_into(axes_in(of_ids), self._mesh.shape) * MANY_ROWS <= table.value.shape[0]:
                how = {"used": used, "of_ids": of_ids, "by_hand": self._by_hand, "wide": self._sums_wide}
                read = lookup_by_columns(equation.eqn, self._mesh, table, **how)
                if read is not None:
                    return [read(ids)]
            read = self._by_own_sums(equation, table, ids.shape)
            if read is not None:
                return [read(ids)]
        moves = any(
            isinstance(value, StoredParameter) and self._used(value, dims) != PartitionSpec(*value.spec)
            for value, dims in zip(inputs, equation.ins, strict=True)
        )
        if not moves:
            return use(inputs)
        if self._after_layers and not self._in_loop:
            inputs = settled(inputs)
        # In a loop the barriers that keep XLA from undoing this are not needed.
        again = jax.checkpoint(
            use, policy=jax.checkpoint_policies.nothing_saveable, prevent_cse=not self._in_loop
        )
        return again(inputs)

    def _by_own_sums(
        self, equation: Equation, table: StoredParameter, ids: tuple[int, ...]
    ) -> Callable[[Any], Any] | None:
        """Return what reads rows of a table whose gradient each device sums in float32, None for others."""
        if not self._sums_wide or self._by_hand.axes or not is_short(table.value.dtype):
            return None
        of_table, of_ids = equation.ins

        def gather(value: Any) -> Any:
            return self._gather(dataclasses.replace(table, value=value), of_table)

        used, of_ids = self._used(table, of_table), self._spec(of_ids, ids)
        how = {"used": used, "of_ids": of_ids, "widens": self._on_cpu}
        return lookup_summed_by_device(equation.eqn, self._mesh, table, gather, **how)

    def _experts(self, call: ExpertsCall, equation: Equation, inputs: list[Any]) -> Any:
        """Run a mixture's experts where they lie; of what they read, only gathered matrices are not kept."""
        first = equation.ins[3][0]
        # Over the axes around that cut experts tokens go to them.
        axes = self._around.get(first[0], ()) if first else ()

        def use(inputs: list[Any]) -> Any:
            values = [*inputs[:3], *(_stored_but(value, axes) for value in inputs[3:])]
            rows = zip(values, equation.ins, strict=True)
            arrays = [self._gather(value, dims) for value, dims in rows]
            count: Any = equation.eqn.invars[3].aval
            own = [own_experts(self._mesh, axes, one, count.shape[0]) for one in arrays[3:]]
            how = self._multiplier, self._around
            return on_mesh(self._mesh, call, equation, self._spec, [*arrays[:3], *own], *how)

        if any(isinstance(value, StoredParameter) for value in inputs):
            use = jax.checkpoint(use, policy=_unless_gathered, prevent_cse=not self._in_loop)
        return self._constrain(use(inputs), equation.outs[0])

    def _compute(self, equation: Equation, values: list[Any], go: Go) -> Sequence[Any]:
        if looks_up_rows(equation.eqn):
            of_table, of_ids = (self._spec(d, v.shape) for d, v in zip(equation.ins, values, strict=True))
            if of_table and of_table[0] is not None:
                aval: Any = equation.eqn.outvars[0].aval
                of_rows = self._spec(equation.outs[0], aval.shape)
                how = {"widens": self._by_hand.widens, "sums_wide": self._sums_wide}
                return [Lookup(equation.eqn, self._mesh, of_table, of_ids, of_rows, **how).read(*values)]
            # Where no axis cuts the ids, no device has but a share of the sums.
            if self._sums_wide and not axes_in(of_ids) and is_short(values[0].dtype):
                return [looked_up(equation.eqn, *values)]
        if equation.primitive == "conv_general_dilated":
            of_ins = [self._spec(dims, v.shape) for dims, v in zip(equation.ins, values, strict=True)]
            by_hand = convolved_in_groups(equation.eqn, self._mesh, of_ins, widens=self._on_cpu)
            if by_hand is not None:
                return [by_hand(*values)]
        if equation.primitive == "gather" and self._by_hand.axes:
            picks = picked(equation.eqn, self._mesh, self._spec(equation.ins[0], values[0].shape))
            if picks is not None:
                return [picks(*values)]
        return go(values)

    def _scan(self, equation: Equation, inputs: list[Any], go: Go) -> Sequence[Any]:
        """Keep stacked parameters stored; their slices are gathered inside, one layer at a time.

        What every turn uses is gathered once before them, and its gradient, which the turns sum, reduced once
        after: an output projection whose loss goes in chunks would be reduced for each of them.
        """
        scope, parts = equation.scopes[0], scan_parts(equation.eqn)
        first_xs = parts.num_consts + parts.num_carry
        outermost = not self._in_loop
        if outermost and any(isinstance(value, StoredParameter) for value in inputs[: parts.num_consts]):
            inputs = settled(inputs)
        summed: dict[int, Any] = {}
        for index, dims in enumerate(equation.ins[:first_xs]):
            value = inputs[index]
            constant = isinstance(value, StoredParameter) and index < parts.num_consts
            cast = cast_of_uses(scope.jaxpr, index) if constant else None
            if cast is None:
                inputs[index] = self._gather(value, dims, summed=True)
            else:
                # It travels, and is read, in the smaller type; its gradient is summed as the loop sums it.
                inputs[index], summed[index] = self._storage.cast_once(value, dims, cast)

        def around(body: Body) -> Body:
            return lambda args: self._turn(scope, args, summed, range(parts.num_consts, first_xs), body)

        outputs = go(inputs, around)
        self._after_layers |= outermost and any(
            isinstance(value, StoredParameter) for value in inputs[first_xs:]
        )
        return outputs

    def _turn(
        self, scope: Scope, args: list[Any], summed: Mapping[int, Any], carry: range, body: Body
    ) -> list[Any]:
        """Run a scan's body on rows of stored parameters, and on a carry that lies as it should."""
        entering = [value.row() if isinstance(value, StoredParameter) else value for value in args]
        for index, sums in summed.items():
            spec = tuple(self._spec(scope.dims_of(scope.jaxpr.invars[index]), args[index].shape))
            entering[index] = StoredParameter(learning(args[index], sums), spec, spec)
        for index in carry:
            entering[index] = self._constrain(args[index], scope.dims_of(scope.jaxpr.invars[index]))
        outside, self._in_loop = self._in_loop, True
        try:
            return body(entering)
        finally:
            self._in_loop = outside

    def _gather(self, value: Any, dims: Dims, summed: bool = False) -> Any:
        return self._storage.gather(value, dims, summed) if isinstance(value, StoredParameter) else value

    def _constrain(self, value: Any, dims: Dims) -> Any:
        if not getattr(value, "ndim", 0) or is_manual(self._mesh):
            return value
        spec = self._spec(dims, value.shape)
        if not self._unsaid.isdisjoint(dim for composition in dims for dim in composition):
            entries: list[Any] = [*spec, *[None] * (len(dims) - len(spec))]
            for n, composition in enumerate(dims):
                if entries[n] is None and not self._unsaid.isdisjoint(composition):
                    entries[n] = PartitionSpec.UNCONSTRAINED
            spec = PartitionSpec(*entries)
        return constraint(self._mesh)(value, NamedSharding(self._mesh, spec))

    def _spec(self, dims: Dims, shape: tuple[int, ...]) -> PartitionSpec:
        """Return the spec of an array while computing; an axis serves one dim, those of parameters first."""
        cut = while_computing(dims, shape, self._axes, self._mesh.shape, self._of_parameters)
        return PartitionSpec(*spec_of(cut))


def _stored_but(value: Any, axes: tuple[str, ...]) -> Any:
    """Return a stored parameter that is left cut over `axes` of its first dimension, if it is over all."""
    if (
        not (axes and isinstance(value, StoredParameter))
        or axes_of((*value.spec, None)[0])[: len(axes)] != axes
    ):
        return value
    return StoredParameter(value.value, without(value.spec, axes), without(value.reduced, axes))


def _unless_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    """Say that what an operation gives may be kept, unless it is a parameter on its way to its use."""
    return primitive.name != "sharding_constraint"


def before_gradients(value: Any) -> Any:
    """Return a loss; its gradients are taken when it is there.

    Where they need nothing of the loss's own forward pass, XLA leaves that for last and keeps what it reads.
    """
    return _awaited(value) if jnp.issubdtype(jnp.result_type(value), jnp.inexact) else value


@jax.custom_jvp
def _awaited(value: Any) -> Any:
    return value


@_awaited.defjvp
def _(values: tuple[Any], changes: tuple[Any]) -> tuple[Any, Any]:
    # By one, which is there when the value is: so that JAX differentiates it in every way.
    known = jax.lax.stop_gradient(values[0])
    one, _ = jax.lax.optimization_barrier((jnp.ones((), known.dtype), known))
    return values[0], changes[0] * one


class Lookup:
    """``table[ids]`` as `eqn` reads it, with the table's rows over some axes of `mesh`.

    `of_table`, `of_ids` and `of_rows` say where the table, the ids and what is read lie while computing. Left
    to itself, XLA gathers the table where the rows read lie over the axes that cut it, and adds up its
    gradient whole on every device. Here each device finds the ids of its own rows, and what they read is
    summed over the others, each keeping its part where `of_rows` says so; in float32 at least if it `widens`.
    A device's own rows' gradients are summed in float32 if `sums_wide`.
    """

    def __init__(
        self,
        eqn: core.JaxprEqn,
        mesh: Mesh | AbstractMesh,
        of_table: PartitionSpec,
        of_ids: PartitionSpec,
        of_rows: PartitionSpec,
        *,
        widens: bool = False,
        sums_wide: bool = False,
    ) -> None:
        self._widens, self._sums_wide = widens, sums_wide
        avals: list[Any] = [atom.aval for atom in eqn.invars]
        table, ids = avals
        self._mode, self._fill = eqn.params["mode"], eqn.params["fill_value"]
        self._mesh = mesh
        self._whole = table.shape[0]
        self._of_table = of_table
        self._axes = axes_of(of_table[0])
        self._rows = table.shape[0] // cut_into(self._axes, mesh.shape)
        rank = ids.ndim - 1
        # An axis of the table holds all ids, and each of its devices looks for its own among them.
        busy = axes_in(of_table)
        self._entries = [
            tuple(axis for axis in entry if axis not in busy)
            for entry in by_dimension(tuple(of_ids), rank)[:rank]
        ]
        wanted = by_dimension(tuple(of_rows), rank)[:rank]
        # Where the sum over the table's axes is scattered: a dimension of the ids, cut by them innermost.
        self._scattered = next(
            (
                n
                for n, (entry, own) in enumerate(zip(wanted, self._entries, strict=True))
                if entry == own + self._axes
            ),
            None,
        )

    def read(self, table: Any, ids: Any) -> Any:
        """Return the rows that `ids` ``[…, 1]`` name of `table` ``[rows, …]``, with its gradient."""

        @jax.custom_vjp
        def rows(table: Any, ids: Any) -> Any:
            scattered = list(self._entries)
            if self._scattered is not None:
                scattered[self._scattered] += self._axes
            in_specs = (self._of_table, self._spec_of_ids())
            return by_device(self._read, self._mesh, in_specs, self._spec(scattered))(table, ids)

        def backward(ids: Any, gradient: Any) -> tuple[Any, Any]:
            in_specs = (self._spec_of_ids(), self._spec(self._entries))
            learnt = by_device(self._learn, self._mesh, in_specs, self._of_table)(ids, gradient)
            return learnt, np.zeros(ids.shape, jax.dtypes.float0)

        rows.defvjp(lambda table, ids: (rows(table, ids), ids), backward)
        return rows(table, ids)

    def _read(self, table: Any, ids: Any) -> Any:
        place, mine = self._own(ids)
        wide = (...,) + (None,) * (table.ndim - 1)
        found = table.at[jnp.where(mine, place, 0)].get(mode="promise_in_bounds")
        found = self._wide(jnp.where(mine[wide], found, jnp.zeros((), table.dtype)))
        if self._scattered is None:
            found = jax.lax.psum(found, self._axes).astype(table.dtype)
        else:
            place = self._scattered
            found = jax.lax.psum_scatter(found, self._axes, scatter_dimension=place, tiled=True)
            found = found.astype(table.dtype)
            own = found.shape[place]
            ids = jax.lax.dynamic_slice_in_dim(ids, jax.lax.axis_index(self._axes) * own, own, place)
        if self._mode != _Mode.FILL_OR_DROP:
            return found
        fill = jnp.nan if self._fill is None else self._fill
        inside = (ids[..., 0] >= 0) & (ids[..., 0] < self._whole)
        return jnp.where(inside[wide], found, jnp.asarray(fill, found.dtype))

    def _learn(self, ids: Any, gradient: Any) -> Any:
        place, mine = self._own(ids)
        dtype = jnp.promote_types(gradient.dtype, jnp.float32) if self._sums_wide else gradient.dtype
        shape, added = (self._rows, *gradient.shape[ids.ndim - 1 :]), gradient.astype(dtype)
        zeros, added = zeros_for(shape, added) if self._sums_wide else (jnp.zeros(shape, dtype), added)
        # What is another device's lies outside, and is dropped.
        sums = zeros.at[jnp.where(mine, place, self._rows)].add(added, mode="drop")
        sums = sums.astype(gradient.dtype)
        others = tuple(axis for entry in self._entries for axis in entry)
        return jax.lax.psum(self._wide(sums), others).astype(sums.dtype) if others else sums

    def _wide(self, value: Any) -> Any:
        return value.astype(jnp.promote_types(value.dtype, jnp.float32)) if self._widens else value

    def _own(self, ids: Any) -> tuple[Any, Any]:
        """Return where each id lies in this device's rows, and whether it does."""
        wanted = ids[..., 0]
        if self._mode == _Mode.CLIP:
            wanted = jnp.clip(wanted, 0, self._whole - 1)
        place = wanted - jax.lax.axis_index(self._axes).astype(wanted.dtype) * self._rows
        return place, (place >= 0) & (place < self._rows)

    def _spec_of_ids(self) -> PartitionSpec:
        return PartitionSpec(*[entry or None for entry in self._entries], None)

    def _spec(self, entries: list[tuple[str, ...]]) -> PartitionSpec:
        return PartitionSpec(*[entry or None for entry in entries], *self._of_table[1:])


def settled(inputs: list[Any]) -> list[Any]:
    """Return `inputs`; the gradients of all are there, and reduced, before any of them is used.

    Else XLA takes the gradients of what comes before first, and meanwhile keeps the parameter gathered and
    its gradient whole.
    """
    leaves, structure = jax.tree.flatten(inputs)
    places = [n for n, leaf in enumerate(leaves) if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)]
    if len(places) < 2:
        return inputs
    for n, value in zip(places, _together(tuple(leaves[n] for n in places)), strict=True):
        leaves[n] = value
    return jax.tree.unflatten(structure, leaves)


@jax.custom_vjp
def _together(values: tuple[Any, ...]) -> tuple[Any, ...]:
    return values


_together.defvjp(
    lambda values: (values, None), lambda _, gradients: (jax.lax.optimization_barrier(gradients),)
)
