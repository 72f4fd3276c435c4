"""Named axes over a topology's devices, the heaviest axis on the fastest links."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from .arrange import arrange as arrange
from .axes import AXES as AXES
from .axes import resolve_axes as resolve_axes
from .links import Reach as Reach
from .links import describe as describe
from .links import reaches as reaches
from .topology import Topology

if TYPE_CHECKING:
    import jax


def make_mesh(
    axes: Mapping[str, int],
    topology: Topology | str | None = None,
    *,
    devices: Sequence[Any] | None = None,
) -> jax.sharding.Mesh:
    """Lay named axes over devices so that heavier traffic gets faster links.

    Args:
      axes: axis → size, in the order the mesh shall have them; one may be -1 and absorb the rest.
      topology: where to lay them; what JAX has attached if not given.
      devices: the devices to use instead of the attached ones, such as those the compiler describes.

    Raises:
      UserError: the axes do not fit (`resolve_axes`), or the devices are not those of the topology.
    """
    from jax.sharding import AxisType, Mesh

    from .attached import by_position

    wanted = None if topology is None else Topology.parse(topology)
    if devices is None:
        import jax

        devices = jax.devices() if wanted is None else wanted.devices()
    found = Topology.of(devices)
    if wanted is not None and not wanted.is_met_by(found):
        raise UserError(f"the devices given are {found}, not {wanted}; give those of {wanted}")
    sizes = resolve_axes(axes, found.num_devices)
    laid = by_position(devices, found)[arrange(sizes, found)]
    return Mesh(laid, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
