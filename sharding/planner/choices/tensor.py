"""Which dimensions an axis may shard together while computing, for any program.

Two dims can be sharded over one axis at once only if no array has both. A tensor-parallel layout is therefore
an independent set in the graph of dims that meet in an array: in a transformer {heads, mlp, vocab} is one,
since each is a weight's only other dimension than embed, and {embed} is another. What one product gives
sharded over such a dim, the next contracts.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

from ...program.flops import matmul_roles, work
from ...program.program import Dim, Dims, Program
from .draft import Draft, Given, Refused

# Alternatives that start from a dimension dividing less than this part of the work are not worth a look.
_WORTHWHILE = 0.1
_MOST_GROUPS = 3
# A dimension that divides no work (a table's rows) counts if it divides this part of the parameters.
_LEAST_PARAMETERS = 0.001


def choices(given: Given, draft: Draft) -> Iterator[Draft | Refused]:
    """Yield the dims that ``tensor`` shards, group by group; none where it has one device or a rule."""
    size = draft.mesh["tensor"]
    if size == 1 or any("tensor" in axes for axes in draft.kept.dims.values()):
        yield draft
        return
    kept = frozenset(draft.kept.dims)
    found = given.once((TensorGroups, kept), lambda: TensorGroups(given.program, kept))
    groups = found.of(size)
    if not groups:
        yield Refused(sizes={"tensor": size}, reason=found.why_none(size))
    for group in groups:
        dims = {**draft.dims, **dict.fromkeys(group, ("tensor",))}
        yield dataclasses.replace(draft, group=group, dims=dims)


class TensorGroups:
    """The groups of dims of one program that an axis of a given size may shard."""

    def __init__(self, program: Program, whole: Iterable[int] = ()) -> None:
        """`whole` are dims that are not to be sharded."""
        self._work, self._total = _matmul_work(program)
        minors, self._meets = _meetings(program)
        spared = minors.union(whole, _of_data(program), _between_activations(program))
        sizes = _parameter_sizes(program)
        self._spared = [dim for dim in program.dims if dim.places and dim.id in spared]
        least = _LEAST_PARAMETERS * sum(math.prod(argument.shape) for argument in program.parameters)
        dims = [dim for dim in program.dims if dim.id not in spared and _is_shardable(dim)]
        self._dims = sorted(
            (dim for dim in dims if dim.id in self._work or sizes[dim.id] > least),
            key=lambda dim: (-self._work.get(dim.id, 0.0), -sizes[dim.id], dim.id),
        )

    @functools.cache  # noqa: B019  # lives as long as one planning
    def of(self, size: int) -> tuple[tuple[int, ...], ...]:
        """Return groups of dims that `size` divides, each as large as can be, most work first."""
        fitting = [dim.id for dim in self._dims if dim.size % size == 0]
        groups: list[tuple[int, ...]] = []
        for seed in fitting:
            if len(groups) == _MOST_GROUPS or self._work.get(seed, 0.0) < _WORTHWHILE * self._total:
                break
            if not any(seed in group for group in groups):
                groups.append(self._grown(seed, fitting))
        return tuple(sorted(groups, key=lambda group: -sum(self._work.get(dim, 0.0) for dim in group)))

    def why_none(self, size: int) -> str:
        """Say why there is no group for an axis of `size`."""
        if any(dim.size % size == 0 for dim in self._spared):
            return (
                f"tensor={size} has nothing worth cutting: what {size} divides of the parameters the data "
                "have too, or two activations are multiplied along it; rules= cuts it all the same"
            )
        return f"no dimension of the parameters is one that {size} divides"

    def _grown(self, seed: int, fitting: Iterable[int]) -> tuple[int, ...]:
        group = [seed]
        for dim in fitting:
            if dim != seed and not self._meets[dim].intersection(group):
                group.append(dim)
        return tuple(sorted(group))


def _is_shardable(dim: Dim) -> bool:
    """Whether parameters have it, it can be cut, and no loop walks it."""
    in_parameters = bool(dim.places) and not dim.batch_like
    return in_parameters and dim.whole is None and not dim.whole_at and not dim.scanned and dim.size > 1


def _of_data(program: Program) -> set[int]:
    """Return the dims that the data have, such as a sequence that positions are learned for."""
    return {dim for a in program.arguments if a.is_data for c in a.dims for dim in c}


def _between_activations(program: Program) -> set[int]:
    """Return the dims that products of two activations contract, and their families (head_dim in q·kᵀ).

    Sharded, they would leave a partial result of the size of what may be the largest array.
    """
    batch = set(program.data_dims)
    families: set[int] = set()
    for equation in program.equations():
        roles = matmul_roles(equation)
        if roles is None or not all(batch & {d for c in dims for d in c} for dims in equation.ins[:2]):
            continue
        families.update(program.dims[dim].family for factor in roles.contracting for dim in factor.dims)
    return {dim.id for dim in program.dims if dim.family in families}


def _matmul_work(program: Program) -> tuple[Mapping[int, float], float]:
    """Return dim → operations of the products that sharding it divides, and those of all products."""
    found: dict[int, float] = defaultdict(float)
    total = 0.0
    for equation in program.equations():
        done = work(equation)
        if done.unit == "matmul":
            total += done.flops * equation.multiplicity
            for dim in set(done.dims):
                found[dim] += done.flops * equation.multiplicity
    return dict(found), total


def _meetings(program: Program) -> tuple[set[int], Mapping[int, set[int]]]:
    """Return the dims that are a minor part of some parameter's dimension, and dim → those it meets."""
    meets: dict[int, set[int]] = defaultdict(set)
    seen: set[Dims] = set()

    def note(dims: Dims) -> None:
        if dims in seen:
            return
        seen.add(dims)
        together = {dim for composition in dims for dim in composition}
        for dim in together:
            meets[dim] |= together - {dim}

    for argument in program.arguments:
        note(argument.dims)
    for equation in program.equations():
        for dims in (*equation.ins, *equation.outs):
            note(dims)
    minors = {dim for argument in program.parameters for c in argument.dims for dim in c[1:]}
    return minors, meets


def _parameter_sizes(program: Program) -> Mapping[int, int]:
    sizes: dict[int, int] = defaultdict(int)
    for argument in program.parameters:
        for dim in {dim for composition in argument.dims for dim in composition}:
            sizes[dim] += math.prod(argument.shape)
    return sizes
