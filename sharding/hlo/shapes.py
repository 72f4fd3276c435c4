"""Shapes as XLA writes them, ``bf16[2,4096]{1,0:T(8,128)(2,1)S(1)}``, and the bytes they take.

A layout lists dimensions from minor to major. A tile pads the most minor dimensions to its multiples: a TPU
stores ``f32[1002,4096]`` in tiles of 8 x 128, which makes 1,008 rows. ``S(n)`` is a memory other than HBM: on
a TPU 1 is the vector memory and 2, 4 and 6 are small ones for flags and scalars; 5 is the host's everywhere.
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass

HOST_SPACE = 5
#: Memory spaces in HBM, by platform; on a GPU 1 is the part that collectives of other devices access.
HBM_SPACES = {"tpu": frozenset({0}), "gpu": frozenset({0, 1}), "cpu": frozenset({0, 1, HOST_SPACE})}

_ARRAY = re.compile(r"([a-z]\w*)\[([^\]]*)\](\{[^}]*\})?")
_TILES = re.compile(r"T((?:\([\d,*]*\))+)")
_SPACE = re.compile(r"S\((\d+)\)")
_BITS = re.compile(r"\d+")


@dataclass(frozen=True, kw_only=True)
class Array:
    """One array: `dims` as written, `order` from minor to major, `tiles`, memory `space`."""

    dtype: str
    dims: tuple[int, ...]
    order: tuple[int, ...] = ()
    tiles: tuple[tuple[int, ...], ...] = ()
    space: int = 0

    @property
    def elements(self) -> int:
        """Number of elements, without padding."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        """Bytes of the elements, without padding."""
        return self.elements * item_bytes(self.dtype)

    @property
    def padded_bytes(self) -> float:
        """Bytes that are allocated, tiles padded."""
        return _tiled(self.dims, self.order, self.tiles) * item_bytes(self.dtype)

    @property
    def text(self) -> str:
        """The shape without its layout: ``bf16[2,4096]``."""
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


#: A tuple's elements, or one array.
Shape = Array | tuple["Shape", ...]


def item_bytes(dtype: str) -> float:
    """Return the bytes of one element.

    >>> [item_bytes(dtype) for dtype in ("bf16", "pred", "s4", "token")]
    [2.0, 1.0, 0.5, 0.0]
    """
    if dtype == "pred":
        return 1.0
    bits = _BITS.search(dtype)
    return 0.0 if bits is None else int(bits[0]) / 8


@functools.lru_cache(maxsize=65536)
def parse_shape(text: str) -> Shape:
    """Return the shape that `text` is: an array or nested tuples, with ``/*index=5*/`` comments or without.

    >>> parse_shape("f32[1002,4096]{1,0:T(8,128)}").padded_bytes / (4 * 4096)
    1008.0

    Raises:
      ValueError: `text` is not a shape.
    """
    shape, end = _read(text, 0)
    if text[end:].strip():
        raise ValueError(f"not a shape: {text[:80]!r}")
    return shape


def leaves(shape: Shape) -> tuple[Array, ...]:
    """Return the arrays of a shape in order, those of nested tuples included."""
    if isinstance(shape, Array):
        return (shape,)
    return tuple(leaf for element in shape for leaf in leaves(element))


def total_bytes(shape: Shape) -> float:
    """Return the bytes of all arrays of a shape, without padding."""
    return sum(leaf.bytes for leaf in leaves(shape))


def _read(text: str, at: int) -> tuple[Shape, int]:
    at = _skip(text, at)
    if text.startswith("(", at):
        found: list[Shape] = []
        at = _skip(text, at + 1)
        while at < len(text) and text[at] != ")":
            element, at = _read(text, at)
            found.append(element)
            at = _skip(text, at)
            if text.startswith(",", at):
                at = _skip(text, at + 1)
        return tuple(found), at + 1
    match = _ARRAY.match(text, at)
    if match is None:
        raise ValueError(f"not a shape: {text[at : at + 80]!r}")
    dims = tuple(int(size.strip().lstrip("<=")) for size in match[2].split(",") if size.strip())
    return _array(match[1], dims, match[3] or ""), match.end()


def _skip(text: str, at: int) -> int:
    while at < len(text):
        if text[at] == " ":
            at += 1
        elif text.startswith("/*", at):
            at = text.index("*/", at) + 2
        else:
            break
    return at


def _array(dtype: str, dims: tuple[int, ...], layout: str) -> Array:
    order, _, rest = layout.strip("{}").partition(":")
    tiles, space = _TILES.search(rest), _SPACE.search(rest)
    return Array(
        dtype=dtype,
        dims=dims,
        order=tuple(int(d) for d in order.split(",") if d),
        tiles=() if tiles is None else tuple(_tile(tile) for tile in re.findall(r"\(([^)]*)\)", tiles[1])),
        space=int(space[1]) if space else 0,
    )


def _tile(text: str) -> tuple[int, ...]:
    # A star merges a dimension into the next, which pads nothing.
    return tuple(1 if size == "*" else int(size) for size in text.split(",") if size)


def _tiled(dims: tuple[int, ...], order: tuple[int, ...], tiles: tuple[tuple[int, ...], ...]) -> int:
    sizes = [dims[d] for d in reversed(order)] if len(order) == len(dims) else list(dims)
    for tile in tiles:
        sizes = [1] * (len(tile) - len(sizes)) + sizes
        kept, tiled = sizes[: len(sizes) - len(tile)], sizes[len(sizes) - len(tile) :]
        sizes = kept + [-(-size // of) for size, of in zip(tiled, tile, strict=True)] + list(tile)
    return math.prod(sizes)
