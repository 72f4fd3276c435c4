"""How a training step is run, as far as its price depends on it: XLA's way, and the interface of others."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping

from ..hardware.topology import Topology
from ..ops.grouped import TILES
from ..xla.compiler import compiler_of
from . import compute, living, memory
from .calibration import Calibration
from .candidate import Candidate
from .collectives import Link, links
from .compute import Busy, FusedAttention, Passes
from .exchange import StoredOver
from .kept import Residuals
from .living import Worked
from .memory import Standing
from .pipeline import moments, through_stages
from .placement import Placement
from .profile import ProgramTables
from .step import ThroughStages

# The parts of a price that may be another's; `Execution` says what each gives.
KeptBy = Callable[[ProgramTables, Candidate, bool], Residuals]
LinksOf = Callable[[Mapping[str, int], Topology, Calibration], Mapping[str, Link]]
BusyWith = Callable[[ProgramTables, Passes, Residuals], Busy]
StandingOf = Callable[[ProgramTables, Placement, Candidate, StoredOver, float, float | None, int], Standing]
MomentsOf = Callable[
    [ProgramTables, Candidate, Standing, Worked, Residuals, bool], Iterator[dict[str, float]]
]


def kept_by_policy(profile: ProgramTables, candidate: Candidate, fused_attention: bool) -> Residuals:
    """Return what JAX keeps under the candidate's policy, and XLA runs again because something needs it."""
    return profile.saved.kept(candidate, fused_attention=fused_attention)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Execution:
    """How a step is run.

    The switches are XLA's. The functions are the parts of a price: theirs is what the cost model says of XLA,
    and what runs steps in another way gives others, mostly around these
    (`dataclasses.replace(execution, busy=...)`).

    Attributes:
      attention: the kernel that carries out attention; None where products and elementwise work do.
      reduces_whole: whether a gradient that is a partial sum over several mesh axes is reduced over all of
        them each microbatch, rather than scattered over one each microbatch and over others once a step.
      gathers_wait, scatters_wait, sums_wait: shares of the seconds in which parameters are gathered, a
        layer's gradients scattered or reduced whole, that nothing is scheduled beside.
      last_layer_apart: whether the last layer whose values come back from the host runs outside of the loop.
      gradient_beside: whether the gradient of logits lies beside them, in the type that products take.
      makes_ahead: whether what a loop makes of nothing that changes is made ahead of it and kept.
      zeros_together: whether zeros that gradients of one array are added to are made at the first of them.
      aligned_elements: of a product's role that matrix units read at once.
      product_bytes: of an element as products take it, None for its own.
      takes_out: whether what a loop works with of an array that it carries is taken out of it.
      rings: fewest devices of an axis that parts of a product go round, 0 for none.
      keeps_gathered: whether keys and values that a kernel reads gathered over `context` are kept so.
      fuses_products: whether products make what is elementwise before them, and add to what another gave.
      host_rate: bytes a second of a value on its way to the host or back that work is scheduled beside.
      grouped: what multiplies rows by their experts: XLA's loop over tiles or a kernel (`ops.products`).
      wide_gradients: whether gradients of 16-bit products into float32 are products of float32.
      pads_products: whether matrices of odd widths are padded until matrix units read them whole.
      short_sums: whether those of look-ups in 16-bit tables are summed in 16 bits.
      wide_sums: whether they are summed in float32.
      kept: (profile, candidate, fused attention) → what is kept for the backward pass, and run again.
      links: (mesh, topology, calibration) → the link of each mesh axis longer than 1.
      through_stages: seconds of a step over stages; `pipeline.through_stages`.
      busy: (profile, passes, kept) → seconds of computing, with what is run again; `compute.busy`.
      standing: bytes that lie in memory all through a step; `memory.standing`.
      moments: bytes at each moment that may be the fullest; `pipeline.moments`.
    """

    attention: FusedAttention | None = None
    reduces_whole: bool = False
    gathers_wait: float = 0.0
    scatters_wait: float = 0.0
    sums_wait: float = 0.0
    last_layer_apart: bool = False
    gradient_beside: bool = False
    makes_ahead: bool = False
    zeros_together: bool = False
    aligned_elements: int = 1
    product_bytes: int | None = None
    takes_out: bool = False
    rings: int = 0
    fuses_products: bool = False
    keeps_gathered: bool = False
    host_rate: float | None = None
    grouped: str = TILES
    wide_gradients: bool = False
    short_sums: bool = False
    wide_sums: bool = False
    pads_products: bool = False
    kept: KeptBy = kept_by_policy
    links: LinksOf = links
    through_stages: ThroughStages = through_stages
    busy: BusyWith = compute.busy
    standing: StandingOf = memory.standing
    moments: MomentsOf = moments

    def worked(
        self, profile: ProgramTables, placement: Placement, mesh: Mapping[str, int], lanes: int
    ) -> Worked:
        """Return what a placement's values weigh on a chip whose rows have so many `lanes` in memory."""
        attention = self.attention
        return living.worked(
            profile,
            placement,
            mesh,
            fused_attention=attention is not None,
            scratch=0.0 if attention is None else attention.scratch,
            slices=0.0 if attention is None else attention.slices,
            lanes=lanes,
            gradient_beside=self.gradient_beside,
            makes_ahead=self.makes_ahead,
            zeros_together=self.zeros_together,
            product_bytes=self.product_bytes,
            wide_sums=self.wide_sums,
            takes_out=self.takes_out,
            rings=self.rings,
            fuses_products=self.fuses_products,
        )


def execution_for(
    topology: Topology, attention: FusedAttention | None = None, grouped: str = TILES
) -> Execution:
    """Return how XLA's compiler for `topology` runs a step, attention by a kernel if one is given.

    `grouped` is what multiplies rows by their experts.

    >>> execution_for(Topology.parse("h100:8")).reduces_whole
    True
    """
    compiler = compiler_of(topology)
    return Execution(
        attention=attention,
        reduces_whole=compiler.reduces_whole,
        gathers_wait=compiler.gathers_wait,
        scatters_wait=compiler.scatters_wait,
        sums_wait=compiler.sums_wait,
        last_layer_apart=compiler.last_layer_apart,
        gradient_beside=compiler.gradient_beside,
        makes_ahead=compiler.makes_ahead,
        zeros_together=compiler.zeros_together,
        aligned_elements=compiler.aligned_elements,
        product_bytes=compiler.product_bytes,
        takes_out=compiler.takes_out,
        rings=compiler.rings,
        fuses_products=compiler.fuses_products,
        keeps_gathered=compiler.keeps_gathered,
        host_rate=compiler.host_rate,
        grouped=grouped,
    )
