"""Storage of parameters, gradients and moments: as computed with, and cut further over the data axes."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

from ...cost.candidate import Storage
from ...errors import nearest_divisors
from ...plans.specs import cut_into
from ...program.program import Argument, Program
from ...xla.compiler import compiler_of
from .draft import Draft, Given, Refused
from .layers import STAGE, Layers, moved_layers, over_stages

# A vector is stored whole unless it is more than this part of all parameters: a gather of so few bytes
# costs its latency in every layer and saves nothing.
_LEAST_VECTOR = 0.01
# How a parameter and its moments lie, by what that depends on: of all parameters, then of one.
Known = dict[object, dict[object, tuple[Storage, Storage]]]
# The axis that stores parameters which it does not compute with.
_STORING = "fsdp"


def choices(given: Given, draft: Draft) -> Iterator[Draft | Refused]:
    """Yield moments and gradients stored as parameters are, then cut over ``data`` too where that differs."""
    seen = []
    # Over an axis of one device nothing is cut further.
    for moments_over in ((), ("data",)) if draft.mesh.get("data", 1) > 1 else ((),):
        stored = store(
            given.program,
            draft.mesh,
            draft.dims,
            over=(_STORING,),
            moments_over=moments_over,
            declared=draft.kept.arrays,
            tile_rows=compiler_of(given.topology).tile_rows,
            chunks=draft.interleave,
            known=given.once(store, dict),
        )
        if stored in seen:
            continue
        seen.append(stored)
        made = dataclasses.replace(draft, stored=stored.params, optimizer=stored.optimizer)
        if (reason := _stores_nothing(given, made)) is not None:
            yield Refused(sizes=draft.mesh, reason=reason)
            continue
        if idle := _idle(made):
            size = draft.mesh[idle]
            yield Refused(sizes={idle: size}, reason=f"{idle}={size} would shard nothing in this program")
            continue
        yield made


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParameterStorage:
    """Index of an argument that is stored → the mesh axes of each dimension of its array."""

    params: Mapping[int, Storage]
    optimizer: Mapping[int, Storage]


def store(
    program: Program,
    mesh: Mapping[str, int],
    dims: Mapping[int, tuple[str, ...]],
    *,
    over: Sequence[str],
    moments_over: Sequence[str] = (),
    declared: Mapping[int, Mapping[int, tuple[str, ...]]],
    tile_rows: int,
    chunks: int = 1,
    known: Known | None = None,
) -> ParameterStorage:
    """Return how each parameter, and each array of the state, lies on the mesh.

    Args:
        program: the traced program.
        mesh: axis → size.
        dims: dim → the axes that shard it while computing.
        over: axes to store parameters over besides those they are computed with (FSDP).
        moments_over: further axes for the optimizer's moments (ZeRO-1).
        declared: argument index → array dimension → axes that are kept as they are.
        tile_rows: rows that gathers move whole, see `Compiler`.
        chunks: of layers that each of the mesh's stages holds.
        known: what was found so far for this program, on meshes of any sizes.
    """
    moved = moved_layers(program, mesh, chunks)
    if moved:
        dims = {dim: axes for dim, axes in dims.items() if all(dim != one.dim for one in moved)}
    params, optimizer = {}, {}
    known = {} if known is None else known
    way = _Way(program=program, over=over, moments_over=moments_over, tile_rows=tile_rows, moved=moved)
    # Of a mesh by the axes of a parameter's dims alone, of others by the sizes of all axes that tell.
    ways = (*over, None, *moments_over, tile_rows, moved)
    of_mesh, of_sizes = known.setdefault((*mesh.items(), *ways), {}), known.setdefault(ways, {})
    for argument, majors in program.majors:
        index, first = argument.index, program.alike[argument.index]
        if first in params and (not declared or declared.get(index) == declared.get(first)):
            params[index], optimizer[index] = params[first], optimizer[first]
            continue
        kept = declared.get(index, {})
        key = (index, *map(dims.get, majors), *kept.items())
        found = of_mesh.get(key)
        if found is None:
            laid = itertools.chain(*(dims.get(dim) or () for dim in majors), *kept.values())
            axes = sorted({*laid, *over, *moments_over, *(STAGE,) * bool(moved)})
            same = (*key, *((axis, mesh.get(axis, 1)) for axis in axes))
            if same not in of_sizes:
                of_sizes[same] = way.of(argument, dims, mesh, kept)
            found = of_mesh[key] = of_sizes[same]
        params[index], optimizer[index] = found
    state = state_storage(program, mesh, dims, params, over=over, tile_rows=tile_rows)
    return ParameterStorage(params={**params, **state}, optimizer={**optimizer, **state})


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Way:
    """How parameters of `program` are stored; fields are as the arguments of `store`."""

    program: Program
    over: Sequence[str]
    moments_over: Sequence[str]
    tile_rows: int
    moved: Sequence[Layers]

    def of(
        self,
        argument: Argument,
        dims: Mapping[int, tuple[str, ...]],
        mesh: Mapping[str, int],
        kept: Mapping[int, tuple[str, ...]],
    ) -> tuple[Storage, Storage]:
        """Return how a parameter and its moments lie, with the dimensions `kept` as they are."""
        storage = [kept.get(n, axes) for n, axes in enumerate(computed(argument, dims, mesh))]
        open_dimensions = [n for n in range(len(argument.shape)) if n not in kept]
        choices = _worth_cutting(argument, self.program, self.program.elements, open_dimensions)
        for axis in self.over:
            storage = _cut(storage, argument.shape, choices, axis, mesh, self.tile_rows)
        if self.moved:
            storage = over_stages(argument, self.moved, storage, mesh)
        moments = storage
        for axis in self.moments_over if argument.is_trained else ():
            moments = _cut(moments, argument.shape, choices, axis, mesh, self.tile_rows)
        return tuple(storage), tuple(moments)


def state_storage(
    program: Program,
    mesh: Mapping[str, int],
    dims: Mapping[int, tuple[str, ...]],
    params: Mapping[int, Storage],
    *,
    over: Sequence[str] = ("fsdp",),
    tile_rows: int,
) -> dict[int, Storage]:
    """Return how each array of the state lies, where `params` says how the parameters do.

    One that has the dims of a parameter, as a moving average of it has, lies as that does; any other as a
    parameter of its size would. The other arguments are as of `store`.
    """
    found = {}
    for index, like in program.state_like.items():
        if like is not None:
            found[index] = params[like]
            continue
        argument = program.arguments[index]
        cut = computed(argument, dims, mesh)
        choices = _worth_cutting(argument, program, program.elements, range(len(argument.shape)))
        for axis in over:
            cut = _cut(cut, argument.shape, choices, axis, mesh, tile_rows)
        found[index] = tuple(cut)
    return found


def computed(
    argument: Argument, dims: Mapping[int, tuple[str, ...]], mesh: Mapping[str, int]
) -> list[tuple[str, ...]]:
    """Return the axes of each dimension of `argument` where it is computed with; each axis serves once."""
    taken: set[str] = set()
    found: list[tuple[str, ...]] = []
    for size, composition in zip(argument.shape, argument.dims, strict=True):
        axes = dims.get(composition[0], ()) if composition else ()
        if taken.intersection(axes) or size % math.prod(mesh[axis] for axis in axes):
            axes = ()
        taken.update(axes)
        found.append(axes)
    return found


def _worth_cutting(argument: Argument, program: Program, total: int, dimensions: Sequence[int]) -> list[int]:
    """Return the dimensions that storage may cut: not those a scan walks, needed at its every step."""
    inner = program.unwalked[argument.index]
    stack = program.stack_of.get(argument.index)
    size = math.prod(argument.shape) * (1 if stack is None else len(stack.arguments))
    if len(inner) < 2 and size < _LEAST_VECTOR * total:
        return []
    return [n for n in inner if n in dimensions]


def _cut(
    storage: Sequence[tuple[str, ...]],
    shape: Sequence[int],
    choices: Sequence[int],
    axis: str,
    mesh: Mapping[str, int],
    tile_rows: int,
) -> list[tuple[str, ...]]:
    """Store over one more axis: on a dimension that no other axis cuts, else below the axes that do.

    Of several those that leave whole tiles go first, and of these one before the last: parts are whole rows
    then, and libtpu gathers and scatters them as they lie. Other parts it pads or transposes, or it does not
    scatter at all over more than one torus axis: it all-reduces and keeps a part.
    """
    cut = list(storage)
    if not choices or mesh.get(axis, 1) == 1 or any(axis in axes for axes in storage):
        return cut
    parts = {n: cut_into(storage[n], mesh) * mesh[axis] for n in choices}
    whole = [n for n in choices if shape[n] % parts[n] == 0]
    if whole:

        def worth(n: int) -> tuple[bool, bool, bool, int, int]:
            rows = shape[n] // parts[n]
            # Tiles lie in the last two dimensions.
            whole_tiles = n < len(shape) - 2 or rows % tile_rows == 0
            by_rows = whole_tiles and n < len(shape) - 1
            return not storage[n] or axis == "data", whole_tiles, by_rows, shape[n], -n

        best = max(whole, key=worth)
        cut[best] = (*cut[best], axis)
    return cut


def _stores_nothing(given: Given, draft: Draft) -> str | None:
    """Say why ``fsdp`` cuts no parameter, where the user gave it a size so that it does."""
    size, parameters = draft.mesh.get(_STORING, 1), given.program.parameters
    if size == 1 or _STORING not in given.declared.mesh or not parameters:
        return None
    if any(_STORING in axes for one in parameters for axes in draft.stored[one.index]):
        return None
    divided = [one for one in parameters if any(length % size == 0 for length in one.shape)]
    if not divided:
        return shards_no_parameter(given.program, _STORING, size)
    largest = max(divided, key=lambda one: math.prod(one.shape))
    if largest.index in draft.kept.arrays:
        # Rules keep it as it is asked to be.
        return None
    name = largest.path or "the parameter"
    why = f"{name} {largest.shape} is too small to gather, scanned over, or cut by other axes"
    return shards_no_parameter(given.program, _STORING, size, why)


def shards_no_parameter(program: Program, axis: str, size: int, why: str | None = None) -> str:
    """Say that a mesh axis shards no parameter: because it divides none, or `why`."""
    if why is None:
        largest = max(program.parameters, key=lambda a: (len(a.shape), *sorted(a.shape, reverse=True)))
        name = largest.path or "the parameter"
        if largest.shape:
            near = nearest_divisors(max(largest.shape), size)
            why = f"it divides none of their dimensions ({name} is {largest.shape}; nearest: {near})"
        else:
            why = f"{name} is a single number, which no axis cuts"
    return (
        f"mesh axis {axis}={size} shards no parameter, so that each device holds them whole: {why}; "
        f"for data parallelism alone write {axis}=1, data=-1"
    )


def _idle(draft: Draft) -> str | None:
    """Return an axis that shards nothing: the devices along it would repeat each other's work."""
    working = {axis for axes in draft.dims.values() for axis in axes}
    working |= {axis for storage in draft.stored.values() for axes in storage for axis in axes}
    return next((axis for axis, size in draft.mesh.items() if size > 1 and axis not in working), None)
