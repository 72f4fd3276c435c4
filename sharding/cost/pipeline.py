"""What a loss takes that goes through stages in lockstep: its ticks, what they move, and what a stage holds.

p stages of v chunks of layers work M microbatches through (`transform/pipeline/schedule.py`). All stages do
the same in a tick, and a tick is as long as the fullest stage's chunk: v M + p - 1 ticks forward and as many
backward, each of one chunk. Backward, a chunk is run again from its input, of which a stage keeps 2 p v - 1,
or from what `remat` keeps of its layers, of as many. Gradients of weights that are delayed take v M ticks,
for what they are made of, which is kept of p chunks.
What comes before the layers and behind them is shared over the stages by rows: 1/p of a microbatch's each, in
M ticks (M + p before the layers), between a reduce-scatter and an all-gather over the stages. Chunks that a
stage does not store one after another come from where they are stored, and their gradients go back, once a
step.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ..plans.record import Decision
from ..plans.vocabulary import DELAYED
from . import memory
from .candidate import Candidate
from .delayed import kept_bytes
from .exchange import parts as lying_over
from .kept import Residuals
from .living import Worked, activations
from .memory import Standing
from .placement import BACKWARD, FORWARD
from .profile import AFTER, BEFORE, LAYERS, ProgramTables
from .stacks import (
    cut_stacks,
    held_layers,
    held_share,
    moved_parameters,
    shares,
    whole_parameters,
    worked_share,
)
from .step import StepParts, Turns, microbatch, reduce_once

# Of what stages hand on, held beside the inputs that are kept: what is embedded for the next tick, what was
# sent on and what came, what is sent back and what came back, the head's share put together again.
_IN_HAND = 5
# The chunk that goes forward and the one that goes back, each cut out of what a stage holds: of every
# stack of layers, of which stages run one each in a tick.
_CUT_OUT = 2
# Bytes of an element that gradients are added up in, at least.
_SUMMED = 4.0
# Sums of gradients are read and written, and what is added is read.
_PASSES_OF_ADDING = 3.0
# What goes over ticks is read where it was made and written into its room, and read there and written to be
# read: as libtpu and XLA for GPUs compile it. Loops over layers stack it before, and take it apart behind: of
# what layers keep that is counted where it was measured.
_PASSES_OF_KEEPING = 4.0
_PASSES_OF_STACKING = 2.0
# Chunks of it beside those that there is room for: the one that is made in a tick.
_KEPT_IN_HAND = 1
# Phases of `Busy` in which layers run forward, and run again.
_AGAIN = 2


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Lockstep:
    """How often a device of `stages` stages of `chunks` chunks does each part, for so many microbatches.

    Gradients of layers' weights may be `delayed`. Of the stages `shares` have rows of a microbatch of their
    own before and behind the layers, all of them if that is 0.

    >>> even = Lockstep(stages=4, chunks=2, microbatches=16)
    >>> even.layer_ticks, even.head_ticks, even.embed_ticks, even.inputs
    (35, 16, 20, 15)
    """

    stages: int
    chunks: int
    microbatches: int
    delayed: bool = False
    shares: int = 0

    @property
    def sharers(self) -> int:
        """Stages that share out the rows of a microbatch; the others work the same shares."""
        return self.shares or self.stages

    @property
    def slots(self) -> int:
        """Microbatches with those that are none: several chunks take them in groups of as many as stages."""
        if self.chunks == 1:
            return self.microbatches
        return math.ceil(self.microbatches / self.stages) * self.stages

    @property
    def layer_ticks(self) -> int:
        """Ticks in which a chunk is run forward, and as many in which one is run backward."""
        return self.slots * self.chunks + self.stages - 1

    @property
    def head_ticks(self) -> int:
        """Ticks with what comes after the layers, forward and backward."""
        return self.slots

    @property
    def embed_ticks(self) -> int:
        """Ticks with what comes before the layers, and as many with its gradient unless `delayed`."""
        return self.slots + self.stages

    @property
    def between_ticks(self) -> int:
        """Ticks with what lies between two stacks of layers, and as many with its gradient."""
        return self.layer_ticks if self.chunks == 1 else self.slots

    @property
    def weight_ticks(self) -> int:
        """Ticks in which a chunk's weights have their gradients; in those of other work where not delayed."""
        return self.slots * self.chunks if self.delayed else self.layer_ticks

    @property
    def kept(self) -> int:
        """Chunks of which a stage keeps what the gradients of weights are made of."""
        return self.stages if self.delayed else 0

    @property
    def inputs(self) -> int:
        """Inputs of chunks that a stage keeps."""
        return 2 * self.stages * self.chunks - 1

    @property
    def sends(self) -> int:
        """What is handed on from stage to stage, or back, a microbatch each."""
        return 2 * self.layer_ticks

    @property
    def exchanges(self) -> int:
        """How often a microbatch's rows are shared out among the stages, or put together again."""
        return 2 * (self.head_ticks + self.embed_ticks)


def lockstep(of: Candidate | Decision) -> Lockstep:
    """Return the ticks of a candidate, or of a plan."""
    stages, rows = of.mesh.get("stage", 1), of.rows if isinstance(of, Candidate) else 0
    return Lockstep(
        stages=stages,
        chunks=of.interleave,
        microbatches=of.microbatches,
        delayed=of.schedule == DELAYED,
        shares=math.gcd(rows // of.microbatches, stages),
    )


class LayerTurns(NamedTuple):
    """How often in a step a device runs all layers, or as many: those needed, with a bubble's, and `again`.

    again: how often they are run forward once more than without stages.
    """

    needed: float
    taken: float
    again: int


def layer_turns(candidate: Candidate, layers: int) -> LayerTurns:
    """Return how often a device of a candidate runs its share of so many layers.

    >>> layer_turns(Candidate(mesh={"stage": 4}, dims={}, microbatches=8), 32)
    LayerTurns(needed=2.0, taken=2.75, again=1)
    """
    ticks = lockstep(candidate)
    if ticks.stages == 1:
        return LayerTurns(ticks.microbatches, ticks.microbatches, 0)
    share = held_layers(layers, ticks.stages, ticks.chunks) / layers
    again = int(candidate.stage_remat)
    return LayerTurns(share * ticks.microbatches, share * ticks.layer_ticks / ticks.chunks, again)


def through_stages(parts: StepParts) -> dict[str, float]:
    """Return the seconds of a step over stages, by item; ``bubble`` is what they wait for one another."""
    ticks = lockstep(parts.candidate)
    share = worked_share(parts.table, ticks.stages, ticks.chunks)
    parts = _forward_again(parts)
    gathers = np.array([2.0, 3.0 if parts.candidate.stage_remat else 2.0, 2.0])
    busy, all_ = (
        Turns(
            rows=np.array([embed / ticks.sharers, layers * share, ticks.microbatches / ticks.sharers]),
            whole=np.array([embed, layers * share, ticks.microbatches], float),
            gathers=gathers,
        )
        for embed, layers in (
            (ticks.microbatches, float(ticks.microbatches)),
            (ticks.embed_ticks, ticks.layer_ticks / ticks.chunks),
        )
    )
    if ticks.slots > ticks.microbatches:
        more = ticks.slots / ticks.microbatches
        all_ = dataclasses.replace(
            all_, rows=all_.rows * [1, 1, more], whole=all_.whole * np.array([1, 1, more])
        )
    time: dict[str, float] = defaultdict(float)
    for name, row in microbatch(parts, busy).items():
        time[name] += float(row.sum())
    taken = sum(time.values())
    with_bubble = sum(float(row.sum()) for row in microbatch(parts, all_).values())
    time["bubble"] = with_bubble - taken
    if ticks.delayed:
        # Of weights' gradients there are no ticks but those of microbatches.
        time["bubble"] -= parts.late * share * (ticks.layer_ticks - ticks.weight_ticks) / ticks.chunks
    time["kept"] += _keeping(parts, ticks, share / ticks.chunks)
    _over_stages(time, parts, ticks, share / ticks.chunks)
    time["host"] += parts.calibration.microbatch_seconds * (ticks.layer_ticks + ticks.stages)
    here = np.array([1.0, held_share(parts.table, ticks.stages, ticks.chunks), 1.0])
    reduce_once(time, parts, here)
    _reduce_shared(time, parts, ticks)
    _move_layers(time, parts, ticks)
    return time


def _keeping(parts: StepParts, ticks: Lockstep, chunk: float) -> float:
    """Return the seconds of what goes over ticks: into its room and out of it in each, all empty at first."""
    waiting, late = chunk * parts.over_ticks, chunk * parts.late_bytes * ticks.delayed
    passes, of_late = _passes(parts)
    moved = waiting * (passes * ticks.layer_ticks + ticks.inputs)
    moved += late * (of_late * ticks.layer_ticks + ticks.kept)
    return moved / _memory_rate(parts)


def _passes(parts: StepParts) -> tuple[float, float]:
    """Return how often what layers keep, and what delayed gradients are made of, go through memory for it."""
    counted = parts.calibration.kept_passes
    stacking = counted or _PASSES_OF_STACKING
    return _PASSES_OF_KEEPING + (0.0 if counted else stacking), _PASSES_OF_KEEPING + stacking


class Least(NamedTuple):
    """What no storage and no number of microbatches takes away from a whole batch that goes through stages.

    sections: seconds by section, computed and exchanged where it is computed with; late: of them those of
    gradients of layers' weights; keeping: those of taking over ticks what layers keep, and made_of: what
    weights' gradients are made of.
    """

    sections: tuple[float, ...]
    late: float
    keeping: float
    made_of: float

    def over(self, table: ProgramTables, ticks: Lockstep) -> float:
        """Return the seconds that a step of such `ticks` takes at least, in so many microbatches or fewer."""
        before, layers, after = self.sections
        share = worked_share(table, ticks.stages, ticks.chunks)
        waited = ticks.layer_ticks / (ticks.chunks * ticks.microbatches)
        here = (layers + self.keeping) * waited
        if ticks.delayed:
            here += self.made_of * waited - self.late * (waited - 1.0)
        return (before + after) / ticks.sharers + here * share


def least(parts: StepParts) -> Least:
    """Return the least of `parts`, which are those of a whole batch, storage left out."""
    rows = sum(microbatch(_forward_again(parts)).values(), np.zeros(3))
    (passes, of_late), rate = _passes(parts), _memory_rate(parts)
    return Least(
        sections=tuple(rows.tolist()),
        late=parts.late,
        keeping=passes * parts.over_ticks / rate,
        made_of=of_late * parts.late_bytes / rate,
    )


def _memory_rate(parts: StepParts) -> float:
    return (parts.chip.hbm_bytes_per_second or math.inf) * parts.calibration.memory_efficiency


def _forward_again(parts: StepParts) -> StepParts:
    """Return the parts of a microbatch whose layers are run once more, from a stage's input, if they are."""
    if not parts.candidate.stage_remat:
        return parts
    seconds, kernels = parts.work.seconds.copy(), parts.work.kernels.copy()
    seconds[_AGAIN, :, LAYERS] += seconds[FORWARD, :, LAYERS]
    kernels[_AGAIN, LAYERS] += kernels[FORWARD, LAYERS]
    layers = 1.0 * (parts.table.values.section == LAYERS)
    kept = dataclasses.replace(
        parts.kept, made=parts.kept.made + layers, gathered=parts.kept.gathered + layers
    )
    work = dataclasses.replace(parts.work, seconds=seconds, kernels=kernels)
    return dataclasses.replace(parts, work=work, kept=kept)


def _over_stages(time: dict[str, float], parts: StepParts, ticks: Lockstep, chunk: float) -> None:
    """Add what stages hand on, as far as nothing hides it, and what they share out.

    What is sent on goes beside the backward pass of a `chunk` of all layers; in ticks that only go forward
    nothing is beside it. What is sent back goes beside the next tick, but where its head waits for it: then
    beside adding up the chunk's gradients, of two halves, which libtpu schedules on either side of the send's
    start, the latter. Of several stacks of layers each hands on its own; what lies between two of them is
    shared out as what is before the first and behind the last.
    """
    link, sizes = parts.wires["stage"], _streams(parts.table, parts.placement.value_fraction, ticks)
    each = link.point_to_point(sum(sizes))
    back = float(parts.work.seconds[[BACKWARD, _AGAIN], :, LAYERS].sum()) * chunk
    added = _PASSES_OF_ADDING * float(_gradients(parts)[LAYERS]) * chunk / _memory_rate(parts)
    behind_back, behind_sums = max(0.0, each - back), max(0.0, each - added / 2)
    time["send/stage"] += (ticks.stages - 1) * each + ticks.layer_ticks * behind_back
    time["send/stage"] += ticks.head_ticks * behind_sums
    half = ticks.exchanges / 2 + 2 * (len(sizes) - 1) * ticks.between_ticks
    moved = ticks.embed_ticks * sizes[0] + ticks.head_ticks * sizes[-1]
    moved += ticks.between_ticks * sum(before + after for before, after in itertools.pairwise(sizes))
    for kind in ("reduce_scatter", "all_gather"):
        time[f"{kind}/stage"] += link.collective(kind, moved, half)


def _streams(profile: ProgramTables, fraction: np.ndarray, ticks: Lockstep) -> list[float]:
    """Return the bytes of a microbatch that travel through each stack of layers that stages cut."""
    sizes = profile.values.bytes * fraction
    cut = cut_stacks(profile, ticks.stages, ticks.chunks)
    return [float(sizes[list(profile.through[n])].sum()) for n in cut]


def _reduce_shared(time: dict[str, float], parts: StepParts, ticks: Lockstep) -> None:
    """Add the reduction over stages of gradients of what all of them have."""
    whole = whole_parameters(parts.table, ticks.stages, ticks.chunks)
    size = float(_gradients(parts)[[BEFORE, AFTER]].sum()) + float(_gradients(parts, whole).sum())
    time["all_reduce/stage"] += parts.wires["stage"].collective("all_reduce", size)


def _move_layers(time: dict[str, float], parts: StepParts, ticks: Lockstep) -> None:
    """Add bringing layers to their stages and their gradients back, where they are stored otherwise."""
    moved = moved_parameters(parts.table, ticks.stages, ticks.chunks)
    if not moved.any():
        return
    table = parts.table.parameters
    # Cast to the type that they are used in first.
    each = np.minimum(np.minimum(table.used_bytes, parts.product), table.item_bytes)
    stored = table.elements * each / lying_over(parts.over.parameters, parts.candidate.mesh)
    size = float(stored[moved].sum()) + float(_gradients(parts, moved).sum())
    time["all_to_all/stage"] += parts.wires["stage"].collective("all_to_all", size, 2.0)


def _gradients(parts: StepParts, of: np.ndarray | float = 1.0) -> np.ndarray:
    """Return the bytes of gradients by section as ticks add them up, were a device to hold all layers.

    They are those `of` some parameters [P]. They lie as parameters do, in four bytes at least; where they are
    stored in more parts, they go there once a step.
    """
    table = parts.table.parameters
    each = np.maximum(table.item_bytes, _SUMMED)
    sizes = table.elements * table.trained * each / lying_over(parts.over.parameters, parts.candidate.mesh)
    sizes = sizes * of
    return np.bincount(table.section, weights=sizes, minlength=3)


def summed(profile: ProgramTables, params: np.ndarray) -> np.ndarray:
    """Return what `_gradients` does, of the bytes of parameters by section."""
    table = profile.parameters
    return _like(profile, params, np.maximum(table.item_bytes, _SUMMED) * table.trained)


def held_at_least(profile: ProgramTables, candidate: Candidate, slot_bytes: float) -> float:
    """Return the bytes of a device that `moments` says at least, however parameters and rows lie.

    They are parameters, moments and gradients over all devices, and inputs of chunks over those of a stage.
    """
    ticks, (stored, streams) = lockstep(candidate), _whole(profile, slot_bytes)
    inputs = (ticks.inputs + _IN_HAND) * (streams / candidate.microbatches) * ticks.stages
    return (stored + inputs) / candidate.num_devices


@functools.lru_cache(maxsize=16)
def _whole(profile: ProgramTables, slot_bytes: float) -> tuple[float, float]:
    """Return the bytes of all parameters, moments and gradients, and of all that layers hand on at once."""
    table = profile.parameters
    each = table.item_bytes + (slot_bytes + np.maximum(table.item_bytes, _SUMMED)) * table.trained
    return float(table.elements @ each), float(profile.values.bytes[list(profile.carries)].sum())


def moments(
    profile: ProgramTables,
    candidate: Candidate,
    stored: Standing,
    work: Worked,
    kept: Residuals,
    last_layer_apart: bool,
) -> Iterator[dict[str, float]]:
    """Yield item → bytes of a device at each moment that may be a step's fullest; see `memory.moments`.

    Over stages those are the head's, a chunk's and the embedding's turn within a tick: each begins when what
    the one before has kept for its own backward pass is gone. All through the loop over ticks lie

    - parameters and moments, and parameters once more in the type that they are used in where that is
      another, or where a stage runs other layers than it stores: XLA casts and moves them before the loop
    - gradients, in four bytes at least, and one chunk's beside their sum: they are added when all are there
    - 2 p v - 1 inputs of chunks, or what is kept of as many; and `_IN_HAND` as large as an input

    and while a chunk goes back what is kept of its layers, what was read of one of them, which its gradient
    is written in the place of, and the head's gradient, which waits to be added. By libtpu's figures for a
    decoder's MLP with 1 and 2 chunks and 2 and 4 stages this is 2 to 5 % off.
    """
    ticks = lockstep(candidate)
    if ticks.stages == 1:
        yield from memory.moments(profile, candidate, stored, work, kept, last_layer_apart)
        return
    # Stacks of layers go back one after another.
    each = (ticks.stages, ticks.chunks)
    worked = worked_share(profile, *each)
    table, values = profile.parameters, profile.values
    weights = table.elements * table.trained * (table.section == LAYERS)
    own = shares(profile, table.stack, weights, *each)
    chunk = max(own) / ticks.chunks
    kept_share = max(shares(profile, values.stack, values.bytes * values.runs, *each)) / ticks.chunks
    here = np.array([1.0, held_share(profile, ticks.stages, ticks.chunks), 1.0])
    saved, scratch = activations(profile, candidate, work, kept)
    scratch[LAYERS] = np.maximum(work.largest_of, work.least).max()
    part = np.array([1 / ticks.sharers, kept_share, 1 / ticks.sharers])
    inputs = _inputs(profile, work, ticks)
    if not candidate.stage_remat:
        # What layers keep goes over ticks in place of what is read.
        inputs += _over_ticks(profile, work, ticks, float(saved[LAYERS]) * worked / ticks.chunks)
    if ticks.delayed:
        held = ticks.kept + _KEPT_IN_HAND + work.takes_out
        inputs += held * worked / ticks.chunks * kept_bytes(profile, work)
    items = {name: float(row @ here) for name, row in stored.items.items()}
    gradients = summed(profile, stored.items["params"])
    moved = moved_parameters(profile, ticks.stages, ticks.chunks)
    used = _used(profile, stored.items["params"], work.product, moved)
    cut_out = _CUT_OUT * sum(own) / ticks.chunks * float(used[LAYERS]) if ticks.chunks > 1 else 0.0
    items["params"] += float(used @ here) + cut_out
    items["batch"] = work.batch * candidate.microbatches
    if profile.captured_bytes:
        items["captured"] = profile.captured_bytes
    beside = {
        AFTER: gradients[AFTER],
        LAYERS: gradients[AFTER] + gradients[LAYERS] * chunk * (1 + work.takes_out),
        BEFORE: gradients[BEFORE],
    }
    for phase in (AFTER, LAYERS, BEFORE):
        alone = 1.0 if phase == LAYERS else 1 / ticks.sharers
        yield {
            **items,
            "gradients": float(gradients @ here + beside[phase]),
            "saved_activations": inputs + float(saved[phase] * part[phase]),
            "temporaries": float(scratch[phase] * alone),
            "communication": stored.sent + stored.gathered[phase],
        }


def _inputs(profile: ProgramTables, work: Worked, ticks: Lockstep) -> float:
    """Return the bytes of inputs that a stage keeps, and has in hand: those of each stack of layers.

    Each waits the longer the more stacks are behind it, as do the shares of what lies between two.
    """
    found, sizes = 0.0, [float(work.sent[list(values)].sum()) for values in profile.through]
    cut = cut_stacks(profile, ticks.stages, ticks.chunks)
    for behind, stack in enumerate(reversed(cut)):
        waits = 2 * behind * ticks.stages
        found += (ticks.inputs + waits * ticks.chunks + _IN_HAND) * sizes[stack]
        found += (waits + 1) * sizes[stack] / ticks.sharers if behind else 0.0
    return found


def _over_ticks(profile: ProgramTables, work: Worked, ticks: Lockstep, kept: float) -> float:
    """Return by how much more what is kept of chunks weighs than their inputs, held as the first stack's."""
    cut = cut_stacks(profile, ticks.stages, ticks.chunks)
    inputs = sum(float(work.sent[list(profile.through[stack])].sum()) for stack in cut)
    found = (ticks.inputs + 2 * (len(cut) - 1) * ticks.stages * ticks.chunks) * (kept - inputs)
    return found + work.takes_out * kept


def _used(profile: ProgramTables, params: np.ndarray, product_bytes: float, moved: np.ndarray) -> np.ndarray:
    """Return the bytes by section of what is made of stored `params` before the loop, to be used in it."""
    table = profile.parameters
    used = np.minimum(table.used_bytes, product_bytes)
    return _like(profile, params, used * ((used < table.item_bytes) | moved))


def _like(profile: ProgramTables, params: np.ndarray, item_bytes: np.ndarray) -> np.ndarray:
    """Return the bytes by section of arrays that lie as the `params` do, of so many bytes an element."""
    table = profile.parameters
    sizes = table.elements * (1.0 - table.state)
    whole = np.bincount(table.section, weights=sizes * table.item_bytes, minlength=3)
    return params * np.bincount(table.section, weights=sizes * item_bytes, minlength=3) / np.maximum(whole, 1)
