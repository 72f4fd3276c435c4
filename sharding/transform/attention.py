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
from ..ops.context.pieces import CUDNN, SPLASH, PieceKernel
from ..ops.context.ways import GATHERED, is_balanced
from ..ops.kernels import block_that_divides, by_cudnn, facts_on, refusal, splash, splash_kernel
from ..plans.specs import axes_of, cut_into
from ..program.layers import Marks
from ..program.primitives import Trait, primitives
from ..program.program import Dims, Equation, Program
from .context import CONTEXT, SpreadLayout, kernel_of, layout_of, over_context, spread_of
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
        kernel = self._settings.get("implementation")
        avals: list[Any] = [atom.aval for atom in eqn.invars[:3]]
        refused = self._facts is None or refusal(self._facts, call, *avals) is not None
        over = None
        if self._context is not None:
            over = layout_of(*(spec_of(equation.ins[n], avals[n].shape) for n in range(2)))
        if refused and over is None:
            return None
        inputs = [gather(value, dims) for value, dims in zip(inputs, equation.ins, strict=True)]
        if over is not None and self._context is not None:
            with jax.named_scope(call.name):
                told = (call, self._context, eqn.outvars[0], inputs, over)
                out = self._over_context(*told, kernel=not refused)
            if out is not None:
                return [out]
        if refused:
            return None
        spec = spec_of(equation.ins[0], inputs[0].shape)
        *first, head_dim = (*spec, *(None,) * (4 - len(spec)))
        if head_dim is not None:
            return None
        layout = _Layout(*first)
        # What is compiled of it says what was asked for, to whoever reads it.
        with jax.named_scope(call.name):
            if kernel == "splash":
                out = self._splash(call, eqn.outvars[0], inputs, layout)
            else:
                out = self._cudnn(call, eqn.outvars[0], inputs, layout)
        return None if out is None else [out]

    def _over_context(
        self,
        call: AttentionCall,
        word: str,
        result: Any,
        inputs: Sequence[Any],
        layout: SpreadLayout,
        *,
        kernel: bool,
    ) -> Any:
        """Return the result over `context`; None where keys are gathered for the kernel, or no way can."""
        query, key, *_ = inputs
        name = self._names.get(result)
        pieces = self._pieces() if kernel else None
        spread = spread_of(self._mesh, call, word, layout, query, key, pieces, name)
        if spread is None:
            return None
        by_kernel = None
        if pieces is not None:
            if spread.way == GATHERED and pieces.name == SPLASH:
                return None
            segments = self._settings.get("segments")
            by_kernel = kernel_of(spread, pieces, segments, query.shape[2] // self._parts(layout.heads))
        with self._described():
            out = over_context(self._mesh, spread, layout, inputs, by_kernel)
        # Only splash, and what is worked through here, keep what their gradients read under a name.
        if name is not None and (by_kernel is None or (pieces is not None and pieces.name == SPLASH)):
            self._made.add(result)
        return out

    def _pieces(self) -> PieceKernel:
        """Return the plan's kernel as one for pieces of a sequence."""
        name = self._settings["implementation"]
        if name != SPLASH:
            return PieceKernel(name=CUDNN, asked=bool(self._settings.get("pieces")))
        blocks = {side: self._settings[side] for side in ("block_q", "block_kv")}
        return PieceKernel(name=SPLASH, interpret=self._platform == "cpu", **blocks)

    def _described(self) -> contextlib.AbstractContextManager[None]:
        """Return what lets JAX trace cuDNN's calls for GPUs that are not here."""
        return contextlib.nullcontext() if self._has_devices() else cudnn.described()

    def _splash(self, call: AttentionCall, result: Any, inputs: Sequence[Any], layout: _Layout) -> Any:
        query, key, *_ = inputs
        row_parts = self._parts(layout.rows)
        block_q = block_that_divides(query.shape[1] // row_parts, self._settings["block_q"])
        block_kv = block_that_divides(key.shape[1], self._settings["block_kv"])
        if block_q is None or block_kv is None:
            return None
        balanced = self._context is not None and layout.rows == CONTEXT
        balanced = balanced and is_balanced(call, GATHERED, query.shape[1], row_parts)
        kernel = splash_kernel(
            call,
            queries=query.shape[1],
            keys=key.shape[1],
            heads=query.shape[2] // self._parts(layout.heads),
            row_parts=row_parts,
            blocks=(block_q, block_kv),
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
        if self._parts(layout.rows) > 1:
            return None

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
