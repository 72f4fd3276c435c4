"""What is worth considering: layouts of a program on a mesh, and how a step may be worked through."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..cost.candidate import Candidate
from ..errors import UserError
from ..hardware.topology import Topology
from ..plans.specs import cut_into
from ..program.jaxpr import scan_parts
from ..program.layers import is_checkpointed, layer_scans
from ..program.program import Program
from .choices import microbatches as parts_of_batch
from .choices import stages
from .choices.mesh import meshes
from .choices.remat import PLAIN, DeclaredRemat, Policy, read
from .choices.sequence import stream_dim
from .choices.storage import store
from .choices.tensor import TensorGroups
from .declared import Declared, Kept, keep


@dataclasses.dataclass(frozen=True, kw_only=True)
class Space:
    """Candidates as layouts x remat x microbatches.

    `layouts` are Candidates that keep everything and take the batch whole; `remats` are ladders, one after
    another, that go from what keeps most to what keeps least and start at `heads`. `refused` maps what was
    not considered (``tensor=16``) to the reason.
    """

    layouts: tuple[Candidate, ...]
    remats: tuple[Policy, ...]
    heads: tuple[int, ...]
    microbatches: Mapping[int, tuple[int, ...]]
    refused: Mapping[str, str]

    def parts(self, layout: Candidate) -> tuple[int, ...]:
        """Return the numbers of microbatches that `layout` can be worked through in, smallest first."""
        return self.microbatches[_batch_parts(layout)]

    def candidates(self) -> Iterator[Candidate]:
        """Yield every candidate."""
        for layout in self.layouts:
            for remat in self.remats:
                for count in self.parts(layout):
                    yield remat.on(layout, count)


def space(
    program: Program,
    topology: Topology,
    declared: Declared,
    *,
    params: Any = None,
    names: Any = None,
    whole_batch: str | None = None,
    ladders: Sequence[Sequence[Policy]] = (PLAIN,),
) -> Space:
    """Return what is worth considering for `program` on `topology`, with the declared parts kept.

    Args:
        program: traced with the parameters first and the data second.
        topology: the devices.
        declared: what is not searched for.
        params: the parameters' tree, needed for rules.
        names: the user's names of their dimensions, as in `trace`.
        whole_batch: why the batch cannot be worked through in parts, where that is not to be read off the
            program.
        ladders: what layers may keep, see `remats.ladders`; for programs that have layers.

    Raises:
        UserError: the declared parts contradict each other, the program or the topology.
    """
    offered = _offered(program, declared.remat, ladders)
    whole_batch = parts_of_batch.why_not(program) or whole_batch
    if declared.microbatches is not None:
        parts_of_batch.check(declared.microbatches, whole_batch)
    stages.check_schedule(declared.schedule, declared.mesh.get("stage"))
    builder = _Builder(program, topology, declared, params, names, whole_batch)
    layouts = builder.layouts()
    return Space(
        layouts=layouts,
        remats=tuple(policy for ladder in offered for policy in ladder),
        heads=tuple(itertools.accumulate((len(ladder) for ladder in offered[:-1]), initial=0)),
        microbatches={_batch_parts(layout): builder.microbatches(_batch_parts(layout)) for layout in layouts},
        refused=builder.refused,
    )


def _offered(
    program: Program, declared: DeclaredRemat | None, ladders: Sequence[Sequence[Policy]]
) -> Sequence[Sequence[Policy]]:
    scans = list(layer_scans(program.jaxpr.jaxpr))
    if declared is not None:
        policy = read(declared)
        if not scans and policy.remat != "none":
            raise UserError(
                f"remat={declared!r} works on scanned layers and this program has no scan over layers; "
                "scan them, or leave remat out"
            )
        return ((policy,),)
    chosen = any(not is_checkpointed(scan_parts(scan).body) for scan in scans)
    return ladders if chosen else ((PLAIN[0],),)


def _batch_parts(layout: Candidate) -> int:
    return max(
        (cut_into(axes, layout.mesh) for axes in layout.dims.values() if "data" in axes or "fsdp" in axes),
        default=1,
    )


class _Builder:
    def __init__(
        self,
        program: Program,
        topology: Topology,
        declared: Declared,
        params: Any,
        names: Any,
        whole_batch: str | None,
    ) -> None:
        self._program, self._topology, self._declared = program, topology, declared
        self._params, self._names, self._whole_batch = params, names, whole_batch
        self._rows = parts_of_batch.batch_rows(program)
        self._leads = _leading(program)
        self._layers = stages.layers(program)
        self.refused: dict[str, str] = {}

    def layouts(self) -> tuple[Candidate, ...]:
        """Return every layout; if the batch is too small for the devices, let some axes only store."""
        options = meshes(self._topology, self._declared.mesh)
        for storing in (False, True):
            found = [layout for mesh in options for layout in self._on(mesh, storing)]
            if found:
                return tuple(found)
        raise UserError(self._nothing())

    def microbatches(self, batch_parts: int) -> tuple[int, ...]:
        """Return the numbers of microbatches to consider."""
        if self._declared.microbatches is not None:
            return (self._declared.microbatches,)
        if self._rows % batch_parts or self._whole_batch is not None:
            return (1,)
        return tuple(parts_of_batch.options(self._rows // batch_parts))

    def _on(self, mesh: Mapping[str, int], storing: bool) -> Iterator[Candidate]:
        try:
            kept = keep(self._program, self._declared, mesh, self._params, self._names)
        except UserError as error:
            self._refuse(mesh, str(error))
            return
        batch = kept.batch
        if batch is None:
            # Where experts have an axis, each of its devices brings tokens of its own.
            batch = tuple(axis for axis in ("data", "fsdp", "expert") if mesh.get(axis, 1) > 1)
            if storing or not self._leads:
                batch = tuple(axis for axis in batch if axis != "fsdp")
        if reason := self._batch_does_not_divide(batch, mesh):
            self._refuse({axis: mesh[axis] for axis in batch}, reason)
            return
        cut: dict[int, tuple[str, ...]] = {}
        if mesh.get("stage", 1) > 1:
            if reason := stages.why_not(self._layers, mesh["stage"]):
                self._refuse({"stage": mesh["stage"]}, reason)
                return
            assert self._layers is not None
            cut = {self._layers.dim: ("stage",)}
        for dims in self._computing(mesh, batch, kept):
            for layout in self._stored(mesh, {**dims, **cut}, kept):
                yield from stages.worked_through(layout, self._layers, self._declared.schedule)

    def _batch_does_not_divide(self, batch: Sequence[str], mesh: Mapping[str, int]) -> str | None:
        count = self._declared.microbatches or 1
        if not batch and self._rows % count == 0:
            return None
        if batch and not self._leads:
            return "no array of the data has a dimension that parameters lack"
        needed = math.prod(mesh[axis] for axis in batch)
        main = self._program.dims[self._leads[0]]
        if self._rows % (needed * count):
            sizes = {axis: mesh[axis] for axis in batch}
            return parts_of_batch.indivisible(self._rows, sizes, count, needed * count)
        if main.size % needed:
            return f"the batch is used in {main.size} parts, which {needed} does not divide"
        return None

    def _computing(
        self, mesh: Mapping[str, int], batch: tuple[str, ...], kept: Kept
    ) -> Iterator[dict[int, tuple[str, ...]]]:
        """Yield how dims are sharded while computing."""
        fixed = {dim: axes for dim, axes in kept.dims.items() if axes}
        if bad := _indivisible_dim(self._program, fixed, mesh):
            self._refuse(mesh, bad)
            return
        if batch:
            together = math.prod(mesh[axis] for axis in batch)
            divisible = [dim for dim in self._leads if self._program.dims[dim].size % together == 0]
            over_batch = [dict.fromkeys(divisible, batch)]
            if len(divisible) > 1:
                over_batch.append({divisible[0]: batch})
        else:
            over_batch = [{}]
        size = mesh["tensor"]
        has_tensor = any("tensor" in axes for axes in kept.dims.values())
        groups: Sequence[tuple[int, ...]] = ((),)
        if size > 1 and not has_tensor:
            groups = self._groups(frozenset(kept.dims)).of(size)
            if not groups:
                self._refuse({"tensor": size}, f"no dimension of the parameters is one that {size} divides")
        for group in groups:
            for lead in over_batch:
                computing = {**lead, **dict.fromkeys(group, ("tensor",)), **fixed}
                yield computing
                if group and (stream := self._stream(computing, size, mesh)):
                    yield {**computing, **stream}

    def _stream(
        self, computing: Mapping[int, tuple[str, ...]], size: int, mesh: Mapping[str, int]
    ) -> dict[int, tuple[str, ...]]:
        """Return how the stream between layers is cut over ``tensor`` too, nothing where it cannot be."""
        dim = self._stream_dim
        if dim is None:
            return {}
        before = computing.get(dim, ())
        if before not in ((), ("context",)) or self._program.dims[dim].size % (cut_into(before, mesh) * size):
            return {}
        return {dim: (*before, "tensor")}

    @functools.cached_property
    def _stream_dim(self) -> int | None:
        if self._layers is None:
            return None
        return stream_dim(self._program, self._layers.dim, {*self._leads, *self._program.batch_dims})

    @functools.cache  # noqa: B019  # lives as long as one planning
    def _groups(self, kept: frozenset[int]) -> TensorGroups:
        return TensorGroups(self._program, kept)

    def _stored(
        self, mesh: Mapping[str, int], dims: Mapping[int, tuple[str, ...]], kept: Kept
    ) -> Iterator[Candidate]:
        seen = []
        for moments_over in ((), ("data",)):
            stored = store(
                self._program, mesh, dims, over=("fsdp",), moments_over=moments_over, declared=kept.arrays
            )
            if stored in seen:
                continue
            seen.append(stored)
            layout = Candidate(
                mesh=mesh,
                dims=dims,
                stored=stored.params,
                optimizer=stored.optimizer,
                gradients=stored.optimizer,
            )
            if idle := _idle(layout):
                self._refuse({idle: mesh[idle]}, f"{idle}={mesh[idle]} would shard nothing in this program")
                continue
            yield layout

    def _refuse(self, sizes: Mapping[str, int], reason: str) -> None:
        written = " x ".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1)
        self.refused.setdefault(written, reason)

    def _nothing(self) -> str:
        reasons = list(dict.fromkeys(self.refused.values()))
        devices = self._topology.num_devices
        if len(self.refused) == 1 or len(reasons) == 1:
            return reasons[0]
        wanted = [r for r in reasons if "batch of" in r] or reasons
        return f"there is no layout of this program over {devices} devices: {wanted[0]}"


def _leading(program: Program) -> tuple[int, ...]:
    """Return the dims that arrays of the data lead with and parameters lack, the batch's first."""
    of_data = dict.fromkeys(program.batch_dims[:1])
    for argument in program.arguments:
        lead = argument.dims[0][:1] if not argument.is_parameter and argument.dims else ()
        of_data.update(dict.fromkeys(dim for dim in lead if dim in program.data_dims))
    return tuple(dim for dim in of_data if program.dims[dim].whole is None)


def _indivisible_dim(
    program: Program, dims: Mapping[int, tuple[str, ...]], mesh: Mapping[str, int]
) -> str | None:
    for number, axes in dims.items():
        dim = program.dims[number]
        if dim.whole:
            return f"{dim.name} cannot be sharded: {dim.whole}"
        if dim.size % cut_into(axes, mesh):
            written = " x ".join(f"{axis}={mesh[axis]}" for axis in axes)
            return f"{written} does not divide {dim.name}={dim.size}"
    return None


def _idle(layout: Candidate) -> str | None:
    """Return an axis that shards nothing: the devices along it would repeat each other's work."""
    working = {axis for axes in layout.dims.values() for axis in axes}
    working |= {axis for storage in layout.stored.values() for axes in storage for axis in axes}
    return next((axis for axis, size in layout.mesh.items() if size > 1 and axis not in working), None)
