"""Bytes of what a placement's values weigh, and of what lives of them under a policy."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from ..program.lookups import MANY_ROWS
from .candidate import Candidate
from .kept import Residuals
from .placement import FORWARD, Placement
from .profile import AFTER, LAYERS, ProgramTables
from .working_set import WorkingSet, gathers, working_set


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Worked:
    """What a placement's values weigh in bytes.

    saved [V]: of one microbatch, in all runs; live, largest_of [stack]: what fused kernels keep of one layer,
    and its largest value; least [stack]: what is live less what elementwise work gives of it; largest
    [section]: likewise; batch: of the microbatch itself; stream: of what layers hand on; product: of an
    element as products take it, at most. sent [V]: of each where nothing but layers hands it on. takes_out:
    whether what a loop works with of an array that it carries is taken out of it. products: what
    those of layers and the loss hold, None where it is no more than the others say. ahead: what the loss
    works in before its gradient is taken, with what is made ahead of a loop over its parts; 0 where none is.
    zeros_together: whether two gradients of one array are zeros in memory as soon as one of them is summed.
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
    ahead: float = 0.0
    zeros_together: bool = False
    _living: dict[object, _Living] = dataclasses.field(default_factory=dict, init=False, repr=False)

    def living(self, profile: ProgramTables, candidate: Candidate, kept: Residuals) -> _Living:
        """Return what lives of a microbatch, found once for a policy wherever it is stored."""
        key = kept, candidate.remat != "none"
        found = self._living.get(key)
        if found is None:
            found = self._living[key] = _live(profile, self, kept, again=key[1])
        return found

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
    gradient_beside: bool = False,
    makes_ahead: bool = False,
    zeros_together: bool = False,
    product_bytes: int | None = None,
    wide_sums: bool = False,
    takes_out: bool = False,
    rings: int = 0,
    fuses_products: bool = False,
    slices: float = 0.0,
) -> Worked:
    """Return what `placement`'s values weigh, whatever is kept of them.

    A kernel of attention works in `scratch` bytes for each element of its result. While the loss's gradient
    is taken, that of a product's result lies beside it, as products take it (`gradient_beside`); before that
    what a loop over its parts makes of nothing that changes does (`makes_ahead`). Rows of heads that are kept
    are padded to whole `lanes`: a TPU's tile has 128 elements in its last dimension, a head often 64.
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
    largest = np.zeros(3)
    # What the loss makes of its parameters before it takes them is with what is gathered.
    made = used * ~((values.section == AFTER) & (values.parameter >= 0))
    arrays = _with_gradient(profile) if gradient_beside else 1.0
    np.maximum.at(largest, values.section, made * arrays)
    ahead = float(used[list(profile.ahead)].sum()) * makes_ahead
    if ahead:
        ahead += float(made[values.section == AFTER].max())
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
        ahead=ahead,
        zeros_together=zeros_together,
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


def _with_gradient(profile: ProgramTables) -> np.ndarray:
    """Return how many arrays as large as each value [V] a loss has with the gradient of a product's result.

    That is cast to what the product takes, and products read it whole.
    """
    values, products = profile.values, profile.products
    rows = (values.section[products.values[:, 2]] == AFTER) & (products.gradients > 0)
    taken, results = products.values[rows, :2], products.values[rows, 2]
    arrays = np.ones(len(values.bytes))
    arrays[results] += values.item_bytes[taken].min(axis=1) / values.item_bytes[results]
    return arrays


class _Living(NamedTuple):
    """What lives of a microbatch under a policy, for all layers, in bytes.

    saved: by section; scratch: the working set of each; alone: that of a layer of each stack; upto: what is
    saved of each stack and those before it. returns: whether any of it comes back from the host.
    """

    saved: tuple[float, ...]
    scratch: tuple[float, ...]
    alone: tuple[float, ...]
    upto: tuple[float, ...]
    returns: bool


def activations(
    profile: ProgramTables, candidate: Candidate, work: Worked, kept: Residuals
) -> tuple[np.ndarray, np.ndarray]:
    """Return what a microbatch saves by section, for all layers, and one layer's working set."""
    living = work.living(profile, candidate, kept)
    return np.array(living.saved), np.array(living.scratch)


def _live(profile: ProgramTables, work: Worked, kept: Residuals, *, again: bool) -> _Living:
    """Return what lives of a microbatch whose layers are run `again`, or not."""
    weights = work.saved * (1.0 * kept.device + kept.beside)
    section = np.where(profile.saved.results, AFTER, profile.values.section)
    saved = np.bincount(section, weights=weights, minlength=3)
    weights *= ~profile.saved.results
    # While its gradient is taken, a section holds its largest value, or the gradient as large as that.
    scratch = work.largest.copy()
    layers = work.of_layers(profile, kept, again=again)
    if again or work.products is not None:
        scratch[LAYERS] = max(scratch[LAYERS] * (not again), layers.max())
    if work.products is not None:
        scratch[AFTER] += work.products.loss
    # What a loop over a loss's parts takes has a gradient that these are put into.
    scratch[AFTER] += weights[list(profile.taken_apart)].sum()
    of_stack = _by_stack(profile, weights)
    return _Living(
        saved=tuple(saved.tolist()),
        scratch=tuple(scratch.tolist()),
        alone=tuple(layers.tolist()),
        upto=tuple(float(of_stack[: stack + 1].sum()) for stack in range(profile.stacks)),
        returns=bool(kept.host.any()),
    )


def _by_stack(profile: ProgramTables, weights: np.ndarray) -> np.ndarray:
    """Return the sums of `weights` [V] over the values of each scan over layers [stack]."""
    return np.bincount(profile.values.stack + 1, weights=weights, minlength=1 + profile.stacks)[1:]
