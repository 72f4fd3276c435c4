"""Fingerprints of arrays: 64 bits that depend on every bit and its position, and not on the mesh.

Each element's bits are mixed with its position into a 32-bit word, and the words are added up modulo 2³².
Addition is associative and commutative, so any sharding and any order of reduction give the same sum. The
mixing is one-to-one for a fixed position: one changed element always changes the sum. It is not linear, so
that elements which swap places or change together cancel only by chance (1 in 2⁶⁴ over both sums).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from .leaves import by_devices

# Odd multipliers whose bits are spread evenly, so that products by them mix upwards; their values are not
# special, but changing one changes every fingerprint ever saved.
_POSITION = np.uint32(0x9E3779B1)
_FIRST = np.uint32(0x7FEB352D)
_SECOND = np.uint32(0x846CA68B)
_THIRD = np.uint32(0xC2B2AE35)


@dataclass(frozen=True, kw_only=True)
class Fingerprints:
    """Fingerprints that the devices are still working out: uint32 `[n, 2]` for each group of leaf indices."""

    groups: tuple[tuple[int, ...], ...]
    words: tuple[jax.Array, ...]

    def hex(self) -> list[str]:
        """Wait for the devices and return 16 hexadecimal digits for each leaf."""
        found = [""] * sum(map(len, self.groups))
        for group, words in zip(self.groups, self.words, strict=True):
            for index, (first, second) in zip(group, np.asarray(words), strict=True):
                found[index] = f"{int(first):08x}{int(second):08x}"
        return found


def fingerprints(leaves: Sequence[jax.Array]) -> Fingerprints:
    """Start working out the fingerprints of `leaves` on their own devices and return at once.

    The values are those at the time of the call: a later step may be given the leaves' buffers. In a job of
    several processes, all must call this.
    """
    groups = tuple(tuple(group) for group in by_devices(leaves))
    words = []
    for group in groups:
        relabelled = tuple(_automatic(leaves[i]) for i in group)
        words.append(_program(_common_mesh(relabelled))(relabelled))
    return Fingerprints(groups=groups, words=tuple(words))


def prepare(leaves: Sequence[jax.ShapeDtypeStruct]) -> None:
    """Compile what `fingerprints` runs on arrays such as `leaves`, so that its first call finds it done."""
    for group in by_devices(leaves):
        relabelled = tuple(
            jax.ShapeDtypeStruct(
                leaves[i].shape,
                leaves[i].dtype,
                sharding=_automatic_sharding(leaves[i].sharding),
                weak_type=leaves[i].weak_type,
            )
            for i in group
        )
        # JAX keeps what it compiled, so that a later call on such arrays only runs it.
        _program(_common_mesh(relabelled)).lower(relabelled).compile()


def _automatic(leaf: jax.Array) -> jax.Array:
    """Relabel an array on an explicit mesh, without moving it: integer reductions there have no type rule."""
    sharding = _automatic_sharding(leaf.sharding)
    return leaf if sharding is leaf.sharding else jax.device_put(leaf, sharding)


def _automatic_sharding(sharding: Sharding) -> Sharding:
    if not isinstance(sharding, NamedSharding):
        return sharding
    mesh = sharding.mesh
    if not isinstance(mesh, Mesh) or all(kind == AxisType.Auto for kind in mesh.axis_types):
        return sharding
    automatic = Mesh(mesh.devices, mesh.axis_names)
    return NamedSharding(automatic, sharding.spec, memory_kind=sharding.memory_kind)


def _common_mesh(leaves: Sequence[Any]) -> Any:
    return next((leaf.sharding.mesh for leaf in leaves if isinstance(leaf.sharding, NamedSharding)), None)


@functools.cache
def _program(mesh: Mesh | None) -> Any:
    return jax.jit(
        fingerprint_of, out_shardings=None if mesh is None else NamedSharding(mesh, PartitionSpec())
    )


def fingerprint_of(leaves: tuple[jax.Array, ...]) -> jax.Array:
    return jnp.stack([_sums(leaf) for leaf in leaves])


def _sums(leaf: jax.Array) -> jax.Array:
    """Return uint32 `[2]`, both sums of one array."""
    bits = _bits(leaf)
    if bits.size == 0:
        return jnp.zeros(2, jnp.uint32)
    word = bits ^ _position(bits.shape)
    word = (word ^ (word >> 16)) * _FIRST
    word = (word ^ (word >> 15)) * _SECOND
    word = word ^ (word >> 16)
    other = (word ^ (word >> 13)) * _THIRD
    other = other ^ (other >> 16)
    # One reduction of two operands reads the array once; on CPU it is also ten times as fast as two sums.
    zero = np.uint32(0)
    both = lax.reduce((word, other), (zero, zero), lambda a, b: (a[0] + b[0], a[1] + b[1]), range(word.ndim))
    return jnp.stack(both)


def _bits(leaf: jax.Array) -> jax.Array:
    """Return the elements' bits as uint32, with a last dimension of 2 or 4 where they have 64 or 128."""
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        return jnp.stack([_bits(leaf.real), _bits(leaf.imag)], axis=-1)
    if leaf.dtype == jnp.bool_:
        return leaf.astype(jnp.uint32)
    width = _width(leaf.dtype)
    if width >= 32:
        return lax.bitcast_convert_type(leaf, jnp.uint32)
    return lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{width}")).astype(jnp.uint32)


def _width(dtype: Any) -> int:
    return jnp.finfo(dtype).bits if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo(dtype).bits


def _position(shape: tuple[int, ...]) -> jax.Array:
    """Return uint32 of `shape`, a different word for each of up to 2³² positions and mixed beyond that."""
    within = len(shape)
    while within > 0 and math.prod(shape[within - 1 :]) <= 2**32:
        within -= 1
    position = _linear(shape, range(within, len(shape))) * _POSITION
    if within:
        outer = _linear(shape, range(within)) * _SECOND
        position = position + (outer ^ (outer >> 15)) * _THIRD
    return position


def _linear(shape: tuple[int, ...], dims: range) -> jax.Array:
    index = jnp.zeros(shape, jnp.uint32)
    for dim in dims:
        stride = np.uint32(math.prod(shape[dim + 1 : dims.stop]) % 2**32)
        index = index + lax.broadcasted_iota(jnp.uint32, shape, dim) * stride
    return index
