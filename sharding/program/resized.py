"""Arguments of a traced function with other sizes of its dimensions, as far as it can be traced with them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from ..paths import map_by_path
from .around import mesh_of_caller, under
from .lookups import looks_up_rows
from .program import Program

# Dims that are tried together, the largest, and by which ratios.
_TOGETHER, _RATIOS = 6, (16, 4)


def resized(
    function: Callable[..., Any], args: Sequence[Any], program: Program, sizes: Mapping[int, int]
) -> tuple[tuple[Any, ...], dict[int, int]]:
    """Return `args` with as many dims of `program` at small sizes as `function` takes, and these sizes.

    Where it does not take all of `sizes` at once (heads that are written into it and do not divide a smaller
    width), dims are tried one by one, those that save most first, each beside those that were taken before.
    What is left may only go together, as a width and the heads' that it is made of: then by one ratio.
    """
    wanted = sorted(
        (dim for dim, size in sizes.items() if size < program.dims[dim].size),
        key=lambda dim: sizes[dim] / program.dims[dim].size,
    )

    def takes(tried: Mapping[int, int]) -> bool:
        return _takes(function, args, program, tried)

    taken = {dim: sizes[dim] for dim in wanted}
    if not takes(taken):
        taken = {}
        for dim in wanted:
            if takes(more := taken | {dim: sizes[dim]}):
                taken = more
        taken |= _together(program, [dim for dim in wanted if dim not in taken], taken, takes)
    return _with_sizes(args, program, taken), taken


def _together(
    program: Program,
    left: Sequence[int],
    taken: Mapping[int, int],
    takes: Callable[[Mapping[int, int]], bool],
) -> dict[int, int]:
    """Return the sizes of as many dims of `left` as can be made small by one ratio, beside those `taken`."""
    left = sorted(left, key=lambda dim: -program.dims[dim].size)[:_TOGETHER]
    for count in range(len(left), 1, -1):
        for ratio, some in itertools.product(_RATIOS, itertools.combinations(left, count)):
            whole = {dim: program.dims[dim].size for dim in some}
            if any(size % ratio or size < 2 * ratio for size in whole.values()):
                continue
            tried = {dim: size // ratio for dim, size in whole.items()}
            if takes({**taken, **tried}):
                return tried
    return {}


def looked_up(program: Program, sizes: Mapping[int, int]) -> int | None:
    """Return how many ids there are in every table that is looked up in, with dims at `sizes`.

    And in every dim that was as long as one of the tables, which the ids may be of too. None without a table.
    """
    tables = [one.ins[0][0] for one in program.equations() if looks_up_rows(one.eqn) and one.ins[0][0]]
    whole = {math.prod(program.dims[dim].size for dim in dims) for dims in tables}
    tables += [(dim.id,) for dim in program.dims if dim.places and dim.size in whole]
    rows = (math.prod(sizes.get(dim, program.dims[dim].size) for dim in dims) for dims in tables)
    return min(rows, default=None)


def _takes(
    function: Callable[..., Any], args: Sequence[Any], program: Program, sizes: Mapping[int, int]
) -> bool:
    """Whether the function can be traced with dims at `sizes`, to a result of the same kinds."""
    try:
        with under(mesh_of_caller()):
            found = jax.eval_shape(function, *_with_sizes(args, program, sizes))
    except Exception:  # A user's own function may raise anything where sizes do not agree.
        return False
    ranks = [len(row.shape) for row in program.results]
    return [len(leaf.shape) for leaf in jax.tree.leaves(found)] == ranks


def _with_sizes(args: Sequence[Any], program: Program, sizes: Mapping[int, int]) -> tuple[Any, ...]:
    rows = {(one.position, one.path): one for one in program.arguments}

    def length(dims: Sequence[int], whole: int) -> int:
        return math.prod(sizes.get(dim, program.dims[dim].size) for dim in dims) if dims else whole

    def shape(position: int, path: str, leaf: Any) -> Any:
        one = rows[position, path]
        lengths = tuple(map(length, one.dims, one.shape))
        return jax.ShapeDtypeStruct(lengths, leaf.dtype)

    return tuple(
        map_by_path(lambda path, leaf, position=position: shape(position, path, leaf), arg)
        for position, arg in enumerate(args)
    )
