"""Mesh axes of a collective, read from the groups of devices that XLA writes.

XLA numbers devices by their place in the program's device assignment, which for a `jax.jit` program is the
order of ``mesh.devices.flat``: a device's number, unravelled over the mesh's shape, gives its coordinates.

XLA writes groups in four ways:

- ``{{0,1},{2,3}}``: listed; ``{}`` is one group of everyone
- ``[4,2]<=[8]``, ``[2,4]<=[4,2]T(1,0)``: 0…n-1 reshaped, transposed, reshaped to [groups, members]
- ``mesh['data'=4,'fsdp'=2] {'fsdp'}``: axes of a named mesh over the devices in order
- ``mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b':(1)2}``: over devices in another order;
  ``(before)size`` is a part of an axis
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Groups = tuple[tuple[int, ...], ...]

_LISTED = re.compile(r"\{\s*((?:\{[\d,\s]*\}[,\s]*)*)\}")
_IOTA = re.compile(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(
    r"@?mesh[\[<]([^\]>]*)[\]>]"
    r"(?:,\s*device_ids=\((\[[\d,]+\](?:T\([\d,]+\))?|[\d,\s]+)\))?"
    r"\s*\{([^}]*)\}"
)
_AXIS = re.compile(r"'?([^'=,\s]+)'?=(\d+)")
_AXIS_PART = re.compile(r"'?([^',:\s]+)'?(?::\((\d+)\)(\d+))?")


@dataclass(frozen=True, kw_only=True)
class MeshAxes:
    """The mesh axes whose coordinate varies within a collective's groups, in mesh order.

    `whole` is False where the groups are not exactly the devices along `names`, as when a group spans only a
    part of an axis.
    """

    names: tuple[str, ...]
    whole: bool

    @property
    def label(self) -> str:
        """The axes as reports show them: ``fsdp``, ``data×fsdp``, ``part of fsdp``, ``none``."""
        if not self.names:
            return "none"
        return ("" if self.whole else "part of ") + "×".join(self.names)


def parse_replica_groups(text: str, *, num_devices: int) -> Groups:
    """Return the groups that the value of a ``replica_groups=`` attribute lists.

    >>> parse_replica_groups("[2,2]<=[4]", num_devices=4)
    ((0, 1), (2, 3))

    Args:
      text: the attribute's value, possibly followed by other attributes.
      num_devices: devices that the program runs on; ``{}`` is one group of all of them.

    Raises:
      ValueError: the value has none of the forms that XLA writes.
    """
    text = text.lstrip()
    if text.startswith(("mesh", "@mesh")) and (match := _MESH.match(text)):
        return _from_mesh(*match.groups())
    if text.startswith("[") and (match := _IOTA.match(text)):
        shape = _ints(match[1])
        return _rows(_iota(_ints(match[2]), _ints(match[3] or "")).reshape(shape[0], -1))
    if text.startswith("{") and (match := _LISTED.match(text)):
        groups = tuple(tuple(_ints(group)) for group in re.findall(r"\{([\d,\s]*)\}", match[1]))
        return groups or (tuple(range(num_devices)),)
    raise ValueError(f"replica groups of no known form: {text[:80]!r}")


def parse_pairs(text: str) -> Groups:
    """Return the pairs of device numbers in the value of a ``source_target_pairs=`` attribute.

    Raises:
      ValueError: the value is not of the form ``{{0,1},{1,0}}``.
    """
    match = _LISTED.match(text.lstrip())
    if match is None:
        raise ValueError(f"source-target pairs of no known form: {text[:80]!r}")
    return tuple(tuple(_ints(pair)) for pair in re.findall(r"\{([\d,\s]*)\}", match[1]))


def axes_of_groups(groups: Groups, mesh: Mapping[str, int]) -> MeshAxes:
    """Return the mesh axes that vary within `groups`; `mesh` is axis → size, in mesh order.

    >>> axes_of_groups(((0, 1), (2, 3), (4, 5), (6, 7)), {"data": 4, "fsdp": 2}).label
    'fsdp'
    """
    names = _varying(groups, mesh)
    span = math.prod(mesh[name] for name in names)
    slices = {frozenset(group) for group in groups}
    everyone = len(set().union(*slices)) if slices else 0
    # Groups in which only `names` vary and that are as large as all devices along `names` are those devices.
    whole = all(len(group) == span for group in slices) and everyone == math.prod(mesh.values())
    return MeshAxes(names=names, whole=whole)


def axes_of_pairs(pairs: Groups, mesh: Mapping[str, int]) -> MeshAxes:
    """Return the mesh axes along which a collective-permute moves data."""
    return MeshAxes(names=_varying(pairs, mesh), whole=True)


def _varying(groups: Groups, mesh: Mapping[str, int]) -> tuple[str, ...]:
    sizes = tuple(mesh.values())
    total = math.prod(sizes)
    varies = np.zeros(len(sizes), bool)
    for group in groups:
        if group and max(group) >= total:
            raise ValueError(f"device {max(group)} lies outside a mesh of {total} devices")
        coordinates = np.stack(
            np.unravel_index(np.asarray(group, np.int64), sizes), axis=1
        )  # [members, axes]
        varies |= (coordinates != coordinates[:1]).any(axis=0)
    return tuple(name for name, varying in zip(mesh, varies, strict=True) if varying)


def _from_mesh(axes: str, device_ids: str | None, grouped: str) -> Groups:
    sizes = {name: int(size) for name, size in _AXIS.findall(axes)}
    shape = tuple(sizes.values())
    if device_ids is None:
        devices = np.arange(math.prod(shape))
    elif device_ids.startswith("["):
        reshaped, _, transposed = device_ids.partition("T")
        devices = _iota(_ints(reshaped), _ints(transposed))
    else:
        devices = np.asarray(_ints(device_ids))

    # An axis of which only a part is grouped becomes three: what is major to the part, the part, the rest.
    split: list[int] = []
    inside: dict[tuple[str, int], int] = {}
    found = _AXIS_PART.findall(grouped)
    parts = [(name, int(before or 1), int(size or sizes[name])) for name, before, size in found]
    for name, size in sizes.items():
        done = 1
        for _, before, part in sorted((p for p in parts if p[0] == name), key=lambda p: p[1]):
            split.append(before // done)
            inside[name, before] = len(split)
            split.append(part)
            done = before * part
        split.append(size // done)
    order = [inside[name, before] for name, before, _ in parts]
    outside = [dim for dim in range(len(split)) if dim not in order]
    members = math.prod(split[dim] for dim in order)
    return _rows(devices.reshape(split).transpose(*outside, *order).reshape(-1, members))


def _iota(shape: Sequence[int], transpose: Sequence[int]) -> np.ndarray:
    values = np.arange(math.prod(shape)).reshape(shape)
    return (values.transpose(*transpose) if transpose else values).reshape(-1)


def _ints(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _rows(array: np.ndarray) -> Groups:
    return tuple(tuple(int(device) for device in row) for row in array)
