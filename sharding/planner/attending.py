"""What carries each call of attention out as a candidate lays it, and the seconds that this takes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

from ..cost.candidate import Candidate
from ..cost.compute import AttendedSeconds
from ..cost.context import SpreadCall, site_of
from ..cost.pieces import Machine, attended_seconds
from ..ops.context.taken import BLOCKS, Site
from ..ops.kernels import kernel_facts
from .choices.attention import Chosen

# The calls whose scores are never in memory, and those of them that the chip's kernel carries out.
Kind = tuple[frozenset[int], frozenset[int]]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class AttentionPrices:
    """The calls of attention of a program, and the chip's kernel and efficiencies for them."""

    calls: Sequence[SpreadCall]
    kernel: Chosen
    machine: Machine
    known: dict[object, Kind] = dataclasses.field(default_factory=dict, repr=False)
    of_maps: dict[object, tuple[Kind, object]] = dataclasses.field(default_factory=dict, repr=False)
    priced: dict[object, Mapping[int, AttendedSeconds]] = dataclasses.field(default_factory=dict, repr=False)

    def kind(self, candidate: Candidate) -> Kind:
        """Return which calls are fused under a candidate, and which of them by the chip's kernel."""
        maps = candidate.mesh, candidate.dims
        same = (*map(id, maps), candidate.context)
        found = self.of_maps.get(same)
        if found is None:
            # The maps are kept, so that no other ones get their identity.
            found = self.of_maps[same] = self._kind(candidate), maps
        return found[0]

    @functools.cached_property
    def _dims(self) -> tuple[int, ...]:
        """The major dims of queries and keys, which alone can be cut."""
        both = (composition for one in self.calls for dims in one.dims[:2] for composition in dims)
        return tuple(dict.fromkeys(composition[0] for composition in both if composition))

    def _kind(self, candidate: Candidate) -> Kind:
        dims, mesh = candidate.dims, candidate.mesh
        cut = tuple(tuple(axis for axis in dims.get(dim, ()) if mesh.get(axis, 1) > 1) for dim in self._dims)
        key = (cut, tuple(mesh[axis] for axes in cut for axis in axes), candidate.context)
        if key not in self.known:
            by = {n: self.kernel.taken(site, candidate.context).by for n, site in self._sites(candidate)}
            fused = frozenset(n for n, one in by.items() if one is not None)
            self.known[key] = fused, frozenset(n for n in fused if by[n] != BLOCKS)
        return self.known[key]

    def seconds(self, candidate: Candidate) -> Mapping[int, AttendedSeconds]:
        """Return the seconds of the calls, by index, of which the layout says more than the kernel's work."""
        if candidate.context is None:
            return {}
        key = (*_layout(candidate), candidate.microbatches)
        if key not in self.priced:
            self.priced[key] = self._seconds(candidate)
        return self.priced[key]

    def _seconds(self, candidate: Candidate) -> dict[int, AttendedSeconds]:
        implementation, found = self.kernel.implementation, {}
        gradient = 0.0 if implementation is None else float(kernel_facts()[implementation]["gradient"])
        for index, site in self._sites(candidate):
            own = attended_seconds(
                site,
                self.kernel.taken(site, candidate.context),
                self.machine,
                microbatches=candidate.microbatches,
                gradient=gradient,
            )
            if own is not None:
                found[index] = own
        return found

    def _sites(self, candidate: Candidate) -> list[tuple[int, Site]]:
        return [(one.equation.index, site_of(one, candidate)) for one in self.calls]


def _layout(candidate: Candidate) -> tuple[object, ...]:
    axes = tuple((dim, cut) for dim, cut in candidate.dims.items() if cut)
    return tuple(candidate.mesh.items()), axes, candidate.context
