"""Bytes of one device at the fullest moment of a step, itemised."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping

import numpy as np

from ..plans.specs import cut_into
from ..program.lookups import MANY_ROWS
from .candidate import Candidate
from .exchange import StoredOver, parts
from .kept import Residuals
from .placement import FORWARD, Placement
from .profile import AFTER, BEFORE, LAYERS, ProgramTables
from .working_set import WorkingSet, gathers, working_set


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Standing:
    """What a storage asks for whatever is kept or run again, in bytes.

    Attributes:
      items: name → bytes [section]; of `framework`, what holds more than the program asks for.
      beside: [section] of a microbatch's gradients, which lie beside their sum.
      sums: [section] of that sum: devices add up their own rows' until the last, as parameters lie.
      layer: of one layer's parameters, gathered at use, for each scan over layers [stack].
      casts: of what all layers make of parameters that lie whole, where it is kept [stack].
      after: of those that the loss uses, gathered or cast, and of their gradient before it is reduced.
      before: of the gradient of those used before the layers (a table of embeddings), and of its copy.
      sent: of what goes to other slices.
      again_after: of the gradients of parameters that the loss uses and something before it does, too.
    """

    items: Mapping[str, np.ndarray]
    beside: np.ndarray
    sums: np.ndarray
    layer: np.ndarray
    casts: np.ndarray
    after: float
    before: float
    sent: float
    again_after: float = 0.0

    def gathered(self, phase: int) -> float:
        """Return the bytes of whole parameters and gradients in the backward pass of a section."""
        return self.sent + {BEFORE: self.before, LAYERS: float(self.layer.max()), AFTER: self.after}[phase]


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
    layer, after, before = _gathered(profile, placement, over, candidate.mesh.get("stage", 1) == 1)
    items = _state(profile, candidate, over, slot_bytes, gradient_bytes)
    # What a slice sends to the others lies in buffers that nothing else uses: its part of each gradient.
    sent = float(items["gradients"].sum()) / slices if slices > 1 else 0.0
    sums = _gradients(profile, candidate, over.parameters, gradient_bytes)
    return Standing(
        items=items,
        beside=sums,
        sums=sums,
        layer=layer,
        casts=_casts(profile, placement, over),
        after=after,
        before=before,
        sent=sent,
        again_after=_again_after(profile, candidate, over, gradient_bytes),
    )


def _again_after(
    profile: ProgramTables, candidate: Candidate, over: StoredOver, gradient_bytes: float | None
) -> float:
    table = profile.parameters
    twice = (table.section != AFTER) & (table.after_bytes > 0)
    each = table.item_bytes if gradient_bytes is None else gradient_bytes
    sizes = table.elements * table.trained * each / parts(over.gradients, candidate.mesh)
    return float(sizes[twice].sum())


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
    every = Holding(here=np.ones(3), microbatches=1.0)
    yield from moments_of(profile, candidate, stored, work, kept, every, last_layer_apart)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Holding:
    """What a device holds of a program: `here` the share of each section, of so many microbatches at once."""

    here: np.ndarray
    microbatches: float


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
    saved, scratch, kept_of, alone = _activations(profile, candidate, work, kept)
    returning = last_layer_apart and bool(kept.host.any())
    # All of it, whatever is worked through at a time.
    batch = work.batch * candidate.microbatches
    here = held.here
    # Compilers that cast what products take before a loop have them whatever is kept.
    casts = stored.casts * (candidate.remat == "none" or math.isfinite(work.product)) * here[LAYERS]
    casts_to = casts.cumsum()
    holding = saved * here * np.array([1.0, held.microbatches, 1.0])
    always = {name: float(row @ here) for name, row in stored.items.items()}
    if candidate.microbatches > 1:
        always["gradients"] = float(stored.sums @ here)
    for phase in [AFTER] * bool(here[AFTER]) + [LAYERS] + [BEFORE] * bool(here[BEFORE]):
        items = always.copy()
        # Gradients of what comes before are still to come, but for a part that the loss gives.
        if candidate.microbatches > 1 and phase != AFTER:
            items["gradients"] += float(stored.beside[phase:] @ here[phase:])
        elif candidate.microbatches == 1 and phase != BEFORE:
            made = float(stored.items["gradients"][phase:] @ here[phase:])
            items["gradients"] = made + float(stored.again_after * here[AFTER])
        # A layer that runs outside of the loop does so beside what follows, and in a loop over
        # microbatches keeps the others' values there.
        lasting = LAYERS if phase == BEFORE and returning and candidate.microbatches > 1 else phase
        items["saved_activations"] = float(holding[: lasting + 1].sum())
        beside = scratch[LAYERS] if returning else 0.0
        items["temporaries"] = float(beside if phase == BEFORE else scratch[phase])
        items["communication"] = stored.gathered(phase)
        items["batch"] = batch
        if profile.captured_bytes:
            items["captured"] = profile.captured_bytes
        if phase != BEFORE and casts_to[-1]:
            items["casts"] = float(casts_to[-1])
        if phase != LAYERS:
            yield items
            continue
        # Scans over layers go back one by one, the last one first; what they kept is gone then.
        parts = _by_stack(profile, kept_of)
        for stack in reversed(range(profile.stacks)):
            left = float(parts[: stack + 1].sum() * here[LAYERS] * held.microbatches)
            if casts_to[-1]:
                items["casts"] = float(casts_to[stack])
            yield {
                **items,
                "saved_activations": float(holding[BEFORE]) + left,
                "temporaries": float(alone[stack]),
                "communication": stored.sent + float(stored.layer[stack]),
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
    table = profile.parameters
    each = table.item_bytes if gradient_bytes is None else gradient_bytes
    weights = table.elements * each * table.trained / parts(axes, candidate.mesh)
    return np.bincount(table.section, weights=weights, minlength=3)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Worked:
    """What a placement's values weigh in bytes.

    saved [V]: of one microbatch, in all runs; live, largest_of [stack]: what fused kernels keep of one layer,
    and its largest value; least [stack]: what is live less what elementwise work gives of it; largest
    [section]: likewise; batch: of the microbatch itself; stream: of what layers hand on; product: of an
    element as products take it, at most. sent [V]: of each where nothing but layers hands it on. takes_out:
    whether what a loop works with of an array that it carries is taken out of it. products: what
    those of layers and the loss hold, None where it is no more than the others say.
    """

    saved: np.ndarray
    live: np.ndarray
    least: np.ndarray
    largest: np.ndarray
    largest_of: np.ndarray
    batch: float
    sent: np.ndarray
    stream: float = 0.0
    product: float = math.inf
    takes_out: bool = False
    products: WorkingSet | None = None

    def of_layers(self, profile: ProgramTables, kept: Residuals, *, again: bool) -> np.ndarray:
        """Return what a layer of each stack [stack] works in while it goes back, run `again` or not.

        That is its largest value, or the gradient as large as that; run again, besides what fused kernels
        would have saved of it; and what its products hold where that is more, but for what is `kept` and
        read where it lies.
        """
        alone = self.largest_of + self.live * again
        if self.products is None:
            return alone
        held = self.products.layer if again else self.products.passing
        if again and not self.takes_out:
            held = held - _by_stack(profile, self.products.again * kept.device)
        return np.maximum(alone, held)


def worked(
    profile: ProgramTables,
    placement: Placement,
    mesh: Mapping[str, int],
    *,
    fused_attention: bool,
    scratch: float = 0.0,
    lanes: int = 1,
    loss_arrays: int = 1,
    product_bytes: int | None = None,
    wide_sums: bool = False,
    takes_out: bool = False,
    rings: int = 0,
    fuses_products: bool = False,
    slices: float = 0.0,
) -> Worked:
    """Return what `placement`'s values weigh, whatever is kept of them.

    A kernel of attention works in `scratch` bytes for each element of its result. While the loss's gradient
    is taken, so many arrays as large as its largest lie in memory (`loss_arrays`). Rows of heads that are
    kept are padded to whole `lanes`: a TPU's tile has 128 elements in its last dimension, a head often 64.
    Products take elements of `product_bytes` at most, where that is given. Gradients of look-ups in tables of
    two bytes lie in memory in four where they have `wide_sums`, but for tables that are read where they lie.
    """
    values = profile.values
    size = values.bytes * placement.value_fraction
    batch = float(size[list(profile.inputs)].sum())
    sent, stream = size, float(size[list(profile.carries)].sum()) if profile.carries else 0.0
    if fused_attention:
        size = size * ~profile.saved.on_chip
    # What is passed on in parts is whole while it is worked with.
    used = size.copy()
    if (cut := gathers(placement, mesh, FORWARD, len(size))) is not None:
        used *= cut
    # Of a loss's weights, whose gradient comes of a part of the batch at a time, one is as large.
    arrays = 1.0 + (loss_arrays - 1.0) * ((values.section == AFTER) & (values.parameter < 0))
    largest = np.zeros(3)
    # What the loss makes of its parameters before it takes them is with what is gathered.
    made = ~((values.section == AFTER) & (values.parameter >= 0))
    np.maximum.at(largest, values.section, used * arrays * made)
    for one in profile.short_sums if wide_sums else ():
        if used[one.table] < MANY_ROWS * used[one.value]:
            largest[one.section] = max(largest[one.section], 2.0 * used[one.table])
    # Casts of parameters are with what is gathered.
    rows = values.dims[:, list(profile.batch_dims)].any(axis=1) if profile.batch_dims else True
    fused = profile.saved.by_policy["none/fused"] & rows
    live = _by_stack(profile, used * fused)
    own = fused & ~profile.saved.by_policy["none/given"]
    least = _by_stack(profile, used * own)
    largest_of = np.zeros(1 + profile.stacks)
    np.maximum.at(largest_of, values.stack + 1, used)
    attended = list(profile.attended)
    if scratch and attended:
        # Of two bytes, as all types that a kernel takes on GPUs.
        at_work = used[attended] / 2 * scratch
        np.maximum.at(largest_of, values.stack[attended] + 1, at_work)
        np.maximum.at(largest, values.section[attended], at_work)
    width = np.maximum(values.width, 1.0)
    padded = np.where(values.width > 0, np.ceil(width / lanes) * lanes / width, 1.0)
    product = math.inf if product_bytes is None else product_bytes
    return Worked(
        saved=size * padded * values.runs,
        live=live,
        least=least,
        largest=largest,
        largest_of=largest_of[1:],
        batch=batch,
        sent=sent,
        stream=stream,
        product=product,
        takes_out=takes_out,
        products=working_set(
            profile,
            placement,
            mesh,
            size,
            own,
            rings=rings,
            fuses=fuses_products,
            product_bytes=product,
            lanes=lanes,
            slices=slices,
        ),
    )


def activations(
    profile: ProgramTables, candidate: Candidate, work: Worked, kept: Residuals
) -> tuple[np.ndarray, np.ndarray]:
    """Return what a microbatch saves by section, for all layers, and one layer's working set."""
    saved, scratch, _, _ = _activations(profile, candidate, work, kept)
    return saved, scratch


def _activations(
    profile: ProgramTables, candidate: Candidate, work: Worked, kept: Residuals
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the same, what is saved of each value [V], and what a layer of each stack [stack] works in."""
    weights = work.saved * (1.0 * kept.device + kept.beside)
    saved = np.bincount(profile.values.section, weights=weights, minlength=3)
    # While its gradient is taken, a section holds its largest value, or the gradient as large as that.
    scratch = work.largest.copy()
    again = candidate.remat != "none"
    layers = work.of_layers(profile, kept, again=again)
    if again or work.products is not None:
        scratch[LAYERS] = max(scratch[LAYERS] * (not again), layers.max())
    if work.products is not None:
        scratch[AFTER] += work.products.loss
    return saved, scratch, weights, layers


def _by_stack(profile: ProgramTables, weights: np.ndarray) -> np.ndarray:
    """Return the sums of `weights` [V] over the values of each scan over layers [stack]."""
    return np.bincount(profile.values.stack + 1, weights=weights, minlength=1 + profile.stacks)[1:]


def _casts(profile: ProgramTables, placement: Placement, over: StoredOver) -> np.ndarray:
    """Return the bytes of what layers make of parameters that lie whole for their gradients to read [stack].

    What is gathered is made again; of what the program stacks the stack is one. JAX gives a loop's backward
    pass a cast of every layer's parameters, which XLA keeps, though it could make it again.
    """
    table = profile.parameters
    weights = table.elements * table.made_bytes * placement.fractions.parameters
    weights *= (table.stacked_bytes == 0) & ~_further(over.parameters, over.computed)
    return np.bincount(table.stack + 1, weights=weights, minlength=1 + profile.stacks)[1:]


def _further(axes: list[frozenset[str]], than: list[frozenset[str]]) -> np.ndarray:
    """Return which parameters [P] lie over axes that they do not in another way of storing them."""
    return np.array([bool(one - other) for one, other in zip(axes, than, strict=True)], bool)


def _gathered(
    profile: ProgramTables, placement: Placement, over: StoredOver, counts_whole: bool
) -> tuple[np.ndarray, float, float]:
    """Return the bytes of `Standing`'s layer, after and before; of whole parameters where these count."""
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
    own = table.item_bytes * table.trained * (gathered | summed)
    after = float(elements @ ((cast + own) * (table.after_bytes > 0)))
    # A table of embeddings: the gradient that rows are added into, and what it is reduced from, which is the
    # same array where it is reduced whole and then cut.
    sums = table.used_bytes * table.trained * (2.0 * gathered + summed)
    before = float(elements @ (sums * (table.section == BEFORE)))
    return layer, after, before
