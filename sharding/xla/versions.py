"""Which versions of JAX and of a topology's compiler are here."""

from __future__ import annotations

from importlib import metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..hardware.topology import Topology

# Distributions that decide what comes out of a compiler, by platform.
_COMPILERS = {"tpu": ("libtpu",), "gpu": ("jax-cuda13-pjrt", "jax-cuda12-pjrt"), "cpu": ()}


def versions(topology: Topology) -> dict[str, str]:
    """Return distribution → version of what compiles for `topology`."""
    wanted = ("jax", "jaxlib", *_COMPILERS.get(topology.chip.platform, ()))
    found = {}
    for name in wanted:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
