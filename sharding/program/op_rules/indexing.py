"""Looking up and writing at computed places: gather, scatter, dynamic slices."""

from __future__ import annotations

from typing import Any

from .rule import Builder, Kind, Op, OpRule, Rule
from .shape import cut


def gather(op: Op) -> OpRule:
    """Take slices of the operand at computed starts.

    Dimensions taken whole pass through, those that are indexed are `index`, batching dimensions belong
    together, and each lookup is independent of the others. ``table[tokens]`` is [vocab, embed],
    [batch, sequence, 1] → [batch, sequence, embed].
    """
    numbers: Any = op.params["dimension_numbers"]
    operand, indices = op.ins[:2]
    builder = Builder(op)
    offset = set(numbers.offset_dims)
    lookups = [d for d in range(len(op.outs[0])) if d not in offset]
    batching = dict(zip(numbers.start_indices_batching_dims, numbers.operand_batching_dims, strict=True))
    for dim, out in enumerate(lookups):
        ins = [(1, dim)] + ([(0, batching[dim])] if dim in batching else [])
        builder.factor("map", indices[dim], ins, [(0, out)])
    windows = iter(sorted(offset))
    for dim, size in enumerate(operand):
        if dim in numbers.operand_batching_dims:
            continue
        if dim in numbers.collapsed_slice_dims:
            builder.factor("index", size, [(0, dim)])
            continue
        _window(builder, op, dim, next(windows))
    return builder.done()


def _window(builder: Builder, op: Op, dim: int, out: int) -> None:
    """Relate an operand's dimension to the window taken out of it."""
    before, after = op.ins[0][dim], op.outs[0][out]
    if before == after:
        builder.factor("map", before, [(0, dim)], [(0, out)])
    else:
        a = builder.factor("index", before, [(0, dim)])
        builder.kin(a, builder.factor("whole", after, (), [(0, out)]))


def _scatter(combine: Kind) -> Rule:
    def rule(op: Op) -> OpRule:
        """Write or add updates at computed places of the operand.

        ``segment_sum`` is [nodes, …], [edges, 1], [edges, …] → [nodes, …]: nodes are `index`,
        edges are summed.
        """
        numbers: Any = op.params["dimension_numbers"]
        operand, indices, updates = op.ins[:3]
        builder = Builder(op)
        window = sorted(numbers.update_window_dims)
        writes = [d for d in range(len(updates)) if d not in window]
        batching = dict(
            zip(numbers.scatter_indices_batching_dims, numbers.operand_batching_dims, strict=True)
        )
        for dim, update in enumerate(writes):
            ins = [(1, dim), (2, update)]
            if dim in batching:
                place = (0, batching[dim])
                builder.factor("map", indices[dim], [*ins, place], [place])
            else:
                builder.factor(combine, indices[dim], ins)
        windows = iter(window)
        for dim, size in enumerate(operand):
            if dim in numbers.operand_batching_dims:
                continue
            place = (0, dim)
            if dim in numbers.inserted_window_dims:
                builder.factor("index", size, [place], [place])
                continue
            update = next(windows)
            if updates[update] == size:
                builder.factor("map", size, [place, (2, update)], [place])
            else:
                a = builder.factor("index", size, [place], [place])
                builder.kin(a, builder.factor("whole", updates[update], [(2, update)]))
        return builder.done()

    return rule


def dynamic_update_slice(op: Op) -> OpRule:
    """Write a part at a computed start."""
    builder = Builder(op)
    for dim, (size, part) in enumerate(zip(op.ins[0], op.ins[1], strict=True)):
        if size == part:
            builder.factor("map", size, [(0, dim), (1, dim)], [(0, dim)])
            continue
        whole = builder.factor("index", size, [(0, dim)], [(0, dim)])
        builder.kin(whole, builder.factor("resize", part, [(1, dim)]))
    return builder.done()


RULES: dict[str, Rule] = {
    "gather": gather,
    "scatter": _scatter("whole"),
    "scatter-add": _scatter("contract"),
    "scatter-sub": _scatter("contract"),
    "scatter-mul": _scatter("reduce"),
    "scatter-min": _scatter("reduce"),
    "scatter-max": _scatter("reduce"),
    "dynamic_slice": cut,
    "dynamic_update_slice": dynamic_update_slice,
}
