"""Seconds and bytes of attention over a sequence that lies over `context`, by the way that it takes."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..ops.attention import AttentionCall, attention_call
from ..ops.context.order import moved_share
from ..ops.context.taken import CONTEXT, Site
from ..ops.context.ways import (
    GATHERED,
    HEADS,
    NEIGHBOURS,
    RING,
    CallSizes,
    Sent,
    held,
    is_balanced,
    sent,
    way_of,
    why_not,
)
from ..plans.specs import while_computing
from ..program.program import Dims, Equation, Program
from .calibration import Calibration
from .candidate import Candidate
from .collectives import Link
from .compute import Passes
from .kept import Residuals
from .profile import ProgramTables
from .step import exposed


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SpreadCall:
    """A call of attention: its equation, shapes and dims of queries, keys and values, bytes of a number."""

    equation: Equation
    call: AttentionCall
    shapes: tuple[tuple[int, ...], ...]
    dims: tuple[Dims, ...]
    item: int
    first: frozenset[int]
    """Dims of parameters, which get a mesh axis before others of an array."""

    @property
    def runs(self) -> int:
        """How often it runs in a forward pass."""
        return self.equation.multiplicity


@dataclasses.dataclass(frozen=True, kw_only=True)
class Balanced:
    """Bytes that a device has moved into balanced order, and out of it."""

    into: float
    out: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaidCall:
    """A call on one device: sizes of whole sequences, bytes of its queries and result, of keys and values.

    `wide` and `value_wide` are the widths of heads of queries and of values. `pairs` are the bytes of arrays
    of all queries and keys, `learnt` those of their gradients in float32.
    """

    call: AttentionCall
    sizes: CallSizes
    parts: int
    query: float
    key: float
    item: int
    runs: int
    index: int
    wide: int
    value_wide: int
    pairs: float = 0.0
    learnt: float = 0.0

    def way(self, word: str) -> str | None:
        """Return the way that a plan's word gives it."""
        return way_of(self.call, word, self.sizes, self.parts)

    def why_not(self, way: str) -> str | None:
        """Return why a way cannot carry it out."""
        return why_not(self.call, way, self.sizes, self.parts)

    def _asked(self) -> dict[str, Any]:
        return {"query": self.query, "key": self.key, "item": self.item}

    def sent(self, way: str) -> Sent:
        """Return what the device sends each time that the call runs."""
        found = sent(self.call, way, self.sizes, self.parts, **self._asked())
        moved = self._moved_pairs(way)
        return Sent(forward=found.forward + moved, backward=found.backward + moved)

    def _moved_pairs(self, way: str) -> float:
        """Return the bytes of arrays of pairs that go into balanced order, or are traded for heads."""
        if way == HEADS:
            return self.pairs * (self.parts - 1) / self.parts
        balanced = is_balanced(self.call, way, self.sizes.queries, self.parts)
        return moved_share(self.parts) * self.pairs if balanced else 0.0

    def held(self, way: str) -> float:
        """Return the bytes beside its operands while its gradient is worked out."""
        found = held(self.call, way, self.sizes, self.parts, **self._asked())
        # Arrays of pairs as they are read, and gradients as they are summed and as they are handed on.
        return found + self.pairs + self.learnt + (self.pairs if self.learnt else 0.0)

    def balanced(self, way: str) -> Balanced:
        """Return the bytes that go into balanced order and out of it in a forward pass."""
        if not is_balanced(self.call, way, self.sizes.queries, self.parts):
            return Balanced(into=0.0, out=0.0)
        each = moved_share(self.parts) * self.query / (self.wide + self.value_wide)
        keys = moved_share(self.parts) * self.key if way == RING else 0.0
        into = each * self.wide + keys + self._moved_pairs(way)
        return Balanced(into=into, out=each * self.value_wide)


def calls_of(program: Program) -> tuple[SpreadCall, ...]:
    """Return the calls of `ops.attention` in a program."""
    first = frozenset(dim for a in program.parameters for c in a.dims for dim in c)
    found = []
    for equation in program.equations():
        call = attention_call(equation.eqn)
        if call is None:
            continue
        avals: list[Any] = [atom.aval for atom in equation.eqn.invars[:3]]
        found.append(
            SpreadCall(
                equation=equation,
                call=call,
                shapes=tuple(tuple(aval.shape) for aval in avals),
                dims=tuple(equation.ins[:3]),
                item=avals[1].dtype.itemsize,
                first=first,
            )
        )
    return tuple(found)


def laid_calls(calls: Sequence[SpreadCall], candidate: Candidate) -> tuple[LaidCall, ...]:
    """Return the calls whose queries lie over `context`, as a device has them in a microbatch."""
    if candidate.mesh.get(CONTEXT, 1) == 1:
        return ()
    found = (_laid(one, candidate) for one in calls)
    return tuple(one for one in found if one is not None)


def crowded(calls: Sequence[SpreadCall], candidate: Candidate) -> bool:
    """Whether queries of a call lie over `context` and other axes at once, for which there is no way."""
    lying = (_axes(one, candidate.dims, candidate.mesh)[0][1] for one in calls)
    return any(CONTEXT in axes and len(axes) > 1 for axes in lying)


def _axes(
    one: SpreadCall, dims: Mapping[int, tuple[str, ...]], mesh: Mapping[str, int]
) -> list[list[tuple[str, ...]]]:
    """Return the mesh axes of each dimension of queries and of keys."""
    axes = {dim: tuple(axis for axis in cut if mesh.get(axis, 1) > 1) for dim, cut in dims.items()}
    return [
        while_computing(composition, shape, axes, mesh, one.first)
        for composition, shape in zip(one.dims[:2], one.shapes[:2], strict=True)
    ]


def site_of(one: SpreadCall, candidate: Candidate) -> Site:
    """Return a call as it lies under a candidate."""
    query, key = _axes(one, candidate.dims, candidate.mesh)
    avals: list[Any] = [atom.aval for atom in one.equation.eqn.invars[:3]]
    return Site(
        call=one.call,
        query=avals[0],
        key=avals[1],
        value=avals[2],
        query_axes=tuple(query),
        key_axes=tuple(key),
        mesh=candidate.mesh,
        given=given_avals(one),
    )


def given_avals(one: SpreadCall) -> tuple[Any, ...]:
    """Return shapes and types of what a call has of pairs of queries and keys, and of a sink."""
    atoms: Any = one.equation.eqn.invars
    last = one.call.before_placed
    return tuple(atom.aval for atom in atoms[last - len(one.call.given) : last])


def _laid(one: SpreadCall, candidate: Candidate) -> LaidCall | None:
    site, mesh = site_of(one, candidate), candidate.mesh
    if not site.over_context:
        return None
    (batch, queries, _, wide), (_, keys, _, _), (*_, value_wide) = one.shapes
    rows = batch / site.parts(0) / candidate.microbatches
    parts, sizes = mesh[CONTEXT], site.sizes
    each = rows * (wide + value_wide) * one.item
    pairs = [x for x in site.of_pairs if x.shape[2] > 1]
    learns = (x for x in pairs if np.issubdtype(x.dtype, np.inexact))
    return LaidCall(
        call=one.call,
        sizes=sizes,
        parts=parts,
        query=each * queries / parts * sizes.heads,
        key=each * keys / (1 if sizes.whole else parts) * sizes.kv_heads,
        item=one.item,
        runs=one.runs,
        index=one.equation.index,
        wide=wide,
        value_wide=value_wide,
        pairs=sum(x.dtype.itemsize * site.numbers(x) for x in pairs),
        learnt=4.0 * sum(site.numbers(x) for x in learns),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attending:
    """Seconds of attention's own work in a microbatch: forward, backward; `again`: forward how often more."""

    forward: float
    backward: float
    again: int

    @classmethod
    def of(cls, profile: ProgramTables, once: Passes, kept: Residuals, more: int) -> Attending:
        """Return that of passes under what is kept, run `more` times forward besides."""
        products = profile.products.equation
        again = bool(kept.again[products[profile.steps.core[products]]].any())
        forward, backward = (float(once.seconds[n, 1].sum()) for n in range(2))
        return cls(forward=forward, backward=backward, again=again + more)


def context_seconds(
    calls: Sequence[LaidCall], word: str, link: Link, calibration: Calibration, work: Attending
) -> dict[str, float]:
    """Return item → seconds that a microbatch waits for what attention sends over `context`.

    What goes round in a ring, and the gradients behind it, travel beside the work on what is there, which
    XLA lets a TPU do and not a GPU, whose loops wait for what they are given; all else is waited for, as what
    moves between products is.
    """
    waited = 1.0 - calibration.overlap_activations
    items: dict[str, float] = defaultdict(float)
    rounds = [0.0, 0.0]
    for one in calls:
        way = one.way(word)
        if way is None:
            continue
        moved, there = one.sent(way), one.balanced(way)
        passes = [moved.forward * (1 + work.again), moved.backward]
        balances = [(there.into + there.out) * (1 + work.again), there.into + there.out]
        if there.into:
            # Gradients go the other way.
            ordered = (1 + work.again) * _ordered(link, there) + _ordered(
                link, Balanced(into=there.out, out=there.into)
            )
            items["all_to_all/context"] += waited * one.runs * ordered
        for n in range(2):
            size = passes[n] - balances[n]
            if way == RING:
                rounds[n] += one.runs * link.point_to_point(size, (one.parts - 1) * (1 + n))
            elif way == HEADS:
                items["all_to_all/context"] += waited * one.runs * _exchanged(link, size)
            elif way == NEIGHBOURS:
                items["send/context"] += waited * one.runs * link.point_to_point(size, 2)
            elif way == GATHERED and size:
                whole = size * one.parts / (one.parts - 1)
                kind = "all_gather" if n == 0 else "reduce_scatter"
                items[f"{kind}/context"] += waited * one.runs * link.collective(kind, whole, 2)
    hidden = calibration.overlap_parameters if link.is_torus else 0.0
    items["send/context"] += exposed(rounds[0], work.forward * (1 + work.again), hidden)
    items["send/context"] += exposed(rounds[1], work.backward, hidden)
    return {name: seconds for name, seconds in items.items() if seconds}


def _exchanged(link: Link, bytes_: float) -> float:
    """Return the seconds in which each device sends `bytes_`, shared out among the others."""
    return link.transfer("all_to_all", bytes_ * link.size**2 / max(link.size - 1, 1))


def _ordered(link: Link, moved: Balanced) -> float:
    """Return the seconds of permutes of halves into balanced order and out of it.

    On a torus a permute takes one way, of few links, where an all-to-all takes all: no less than one send to
    a neighbour after another, and into balance two share a link, as compiled programs are routed.
    """
    if not link.is_torus:
        return _exchanged(link, moved.into + moved.out)
    one_way = max(_exchanged(link, moved.into), 2.0 * link.point_to_point(moved.into, 2.0))
    return one_way + max(_exchanged(link, moved.out), link.point_to_point(moved.out, 2.0))


def context_memory(
    items: Mapping[str, float],
    calls: Sequence[LaidCall],
    candidate: Candidate,
    gathered: np.ndarray,
    read: Mapping[int, tuple[int, int]],
) -> dict[str, float]:
    """Return items of `items` with what calls hold beside their operands, and of what is kept gathered.

    Over stages what is kept is counted in parts.

    Args:
      items: item → bytes on a device.
      calls: as a device has them.
      candidate: for the word by which they take their way.
      gathered: which values [V] are kept as they are gathered for a call, where they are.
      read: call's index → the keys and the values that its kernel reads, in V.
    """
    held = kept = 0.0
    for one in calls:
        way = one.way(candidate.context or "")
        held = max(held, one.held(way) if way is not None else 0.0)
        whole = one.sizes.whole or candidate.mesh.get("stage", 1) > 1
        if way == GATHERED and not whole and one.index in read:
            keys, values = (bool(gathered[index]) for index in read[one.index])
            part = one.key * (keys * one.wide + values * one.value_wide) / (one.wide + one.value_wide)
            kept += (one.parts - 1) * part * one.runs
    return {
        "communication": items["communication"] + held,
        "saved_activations": items["saved_activations"] + kept,
    }
