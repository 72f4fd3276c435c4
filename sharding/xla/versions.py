"""Versions of JAX and of a topology's compiler that are installed."""

from __future__ import annotations

from importlib import metadata

from ..hardware.topology import Topology

# Distributions with the compiler of each platform, besides jax and jaxlib.
_COMPILERS = {"tpu": ("libtpu",), "gpu": ("jax-cuda13-pjrt", "jax-cuda12-pjrt"), "cpu": ()}


def versions(topology: Topology) -> dict[str, str]:
    """Return distribution → installed version of what compiles for `topology`."""
    wanted = ("jax", "jaxlib", *_COMPILERS.get(topology.chip.platform, ()))
    found = {}
    for name in wanted:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
