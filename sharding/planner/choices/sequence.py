"""Sequence parallelism: the dimension of what layers hand on that may share an axis with the parameters.

Between the products that a tensor axis divides, a layer's stream is the same on all its devices. Sharded over
that axis too, on a dimension that no parameter has, it costs no more traffic (the all-reduce after a product
becomes a reduce-scatter, and an all-gather before the next) and every device keeps and normalises a part
(Korthikanti et al. 2022, arXiv:2205.05198).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator

from ...cost.candidate import Candidate
from ...cost.context import CONTEXT, calls_of, crowded
from ...plans.specs import cut_into
from ...program.jaxpr import scan_parts
from ...program.program import Dims, Equation, Program
from .draft import Draft, Given, Refused


def choices(given: Given, draft: Draft) -> Iterator[Draft | Refused]:
    """Yield the draft, then the draft with the stream between layers cut over ``tensor`` too."""
    yield draft
    layers, taken = given.layers, {*given.leads, *given.program.batch_dims}
    if not draft.group or layers is None:
        return
    dim = given.once(_stream_dim, lambda: _stream_dim(given.program, layers.dim, taken))
    if dim is None:
        return
    before = draft.dims.get(dim, ())
    cut = (*before, "tensor")
    if before not in ((), (CONTEXT,)) or given.program.dims[dim].size % cut_into(cut, draft.mesh):
        return
    dims = {**draft.dims, dim: cut}
    if before:
        # Where heads do not lie over the tensor axis, attention's queries would, beside context.
        calls = given.once(calls_of, lambda: calls_of(given.program))
        if crowded(calls, Candidate(mesh=draft.mesh, dims=dims)):
            return
    yield dataclasses.replace(draft, dims=dims)


def _stream_dim(program: Program, layer_dim: int, taken: Collection[int]) -> int | None:
    """Return the largest dim, not one of `taken`, that the stream of the scan over `layer_dim` can be cut at.

    None if the stream has none but those of parameters and of the batch.
    """
    of_parameters = {dim for a in program.parameters for c in a.dims for dim in c}
    spared = of_parameters.union(taken)
    found = [
        composition[0]
        for dims in _carried(program, layer_dim)
        for composition in dims
        if composition and not spared.intersection(composition)
    ]
    open_ = [dim for dim in found if program.dims[dim].whole is None and not program.dims[dim].scanned]
    return max(open_, key=lambda dim: (program.dims[dim].size, -dim), default=None)


def _carried(program: Program, layer_dim: int) -> list[Dims]:
    """Return the dims of the arrays that the scan over the layers carries, the largest first."""
    for equation in program.equations():
        if _walks(equation, layer_dim):
            parts = scan_parts(equation.eqn)
            scope = equation.scopes[0]
            variables = scope.jaxpr.invars[parts.num_consts : parts.num_consts + parts.num_carry]
            by_size = sorted(variables, key=lambda var: -math.prod(getattr(var.aval, "shape", ())))
            return [scope.dims_of(variable) for variable in by_size]
    return []


def _walks(equation: Equation, layer_dim: int) -> bool:
    return (
        equation.primitive == "scan"
        and bool(equation.factors)
        and any(layer_dim in factor.dims for factor in equation.factors)
    )
