"""What in a program keeps its plan slow, or from fitting, each with what taking it out of the way would win.

Every number is of the price of one candidate, taken apart (`cost.breakdown`); what would be won is the price
of the same program under one supposition, such as without attention's scores in memory (`supposing`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

import numpy as np

from ..cost.candidate import Candidate
from ..cost.compute import FusedAttention, peak_flops, product_seconds
from ..cost.estimate import Pricer
from ..cost.profile import LAYERS
from ..plans.estimate import Estimate
from ..program.dims import batch_rows
from ..program.forms.losses import product_with_vocabulary
from ..words import gib, seconds
from .choices.attention import PLAIN
from .inputs import Supposing
from .supposing import Case, checkpointed, in_parts, lighter, more_rows, together

# A plan is slow where its MFU is below this share of what its largest products allow, which are those that
# make up so much of the work.
_SLOW, _LARGEST = 0.5, 0.9
# Of a step's seconds, or of a device's memory, what takes less is not told of.
_TOLD = 0.1
# What must be won to be told of: times as fast, or as small.
_WORTH = 1.1
# How many obstacles a plan tells of.
_SHOWN = 4
# A batch of so many times the rows is tried.
_MORE_ROWS = 4
# In how many parts logits are worked through, some positions at a time.
_PARTS_OF_LOGITS = 16
_COUNTS = ("none", "one", "both", "three", "four")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Obstacle:
    """Something in a program that stands in the way: what it is and takes, what would help, what that wins.

    `gain` is how many times as fast, or as small, a step would be; endless where it would fit at last. It is
    `supposing`'s, where it was priced so.
    """

    what: str
    remedy: str
    gain: float
    supposing: Supposing | None = None

    @property
    def sentence(self) -> str:
        """How a plan says it."""
        return f"{self.what}; {self.remedy}"


_Finder = Callable[[Case], Iterator[Obstacle]]


def usual_mfu(pricer: Pricer) -> float:
    """Return the MFU that a program's largest products allow: by their own seconds, whole and undivided."""
    table = pricer.profile
    undivided = pricer.place(Candidate(mesh={}, dims={}))
    once = product_seconds(
        table,
        undivided,
        pricer.topology.chip,
        pricer.dtype,
        pricer.calibration,
        pricer.execution.attention,
        pricer.execution.aligned_elements,
    )
    runs = table.steps.runs[table.products.equation]
    flops, spent = table.products.flops * runs, once * runs
    order = np.argsort(-table.products.flops, kind="stable")
    enough = np.searchsorted(np.cumsum(flops[order]), _LARGEST * flops.sum()) + 1
    largest = order[:enough]
    if not len(largest) or not spent[largest].sum():
        return 0.0
    reached = float(flops[largest].sum() / spent[largest].sum())
    # A kernel that leaves out what a mask hides takes less time than all that is counted.
    return min(1.0, reached / peak_flops(pricer.topology.chip, pricer.dtype))


def is_slow(pricer: Pricer, estimate: Estimate) -> bool:
    """Whether a plan is below half of what is usual for its kind."""
    return estimate.mfu < _SLOW * usual_mfu(pricer) or _in_half(pricer, estimate) < _SLOW * usual_mfu(pricer)


def _in_half(pricer: Pricer, estimate: Estimate) -> float:
    """Return the MFU towards the peak of bfloat16, which wider products could reach in it."""
    chip = pricer.topology.chip
    half = chip.peak_flops("bfloat16")
    return estimate.mfu if half is None else estimate.mfu * min(1.0, peak_flops(chip, pricer.dtype) / half)


def obstacles(case: Case) -> list[Obstacle]:
    """Return what stands in the way, that which wins most first."""
    found = [one for finder in _FINDERS for one in finder(case)]
    return sorted(found, key=lambda one: -one.gain)


def notes_on(case: Case) -> tuple[str, ...]:
    """Say of a slow plan where its seconds go and what stands in the way; nothing of one that is not."""
    estimate = case.estimate
    if case.topology.chip.nominal or not is_slow(case.pricer, estimate):
        return ()
    items = sorted(estimate.time.items(), key=lambda row: -row[1])
    spent = ", ".join(f"{item} {seconds(size)}" for item, size in items[:3])
    usual = usual_mfu(case.pricer)
    head = (
        f"MFU {estimate.mfu:.1%} is below half of the {usual:.0%} that the largest products of this program "
        f"allow; of {seconds(estimate.step_seconds)} a step, {spent}"
    )
    return (head, *(f"in the way: {one}" for one in _told(case)))


def in_the_way(case: Case) -> str:
    """Say in one phrase what keeps a program from fitting; nothing where nothing in it does."""
    said = [f"({number}) {one}" for number, one in enumerate(_told(case), start=1)]
    return f"in the way: {', '.join(said)}" if said else ""


def _told(case: Case) -> list[str]:
    """Return the sentences of what wins most, with what is won by all together."""
    found = obstacles(case)[:_SHOWN]
    said = [one.sentence for one in found]
    several = [one for one in found if one.supposing is not None]
    if len(several) > 1:
        best = case.best(together([one.supposing for one in several if one.supposing is not None]))
        if case.gain(*best) > max(one.gain for one in several) or best[1] > case.fits:
            said.append(f"{_COUNTS[len(several)]} of these mended: {case.in_words(*best)}")
    return said


def _attention(case: Case) -> Iterator[Obstacle]:
    """Scores in memory, where no kernel carries attention out."""
    # What is declared is no matter of the program.
    if case.pricer.execution.attention is not None or case.declared.attention == PLAIN:
        return
    parts, table = case.parts, case.table
    mask = table.saved.on_chip
    if not mask.any():
        return
    spent = float((parts.products + parts.elementwise)[table.steps.core].sum())
    told = _taken(case, np.where(mask, parts.held, 0.0), np.where(mask, parts.worked, 0.0), spent)
    if told is None:
        return
    supposing = Supposing(
        execution=lambda own: dataclasses.replace(own, attention=FusedAttention()), attention=PLAIN
    )
    yield from _won(case, f"attention's scores, {told}", "carried out by a kernel", supposing)


def _logits(case: Case) -> Iterator[Obstacle]:
    """Logits over a vocabulary that are whole in memory."""
    parts, flat = case.parts, case.flat
    logits: set[object] = set()
    products: list[int] = []
    for number, op in enumerate(flat.ops):
        # What a layer multiplies by is no vocabulary.
        if op.equation.scopes or op.stack >= 0 or product_with_vocabulary(op.equation.eqn) is None:
            continue
        (out,) = (flat.values[index] for index in op.outs)
        products.append(number)
        logits.add((out.elements, out.dims, out.trips))
    mask = np.array([(one.elements, one.dims, one.trips) in logits for one in flat.values], bool)
    if not mask.any():
        return
    held, worked = np.where(mask, parts.held, 0.0), np.where(mask, parts.worked, 0.0)
    makers = [n for n in parts.makers if n >= 0 and mask[list(flat.ops[n].outs)].any()]
    told = _taken(case, held, worked, float(parts.elementwise[sorted(set(makers))].sum()))
    if told is not None:
        remedy = "worked through a part of the positions at a time, in a checkpointed scan"
        supposing = in_parts(case.table, mask, _PARTS_OF_LOGITS, products)
        yield from _won(case, f"logits over a vocabulary, {told}", remedy, supposing)


def _kept_outside(case: Case) -> Iterator[Obstacle]:
    """What is kept for the backward pass where no loop over layers has borders for it."""
    parts, table = case.parts, case.table
    held = np.where(table.values.section != LAYERS, parts.held, 0.0)
    if held.sum() < _TOLD * case.capacity_bytes:
        return
    products = table.steps.section[table.products.equation] != LAYERS
    count = int((products & (table.products.gradients > 0)).sum())
    if count < 2:
        return
    lines = parts.by_line_of_values(held)[:2]
    where = " and ".join(f"{gib(one.amount)} at {one.where}" for one in lines)
    what = "outside of the loop over layers" if table.layers > 1 else "since no loop over layers was found"
    # With n borders as many values stay as lie between two of them: fewest where these are the root of all.
    yield from _won(
        case,
        f"{gib(float(held.sum()))} are kept for the backward pass {what}, {where}",
        f"with jax.checkpoint around about {max(2, round(math.sqrt(count)))} parts of it",
        checkpointed(1 / math.sqrt(count)),
    )


def _whole(case: Case) -> Iterator[Obstacle]:
    """Parameters that lie whole on every device."""
    program, candidate = case.problem.program, case.candidate
    if candidate.num_devices == 1:
        return
    whole = [one for one in program.stored if not any(candidate.stored[one.index])]
    slots = case.pricer.slot_bytes

    def size(argument: object) -> float:
        item, trained = argument.dtype.itemsize, argument.is_trained  # type: ignore[attr-defined]
        return math.prod(argument.shape) * (item + trained * (item + slots))  # type: ignore[attr-defined]

    total = sum(map(size, whole))
    if total < _TOLD * case.capacity_bytes:
        return
    largest = max(whole, key=size)
    saved = total * (1 - 1 / candidate.num_devices)
    needed = case.estimate.needed_bytes
    yield Obstacle(
        what=f"{len(whole)} parameters lie whole on every device, with gradients and moments {gib(total)}, "
        f"the largest {largest.path or 'of them'} {largest.shape}",
        remedy=f"cut over all devices {gib(needed - saved)} would be needed instead of {gib(needed)}",
        gain=needed / (needed - saved),
    )


def _batch(case: Case) -> Iterator[Obstacle]:
    """A batch too small for its devices."""
    table, candidate = case.table, case.candidate
    if not case.fits or not table.batch_dims:
        return
    pricer = case.problem.pricer(
        case.topology, case.declared, case.room, Supposing(tables=more_rows(_MORE_ROWS))
    ).of(candidate)
    numbers = dict.fromkeys((candidate.microbatches, _MORE_ROWS * candidate.microbatches))
    rows = batch_rows(case.problem.program)
    if candidate.microbatches == 1 and case.problem.accumulation(case.declared).why_not(_MORE_ROWS):
        numbers.pop(_MORE_ROWS, None)
    tried = [dataclasses.replace(candidate, microbatches=number) for number in numbers]
    found = [one for one in map(pricer.price, tried) if one.needed_bytes <= case.capacity_bytes]
    if not found:
        return
    best = max(found, key=lambda one: one.mfu)
    gain = best.mfu / case.estimate.mfu
    if gain >= _WORTH:
        yield Obstacle(
            what=f"a batch of {rows} rows is {_some(rows / candidate.num_devices)} a device",
            remedy=f"with {_MORE_ROWS * rows} rows MFU {best.mfu:.1%}, {seconds(best.step_seconds)} a step",
            gain=gain,
        )


def _repeated(case: Case) -> Iterator[Obstacle]:
    """Products that several devices work out alike, since their number divides too little of them."""
    if not case.fits:
        return
    candidate, products = case.candidate, case.table.products
    own = case.pricer.place(candidate).fractions.roles.prod(axis=1) * candidate.microbatches
    # Each of the stages has other layers.
    times = np.maximum(own * candidate.num_devices / candidate.mesh.get("stage", 1), 1.0)
    spent = float((case.parts.products[products.equation] * (1 - 1 / times)).sum())
    step, rows = case.estimate.step_seconds, batch_rows(case.problem.program)
    more = rows % candidate.num_devices
    if spent < _TOLD * step or not more:
        return
    near = " or ".join(f"{n:,}" for n in (rows - more, rows - more + candidate.num_devices) if n)
    yield Obstacle(
        what=f"{seconds(spent)} go into products that several devices repeat, whose number "
        f"{candidate.num_devices} does not divide {rows:,} rows",
        remedy=f"without that {seconds(step - spent)} a step; nearest: {near} rows",
        gain=step / (step - spent),
    )


def _some(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _wide(case: Case) -> Iterator[Obstacle]:
    """Products and values in float32 that bfloat16 would do for."""
    parts = case.parts
    mask = np.array(
        [v.item_bytes == 4 and v.grad and v.parameter < 0 and v.elements > 1 for v in parts.flat.values], bool
    )
    if not mask.any():
        return
    if case.fits:
        amounts = np.zeros(len(parts.flat.ops))
        moved = [n for n, op in enumerate(parts.flat.ops) if mask[list(op.outs)].any()]
        amounts[moved] = (parts.products + parts.elementwise)[moved]
        lines, words, least = parts.by_line(amounts), seconds, _TOLD * case.estimate.step_seconds
    else:
        amounts = np.where(mask, parts.held, 0.0)
        lines, words, least = parts.by_line_of_values(amounts), gib, _TOLD * case.capacity_bytes
    if amounts.sum() < least:
        return
    where = " and ".join(f"{words(one.amount)} at {one.where}" for one in lines[:2])
    of = "products and values" if case.pricer.dtype == "float32" else "values"
    supposing = Supposing(
        tables=lighter(case.table, mask, 0.5),
        dtype="bfloat16" if case.pricer.dtype == "float32" else None,
    )
    yield from _won(case, f"{of} in float32, {where}", "in bfloat16", supposing)


def _sums(case: Case) -> Iterator[Obstacle]:
    """Products without rows, columns or contraction, which matrix units have nothing for."""
    parts, products = case.parts, case.table.products
    short = (products.role_sizes[:, 1:] < 2).any(axis=1)
    amounts = np.zeros(len(parts.products))
    amounts[products.equation[short]] = parts.products[products.equation[short]]
    yield from _spent(
        case,
        amounts,
        "products without rows, columns or contraction (depthwise convolutions, sums of products), "
        "which matrix units do not speed up",
    )


def _traffic(case: Case) -> Iterator[Obstacle]:
    """Elementwise work, which takes as long as memory does."""
    yield from _spent(case, case.parts.elementwise, "work that waits for memory (elementwise, norms, copies)")


def _spent(case: Case, amounts: np.ndarray, what: str) -> Iterator[Obstacle]:
    total, step = float(amounts.sum()), case.estimate.step_seconds
    if not case.fits or total < 2 * _TOLD * step:
        return
    lines = case.parts.by_line(amounts)[:3]
    where = ", ".join(f"{seconds(one.amount)} at {one.where}" for one in lines)
    without = max(step - total, 1e-9)
    yield Obstacle(
        what=f"{what}: {seconds(total)}, {where}",
        remedy=f"without it a step would take {seconds(without)}",
        gain=step / without,
    )


def _talking(case: Case) -> Iterator[Obstacle]:
    """Communication that nothing hides."""
    time, step = case.estimate.time, case.estimate.step_seconds
    kinds = ("all_gather", "all_reduce", "reduce_scatter", "all_to_all")
    rows = {item: size for item, size in time.items() if item.startswith(kinds)}
    total = sum(rows.values())
    if case.fits and total >= 2 * _TOLD * step:
        item, most = max(rows.items(), key=lambda row: row[1])
        yield Obstacle(
            what=f"devices wait {seconds(total)} for one another, {seconds(most)} of it {item}",
            remedy=f"without that a step would take {seconds(step - total)}",
            gain=step / (step - total),
        )


def _again(case: Case) -> Iterator[Obstacle]:
    """What is run again because memory is short."""
    total = float(case.parts.again.sum())
    if not case.fits or total < _TOLD * case.estimate.step_seconds:
        return
    most = case.parts.by_line(case.parts.again)[0]
    told = f"{seconds(total)} of work are done again for the backward pass"
    best = case.best(Supposing(), memory=2.0)
    if case.gain(*best) >= _WORTH:
        yield Obstacle(
            what=f"{told}, {seconds(most.amount)} at {most.where}",
            remedy=f"with twice the memory a device: {case.in_words(*best)}",
            gain=case.gain(*best),
        )


def _turns(case: Case) -> Iterator[Obstacle]:
    """Loops of many turns, each of which starts kernels."""
    spent, step = case.estimate.time.get("host", 0.0), case.estimate.step_seconds
    if not case.fits or spent < _TOLD * step:
        return
    runs = np.array([op.runs for op in case.flat.ops], float)
    most = int(np.argmax(runs))
    # What every step takes of the host, however little it starts.
    always = case.pricer.calibration.step_seconds
    if runs[most] <= 1 or spent - always < _TOLD * step:
        yield Obstacle(
            what=f"{seconds(spent)} go into starting a step and its kernels, which have little to do",
            remedy=f"what they do takes {seconds(step - spent)}, on fewer devices or with more rows too",
            gain=step / (step - spent),
        )
        return
    yield Obstacle(
        what=f"{seconds(spent)} go into starting kernels, most in a loop of {int(runs[most]):,} turns "
        f"in all at {case.parts.lines[most]}",
        remedy=f"with that worked out in larger pieces up to {seconds(step - spent)} a step",
        gain=step / (step - spent),
    )


_FINDERS: tuple[_Finder, ...] = (
    _attention,
    _logits,
    _kept_outside,
    _whole,
    _wide,
    _batch,
    _repeated,
    _sums,
    _traffic,
    _talking,
    _again,
    _turns,
)


def _taken(case: Case, held: np.ndarray, worked: np.ndarray, spent: float) -> str | None:
    """Say what values take in memory and of a step, and where; None where it is too little to tell."""
    kept, most = float(held.sum()), float(worked.max(initial=0.0))
    size = max(kept, most)
    if size < _TOLD * case.capacity_bytes and (not case.fits or spent < _TOLD * case.estimate.step_seconds):
        return None
    # What a recognised form makes by itself has no line of the user's.
    lines = [one.where for one in case.parts.by_line_of_values(held if kept >= most else worked) if one.where]
    where = f" ({lines[0]})" if lines else ""
    told = f"{gib(kept)} kept for the backward pass" if kept >= most else f"{gib(most)} at a time"
    return f"{told}{where}" + (f", {seconds(spent)} of a step" if spent and case.fits else "")


def _won(case: Case, what: str, remedy: str, supposing: Supposing) -> Iterator[Obstacle]:
    best = case.best(supposing)
    gain = case.gain(*best)
    if gain >= _WORTH:
        yield Obstacle(what=what, remedy=f"{remedy}: {case.in_words(*best)}", gain=gain, supposing=supposing)
