"""Topologies, meshes, rules, plans and the transformations that carry them out."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from .hardware.attached import quiet_absent

if TYPE_CHECKING:
    from .api import Plan as Plan
    from .api import declare as declare
    from .api import plan as plan
    from .errors import UserError as UserError
    from .hardware.mesh import make_mesh as make_mesh
    from .hardware.topology import Chip as Chip
    from .hardware.topology import Topology as Topology
    from .report.picture import picture as picture
    from .rules.rules import DEFAULT_RULES as DEFAULT_RULES
    from .rules.rules import Rules as Rules
    from .transform.step import train_step as train_step

# Name → module that defines it. Loaded on first use, so that `import meshwright.sharding` costs nothing.
_HOMES = {
    "Chip": "hardware.topology",
    "Plan": "api",
    "declare": "api",
    "plan": "api",
    "DEFAULT_RULES": "rules.rules",
    "Rules": "rules.rules",
    "Topology": "hardware.topology",
    "UserError": "errors",
    "make_mesh": "hardware.mesh",
    "picture": "report.picture",
    "train_step": "transform.step",
}

__all__ = list(_HOMES)

# Here, because every process that uses meshwright passes here before JAX has looked for devices.
quiet_absent()


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(_HOMES)
