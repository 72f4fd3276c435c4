"""Meshes: factorisations of the devices over the axes that can be carried out."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

from ...errors import UserError, nearest, nearest_cuts, nearest_divisors
from ...hardware.axes import AXES, resolve_axes
from ...hardware.topology import Topology
from ...plans.specs import cut_into
from ...program.mixtures import experts_dims
from ...program.program import Program
from ..declared import keep
from . import context
from .draft import Draft, Given, Refused
from .microbatches import divisors

# What the search may choose for any program; `expert` for one with calls of `ops.experts`, `context` for long
# sequences of `ops.attention`; `stage` is searched for apart (`pipelines.py`).
OFFERED = ("data", "fsdp", "tensor")

# Axes whose traffic is light enough for the network between slices.
_TOLERATE_DCN = ("data", "stage")


def choices(given: Given, draft: Draft) -> Iterator[Draft | Refused]:
    """Yield every mesh worth considering, with what the user's rules fix on it."""
    experts = given.once(experts_dims, lambda: experts_dims(given.program))
    counts = [given.program.dims[dim].size for dim in experts]
    long = (
        (1,)
        if "context" in given.declared.mesh
        else given.once(context.sizes_of, lambda: context.sizes_of(given))
    )
    for mesh in meshes(given.topology, given.declared.mesh, experts=math.gcd(*counts), contexts=long):
        try:
            found = ("experts",) if experts else ()
            kept = keep(given.program, given.declared, mesh, given.params, given.names, found)
        except UserError as error:
            yield Refused(sizes=mesh, reason=str(error))
            continue
        if mesh.get("expert", 1) > 1 and kept.dims.keys().isdisjoint(experts):
            kept = dataclasses.replace(kept, dims={**kept.dims, **dict.fromkeys(experts, ("expert",))})
        if "context" not in given.declared.mesh:
            cut = {
                dim: axes for dim, axes in context.over_sequences(given, mesh).items() if dim not in kept.dims
            }
            kept = dataclasses.replace(kept, dims={**kept.dims, **cut}) if cut else kept
        fixed = {dim: axes for dim, axes in kept.dims.items() if axes}
        if bad := _indivisible(given.program, fixed, mesh):
            yield Refused(sizes=mesh, reason=bad)
            continue
        yield dataclasses.replace(draft, mesh=mesh, kept=kept, dims=fixed)


def meshes(
    topology: Topology, declared: Mapping[str, int], *, experts: int = 0, contexts: Sequence[int] = (1,)
) -> list[dict[str, int]]:
    """Return every mesh over the devices that keeps the `declared` sizes.

    Sizes that are not declared are shared out among `OFFERED`, `expert` as far as that divides `experts`, and
    `context` in the sizes `contexts`;
    a declared -1 takes all that is left. Between slices lies only what tolerates the data-centre network,
    unless the declared sizes leave no other way.

    Raises:
      UserError: an axis is unknown, or the declared sizes do not divide the devices.
    """
    devices = topology.num_devices
    if -1 in declared.values() or math.prod(declared.values()) == devices:
        found = [_ordered(resolve_axes(declared, devices))] if declared else [_ordered({})]
    else:
        found = [_ordered({**declared, **free}) for free in _shared_out(devices, declared, experts, contexts)]
    kept = [mesh for mesh in found if _crosses_lightly(mesh, topology)]
    return kept or found


def _shared_out(
    devices: int, declared: Mapping[str, int], experts: int, contexts: Sequence[int]
) -> Iterator[dict[str, int]]:
    for axis in declared:
        if axis not in AXES:
            raise UserError(f"mesh axis {axis!r} is not known; {nearest(axis, AXES)}")
    free = [axis for axis in OFFERED if axis not in declared]
    product = math.prod(declared.values())
    if not free or product < 1 or devices % product:
        absorbing = {free[0]: -1} if free else {}
        try:
            resolve_axes({**declared, **absorbing}, devices)
        except UserError as error:
            # Nobody wrote the axis that stands for the rest.
            said = f"{free[0]}=-1 cannot absorb the rest: " if free else ""
            raise UserError(str(error).removeprefix(said)) from None
    left = devices // product
    parts = [1] if "expert" in declared else divisors(math.gcd(experts, left)) if experts else [1]
    for part, length in itertools.product(parts, contexts):
        if left % (part * length):
            continue
        more = {"expert": part} if part > 1 else {}
        more |= {"context": length} if length > 1 else {}
        for sizes in _factorisations(left // (part * length), len(free)):
            yield {**dict(zip(free, sizes, strict=True)), **more}


def _factorisations(number: int, parts: int) -> Iterator[tuple[int, ...]]:
    """Yield every way to write `number` as a product of `parts` factors in order."""
    if parts == 1:
        yield (number,)
        return
    for first in divisors(number):
        for rest in _factorisations(number // first, parts - 1):
            yield (first, *rest)


def _ordered(sizes: Mapping[str, int]) -> dict[str, int]:
    """Return the offered axes, of size 1 where not given, and the others that are given."""
    return {axis: sizes.get(axis, 1) for axis in AXES if axis in OFFERED or axis in sizes}


def _crosses_lightly(mesh: Mapping[str, int], topology: Topology) -> bool:
    light = math.prod(mesh.get(axis, 1) for axis in _TOLERATE_DCN)
    return light % topology.num_slices == 0


def _indivisible(
    program: Program, dims: Mapping[int, tuple[str, ...]], mesh: Mapping[str, int]
) -> str | None:
    for number, axes in dims.items():
        dim = program.dims[number]
        if dim.whole:
            return f"{dim.name} cannot be sharded: {dim.whole}"
        if dim.size % (count := cut_into(axes, mesh)):
            written = " x ".join(f"{axis}={mesh[axis]}" for axis in axes)
            written += f" = {count}" if len(axes) > 1 else ""
            owners = [one for one in program.arguments if any(number in dims for dims in one.dims)]
            data = next((one for one in owners if one.is_data), None)
            if data is None:
                near, where = nearest_divisors(dim.size, count), owners[:1]
            else:
                near, where = nearest_cuts(dim.name, dim.size, count, math.prod(mesh.values())), [data]
            where = "".join(f"{one.path} {one.shape}: " for one in where)
            return f"{where}{written} does not divide {dim.name}={dim.size}; nearest: {near}"
    return None
