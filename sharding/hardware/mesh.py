"""JAX meshes over a topology's devices, the axis with the heaviest traffic on the fastest links."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import UserError, wrong
from .arrange import arrange
from .attached import by_position
from .axes import resolve_axes
from .topology import Topology

if TYPE_CHECKING:
    import jax


def make_mesh(
    axes: Mapping[str, int],
    topology: Topology | str | None = None,
    *,
    devices: Sequence[Any] | None = None,
) -> jax.sharding.Mesh:
    """Return a mesh of named axes over devices, heavier traffic on faster links.

    >>> dict(make_mesh({"data": 2, "fsdp": -1}, "cpu:8").shape)
    {'data': 2, 'fsdp': 4}

    Args:
      axes: axis → number of devices along it, in the order the mesh is to have them; one may be -1, which
        takes what the others leave.
      topology: the topology to lay them over, or its text; that of the attached devices if not given.
      devices: devices to use instead of the attached ones, in a list or an array, such as those that a
        compiler describes; how they lie on the mesh is decided here all the same.

    Raises:
      UserError: the axes do not fit (`resolve_axes`), or the devices are not those of the topology.
    """
    from jax.sharding import AxisType, Mesh

    wanted = None if topology is None else Topology.parse(topology)
    if devices is None:
        import jax

        devices = jax.devices() if wanted is None else wanted.devices()
    elif isinstance(devices, np.ndarray):
        devices = list(devices.flat)
    found = Topology.of(devices)
    if wanted is not None and not wanted.is_met_by(found):
        raise UserError(f"the devices given are {found}, not {wanted}; give those of {wanted}")
    if not isinstance(axes, Mapping):
        raise wrong("axes", axes, 'is no mapping, such as {"data": 8}')
    sizes = resolve_axes(axes, found.num_devices)
    laid = by_position(devices, found.chip)[arrange(sizes, found)]
    return Mesh(laid, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def check_mesh(mesh: Any) -> None:
    """Raise UserError for what is no mesh of JAX's."""
    from jax.sharding import AbstractMesh, Mesh

    if not isinstance(mesh, Mesh | AbstractMesh):
        raise wrong("mesh", mesh, "is no mesh; give it plan.make_mesh()")
