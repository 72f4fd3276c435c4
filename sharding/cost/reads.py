"""What JAX's gradients of single operations read, and where that is an array made for the gradient alone.

The gradient of a product of two arrays reads them as they are. That of a function of each element multiplies
by its derivative, which JAX works out in the forward pass and keeps: neither what the function took nor what
it gave, unless something else reads those, too. Of the larger of two it keeps where it took which, a byte an
element. A function with a gradient of its own (`jax.custom_jvp`) is one such, whatever it is made of.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jax.extend import core

from ..program.flops import matmul_roles
from ..program.jaxpr import RESULT_READ_TOO
from ..program.primitives import Trait, primitives
from .fusion import is_linear
from .tables import LAYERS, Flat, FlatOp

_BY_RESULT = primitives(Trait.BY_RESULT)
_BY_FACTOR = primitives(Trait.BY_FACTOR)
_BY_MASK = primitives(Trait.BY_MASK)
ELEMENTWISE = primitives(Trait.ELEMENTWISE) | primitives(Trait.MOVE)


def reads_of(flat: Flat) -> list[list[int]]:
    """Return the values that the gradient of each op [E] reads, or that what it reads is made of."""
    found, masks = [_read_by(flat, op) for op in flat.ops], {}
    for op, read in zip(flat.ops, found, strict=True):
        if read and op.equation.primitive == "select_n":
            # Compilers make what is asked twice once.
            read[0] = masks.setdefault(_asked(flat, read[0]), read[0])
    for ins, ops in _own(flat):
        for number in ops:
            found[number] = []
        found[ops[-1]] = [index for index in ins if flat.values[index].grad]
    return found


def factors(flat: Flat, reads: Sequence[Sequence[int]]) -> np.ndarray:
    """Return, of values of layers [V], how many arrays as large are made of each for gradients to read.

    Less the value itself, where nothing reads that: with the mask of `reads` it comes to what is kept.
    """
    found, itself = np.zeros(len(flat.values)), np.zeros(len(flat.values), bool)
    own = {ops[-1]: _is_mask(flat, ops) for _, ops in _own(flat)}
    for number, (op, read) in enumerate(zip(flat.ops, reads, strict=True)):
        name = op.equation.primitive
        if op.rematted or not read:
            continue
        if op.section != LAYERS or not (number in own or name in _BY_FACTOR | _BY_MASK):
            itself[list(read)] = True
            continue
        mask = own.get(number, name in _BY_MASK)
        for index in read:
            found[index] += 1.0 / flat.values[index].item_bytes if mask else 1.0
            itself[index] |= number not in own and name in RESULT_READ_TOO
    return found - (~itself & (found > 0))


def _read_by(flat: Flat, op: FlatOp) -> list[int]:
    if not any(flat.values[i].grad for i in op.outs):
        return []
    if matmul_roles(op.equation) is not None:
        left, right = op.ins[:2]
        kept = [left] if flat.values[right].grad else []
        return kept + ([right] if flat.values[left].grad else [])
    name = op.equation.primitive
    if name == "mul" and len(op.ins) == 2:
        left, right = op.ins
        return [a for a, b in ((left, right), (right, left)) if flat.values[b].grad]
    if name == "select_n":
        return [op.ins[0]] if _is_of_layer(flat, op.ins[0]) else []
    if is_linear(flat, op):
        return []
    return list(op.outs) if name in _BY_RESULT else [i for i in op.ins if flat.values[i].grad]


def _is_of_layer(flat: Flat, index: int) -> bool:
    """Whether a mask is made, in a layer, of what gradients flow into: any other is the same for all."""
    value = flat.values[index]
    if value.section != LAYERS or value.producer < 0:
        return False
    return any(flat.values[i].grad for i in flat.ops[value.producer].ins)


def _asked(flat: Flat, mask: int) -> tuple[object, ...]:
    """Return what a mask asks: the primitive, the arrays and the numbers that it compares."""
    op = flat.ops[flat.values[mask].producer]
    arrays = [index for index in op.ins if flat.values[index].elements > 1]
    numbers = [str(atom.val) for atom in op.equation.eqn.invars if isinstance(atom, core.Literal)]
    return (op.equation.primitive, *arrays, *numbers)


def _own(flat: Flat) -> list[tuple[tuple[int, ...], range]]:
    """Return the functions of each element that have gradients of their own, and no such function around."""
    found: list[tuple[tuple[int, ...], range]] = []
    # Those inside of another end before it does.
    for ins, ops in reversed(flat.own):
        inside = any(ops.start >= other.start and ops.stop <= other.stop for _, other in found)
        if ops and not inside and all(flat.ops[n].equation.primitive in ELEMENTWISE for n in ops):
            found.append((ins, ops))
    return found


def _is_mask(flat: Flat, ops: range) -> bool:
    return all(flat.ops[n].equation.primitive in _BY_MASK for n in ops)
