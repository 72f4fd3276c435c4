"""Seconds and bytes of a candidate, itemised."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ..hardware.topology import Topology
from ..plans.estimate import Estimate
from ..plans.vocabulary import DELAYED
from ..program.program import Program
from .calibration import Calibration, calibration_for
from .candidate import Candidate
from .collectives import Link, joint_link
from .compute import AttendedSeconds, Busy, Passes, layer_product, passes, peak_flops
from .context import Attending, SpreadCall, context_memory, context_seconds, laid_calls
from .delayed import kept_bytes, late_seconds
from .exchange import Exchange, StoredOver, exchange, parts, stored_over, tables_read_there
from .execution import Execution, execution_for
from .findings import Findings, remembered
from .floor import stored_at_least
from .kept import Residuals
from .living import Worked, activations
from .memory import Ahead, standing
from .pipeline import LayerTurns, Least, layer_turns, least, lockstep, moments
from .placement import Placement, place
from .profile import LAYERS, ProgramTables, profile
from .step import Offload, StepParts, microbatch, offload, optimizer_bytes, stacking_seconds, step_seconds
from .working_set import GATHERED_OVER


class Pricer:
    """Prices candidates of one program on one topology.

    Args:
      program: the traced loss; its gradient is derived, not traced.
      topology: what it runs on.
      optimizer_slots: bytes of optimizer state for each element that is trained, or its arrays' items' sizes.
      optimizer_bytes: gives the bytes of the optimizer's arrays on a device, were all layers on each stage,
        where they are not cut as parameters are; `optimizer_slots` says it if not given.
      calibration: efficiencies; the shipped ones of the chip if not given.
      execution: how a step is run; as XLA's compiler for the topology does if not given.
      gradient_bytes: of one accumulated gradient; as the parameter's if not given.
      dtype: of matrix products, for their peak; ``bfloat16`` if not given.
      more_passes: of microbatches over the batch, in parts of one forward and backward; see
        `transform.accumulation.levels`.
      ahead: what microbatches want made of the data first.
      other: gives the Pricer for a candidate that this one is not for, None where this one is.
      calls: of attention, which candidates may lay over ``context``.
      attended: gives the seconds of those calls, by index, of which a candidate's layout says more than the
        kernel in `execution` does.
      known: what was found by another Pricer that differs at most in the share of free memory that its
        calibration counts, and in `other`.

    >>> import jax
    >>> from meshwright.sharding import Topology
    >>> from meshwright.sharding.program import trace
    >>> w, x = jax.ShapeDtypeStruct((4096, 4096), "bfloat16"), jax.ShapeDtypeStruct((8192, 4096), "bfloat16")
    >>> program = trace(lambda w, x: (x @ w).mean(), w, x)
    >>> pricer = Pricer(program, Topology.parse("v5e:1x1"))
    >>> pricer.flops  # of a step: forward, and two products backward
    549755813888.0
    """

    def __init__(
        self,
        program: Program | ProgramTables,
        topology: Topology,
        *,
        optimizer_slots: float | Sequence[float] = 8.0,
        optimizer_bytes: Callable[[Candidate], float] | None = None,
        calibration: Calibration | None = None,
        execution: Execution | None = None,
        gradient_bytes: float | None = None,
        dtype: str = "bfloat16",
        more_passes: float = 0.0,
        ahead: Ahead | None = None,
        other: Callable[[Candidate], Pricer | None] | None = None,
        calls: Sequence[SpreadCall] = (),
        attended: Callable[[Candidate], Mapping[int, AttendedSeconds]] | None = None,
        known: Findings | None = None,
    ) -> None:
        self.profile = program if isinstance(program, ProgramTables) else profile(program)
        self.topology = topology
        self.slot_bytes = (
            float(sum(optimizer_slots)) if isinstance(optimizer_slots, Sequence) else float(optimizer_slots)
        )
        self._optimizer_bytes = optimizer_bytes
        self.calibration = calibration_for(topology.chip.name) if calibration is None else calibration
        self.execution = execution_for(topology) if execution is None else execution
        self.gradient_bytes = gradient_bytes
        self.dtype = dtype
        self._more_passes, self._ahead = more_passes, ahead
        self._other = other
        self._calls = tuple(calls)
        self._attended = attended
        self._known = Findings() if known is None else known
        products = self.profile.products
        runs = self.profile.steps.runs[products.equation]
        # The gradient of a product for one operand is a product of as many flops.
        self.flops = float((products.flops * runs * (1.0 + products.gradients)).sum())

    def of(self, candidate: Candidate) -> Pricer:
        """Return the Pricer that is for `candidate`: this one, or another where its kernel does not run."""
        other = None if self._other is None else self._other(candidate)
        return self if other is None else other

    def price(self, candidate: Candidate) -> Estimate:
        """Return the estimate of `candidate`."""
        if (other := self.of(candidate)) is not self:
            return other.price(candidate)
        placement = self.place(candidate)
        over = self.stored_over(candidate, placement)
        memory = self.memory(candidate, placement, over)
        time = self.time(candidate, placement, over, memory)
        total = sum(time.values())
        peak = candidate.num_devices * peak_flops(self.topology.chip, self.dtype)
        return Estimate(
            step_seconds=total,
            mfu=self.flops / (total * peak),
            peak_bytes=sum(memory.values()),
            time=time,
            memory=memory,
            heap_bytes=self._heap(memory) if self.calibration.fragmentation else None,
        )

    def needed_bytes(self, candidate: Candidate) -> float:
        """Return the memory that `price` would say is needed, without what the step takes."""
        if (other := self.of(candidate)) is not self:
            return other.needed_bytes(candidate)
        placement = self.place(candidate)
        over, kept = self.stored_over(candidate, placement), self.kept(candidate)
        way = (candidate.schedule, candidate.interleave, candidate.stage_remat, candidate.rows)
        key = (id(over), id(kept), candidate.remat, candidate.microbatches, candidate.context, *way)
        known = self._known.held.get(key)
        if known is None:
            memory = self.memory(candidate, placement, over)
            sizes = sum(memory.values()), memory["temporaries"] + memory["communication"]
            known = remembered(self._known.held, key, (sizes, (over, kept)))
        (total, passing), _ = known
        return total + self.calibration.fragmentation * passing

    def least_bytes(self, candidate: Candidate) -> float:
        """Return the bytes of a device that `candidate` takes at least, whatever it keeps and in many parts.

        They are those of what it stores, and are found much sooner than `needed_bytes`.
        """
        if self.execution.standing is not standing or self.execution.moments is not moments:
            return 0.0
        slots = self.slot_bytes if self._optimizer_bytes is None else 0.0
        return stored_at_least(self.profile, candidate, slots, self.gradient_bytes)

    def _heap(self, memory: Mapping[str, float]) -> float:
        passing = memory["temporaries"] + memory["communication"]
        return sum(memory.values()) + self.calibration.fragmentation * passing

    def stored_over(self, candidate: Candidate, placement: Placement) -> StoredOver:
        """Return where everything is stored; candidates made of one another share their storage."""
        maps = (candidate.dims, candidate.stored, candidate.optimizer, candidate.gradients)
        mesh = (tuple(candidate.mesh.items()), *map(id, maps))
        of_parts = (*mesh, candidate.microbatches)
        tables = self._known.tables.get(of_parts)
        if tables is None:
            found = tables_read_there(self.profile, placement, candidate)
            tables = remembered(self._known.tables, of_parts, (found, maps))
        there = tables[0]
        # What goes to a table and back, unlike what is gathered, is as much as a microbatch looks up.
        key = (*mesh, *there, candidate.microbatches) if there else mesh
        known = self._known.stored.get(key)
        if known is None:
            # The maps are kept, so that no other one gets their identity.
            known = remembered(self._known.stored, key, (stored_over(self.profile, candidate, there), maps))
        return known[0]

    def place(self, candidate: Candidate) -> Placement:
        """Return `candidate` laid over the program; one that differs in storage or remat alone is known."""
        maps, way = (candidate.mesh, candidate.dims), (candidate.microbatches, candidate.context)
        same = (*map(id, maps), *way)
        known = self._known.of_maps.get(same)
        if known is None:
            dims = tuple((dim, axes) for dim, axes in candidate.dims.items() if axes)
            key = (tuple(candidate.mesh.items()), dims, *way)
            found = self._known.placements.get(key)
            if found is None:
                found = remembered(self._known.placements, key, place(self.profile, candidate))
            known = remembered(self._known.of_maps, same, (found, maps))
        return known[0]

    def memory(self, candidate: Candidate, placement: Placement, over: StoredOver) -> dict[str, float]:
        """Return item → bytes of a placed candidate on its fullest device."""
        # Microbatches and what is kept change nothing of what stands in memory all through a step.
        lying = self._known.standing.get(id(over))
        if lying is None:
            found = self.execution.standing(
                self.profile,
                placement,
                candidate,
                over,
                self._slot_bytes(candidate, over),
                self.gradient_bytes,
                self.topology.num_slices,
            )
            lying = remembered(self._known.standing, id(over), (found, over))
        found = self.execution.moments(
            self.profile,
            candidate,
            lying[0],
            self.worked(placement, candidate.mesh),
            self.kept(candidate),
            self.execution.last_layer_apart,
        )
        items = max(found, key=lambda items: sum(items.values()))
        if candidate.context is not None:
            kept = self.kept(candidate).device & self.execution.keeps_gathered
            calls = laid_calls(self._calls, candidate)
            items |= context_memory(items, calls, candidate, kept, self.profile.attending)
        if self._ahead is not None and candidate.microbatches > 1:
            items["prepared"] = self._ahead.of_device(candidate)
        return {name: float(size) for name, size in items.items()}

    def _slot_bytes(self, candidate: Candidate, over: StoredOver) -> float:
        """Return the bytes of optimizer state for each trained element whose moments a device holds."""
        if self._optimizer_bytes is None:
            return self.slot_bytes
        known = self._known.slots.get(id(over))
        if known is None:
            table = self.profile.parameters
            held = float((table.elements * table.trained / parts(over.optimizer, candidate.mesh)).sum())
            found = self._optimizer_bytes(candidate) / max(held, 1.0)
            known = remembered(self._known.slots, id(over), (found, over))
        return known[0]

    def worked(self, placement: Placement, mesh: Mapping[str, int]) -> Worked:
        """Return what the values of a placed candidate weigh."""
        # Of the axes, it depends on those alone that gather what lies in parts between layers.
        gathers = (id(one) for one in placement.traffic if one.axis in GATHERED_OVER)
        key = (id(placement.fractions), *gathers)
        known = self._known.worked.get(key)
        if known is None:
            made = self.execution.worked(self.profile, placement, mesh, self.topology.chip.lanes)
            known = remembered(self._known.worked, key, (made, placement))
        return known[0]

    def kept(self, candidate: Candidate) -> Residuals:
        """Return what a candidate keeps for its backward pass, and what it runs again."""
        return self.execution.kept(self.profile, candidate, self.execution.attention is not None)

    def time(
        self,
        candidate: Candidate,
        placement: Placement,
        over: StoredOver,
        memory: Mapping[str, float],
        calibration: Calibration | None = None,
        execution: Execution | None = None,
    ) -> dict[str, float]:
        """Return item → seconds of a placed candidate, under another calibration or execution if given.

        What was found under this Pricer's own is used again; under others nothing is.
        """
        own = calibration is None and execution is None
        calibration, execution = calibration or self.calibration, execution or self.execution
        table, chip = self.profile, self.topology.chip
        wires = execution.links(candidate.mesh, self.topology, calibration)
        kept = execution.kept(table, candidate, execution.attention is not None)
        once = self._once(placement, calibration, execution, known=own)
        done = self._busy(once, kept) if own else execution.busy(table, once, kept)
        joint = functools.partial(joint_link, candidate.mesh, self.topology, calibration)
        # Parts that follow one another scatter what they learn by hand, see `transform.accumulation.region`.
        joint = joint if execution.reduces_whole and candidate.microbatches == 1 else None
        moved = self._exchange(candidate, placement, over, wires, joint, known=own)
        stacking = stacking_seconds(
            table, placement, kept, chip, calibration, fused_attention=execution.attention is not None
        )
        parts = StepParts(
            table=table,
            placement=placement,
            candidate=candidate,
            over=over,
            chip=chip,
            calibration=calibration,
            wires=wires,
            work=done,
            moved=moved,
            kept=kept,
            host=offload(
                table,
                placement,
                kept,
                chip,
                calibration,
                host_rate=execution.host_rate,
                product=layer_product(table, once),
            ),
            stacking=stacking,
            gradient_bytes=self.gradient_bytes,
            product=math.inf if execution.product_bytes is None else execution.product_bytes,
            gathers_wait=execution.gathers_wait,
            scatters_wait=execution.scatters_wait,
            sums_wait=execution.sums_wait,
        )
        if candidate.schedule == DELAYED or not candidate.stage_remat:
            parts = self._with_kept(parts, once)
        time = step_seconds(parts, execution.through_stages)
        if candidate.context is not None:
            turns = layer_turns(candidate, table.layers)
            for name, waited in self._over_context(candidate, wires, calibration, once, kept, turns).items():
                time[name] = time.get(name, 0.0) + waited * turns.needed
                time["bubble"] = time.get("bubble", 0.0) + waited * (turns.taken - turns.needed)
        if candidate.microbatches > 1 and self._more_passes:
            once = ("host", "bubble")
            time["passes"] = self._more_passes * sum(s for name, s in time.items() if name not in once)
        rate = (chip.hbm_bytes_per_second or 1.0) * calibration.optimizer_efficiency
        slots = self._slot_bytes(candidate, over)
        moved_bytes = optimizer_bytes(memory, table, slots, self.gradient_bytes)
        # What changes beside the parameters is read and written, and as much of them is read for it.
        time["optimizer"] = (moved_bytes + 3.0 * memory.get("state", 0.0)) / rate
        # A stack is made of the parameters, its gradient taken apart: each is read and written once.
        moved_bytes = 4.0 * memory.get("stacks", 0.0) * candidate.microbatches
        time["stacks"] = moved_bytes / ((chip.hbm_bytes_per_second or 1.0) * calibration.memory_efficiency)
        time["host"] += calibration.step_seconds
        time["stragglers"] = sum(time.values()) * (calibration.lateness(candidate.num_devices) - 1.0)
        return {name: float(seconds) for name, seconds in time.items() if seconds}

    def _over_context(
        self,
        candidate: Candidate,
        wires: Mapping[str, Link],
        calibration: Calibration,
        once: Passes,
        kept: Residuals,
        turns: LayerTurns,
    ) -> dict[str, float]:
        """Return what a microbatch waits for attention's sends over ``context``, in all layers."""
        assert candidate.context is not None
        calls = laid_calls(self._calls, candidate)
        if not calls:
            return {}
        work = Attending.of(self.profile, once, kept, turns.again)
        return context_seconds(calls, candidate.context, wires["context"], calibration, work)

    def least(self, candidate: Candidate) -> float:
        """Return the seconds that `candidate` takes at least however it is stored.

        Over stages they are also those in fewer microbatches. What is kept is not counted as `kept`.
        """
        if (other := self.of(candidate)) is not self:
            return other.least(candidate)
        late = self.calibration.lateness(candidate.num_devices)
        if candidate.mesh.get("stage", 1) > 1:
            return self.whole(candidate).over(self.profile, lockstep(candidate)) * late
        placement = self.place(candidate)
        key = (id(placement), candidate.remat, *candidate.saved.items())
        known = self._known.least.get(key)
        if known is None:
            found = microbatch(self._unstored(candidate, placement))
            seconds = candidate.microbatches * sum(
                float(row.sum()) for name, row in found.items() if name != "kept"
            )
            known = remembered(self._known.least, key, (seconds, placement))
        return known[0] * late

    def exchanged(self, candidate: Candidate) -> float:
        """Return the seconds that a candidate over stages exchanges values at least, found without its work.

        Whatever is stored, kept or run again, values go to where they are computed with, and back. (What is
        started then shows only beside less computing, and does not count.)
        """
        if (other := self.of(candidate)) is not self:
            return other.exchanged(candidate)
        placement = self.place(dataclasses.replace(candidate, microbatches=1))
        known = self._known.exchanged.get(id(placement))
        if known is None:
            idle = Busy(seconds=np.zeros((3, 3, 3)), kernels=np.zeros((3, 3)), waiting=np.zeros(3))
            items = microbatch(self._parts(candidate, placement, idle))
            rows = sum((row for name, row in items.items() if name != "host"), np.zeros(3))
            found = Least(sections=tuple(rows.tolist()), late=0.0, keeping=0.0, made_of=0.0)
            known = remembered(self._known.exchanged, id(placement), (found, placement))
        late = self.calibration.lateness(candidate.num_devices)
        return known[0].over(self.profile, lockstep(candidate)) * late

    def whole(self, candidate: Candidate) -> Least:
        """Return what of the whole batch at once a candidate over stages takes at least."""
        placement = self.place(dataclasses.replace(candidate, microbatches=1))
        key = (id(placement), candidate.stage_remat, candidate.remat, *candidate.saved.items())
        known = self._known.whole.get(key)
        if known is None:
            once = self._once(placement, self.calibration, self.execution, known=True)
            parts = self._with_kept(self._unstored(candidate, placement), once)
            known = remembered(self._known.whole, key, (least(parts), placement))
        return known[0]

    def _with_kept(self, parts: StepParts, once: Passes) -> StepParts:
        """Return the parts of a step over stages with what goes over its ticks, and what is delayed."""
        work = self.worked(parts.placement, parts.candidate.mesh)
        saved, _ = activations(self.profile, parts.candidate, work, parts.kept)
        return dataclasses.replace(
            parts,
            late=late_seconds(self.profile, once),
            late_bytes=kept_bytes(self.profile, work),
            over_ticks=0.0 if parts.candidate.stage_remat else float(saved[LAYERS]),
        )

    def _unstored(self, candidate: Candidate, placement: Placement) -> StepParts:
        """Return what a step is made of but for what is stored, and travels for it."""
        once = self._once(placement, self.calibration, self.execution, known=True)
        return self._parts(candidate, placement, self._busy(once, self.kept(candidate)))

    def _busy(self, once: Passes, kept: Residuals) -> Busy:
        """Return what a device computes, in a placement's passes under a policy."""
        key = id(once), id(kept)
        known = self._known.busy.get(key)
        if known is None:
            made = self.execution.busy(self.profile, once, kept)
            known = remembered(self._known.busy, key, (made, (once, kept)))
        return known[0]

    def _parts(self, candidate: Candidate, placement: Placement, busy: Busy) -> StepParts:
        return StepParts(
            table=self.profile,
            placement=placement,
            candidate=candidate,
            over=StoredOver(parameters=[], gradients=[], optimizer=[], computed=[]),
            chip=self.topology.chip,
            calibration=self.calibration,
            wires=self.execution.links(candidate.mesh, self.topology, self.calibration),
            work=busy,
            moved=Exchange(gathers={}, scatters={}, step={}),
            kept=self.kept(candidate),
            host=Offload(),
        )

    def passes(self, candidate: Candidate) -> Passes:
        """Return a candidate's forward and backward passes over one microbatch."""
        return self._once(self.place(candidate), self.calibration, self.execution, known=True)

    def attended(self, candidate: Candidate) -> Mapping[int, AttendedSeconds]:
        """Return the seconds of one run of calls of attention, by index, that its layout says more of."""
        return {} if self._attended is None else self._attended(candidate)

    def _once(
        self, placement: Placement, calibration: Calibration, execution: Execution, *, known: bool
    ) -> Passes:
        """Return the passes over a placement, which nothing that is kept changes.

        They are those of all placements with its fractions, but for attention that goes over ``context``.
        """
        apart = placement.candidate.context is not None
        key = id(placement if apart else placement.fractions)
        if known and (found := self._known.passes.get(key)) is not None:
            return found[0]
        made = passes(
            self.profile,
            placement,
            self.topology.chip,
            self.dtype,
            calibration,
            execution.attention,
            1 if execution.pads_products else execution.aligned_elements,
            execution.grouped,
            attended=self.attended(placement.candidate),
            wide_gradients=execution.wide_gradients,
            short_sums=execution.short_sums,
        )
        if known:
            remembered(self._known.passes, key, (made, placement))
        return made

    def _exchange(
        self,
        candidate: Candidate,
        placement: Placement,
        over: StoredOver,
        wires: Mapping[str, Link],
        joint: Callable[[Sequence[str]], Link] | None,
        *,
        known: bool,
    ) -> Exchange:
        """Return how parameters and gradients travel, which remat does not change."""
        key = (tuple(candidate.mesh.items()), id(candidate.dims), id(over), joint is None)
        if known and (found := self._known.exchanges.get(key)) is not None:
            return found[0]
        made = exchange(
            self.profile,
            placement,
            candidate,
            over,
            wires,
            self.gradient_bytes,
            joint=joint,
            renews_alone=self.execution.gathers_wait > 0.0,
        )
        if known:
            remembered(self._known.exchanges, key, (made, (candidate.dims, over)))
        return made
