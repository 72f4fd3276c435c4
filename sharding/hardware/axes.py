"""Axes that a mesh may have, in the order of their traffic, and the check of their sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ..errors import UserError, nearest, nearest_divisors

# From the lightest traffic to the heaviest. Gradients cross `data` once a step; `stage` passes one activation
# a microbatch, point to point; `fsdp` gathers every layer's parameters, ahead of their use; `expert` and
# `context` exchange activations in every layer; `tensor` several times a layer with nothing to hide behind.
AXES_BY_WEIGHT = ("data", "stage", "fsdp", "expert", "context", "tensor")
AXES = ("data", "fsdp", "tensor", "context", "expert", "stage")


def resolve_axes(axes: Mapping[str, int], num_devices: int) -> dict[str, int]:
    """Return `axes` with a size of -1, of which there may be one, replaced by what `num_devices` leaves.

    >>> resolve_axes({"data": 2, "fsdp": -1}, 8)
    {'data': 2, 'fsdp': 4}

    Raises:
      UserError: an axis is not in `AXES`, a size is not a whole number from 1 (or -1), two are -1, or the
        product is not `num_devices`.
    """
    sizes = dict(axes)
    if not sizes:
        raise UserError(f"a mesh needs an axis; write for example data=-1 for all {num_devices} devices")
    for axis, size in sizes.items():
        if axis not in AXES:
            raise UserError(f"mesh axis {axis!r} is not known; {nearest(axis, AXES)}")
        if isinstance(size, bool) or not isinstance(size, int) or (size < 1 and size != -1):
            raise UserError(
                f"{axis}={size!r} is no axis size; write a whole number from 1, or -1 for the rest"
            )
    absorbing = [axis for axis, size in sizes.items() if size == -1]
    if len(absorbing) > 1:
        both = " and ".join(f"{axis}=-1" for axis in absorbing)
        raise UserError(f"{both}: only one axis can absorb the rest; give {absorbing[1]} a size")
    given = {axis: size for axis, size in sizes.items() if size != -1}
    product = math.prod(given.values())
    if absorbing and num_devices % product == 0:
        return {axis: num_devices // product if size == -1 else size for axis, size in sizes.items()}
    if product != num_devices or absorbing:
        raise UserError(_wrong_product(given, num_devices, absorbing))
    return sizes


def _wrong_product(given: Mapping[str, int], num_devices: int, absorbing: Sequence[str]) -> str:
    written = " x ".join(f"{axis}={size}" for axis, size in given.items())
    product = math.prod(given.values())
    fixes = []
    for axis in sorted(given, key=AXES_BY_WEIGHT.index):
        others = product // given[axis]
        if num_devices % others:
            continue
        if absorbing:
            fixes.append(f"{axis}={nearest_divisors(num_devices // others, given[axis])}")
        else:
            fixes.append(f"{axis}={num_devices // others}")
    advice = f"nearest: {fixes[0]}" if fixes else f"nearest product: {nearest_divisors(num_devices, product)}"
    if absorbing:
        multiplied = f"{written} = {product}" if len(given) > 1 else written
        problem = f"{multiplied} does not divide {num_devices} devices"
        return f"{absorbing[0]}=-1 cannot absorb the rest: {problem}; {advice}"
    multiplied = f"{written} is {product}" if len(given) > 1 else written
    there = "there is 1 device" if num_devices == 1 else f"there are {num_devices} devices"
    return f"{multiplied}, but {there}; {advice}, or -1 on one axis for the rest"
