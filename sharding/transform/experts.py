"""A mixture's experts where they lie: calls of `ops.experts` in regions in which all mesh axes are manual.

The axes of the experts decide what moves. Those that tokens lie over too exchange tokens by all-to-alls
(`ops.rounds`); over others every device has the same tokens, and takes those of its own experts. Left to XLA,
sorted rows would be gathered.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from ..ops.experts import ExpertsCall, KeptProducts, by_expert
from ..ops.grouped import TILES
from ..ops.products import product_facts, products_refusal
from ..ops.rounds import PeerExchange, exchanged, slots_of
from ..plans import arrays
from ..plans.record import Decision
from ..plans.specs import by_dimension, cut_into
from ..program.layers import Marks
from ..program.mixtures import experts_dims
from ..program.primitives import Trait, primitives
from ..program.program import Dims, Equation, Program, Scope
from .meshes import by_device

# The axis of stages, of which each runs other layers.
_STAGE = "stage"

_PRODUCTS = primitives(Trait.PRODUCT)

# Return how the plan lays an array of these dims and this shape on the mesh.
SpecOf = Callable[[Dims, tuple[int, ...]], PartitionSpec]

# The mesh axes of one array dimension, the major one first.
_Axes = tuple[str, ...]

# Of no dims.
NOWHERE: Mapping[int, _Axes] = MappingProxyType({})


class _ExpertAxes(NamedTuple):
    """The mesh axes of tokens' two dimensions, of experts and of their hidden size.

    `scattered` are those of the hidden size that tokens lie over outside, in their second dimension.
    """

    batch: _Axes
    sequence: _Axes
    experts: _Axes
    hidden: _Axes
    scattered: _Axes

    @classmethod
    def of(cls, x: tuple[_Axes, ...], up: tuple[_Axes, ...]) -> _ExpertAxes:
        batch, sequence, _ = x
        experts, _, hidden = up
        tokens = {*batch, *sequence}
        # Axes of which all devices need the same tokens.
        whole = {*hidden, *(() if tokens.issuperset(experts) else experts)}
        left = tuple(axis for axis in sequence if axis not in whole)
        dropped = sequence[len(left) :]
        return cls(
            batch=tuple(axis for axis in batch if axis not in whole),
            sequence=left,
            experts=experts,
            hidden=hidden,
            scattered=dropped if sequence == left + dropped else (),
        )

    def but(self, axes: Collection[str]) -> _ExpertAxes:
        """Return those that are none of `axes`."""
        return _ExpertAxes(*(tuple(axis for axis in one if axis not in axes) for one in self))

    @property
    def exchanges(self) -> bool:
        """Whether each device of the experts' axes brings tokens of its own."""
        return bool(self.experts) and {*self.batch, *self.sequence}.issuperset(self.experts)

    @property
    def summed(self) -> _Axes:
        """The axes over which results are partial sums."""
        return self.hidden if self.exchanges else (*self.experts, *self.hidden)


class Multiplier(NamedTuple):
    """What multiplies rows by their experts: a kernel's name, and whether a CPU stands for its chip.

    `marks` name what a plan keeps for the backward pass, by its place in the program.
    """

    kernel: str = TILES
    interpret: bool = False
    marks: Marks = MappingProxyType({})

    @classmethod
    def of(cls, settings: Mapping[str, Any] | None, platform: str, marks: Marks) -> Multiplier:
        """Read a plan's ``kernels["experts"]`` on the platform that is compiled for."""
        kernel = TILES if settings is None else settings["implementation"]
        facts = product_facts().get(kernel, {})
        if platform == facts.get("platform"):
            return cls(kernel, marks=marks)
        if platform == "cpu" and facts.get("interpreted"):
            return cls(kernel, True, marks)
        return cls(marks=marks)

    def on(self, x: Any, matrices: Sequence[Any], hidden: int) -> Multiplier:
        """Return what multiplies a device's part of arrays, their hidden size cut into `hidden` parts."""
        if self.kernel == TILES:
            return self
        up, *_ = matrices
        local = jax.ShapeDtypeStruct((1, up.shape[1], up.shape[2] // hidden), up.dtype)
        return self if products_refusal(self.kernel, x, local) is None else Multiplier(marks=self.marks)


BY_TILES = Multiplier()


def names_of_experts(plan: Decision, program: Program) -> frozenset[str]:
    """Return the plan's dims of experts whose tokens `on_mesh` exchanges, by their names there."""
    found = set(experts_dims(program))
    return frozenset(name for name, dim in arrays.numbers_of_dims(plan, program).items() if dim in found)


def own_experts(mesh: Mesh | AbstractMesh, axes: _Axes, matrix: jax.Array, count: int) -> jax.Array:
    """Return a device's own of a `matrix` for each of `count` experts, where it is not that already.

    `axes` cut the experts and are manual around.
    """
    if not axes or matrix.shape[0] < count:
        return matrix
    own = count // cut_into(axes, mesh.shape)
    return lax.dynamic_slice_in_dim(matrix, lax.axis_index(axes) * own, own)


def _kept(equation: Equation, marks: Marks) -> KeptProducts:
    """Return the names that `marks` give the products of a call, as they stand in what it is priced by."""
    inner = equation.scopes[0]
    matrices = dict(zip(inner.jaxpr.invars[3:], KeptProducts._fields, strict=False))
    return KeptProducts(**{one: marks.get((product, None)) for one, product in _products(inner, matrices)})


def _products(scope: Scope, matrices: dict[Any, str]) -> Iterator[tuple[str, int]]:
    """Yield which of `matrices` each product of a scope reads, and the product's equation."""
    for equation in scope.equations:
        read = [matrices.get(atom) for atom in equation.eqn.invars if not isinstance(atom, core.Literal)]
        if equation.scopes:
            inner = equation.scopes[0]
            pairs = zip(inner.jaxpr.invars, equation.eqn.invars, strict=True)
            own = {
                var: matrices[atom]
                for var, atom in pairs
                if not isinstance(atom, core.Literal) and atom in matrices
            }
            yield from _products(inner, own)
        elif equation.primitive in _PRODUCTS:
            yield from ((one, equation.index) for one in read if one is not None)


def on_mesh(
    mesh: Mesh | AbstractMesh,
    call: ExpertsCall,
    equation: Equation,
    spec_of: SpecOf,
    operands: Sequence[Any],
    multiplier: Multiplier,
    around: Mapping[int, _Axes] = NOWHERE,
) -> Any:
    """Return the result of `call` of `operands`, which is `equation`, as a plan lays them on `mesh`.

    `around` has the axes of dims that are manual already, of which operands are a device's part.
    """
    dims = equation.ins
    x, up = operands[0], operands[3]

    def lying(dims: Dims, shape: tuple[int, ...]) -> tuple[_Axes, ...]:
        free = by_dimension(tuple(spec_of(dims, shape)), 3)
        return tuple(_axes_around(around, one) + axes for one, axes in zip(dims, free, strict=True))

    layout = _ExpertAxes.of(lying(dims[0], x.shape), lying(dims[3], up.shape))
    # What is manual around cuts the rows.
    mine = tuple(axis for axis in _axes_around(around, dims[3][0]) if axis not in layout.batch)
    layout = layout._replace(batch=mine + layout.batch)
    by_hand = {axis for axes in around.values() for axis in axes}
    free = layout.but(by_hand)
    parts = cut_into((*free.batch, *free.sequence), mesh.shape)
    multiplier = multiplier.on(x, operands[3:], cut_into(layout.hidden, mesh.shape))
    how = {
        "kernel": multiplier.kernel,
        "interpret": multiplier.interpret,
        "kept": _kept(equation, multiplier.marks),
    }
    exchange = None
    if layout.exchanges:
        peers = cut_into(layout.experts, mesh.shape)
        tokens = x.shape[0] * x.shape[1] // parts
        slots = slots_of(tokens, operands[2].shape[2], peers)
        # Stages run other layers, and exchange nothing of them.
        everywhere = tuple(axis for axis in mesh.axis_names if axis != _STAGE)
        exchange = PeerExchange(axes=layout.experts, peers=peers, everywhere=everywhere, slots=slots, **how)
    tokens = PartitionSpec(free.batch or None, free.sequence or None)
    wide = PartitionSpec(free.experts or None, None, free.hidden or None)
    narrow = PartitionSpec(free.experts or None, free.hidden or None)
    out = PartitionSpec(free.batch or None, (*free.sequence, *_scattered(layout)) or None)
    local = functools.partial(_local, mesh, call, layout, exchange, how)
    in_specs = (tokens, tokens, tokens, wide, narrow, *(wide,) * call.gated)
    return by_device(local, mesh, in_specs, out)(*operands)


def _axes_around(around: Mapping[int, _Axes], composition: Sequence[int]) -> _Axes:
    return around.get(composition[0], ()) if composition else ()


def _scattered(layout: _ExpertAxes) -> _Axes:
    """Return the axes that a sum over them leaves a part of the sequence to."""
    return layout.scattered if {*layout.scattered} == {*layout.summed} else ()


def _local(
    mesh: Mesh | AbstractMesh,
    call: ExpertsCall,
    layout: _ExpertAxes,
    exchange: PeerExchange | None,
    how: Mapping[str, Any],
    x: jax.Array,
    weights: jax.Array,
    chosen: jax.Array,
    *matrices: jax.Array,
) -> jax.Array:
    """Return one device's part of the result, of its parts of the arrays."""
    shape, count = x.shape, matrices[0].shape[0]
    x, weights, chosen = (y.reshape(-1, y.shape[-1]) for y in (x, weights, chosen))
    if exchange is not None:
        out = exchanged(call, exchange, x, weights, chosen, *matrices)
    else:
        if layout.experts:
            own = chosen - lax.axis_index(layout.experts).astype(jnp.int32) * count
            chosen = jnp.where((own >= 0) & (own < count), own, count)
        parts = cut_into(layout.experts, mesh.shape)
        out = by_expert(call, x, weights, chosen, *matrices, parts=parts, **how)
    out = out.reshape(shape)
    if axes := _scattered(layout):
        return lax.psum_scatter(out, axes, scatter_dimension=1, tiled=True)
    return _summed(layout.summed, cut_into(layout.summed, mesh.shape), out) if layout.summed else out


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _summed(axes: _Axes, size: int, x: jax.Array) -> jax.Array:
    """Return the sum of `x` over mesh axes, `size` devices.

    Its gradient is the same on all of them: `jax.shard_map` hands each an equal part, and to sum these again
    would be a collective for nothing.
    """
    return lax.psum(x, axes)


_summed.defvjp(
    lambda axes, size, x: (_summed(axes, size, x), None), lambda axes, size, _, gradient: (gradient * size,)
)
