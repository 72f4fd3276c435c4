"""How attention goes over ``context``: gathered keys, heads, a ring or neighbours, where its calls let it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

from ...cost.candidate import Candidate
from ...cost.context import LaidCall, SpreadCall, calls_of, given_avals, laid_calls, site_of
from ...errors import UserError
from ...ops.context.pieces import SPLASH
from ...ops.context.taken import CONTEXT
from ...ops.context.ways import GATHERED, NEIGHBOURS, RING, WAYS, described
from ...program.lines import line_of
from ...words import gib
from . import attention as kernels
from .draft import Draft, Given, Refused

# Tokens of a sequence from which the search cuts it, and the fewest of a device.
LONG, SHORTEST = 32768, 2048


def choices(given: Given, draft: Draft) -> Iterator[Draft | Refused]:
    """Yield the draft with each way of attention over ``context``; as it is where nothing is cut over it."""
    declared = given.declared
    if draft.mesh.get(CONTEXT, 1) == 1:
        yield draft if declared.context is None else _without_axis(given, declared.context)
        return
    calls = given.once(calls_of, lambda: calls_of(given.program))
    kernel = given.once(
        kernels.choose,
        lambda: kernels.choose(given.program, given.topology, declared.attention, declared.segments),
    )
    layout = Candidate(mesh=draft.mesh, dims=draft.dims)
    if declared.context is not None and not declared.mesh.get(CONTEXT):
        why = _lacks(laid_calls(calls, layout), declared.context)
        if why is not None:
            axes = [axis for axis in (CONTEXT, "tensor") if draft.mesh.get(axis, 1) > 1]
            yield Refused(sizes={axis: draft.mesh[axis] for axis in axes}, reason=why)
            return
    found = words(calls, layout, declared.context, kernel)
    for word in found:
        yield dataclasses.replace(draft, context=word)


def _without_axis(given: Given, word: str) -> Refused:
    """Refuse a mesh without ``context`` where a way over it is declared; raise UserError if all lack it."""
    sizes = given.once(sizes_of, lambda: sizes_of(given))
    if given.declared.mesh.get(CONTEXT, max(sizes)) == 1:
        raise UserError(
            f"context={word!r} is a way over a mesh axis that no mesh has here: sequences are cut from "
            f"{LONG:,} tokens on, where rows do not fill the devices; declare it, as mesh={{'context': 2}}"
        )
    return Refused(sizes={CONTEXT: 1}, reason=f"context={word!r} is a way over several devices")


def _lacks(laid: Sequence[LaidCall], way: str) -> str | None:
    """Return why no call goes a `way` here that one would go over fewer devices."""
    if any(one.way(way) == way for one in laid):
        return None
    fewer = (dataclasses.replace(one, parts=2) for one in laid)
    return next((one.why_not(way) for one in laid), None) if any(f.way(way) == way for f in fewer) else None


def words(
    calls: Sequence[SpreadCall], layout: Candidate, declared: str | None, kernel: kernels.Chosen
) -> tuple[str | None, ...]:
    """Return the words worth a price: those that carry calls out differently; None where none does.

    Of those that no kernel of the chip takes, only where it takes none.

    Raises UserError where `declared` is a way that no call can take.
    """
    laid = laid_calls(calls, layout)
    if declared is None and layout.mesh.get(CONTEXT, 1) == 1:
        return (None,)
    if declared is not None:
        _check(calls, laid, layout, declared)
        return (declared,)
    found: dict[tuple[str | None, ...], str] = {}
    for word in WAYS:
        ways = tuple(one.way(word) for one in laid)
        if word in ways:
            found.setdefault(ways, word)
    ways_of = {word: dataclasses.replace(layout, context=word) for word in found.values()}
    kept = tuple(word for word, there in ways_of.items() if by_kernel(calls, kernel, there))
    if not kept and kernel.implementation == SPLASH and by_kernel(calls, kernel, layout):
        # Splash reads gathered keys by itself.
        return (None,)
    return kept or tuple(found.values()) or (None,)


def by_kernel(calls: Sequence[SpreadCall], kernel: kernels.Chosen, layout: Candidate) -> bool:
    """Return whether the chip's kernel carries out all that it takes of the calls under a layout, too."""
    return kernel.implementation is not None and all(
        kernel.taken(site_of(one, layout), layout.context).by == kernel.implementation
        for one in calls
        if one.equation.index in kernel.calls
    )


def _check(calls: Sequence[SpreadCall], laid: Sequence[LaidCall], layout: Candidate, declared: str) -> None:
    """Raise UserError where no call goes the declared way."""
    if layout.mesh.get(CONTEXT, 1) == 1:
        raise UserError(f"context={declared!r} is a way over a mesh axis that the mesh does not have")
    if not laid:
        raise UserError(
            f"context={declared!r}, but no call of attention has its queries over the mesh axis context; "
            "it is told by meshwright.sharding.ops.attention, or recognised in a loss"
        )
    if any(one.way(declared) == declared for one in laid):
        return
    why = next((why for one in laid if (why := one.why_not(declared))), None)
    why = why or f"window={laid[0].call.window} reaches few of {laid[0].parts} chunks, which are fetched"
    others = dict.fromkeys(way for one in laid if (way := one.way(GATHERED)))
    where = line_of(calls[0].equation.eqn)
    instead = f"context={next(iter(others))!r} can" if others else "XLA gathers keys for it"
    raise UserError(f"context={declared!r} cannot carry attention out ({where}): {why}; {instead}")


def notes_on(calls: Sequence[SpreadCall], layout: Candidate, kernel: kernels.Chosen) -> tuple[str, ...]:
    """Say how attention goes over ``context`` in a layout, and which calls go otherwise, with the reason."""
    if layout.mesh.get(CONTEXT, 1) == 1:
        return ()
    laid = laid_calls(calls, layout)
    if not calls:
        return ("no attention is recognised in the loss: what is not cut alike over context is gathered",)
    if layout.context is None and by_kernel(calls, kernel, layout):
        return ()
    notes = _left_whole(calls, layout)
    if layout.context is None or not laid:
        why = next((why for one in laid if (why := one.why_not(GATHERED))), None)
        if why is not None:
            count, gathers = _count(len(laid), len(calls))
            notes.append(f"{count} {gathers} keys over context and XLA computes it: {why}")
        return tuple(notes)
    if kernel.implementation is not None and not by_kernel(calls, kernel, layout):
        notes.append(_in_blocks(kernel.implementation, any(one.way(layout.context) == RING for one in laid)))
    ways = [(one, one.way(layout.context)) for one in laid]
    for way in dict.fromkeys(way for _, way in ways):
        mine = [one for one, own in ways if own == way]
        count, verb = _count(len(mine), len(calls), "go" if way else "gather")
        if way is None:
            notes.append(f"{count} {verb} keys over context by XLA: {mine[0].why_not(GATHERED)}")
        elif way != layout.context and way != NEIGHBOURS:
            notes.append(f"{count} {verb} over context by {way}: {mine[0].why_not(layout.context)}")
        elif len(mine) < len(calls):
            notes.append(f"{count}: {described(way)} over context ({way})")
    having = [said for one, way in ways if way is not None and (said := _of_pairs(calls, one))]
    if having:
        notes.append(f"{_count(len(having), len(calls))[0]} {having[0]}")
    return tuple(notes)


def _of_pairs(calls: Sequence[SpreadCall], one: LaidCall) -> str | None:
    """Say what a call has for pairs of queries and keys, of which a device has its queries' part; or None."""
    asked = next(call for call in calls if call.equation.index == one.index)
    pairs = [
        (name, aval)
        for name, aval in zip(asked.call.given, given_avals(asked), strict=True)
        if name != "sink" and aval.shape[2] > 1 and aval.shape[3] > 1
    ]
    if not pairs:
        return None
    name, aval = max(pairs, key=lambda pair: math.prod(pair[1].shape) * pair[1].dtype.itemsize)
    shape = " x ".join(str(size) for size in aval.shape)
    return (
        f"has a {name} of all queries and keys ({shape}, {gib(math.prod(aval.shape) * aval.dtype.itemsize)} "
        "in all), of which a device has its queries' part"
    )


def _count(some: int, calls: int, verb: str = "gather") -> tuple[str, str]:
    """Return the words for `some` of a program's calls, and what they do.

    >>> _count(2, 3), _count(1, 3, "go"), _count(3, 3)
    (('2 of 3 calls of attention', 'gather'), ('1 of 3 calls of attention', 'goes'), ('attention', 'gathers'))
    """
    count = f"{some} of {calls} calls of attention" if some < calls else "attention"
    return count, verb if 1 < some < calls else "goes" if verb == "go" else f"{verb}s"


def _left_whole(calls: Sequence[SpreadCall], layout: Candidate) -> list[str]:
    """Say which calls have their queries whole on every device of ``context``, with a line and the reason."""
    found: dict[str, list[SpreadCall]] = {}
    for one in calls:
        site = site_of(one, layout)
        if any(CONTEXT in axes for axes in site.query_axes):
            continue
        queries, parts = one.shapes[0][1], layout.mesh[CONTEXT]
        if any(CONTEXT in axes for axes in site.key_axes):
            why = "its keys lie over context and its queries do not: XLA sums what each device has of them"
        elif queries % parts:
            below = queries // parts * parts
            near = " or ".join(str(size) for size in (below, below + parts) if size)
            why = f"context={parts} does not divide {queries} queries; nearest: {near}"
        else:
            why = f"its {queries} queries are of no sequence that lies over context"
        found.setdefault(why, []).append(one)
    return [
        f"{_count(len(mine), len(calls))[0]} ({line_of(mine[0].equation.eqn)}) is left to XLA, with all "
        f"queries on every device: {why}"
        for why, mine in found.items()
    ]


def _in_blocks(kernel: str | None, ring: bool) -> str:
    """Say why a kernel of the chip does not carry attention out over ``context``."""
    said = "attention over context is worked through in blocks by XLA"
    if kernel == SPLASH or not ring:
        return f"{said}: {kernel} does not take a device's part of it"
    return (
        f"{said}: no card has compared {kernel}'s pieces of a ring with them; a plan with pieces: true "
        f"beside implementation: {kernel} takes those of calls without segments"
    )


def sizes_of(given: Given) -> tuple[int, ...]:
    """Return the sizes of ``context`` that the search considers without being told.

    Where it can pay: long sequences, and rows that do not fill the devices. A size divides the sequence into
    chunks of two halves, and no more devices than the rows leave share one.
    """
    calls = given.once(calls_of, lambda: calls_of(given.program))
    length = max((one.shapes[0][1] for one in calls), default=0)
    devices = given.topology.num_devices
    if length < LONG or given.rows >= devices:
        return (1,)
    return tuple(
        size
        for size in range(1, devices + 1)
        if devices % size == 0 and length % (2 * size) == 0 and length // size >= SHORTEST
    )


def over_sequences(given: Given, mesh: Mapping[str, int]) -> dict[int, tuple[str, ...]]:
    """Return the dims of the sequences that a mesh's ``context`` cuts where nothing is declared of it."""
    if mesh.get(CONTEXT, 1) == 1:
        return {}
    calls = given.once(calls_of, lambda: calls_of(given.program))
    dims = {
        composition[0] for one in calls for composition in (one.dims[0][1], one.dims[1][1]) if composition
    }
    return dict.fromkeys(dims, (CONTEXT,))
