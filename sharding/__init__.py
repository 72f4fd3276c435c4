"""Topologies, meshes, rules, plans and the transformations that carry them out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import door

if TYPE_CHECKING:
    from .api.facade import Plan as Plan
    from .api.planning import declare as declare
    from .api.planning import plan as plan
    from .errors import UserError as UserError
    from .hardware.chip import Chip as Chip
    from .hardware.mesh import make_mesh as make_mesh
    from .hardware.topology import Topology as Topology
    from .report.picture import picture as picture
    from .rules.rules import DEFAULT_RULES as DEFAULT_RULES
    from .rules.rules import Rules as Rules
    from .transform.step import train_step as train_step

# Name → module that defines it. Loaded on first use, so that `import meshwright.sharding` costs nothing.
_HOMES = {
    "Chip": "hardware.chip",
    "Plan": "api.facade",
    "declare": "api.planning",
    "plan": "api.planning",
    "DEFAULT_RULES": "rules.rules",
    "Rules": "rules.rules",
    "Topology": "hardware.topology",
    "UserError": "errors",
    "make_mesh": "hardware.mesh",
    "picture": "report.picture",
    "train_step": "transform.step",
}

__all__ = list(_HOMES)
__getattr__, __dir__ = door(__name__, _HOMES)
