"""Pictures, in text, of which device holds which part of an array."""

from __future__ import annotations

import itertools
from collections import defaultdict
from typing import Any

from ..errors import UserError

# Wider or taller than this, a picture says less than the words above it.
_MOST_CELLS = 32


def picture(array: Any) -> str:
    """Return a grid with a cell for each part of a sharded array and the ids of the devices that hold it.

    Of an array with more than two sharded dimensions the first two are drawn, and the cells name the devices
    along the rest.

    >>> import jax
    >>> from meshwright.sharding import make_mesh
    >>> mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2}, "cpu:8")
    >>> sharding = jax.NamedSharding(mesh, jax.P("fsdp", "tensor"))
    >>> print(picture(jax.ShapeDtypeStruct((64, 256), "float32", sharding=sharding)))
    float32[64, 256] as ('fsdp', 'tensor') on data=2, fsdp=2, tensor=2: 16.0 KiB of 64.0 KiB on each device
             0:128    128:256
          ┌─────────┬─────────┐
     0:32 │   0 4   │   1 5   │
          ├─────────┼─────────┤
    32:64 │   2 6   │   3 7   │
          └─────────┴─────────┘

    Args:
      array: a `jax.Array`, or anything with a shape, dtype and sharding.

    Raises:
      UserError: the array has no sharding.
    """
    sharding = getattr(array, "sharding", None)
    if sharding is None:
        raise UserError(f"a picture is of a sharded array; {type(array).__name__} has no sharding")
    shape = tuple(array.shape)
    parts: dict[tuple[tuple[int, int], ...], list[int]] = defaultdict(list)
    for device, index in sharding.devices_indices_map(shape).items():
        parts[tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))].append(
            device.id
        )
    cut = [axis for axis in range(len(shape)) if len({part[axis] for part in parts}) > 1]
    rows, columns = ([*cut, None, None][:2]) if len(cut) > 1 else (None, cut[0] if cut else None)
    grid: dict[tuple[Any, Any], list[int]] = defaultdict(list)
    for part, devices in parts.items():
        grid[_at(part, rows), _at(part, columns)] += devices
    return f"{_words(array, sharding, parts)}\n{_draw(grid)}"


def _at(part: tuple[tuple[int, int], ...], axis: int | None) -> tuple[int, int] | None:
    return None if axis is None else part[axis]


def _words(array: Any, sharding: Any, parts: Any) -> str:
    shape = ", ".join(map(str, array.shape))
    spec = tuple(getattr(sharding, "spec", ()))
    mesh = getattr(sharding, "mesh", None)
    over = f" as {spec}" if mesh is not None else ""
    if mesh is not None:
        over += " on " + ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    size = array.dtype.itemsize
    for extent in array.shape:
        size *= extent
    return f"{array.dtype}[{shape}]{over}: {_bytes(size / len(parts))} of {_bytes(size)} on each device"


def _draw(grid: dict[tuple[Any, Any], list[int]]) -> str:
    rows = sorted({row for row, _ in grid}, key=lambda part: part or (0, 0))
    columns = sorted({column for _, column in grid}, key=lambda part: part or (0, 0))
    if max(len(rows), len(columns)) > _MOST_CELLS:
        return f"({len(rows)} x {len(columns)} parts)"
    cells = {place: _ids(sorted(devices)) for place, devices in grid.items()}
    heads = [_range(column) for column in columns]
    width = max(len(text) for text in itertools.chain(cells.values(), heads)) + 2
    margin = max((len(_range(row)) for row in rows), default=0)
    indent = " " * (margin + 1)

    def line(left: str, middle: str, right: str) -> str:
        return indent + left + middle.join(["─" * width] * len(columns)) + right

    lines = [indent + " " + " ".join(head.center(width) for head in heads)] if any(heads) else []
    lines.append(line("┌", "┬", "┐"))
    for number, row in enumerate(rows):
        if number:
            lines.append(line("├", "┼", "┤"))
        body = "│".join(cells[row, column].center(width) for column in columns)
        lines.append(f"{_range(row):>{margin}} │{body}│")
    lines.append(line("└", "┴", "┘"))
    return "\n".join(text.rstrip() for text in lines)


def _range(part: tuple[int, int] | None) -> str:
    return "" if part is None else f"{part[0]}:{part[1]}"


def _ids(devices: list[int]) -> str:
    shown = " ".join(map(str, devices[:8]))
    return shown if len(devices) <= 8 else f"{shown} +{len(devices) - 8}"


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError
