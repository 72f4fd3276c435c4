"""Attention by a kernel of the chip, as a transformation of each call of `ops.attention`."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from ..ops import cudnn
from ..ops.attention import AttentionCall, attention_call
from ..ops.kernels import block_that_divides, dot_product, splash, splash_kernel
from ..program.primitives import Trait, primitives
from ..program.program import Dims, Equation

# What an array goes through and is still the same numbers.
_VIEWS = primitives(Trait.VIEW)

# Return how the plan lays an array of these dims and this shape on the mesh.
SpecOf = Callable[[Dims, tuple[int, ...]], PartitionSpec]

# Return a parameter that is stored in parts as it is computed with, and any other value as it is.
Gather = Callable[[Any, Dims], Any]

# The mesh axes of one array dimension, as a PartitionSpec has them.
_Entry = str | tuple[str, ...] | None


class AttentionKernel:
    """Carries out calls of attention by the kernel that `settings` name, on the devices of `mesh`.

    `settings` is a plan's ``kernels["attention"]``: ``implementation`` (``splash`` or ``cudnn``), and for
    splash the largest blocks, ``block_q`` and ``block_kv``. A call that the kernel cannot do is left to XLA;
    the planner has said so in the plan's notes. `platform` is what the program is lowered for; on a ``cpu``
    splash is interpreted.
    """

    def __init__(self, mesh: Mesh | AbstractMesh, settings: Mapping[str, Any], platform: str) -> None:
        self._mesh = mesh
        self._settings = settings
        self._platform = platform
        self._names: dict[Any, str] = {}
        self._origins: dict[Any, Any] = {}
        self._made: set[Any] = set()

    def enter(self, jaxpr: core.Jaxpr) -> None:
        """Take note of the names that results of attention have in `jaxpr`.

        Splash's backward pass reads its result in an order of its own, and one number a row besides. It is
        these that are to be kept under the name, and not the program's order of them once more.
        """
        for eqn in jaxpr.eqns:
            if attention_call(eqn) is not None:
                self._origins[eqn.outvars[0]] = eqn.outvars[0]
                continue
            first = eqn.invars[0] if eqn.invars else None
            origin = None if isinstance(first, core.Literal) else self._origins.get(first)
            if origin is None:
                continue
            if eqn.primitive.name == "name":
                self._names.setdefault(origin, eqn.params["name"])
            if eqn.primitive.name in (*_VIEWS, "name"):
                self._origins[eqn.outvars[0]] = origin

    def visit(
        self, equation: Equation, inputs: Sequence[Any], gather: Gather, spec_of: SpecOf
    ) -> list[Any] | None:
        """Return the results of a call of attention, or of naming one; None to do as without a kernel."""
        eqn = equation.eqn
        if eqn.primitive.name == "name":
            return list(inputs) if self._origins.get(eqn.invars[0]) in self._made else None
        call = attention_call(eqn)
        if call is None or call.windowed:
            return None
        inputs = [gather(value, dims) for value, dims in zip(inputs, equation.ins, strict=True)]
        spec = spec_of(equation.ins[0], inputs[0].shape)
        batch, rows, heads, head_dim = (*spec, *(None,) * (4 - len(spec)))
        if head_dim is not None:
            return None
        # What is compiled of it says what was asked for, to whoever reads it.
        with jax.named_scope(call.name):
            if self._settings["implementation"] == "splash":
                out = self._splash(call, eqn.outvars[0], inputs, batch, rows, heads)
            else:
                out = self._cudnn(call, inputs, batch, rows, heads)
        return None if out is None else [out]

    def _splash(
        self,
        call: AttentionCall,
        result: Any,
        inputs: Sequence[Any],
        batch: _Entry,
        rows: _Entry,
        heads: _Entry,
    ) -> Any:
        query, key, *_ = inputs
        row_parts = self._parts(rows)
        block_q = block_that_divides(query.shape[1] // row_parts, self._settings["block_q"])
        block_kv = block_that_divides(key.shape[1], self._settings["block_kv"])
        if block_q is None or block_kv is None:
            return None
        kernel = splash_kernel(
            call,
            queries=query.shape[1],
            keys=key.shape[1],
            heads=query.shape[2] // self._parts(heads),
            row_parts=row_parts,
            blocks=(block_q, block_kv),
            name=self._names.get(result),
            interpret=self._platform == "cpu",
        )
        if result in self._names:
            self._made.add(result)

        def local(kernel: Any, *arrays: Any) -> Any:
            return splash(call, kernel, *arrays)

        of_masks = kernel.manual_sharding_spec(NamedSharding(self._mesh, PartitionSpec(None, rows)))
        return self._on_devices(local, (kernel,), (of_masks,), inputs, batch, rows, heads)

    def _cudnn(
        self, call: AttentionCall, inputs: Sequence[Any], batch: _Entry, rows: _Entry, heads: _Entry
    ) -> Any:
        if self._parts(rows) > 1:
            return None

        def local(*arrays: Any) -> Any:
            return dot_product(call, *arrays)

        try:
            with contextlib.nullcontext() if self._has_devices() else cudnn.described():
                return self._on_devices(local, (), (), inputs, batch, None, heads)
        except (RuntimeError, NotImplementedError, ValueError) as error:
            # JAX asks the library itself, which is there where a GPU is, while it traces.
            warnings.warn(f"attention by cuDNN cannot be had here ({error}); XLA computes it", stacklevel=2)
            return None

    def _on_devices(
        self,
        local: Callable[..., Any],
        first: tuple[Any, ...],
        of_first: tuple[Any, ...],
        inputs: Sequence[Any],
        batch: _Entry,
        rows: _Entry,
        heads: _Entry,
    ) -> Any:
        """Run `local(*first, query, key, value, *segment_ids)` on what each device holds.

        Keys and values are whole along the sequence. Query heads lie where the kv heads are that they read;
        where their axes do not divide the kv heads, each query head gets a copy of its own.
        """
        query, key, value, *ids = inputs
        kv_heads = heads if key.shape[2] > 1 else None
        if kv_heads is not None and key.shape[2] % self._parts(heads):
            times = query.shape[2] // key.shape[2]
            key, value = (jnp.repeat(array, times, axis=2) for array in (key, value))
        of_keys = PartitionSpec(batch, None, kv_heads)
        of_queries = PartitionSpec(batch, rows, heads)
        # Ids for queries and keys alike are given twice: a device has all keys, and its own rows of queries.
        both = (ids[0], ids[-1]) if ids else ()
        of_ids = (PartitionSpec(batch, rows), PartitionSpec(batch, None))[: len(both)]
        return jax.shard_map(
            local,
            mesh=self._mesh,
            in_specs=(*of_first, of_queries, of_keys, of_keys, *of_ids),
            out_specs=of_queries,
            # Kernels do not say over which axes their results vary.
            check_vma=False,
        )(*first, query, key, value, *both)

    def _has_devices(self) -> bool:
        """Whether the mesh is of devices that are here, rather than of described ones."""
        return isinstance(self._mesh, Mesh) and self._mesh.devices.flat[0] in jax.devices()

    def _parts(self, axes: _Entry) -> int:
        names = () if axes is None else (axes,) if isinstance(axes, str) else axes
        return math.prod(self._mesh.shape[axis] for axis in names)
