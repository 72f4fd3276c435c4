"""Bytes of one device at the fullest moment of a step, itemised."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from ..plans.specs import cut_into
from .candidate import Candidate
from .exchange import StoredOver, parts
from .kept import Residuals
from .living import Worked
from .placement import Placement
from .profile import AFTER, BEFORE, LAYERS, ProgramTables

# Dimensions of a stack of matrices, one a layer.
_MATRICES = 3


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Standing:
    """What a storage asks for whatever is kept or run again, in bytes.

    Attributes:
      items: name → bytes [section]; of `framework`, what holds more than the program asks for.
      beside: [section] of a microbatch's gradients, which lie beside their sum.
      sums: [section] of that sum: devices add up their own rows' until the last, as parameters lie.
      layer: of one layer's parameters, gathered at use, for each scan over layers [stack].
      casts: of what all layers make of parameters that lie whole, where it is kept [stack].
      cast_parts: of casts of gathered ones as they lie in parts, where made ahead of loops [stack].
      after: of those that the loss uses, gathered or cast, and of their gradient before it is reduced.
      after_used: of that, without their gradient.
      before: of the gradient of those used before the layers (a table of embeddings), and of its copy.
      sent: of what goes to other slices.
      after_sums: of gradients of parameters that the loss uses, where they are not reduced from what `after`
        holds, but there as they are stored.
      again_after: of the gradients of parameters that the loss uses and something before it does, too.
      again_whole: of these, of those in `after_sums`.
    """

    items: Mapping[str, np.ndarray]
    beside: np.ndarray
    sums: np.ndarray
    layer: np.ndarray
    casts: np.ndarray
    cast_parts: np.ndarray
    after: float
    before: float
    sent: float
    after_used: float
    after_sums: float
    again_after: float
    again_whole: float
    _shares: dict[Holding, _Share] = dataclasses.field(default_factory=dict, init=False, repr=False)

    @functools.cached_property
    def gathered(self) -> tuple[float, float, float]:
        """The bytes of whole parameters and gradients in the backward pass of each section, but `sent`."""
        by_section = {BEFORE: self.before, LAYERS: float(self.layer.max()), AFTER: self.after}
        return by_section[0], by_section[1], by_section[2]

    def share(self, held: Holding) -> _Share:
        """Return what of it a device holds, found once for all policies and numbers of microbatches."""
        found = self._shares.get(held)
        if found is None:
            found = self._shares[held] = _share(self, held.here)
        return found


class _Share(NamedTuple):
    """What a device holds of a `Standing`: bytes by item; of gradients those to come from a section on.

    made: of one microbatch, as they are stored; beside: as they lie beside their sum, `sums`. casts: of each
    scan over layers and those before it [stack], where what they are cast for is kept; ahead: where they are
    made ahead of loops. after, zeros: `Standing.after_sums` and `again_whole`.
    """

    items: Mapping[str, float]
    made: tuple[float, ...]
    beside: tuple[float, ...]
    sums: float
    again_after: float
    after: float
    zeros: float
    casts: tuple[float, ...]
    ahead: tuple[float, ...]


def _share(stored: Standing, here: np.ndarray) -> _Share:
    def from_on(row: np.ndarray) -> tuple[float, ...]:
        return tuple(float(row[phase:] @ here[phase:]) for phase in range(3))

    return _Share(
        items={name: float(row @ here) for name, row in stored.items.items()},
        made=from_on(stored.items["gradients"]),
        beside=from_on(stored.beside),
        sums=float(stored.sums @ here),
        again_after=float(stored.again_after * here[AFTER]),
        after=float(stored.after_sums * here[AFTER]),
        zeros=float(stored.again_whole * here[AFTER]),
        casts=tuple((stored.casts * here[LAYERS]).cumsum().tolist()),
        ahead=tuple(((stored.casts + stored.cast_parts) * here[LAYERS]).cumsum().tolist()),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ahead:
    """Bytes of what is made of the whole batch's data before its parts: `rows`, which lie over the axes of
    the `dims` that the batch leads with, and what is `whole` on every device.
    """

    rows: float
    whole: float
    dims: tuple[int, ...]

    def of_device(self, candidate: Candidate) -> float:
        """Return what a device holds of it, all through a step."""
        axes = [axis for dim in self.dims for axis in candidate.dims.get(dim, ())]
        return self.rows / cut_into(axes, candidate.mesh) + self.whole


def standing(
    profile: ProgramTables,
    placement: Placement,
    candidate: Candidate,
    over: StoredOver,
    slot_bytes: float,
    gradient_bytes: float | None,
    slices: int,
) -> Standing:
    """Return what `candidate` stores all through a step on so many `slices`."""
    # Ticks make what they use of whole parameters before them, and sum gradients as parameters lie.
    in_stages = candidate.mesh.get("stage", 1) > 1
    layer, after_used, owned, before = _gathered(profile, placement, over, not in_stages)
    items = _state(profile, candidate, over, slot_bytes, gradient_bytes)
    # What a slice sends to the others lies in buffers that nothing else uses: its part of each gradient.
    sent = float(items["gradients"].sum()) / slices if slices > 1 else 0.0
    sums = _gradients(profile, candidate, over.parameters, gradient_bytes)
    again = _again_after(profile, candidate, over, gradient_bytes)
    each = _gradient_sizes(profile, candidate, over.gradients, gradient_bytes)
    there = each * (profile.parameters.section == AFTER) + again
    return Standing(
        items=items,
        beside=sums,
        sums=sums,
        layer=layer,
        casts=_casts(profile, placement, over),
        cast_parts=_cast_parts(profile, candidate, over) * (not in_stages),
        after=after_used + float(owned.sum()),
        after_used=after_used,
        before=before,
        sent=sent,
        again_after=float(again.sum()),
        after_sums=float(there[owned == 0].sum()),
        again_whole=float(again[owned == 0].sum()),
    )


def _again_after(
    profile: ProgramTables, candidate: Candidate, over: StoredOver, gradient_bytes: float | None
) -> np.ndarray:
    """Return the bytes of gradients [P] of what the loss uses and something before it does, too."""
    table = profile.parameters
    twice = (table.section != AFTER) & (table.after_bytes > 0)
    return _gradient_sizes(profile, candidate, over.gradients, gradient_bytes) * twice


def moments(
    profile: ProgramTables,
    candidate: Candidate,
    stored: Standing,
    work: Worked,
    kept: Residuals,
    last_layer_apart: bool,
) -> Iterator[dict[str, float]]:
    """Yield item → bytes of a device at each moment that may be a step's fullest, without stages.

    Memory grows to the end of the forward pass and shrinks through the backward pass, whose sections (loss,
    layers, what comes before them) follow one another and each hold something of their own.

    Args:
      profile: the program's tables.
      candidate: its mesh, remat and microbatches.
      stored: what lies in memory all through a step.
      work: what the values weigh.
      kept: which of them are kept.
      last_layer_apart: whether the last layer to come back from the host runs outside of the loop.
    """
    yield from moments_of(profile, candidate, stored, work, kept, _EVERYTHING, last_layer_apart)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Holding:
    """What a device holds of a program: `here` the share of each section, of so many microbatches at once."""

    here: np.ndarray
    microbatches: float


_EVERYTHING = Holding(here=np.ones(3), microbatches=1.0)


def moments_of(
    profile: ProgramTables,
    candidate: Candidate,
    stored: Standing,
    work: Worked,
    kept: Residuals,
    held: Holding,
    last_layer_apart: bool,
) -> Iterator[dict[str, float]]:
    """Yield the moments of a device that holds a share of the program; see `moments`."""
    living, lies = work.living(profile, candidate, kept), stored.share(held)
    returning = last_layer_apart and living.returns
    here, many = held.here.tolist(), candidate.microbatches > 1
    # All of it, whatever is worked through at a time.
    batch = work.batch * candidate.microbatches
    # Compilers that cast what products take before a loop have them whatever is kept.
    casts = lies.ahead if math.isfinite(work.product) else lies.casts if candidate.remat == "none" else ()
    casts = casts if casts and casts[-1] else ()
    # What microbatches sum is sent to other slices when they are done.
    sent = 0.0 if many else stored.sent
    before, layers, after = (size * share for size, share in zip(living.saved, here, strict=True))
    layers *= held.microbatches
    holding = before, before + layers, before + layers + after
    always = {**lies.items, "gradients": lies.sums} if many else lies.items
    if work.ahead and here[AFTER]:
        yield {
            **always,
            "gradients": lies.sums if many else 0.0,
            "saved_activations": holding[AFTER],
            "temporaries": work.ahead,
            "communication": sent + stored.after_used,
            "batch": batch,
            **({"captured": profile.captured_bytes} if profile.captured_bytes else {}),
            **({"casts": casts[-1]} if casts else {}),
        }
    for phase in [AFTER] * bool(here[AFTER]) + [LAYERS] + [BEFORE] * bool(here[BEFORE]):
        items = dict(always)
        # Gradients of what comes before are still to come, but for a part that the loss gives.
        if many and phase != AFTER:
            items["gradients"] += lies.beside[phase]
        elif not many and phase != BEFORE:
            # The loss's are reduced when it is done with.
            made = lies.after if phase == AFTER else lies.made[phase] + lies.again_after
            items["gradients"] = made + lies.zeros * work.zeros_together
        # A layer that runs outside of the loop does so beside what follows, and in a loop over
        # microbatches keeps the others' values there.
        items["saved_activations"] = holding[LAYERS if phase == BEFORE and returning and many else phase]
        beside = living.scratch[LAYERS] if returning else 0.0
        items["temporaries"] = beside if phase == BEFORE else living.scratch[phase]
        items["communication"] = sent + stored.gathered[phase]
        items["batch"] = batch
        if profile.captured_bytes:
            items["captured"] = profile.captured_bytes
        if phase != BEFORE and casts:
            items["casts"] = casts[-1]
        if phase != LAYERS:
            yield items
            continue
        # Scans over layers go back one by one, the last one first; what they kept is gone then.
        for stack in reversed(range(profile.stacks)):
            left = living.upto[stack] * here[LAYERS] * held.microbatches
            if casts:
                items["casts"] = casts[stack]
            yield {
                **items,
                "saved_activations": before + left,
                "temporaries": living.alone[stack],
                "communication": sent + float(stored.layer[stack]),
            }


def _state(
    profile: ProgramTables,
    candidate: Candidate,
    over: StoredOver,
    slot_bytes: float,
    gradient_bytes: float | None,
) -> dict[str, np.ndarray]:
    """Return parameters', gradients', moments' and the state's bytes by section; XLA holds nothing itself."""
    table, mesh = profile.parameters, candidate.mesh
    rows = {
        "params": (over.parameters, table.item_bytes * (1.0 - table.state)),
        "optimizer": (over.optimizer, slot_bytes * table.trained),
    }
    if table.state.any():
        rows["state"] = (over.parameters, table.item_bytes * table.state)
    found = {}
    for name, (axes, size) in rows.items():
        divided = parts(axes, mesh)
        found[name] = np.bincount(table.section, weights=table.elements * size / divided, minlength=3)
    found["gradients"] = _gradients(profile, candidate, over.gradients, gradient_bytes)
    if table.stacked_bytes.any():
        # Made in every step and kept to its end. Their gradients are stacked before they are parameters' own:
        # cast to a smaller type the stack is in their place, else it is beside them.
        beside = table.trained * (table.stacked_bytes >= table.item_bytes)
        each = 1.0 / parts(over.parameters, mesh) + beside / parts(over.gradients, mesh)
        weights = table.elements * table.stacked_bytes * each
        found["stacks"] = np.bincount(table.section, weights=weights, minlength=3)
    return {**found, "framework": np.zeros(3)}


def _gradients(
    profile: ProgramTables, candidate: Candidate, axes: list[frozenset[str]], gradient_bytes: float | None
) -> np.ndarray:
    """Return the bytes by section of gradients that lie over `axes` [P]."""
    weights = _gradient_sizes(profile, candidate, axes, gradient_bytes)
    return np.bincount(profile.parameters.section, weights=weights, minlength=3)


def _gradient_sizes(
    profile: ProgramTables, candidate: Candidate, axes: list[frozenset[str]], gradient_bytes: float | None
) -> np.ndarray:
    """Return the bytes of each gradient [P], over `axes`."""
    table = profile.parameters
    each = table.item_bytes if gradient_bytes is None else gradient_bytes
    return table.elements * each * table.trained / parts(axes, candidate.mesh)


def _casts(profile: ProgramTables, placement: Placement, over: StoredOver) -> np.ndarray:
    """Return the bytes of what layers make of parameters that lie whole for their gradients to read [stack].

    What is gathered is made again; of what the program stacks the stack is one. JAX gives a loop's backward
    pass a cast of every layer's parameters, which XLA keeps, though it could make it again.
    """
    table = profile.parameters
    weights = table.elements * table.made_bytes * placement.fractions.parameters
    weights *= (table.stacked_bytes == 0) & ~_further(over.parameters, over.computed)
    return np.bincount(table.stack + 1, weights=weights, minlength=1 + profile.stacks)[1:]


def _cast_parts(profile: ProgramTables, candidate: Candidate, over: StoredOver) -> np.ndarray:
    """Return the bytes of `Standing.cast_parts`: of what each layer has of its own, and gathers and casts.

    A loop over microbatches has all casts made ahead of it, one over layers those of matrices: libtpu lays
    out what has more dimensions anew in each turn.
    """
    table = profile.parameters
    cast = (table.runs > 1) & (table.used_bytes < table.item_bytes) & (table.stacked_bytes == 0)
    cast &= _further(over.parameters, over.computed)
    if candidate.microbatches == 1:
        cast &= np.array([len(dims) <= _MATRICES for dims in profile.parameter_dims], bool)
    weights = table.elements * table.used_bytes * cast / parts(over.parameters, candidate.mesh)
    return np.bincount(table.stack + 1, weights=weights, minlength=1 + profile.stacks)[1:]


def _further(axes: list[frozenset[str]], than: list[frozenset[str]]) -> np.ndarray:
    """Return which parameters [P] lie over axes that they do not in another way of storing them."""
    return np.array([bool(one - other) for one, other in zip(axes, than, strict=True)], bool)


def _gathered(
    profile: ProgramTables, placement: Placement, over: StoredOver, counts_whole: bool
) -> tuple[np.ndarray, float, np.ndarray, float]:
    """Return the bytes of `Standing`'s layer and after_used, of `after` those of gradients [P], and before.

    Of parameters that lie whole where these count.
    """
    table = profile.parameters
    gathered = _further(over.parameters, over.computed)
    # Of parameters that lie whole gradients may not: these are whole before they are reduced.
    whole = ~gathered & counts_whole
    summed = whole & _further(over.gradients, over.computed)
    # Of layers one at a time: a stacked parameter's elements are those of all turns of the scan. What stands
    # outside is whole, however often it is used.
    turns = np.where(table.section == LAYERS, table.runs, 1.0)
    elements = table.elements * table.read * placement.fractions.parameters / turns
    # Its gradient is summed whole too, if it is the same in all turns.
    again = table.trained * ((table.section == LAYERS) & (table.runs == 1))
    each = elements * gathered * table.used_bytes * (1.0 + again)
    layer = np.bincount(table.stack + 1, weights=each, minlength=1 + profile.stacks)[1:]
    # The loss's parameter in the type that it is used in, a copy of a whole one that is of another, and its
    # gradient in its own.
    cast = table.used_bytes * gathered + table.after_bytes * (whole & (table.after_bytes != table.item_bytes))
    own = elements * table.item_bytes * table.trained * (gathered | summed) * (table.after_bytes > 0)
    after_used = float(elements @ (cast * (table.after_bytes > 0)))
    # A table of embeddings: the gradient that rows are added into, and what it is reduced from, which is the
    # same array where it is reduced whole and then cut.
    sums = table.used_bytes * table.trained * (2.0 * gathered + summed)
    before = float(elements @ (sums * (table.section == BEFORE)))
    return layer, after_used, own, before
