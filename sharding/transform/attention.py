"""Attention by a kernel of the chip, as a transformation of each call of `ops.attention`."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from ..ops import cudnn
from ..ops.attention import AttentionCall, attention_call
from ..ops.context.order import into_balance, out_of_balance
from ..ops.context.pieces import SPLASH
from ..ops.context.taken import BLOCKS, CONTEXT, Site, Taken, piece_kernel, taken
from ..ops.context.ways import GATHERED, RING, is_balanced
from ..ops.kernels import by_cudnn, facts_on, pair_of_blocks, splash, splash_kernel
from ..plans.specs import axes_of, by_dimension, cut_into
from ..program.layers import Marks
from ..program.primitives import Trait, primitives
from ..program.program import Dims, Equation, Program
from .context import kernel_of, layout_of, over_context, spread_of
from .meshes import by_device, with_automatic_axes

# What an array goes through and is still the same numbers.
_PASSING = primitives(Trait.VIEW) | {"name"}

# Return how the plan lays an array of these dims and this shape on the mesh.
SpecOf = Callable[[Dims, tuple[int, ...]], PartitionSpec]

# Return a parameter that is stored in parts as it is computed with, and any other value as it is.
Gather = Callable[[Any, Dims], Any]

# The mesh axes of one array dimension, as a PartitionSpec has them.
_Entry = str | tuple[str, ...] | None


class _Layout(NamedTuple):
    """The mesh axes of the queries' first three dimensions."""

    batch: _Entry
    rows: _Entry
    heads: _Entry


class AttentionKernel:
    """Carries out calls of attention as a plan says on the devices of `mesh`: by a kernel, over `context`.

    `settings` is a plan's ``kernels["attention"]``: ``implementation``, for splash the largest blocks,
    ``block_q`` and ``block_kv``, for kernels of packed rows ``segments``, the most of a row. A call that the
    kernel cannot do is left to XLA; the planner has said so in the plan's notes. `context` is the plan's way
    over that axis, for calls whose queries it cuts; of both, either may be None. `platform` is what the
    program is lowered for; on a ``cpu`` splash is interpreted. `marks` are the names that values of the
    program are to be given. `capability` is that of the plan's GPUs.

    A kernel's backward pass reads its result, splash's in an order of its own, and one number a row besides.
    It is these that are to be kept under a name of the result, and not the program's order of them once more.
    """

    def __init__(
        self,
        mesh: Mesh | AbstractMesh,
        settings: Mapping[str, Any] | None,
        platform: str,
        program: Program,
        marks: Marks,
        capability: str | None = None,
        context: str | None = None,
    ) -> None:
        self._mesh = mesh
        self._context = context
        self._facts = None if settings is None else facts_on(settings["implementation"], capability)
        self._settings = settings or {}
        self._platform = platform
        self._names: dict[Any, str] = {}
        self._origins: dict[Any, Any] = {}
        self._made: set[Any] = set()
        for equation in program.equations():
            self._follow(equation, marks)

    def _follow(self, equation: Equation, marks: Marks) -> None:
        """Take note of the names of a call's result, and of what else is that result."""
        eqn = equation.eqn
        if attention_call(eqn) is not None:
            self._origins[eqn.outvars[0]] = eqn.outvars[0]
            return
        for n, atom in enumerate(eqn.invars):
            origin = self._origin(atom)
            name = eqn.params["name"] if equation.primitive == "name" else marks.get((equation.index, n))
            if origin is not None and name is not None:
                self._names.setdefault(origin, name)
            if origin is not None and n == 0 and equation.primitive in _PASSING:
                self._origins[eqn.outvars[0]] = origin

    def _origin(self, atom: Any) -> Any:
        return None if isinstance(atom, core.Literal) else self._origins.get(atom)

    def keeps(self, atom: Any) -> bool:
        """Whether a kernel that was made gives this value, and keeps it under its name."""
        return self._origin(atom) in self._made

    def visit(
        self, equation: Equation, inputs: Sequence[Any], gather: Gather, spec_of: SpecOf
    ) -> list[Any] | None:
        """Return the results of a call of attention, or of naming one; None to do as without a kernel."""
        eqn = equation.eqn
        if equation.primitive == "name":
            return list(inputs) if self.keeps(eqn.invars[0]) else None
        call = attention_call(eqn)
        if call is None:
            return None
        avals: list[Any] = [atom.aval for atom in eqn.invars[:3]]
        queries, keys = (spec_of(equation.ins[n], avals[n].shape) for n in range(2))
        site = Site(
            call=call,
            query=avals[0],
            key=avals[1],
            value=avals[2],
            query_axes=by_dimension(tuple(queries), 4),
            key_axes=by_dimension(tuple(keys), 4),
            mesh=self._mesh.shape,
        )
        found = taken(site, self._settings or None, self._facts, self._context)
        if found.by is None:
            return None
        inputs = [gather(value, dims) for value, dims in zip(inputs, equation.ins, strict=True)]
        # What is compiled of it says what was asked for, to whoever reads it.
        with jax.named_scope(call.name):
            if found.way is not None:
                return [self._over_context(site, found, eqn.outvars[0], inputs)]
            layout = _Layout(*(*queries, *(None,) * (4 - len(queries)))[:3])
            by = self._splash if found.by == SPLASH else self._cudnn
            out = by(call, eqn.outvars[0], inputs, layout)
        return None if out is None else [out]

    def _over_context(self, site: Site, found: Taken, result: Any, inputs: Sequence[Any]) -> Any:
        """Return the result over `context`, by a kernel of the chip or in blocks."""
        name = self._names.get(result)
        pieces = None
        if found.by != BLOCKS:
            pieces = piece_kernel(self._settings, interpret=self._platform == "cpu")
        assert found.way is not None
        spread = spread_of(site, found.way, pieces, name)
        by_kernel = None
        if pieces is not None and found.way != RING:
            by_kernel = kernel_of(spread, pieces, self._settings.get("segments"), site.sizes.heads)
        with self._described():
            out = over_context(self._mesh, spread, layout_of(site), inputs, by_kernel)
        if name is not None:
            self._made.add(result)
        return out

    def _described(self) -> contextlib.AbstractContextManager[None]:
        """Return what lets JAX trace cuDNN's calls for GPUs that are not here."""
        return contextlib.nullcontext() if self._has_devices() else cudnn.described()

    def _splash(self, call: AttentionCall, result: Any, inputs: Sequence[Any], layout: _Layout) -> Any:
        query, key, *_ = inputs
        row_parts = self._parts(layout.rows)
        most = self._settings["block_q"], self._settings["block_kv"]
        blocks = pair_of_blocks(query.shape[1] // row_parts, key.shape[1], most)
        assert blocks is not None
        balanced = self._context is not None and layout.rows == CONTEXT
        balanced = balanced and is_balanced(call, GATHERED, query.shape[1], row_parts)
        kernel = splash_kernel(
            call,
            queries=query.shape[1],
            keys=key.shape[1],
            heads=query.shape[2] // self._parts(layout.heads),
            row_parts=row_parts,
            blocks=blocks,
            name=self._names.get(result),
            interpret=self._platform == "cpu",
            balanced=balanced,
        )
        if result in self._names:
            self._made.add(result)

        def local(kernel: Any, *arrays: Any) -> Any:
            if not balanced:
                return splash(call, kernel, *arrays)
            query, key, value, *ids = arrays
            query, *own = (into_balance(x, CONTEXT, row_parts) for x in (query, *ids[:1]))
            return out_of_balance(splash(call, kernel, query, key, value, *own, *ids[1:]), CONTEXT, row_parts)

        of_masks = kernel.manual_sharding_spec(
            NamedSharding(with_automatic_axes(self._mesh), PartitionSpec(None, layout.rows))
        )
        return self._on_devices(local, (kernel,), (of_masks,), inputs, layout)

    def _cudnn(self, call: AttentionCall, result: Any, inputs: Sequence[Any], layout: _Layout) -> Any:
        def local(*arrays: Any) -> Any:
            return by_cudnn(call, self._settings.get("segments"), *arrays, name=name)

        name = self._names.get(result)
        try:
            with self._described():
                out = self._on_devices(local, (), (), inputs, layout._replace(rows=None))
        except (RuntimeError, NotImplementedError, ValueError) as error:
            # JAX asks the library itself, which is there where a GPU is, while it traces.
            warnings.warn(f"attention by cuDNN cannot be had here ({error}); XLA computes it", stacklevel=2)
            return None
        if name is not None:
            self._made.add(result)
        return out

    def _on_devices(
        self,
        local: Callable[..., Any],
        first: tuple[Any, ...],
        of_first: tuple[Any, ...],
        inputs: Sequence[Any],
        layout: _Layout,
    ) -> Any:
        """Run `local(*first, query, key, value, *segment_ids)` on what each device holds.

        Keys and values are whole along the sequence. Query heads lie where the kv heads are that they read;
        where their axes do not divide the kv heads, each query head gets a copy of its own.
        """
        query, key, value, *ids = inputs
        batch, rows, heads = layout
        kv_heads = heads if key.shape[2] > 1 else None
        if kv_heads is not None and key.shape[2] % self._parts(heads):
            times = query.shape[2] // key.shape[2]
            key, value = (jnp.repeat(array, times, axis=2) for array in (key, value))
        of_keys = PartitionSpec(batch, None, kv_heads)
        of_queries = PartitionSpec(batch, rows, heads)
        # Ids for queries and keys alike are given twice: a device has all keys, and its own rows of queries.
        both = (ids[0], ids[-1]) if ids else ()
        of_ids = (PartitionSpec(batch, rows), PartitionSpec(batch, None))[: len(both)]
        in_specs = (*of_first, of_queries, of_keys, of_keys, *of_ids)
        return by_device(local, self._mesh, in_specs, of_queries)(*first, query, key, value, *both)

    def _has_devices(self) -> bool:
        """Whether the mesh is of devices that are here, rather than of described ones."""
        return isinstance(self._mesh, Mesh) and self._mesh.devices.flat[0] in jax.devices()

    def _parts(self, axes: _Entry) -> int:
        return cut_into(axes_of(axes), self._mesh.shape)
