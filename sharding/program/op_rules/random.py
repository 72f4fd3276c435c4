"""Random numbers: every element is drawn by itself, keys are small."""

from __future__ import annotations

from .rule import Builder, Op, OpRule, Rule


def drawn(op: Op) -> OpRule:
    """Unite the key array's dimensions with the leading ones of the draws; the rest are new."""
    builder = Builder(op)
    keys = op.ins[0] if op.ins else ()
    for result, shape in enumerate(op.outs):
        for dim, size in enumerate(shape):
            lead = dim < len(keys) and keys[dim] == size
            builder.factor("map", size, [(0, dim)] if lead else [], [(result, dim)])
    return builder.done()


def generator(op: Op) -> OpRule:
    """Return a generator's next state, whole, and its draws."""
    builder = Builder(op)
    for dim, size in enumerate(op.ins[0]):
        builder.factor("whole", size, [(0, dim)], [(0, dim)])
    for dim, size in enumerate(op.outs[1]):
        builder.factor("map", size, (), [(1, dim)])
    return builder.done()


def fresh(op: Op) -> OpRule:
    """Make an array out of nothing: any sharding will do."""
    builder = Builder(op)
    for result, shape in enumerate(op.outs):
        for dim, size in enumerate(shape):
            builder.factor("map", size, (), [(result, dim)])
    return builder.done()


RULES: dict[str, Rule] = {
    "random_bits": drawn,
    "random_split": drawn,
    "random_wrap": drawn,
    "random_unwrap": drawn,
    "random_seed": drawn,
    "to_edtype": drawn,
    "from_edtype": drawn,
    "rng_bit_generator": generator,
    "rng_uniform": fresh,
    "iota": fresh,
    "empty": fresh,
    "empty2": fresh,
    "iota_2x32_shape": fresh,
}
