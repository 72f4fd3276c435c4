"""Operations that rearrange: reshape, transpose, broadcast, join, cut, pad."""

from __future__ import annotations

from collections.abc import Sequence

from .rule import Builder, Op, OpRule, Rule, Shape


def reshape(op: Op) -> OpRule:
    """Regroup factors: consecutive dimensions whose products agree merge and split factor by factor."""
    if op.params.get("dimensions") is not None:
        return Builder(op).done()
    before, after = op.ins[0], op.outs[0]
    builder = Builder(op)
    if 0 in before:
        return builder.done()
    for ins, outs in _groups(before, after):
        refined = refinement([before[d] for d in ins], [after[d] for d in outs])
        if refined is None:
            continue
        sizes, in_parts, out_parts = refined
        factors = [builder.factor("map", size) for size in sizes]
        for dim, parts in zip(ins, in_parts, strict=True):
            builder.put_in(0, dim, *(factors[p] for p in parts))
        for dim, parts in zip(outs, out_parts, strict=True):
            builder.put_out(0, dim, *(factors[p] for p in parts))
    return builder.done()


def _groups(before: Shape, after: Shape) -> list[tuple[list[int], list[int]]]:
    """Pair the shortest runs of dimensions whose products agree."""
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        ins, outs, left, right = [], [], 1, 1
        while not (ins or outs) or left != right:
            if j >= len(after) or (i < len(before) and left <= right):
                left *= before[i]
                ins.append(i)
                i += 1
            else:
                right *= after[j]
                outs.append(j)
                j += 1
        groups.append((ins, outs))
    return groups


def refinement(
    before: list[int], after: list[int]
) -> tuple[list[int], list[list[int]], list[list[int]]] | None:
    """Return the common factors of two factorisations of one number, and which of them each part consists of.

    >>> refinement([6, 4], [2, 12])
    ([2, 3, 4], [[0, 1], [2]], [[0], [1, 2]])

    None where they have none: [3, 4] and [4, 3].
    """
    sizes: list[int] = []
    parts: tuple[list[list[int]], list[list[int]]] = ([[] for _ in before], [[] for _ in after])
    rest = ([*before], [*after])
    at = [0, 0]
    while True:
        for side in (0, 1):
            while at[side] < len(rest[side]) and rest[side][at[side]] == 1:
                at[side] += 1
        if at[0] == len(before) or at[1] == len(after):
            return sizes, *parts
        a, b = rest[0][at[0]], rest[1][at[1]]
        size = min(a, b)
        if max(a, b) % size:
            return None
        for side in (0, 1):
            parts[side][at[side]].append(len(sizes))
            rest[side][at[side]] //= size
        sizes.append(size)


def transpose(op: Op) -> OpRule:
    """Move whole dimensions."""
    return _kept(op, op.params["permutation"])


def squeeze(op: Op) -> OpRule:
    """Drop dimensions of size 1."""
    dropped = op.params["dimensions"]
    return _kept(op, [dim for dim in range(len(op.ins[0])) if dim not in dropped])


def _kept(op: Op, dims: Sequence[int]) -> OpRule:
    """Relate the result's dimensions, in order, to these of the operand."""
    builder = Builder(op)
    for out, dim in enumerate(dims):
        builder.factor("map", op.ins[0][dim], [(0, dim)], [(0, out)])
    return builder.done()


def broadcast_in_dim(op: Op) -> OpRule:
    """Place the operand's dimensions among new ones."""
    builder = Builder(op)
    source = {int(out): dim for dim, out in enumerate(op.params["broadcast_dimensions"])}
    for out, size in enumerate(op.outs[0]):
        dim = source.get(out)
        same = dim is not None and op.ins[0][dim] == size
        builder.factor("map", size, [(0, dim)] if same and dim is not None else [], [(0, out)])
    return builder.done()


def broadcast_to(op: Op) -> OpRule:
    """Align the operand's dimensions with the last ones of the result."""
    lead = len(op.outs[0]) - len(op.ins[0])
    numbers = tuple(range(lead, len(op.outs[0])))
    return broadcast_in_dim(Op(op.name, op.ins[:1], op.outs, {"broadcast_dimensions": numbers}))


def rev(op: Op) -> OpRule:
    """Flip dimensions: their shards change places."""
    flipped = set(op.params["dimensions"])
    builder = Builder(op)
    for dim, size in enumerate(op.ins[0]):
        builder.factor("resize" if dim in flipped else "map", size, [(0, dim)], [(0, dim)])
    return builder.done()


def concatenate(op: Op) -> OpRule:
    """Join along one dimension; the pieces and the result would rather be sharded alike."""
    axis = int(op.params["dimension"])
    builder = Builder(op)
    for dim, size in enumerate(op.outs[0]):
        if dim != axis:
            builder.factor("map", size, [(n, dim) for n in range(len(op.ins))], [(0, dim)])
            continue
        joined = builder.factor("resize", size, (), [(0, axis)])
        for number, shape in enumerate(op.ins):
            builder.kin(builder.factor("resize", shape[axis], [(number, axis)]), joined)
    return builder.done()


def split(op: Op) -> OpRule:
    """Cut along one dimension; the whole and its pieces would rather be sharded alike.

    Pieces of one size are one dimension (the gates of an LSTM).
    """
    axis = int(op.params["axis"])
    builder = Builder(op)
    for dim, size in enumerate(op.ins[0]):
        if dim != axis:
            builder.factor("map", size, [(0, dim)], [(n, dim) for n in range(len(op.outs))])
            continue
        source = builder.factor("resize", size, [(0, axis)])
        for piece in sorted({shape[axis] for shape in op.outs}):
            places = [(n, axis) for n, shape in enumerate(op.outs) if shape[axis] == piece]
            builder.kin(source, builder.factor("resize", piece, (), places))
    return builder.done()


def stack(op: Op) -> OpRule:
    """Join arrays along a new dimension, which stays whole."""
    axis = int(op.params["axis"])
    builder = Builder(op)
    for dim, size in enumerate(op.ins[0]):
        builder.factor(
            "map", size, [(n, dim) for n in range(len(op.ins))], [(0, dim if dim < axis else dim + 1)]
        )
    return builder.done()


def unstack(op: Op) -> OpRule:
    """Take an array apart along one dimension, which stays whole."""
    axis = int(op.params["axis"])
    builder = Builder(op)
    for dim, size in enumerate(op.ins[0]):
        if dim != axis:
            out = dim if dim < axis else dim - 1
            builder.factor("map", size, [(0, dim)], [(n, out) for n in range(len(op.outs))])
    return builder.done()


def tile(op: Op) -> OpRule:
    """Repeat: a dimension of n repeated r times is the factors (r, n)."""
    reps = op.params["reps"]
    lead = len(op.outs[0]) - len(op.ins[0])
    builder = Builder(op)
    for out, size in enumerate(op.outs[0]):
        dim = out - lead
        inner = op.ins[0][dim] if dim >= 0 else 1
        repeat = builder.factor("map", size // inner if inner else 1)
        kept = builder.factor("map", inner, [(0, dim)] if dim >= 0 else [])
        builder.put_out(0, out, repeat, kept)
    assert len(reps) <= len(op.outs[0])
    return builder.done()


def cut(op: Op) -> OpRule:
    """Cut out a part, at a start that may be computed.

    Dimensions taken whole pass through; one that shrinks stays kin to itself.
    """
    builder = Builder(op)
    for dim, (before, after) in enumerate(zip(op.ins[0], op.outs[0], strict=True)):
        if before == after:
            builder.factor("map", before, [(0, dim)], [(0, dim)])
        elif after == 1:
            builder.factor("index", before, [(0, dim)])
        else:
            builder.resized(0, dim, 0, dim)
    return builder.done()


def pad(op: Op) -> OpRule:
    """Pad, or crop by negative padding, with the operand's dimensions kin to the result's."""
    builder = Builder(op)
    for dim, (low, high, interior) in enumerate(op.params["padding_config"]):
        if (low, high, interior) == (0, 0, 0):
            builder.factor("map", op.ins[0][dim], [(0, dim)], [(0, dim)])
        else:
            builder.resized(0, dim, 0, dim)
    return builder.done()


RULES: dict[str, Rule] = {
    "broadcast_in_dim": broadcast_in_dim,
    "broadcast_to": broadcast_to,
    "concatenate": concatenate,
    "pad": pad,
    "reshape": reshape,
    "rev": rev,
    "slice": cut,
    "split": split,
    "squeeze": squeeze,
    "stack": stack,
    "tile": tile,
    "transpose": transpose,
    "unstack": unstack,
}
