"""Descriptions, for the compilers, of topologies that are not attached; and what is missing to compile."""

from __future__ import annotations

import platform
import sys
from importlib import metadata
from typing import Any

from ..errors import UserError
from ..hardware.attached import QUIETING, quiet
from ..hardware.topology import Topology
from .gpu_targets import gpu_target, gpu_target_names

INSTALL = 'pip install "meshwright[verify]"'
"""Command that installs the compilers that the installed JAX asks for."""
_CUDA_PLUGINS = ("jax-cuda13-plugin", "jax-cuda12-plugin")


def describe(topology: Topology) -> Any:
    """Return the `jax.experimental.topologies.TopologyDescription` of a TPU or NVIDIA topology.

    Its `devices` form a mesh as attached ones do; a function jitted on them can be compiled, not run. Call
    this in a process that compiles for one platform only, before JAX has looked for devices.

    Raises:
      UserError: there is no compiler for such chips, or it is not installed.
    """
    if (reason := missing(topology)) is not None:
        raise UserError(reason)
    from jax.experimental import topologies

    # A process that only compiles uses no device, and may load libtpu beside one that does.
    quiet(*QUIETING)
    if topology.is_torus:
        return topologies.get_topology_desc(**topology.compiler_arguments())
    return topologies.get_topology_desc(
        platform="cuda", topology=domains(topology), target_config=gpu_target(topology.chip)
    )


def missing(topology: Topology) -> str | None:
    """Return why this machine cannot compile for `topology`, and what to install; None if it can."""
    chip = topology.chip
    if topology.is_torus:
        if _version("libtpu") is not None:
            return None
        if (sys.platform, platform.machine()) != ("linux", "x86_64"):
            return f"compiling for {topology} needs libtpu, which there is for Linux on x86-64 only"
        return f"compiling for {topology} needs libtpu, which is not installed: {INSTALL}"
    if chip.name not in gpu_target_names():
        return (
            f"there is no compiler for {topology} on a machine without {chip.name}; "
            f"there is one for TPUs and for {', '.join(gpu_target_names())}"
        )
    found = {name: version for name in _CUDA_PLUGINS if (version := _version(name)) is not None}
    if not found:
        if sys.platform != "linux":
            return f"compiling for {topology} needs JAX's CUDA plugin, which there is for Linux only"
        return f"compiling for {topology} needs JAX's CUDA plugin, which is not installed: {INSTALL}"
    jaxlib = _version("jaxlib")
    if jaxlib not in found.values():
        name, version = next(iter(found.items()))
        return (
            f"compiling for {topology} needs a CUDA plugin of jaxlib's version, {jaxlib}, "
            f"but {name} is {version}: {INSTALL}"
        )
    return None


def domains(topology: Topology) -> str:
    """Return a topology of GPUs as XLA writes it: NVLink domains x hosts of a domain x devices of a host.

    XLA takes equal domains only: hosts that do not fill theirs are divided evenly.

    >>> domains(Topology.parse("h100:4x8")), domains(Topology.parse("gb200:36x4"))
    ('4x1x8', '2x18x4')
    """
    at_most = max(1, topology.devices_per_domain // topology.devices_per_host)
    hosts = next(n for n in range(at_most, 0, -1) if topology.num_hosts % n == 0)
    return f"{topology.num_hosts // hosts}x{hosts}x{topology.devices_per_host}"


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
