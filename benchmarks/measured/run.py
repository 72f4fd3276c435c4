"""A measured run: what was trained, on what, how, and what was measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from meshwright.sharding import Topology

from .shapes import Architecture


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A measured row: `seconds` is None where the run did not complete; `peak_bytes` None where not said."""

    source: str
    cell: tuple[str, ...]
    label: str
    architecture: Architecture
    topology: Topology
    layout: Mapping[str, Any]
    framework: Mapping[str, Any]
    dtype: str
    seconds: float | None
    peak_bytes: float | None
