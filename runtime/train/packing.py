"""What a plan is told of packed rows: which kernels were found right, and how many segments a row has."""

from __future__ import annotations

import dataclasses
from typing import Any

from ...sharding.ops.kernels import kernel_facts
from ..config import Config
from ..data.segments import known
from ..doctor.kernels import compared


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packing:
    """What is known of packed rows: kernels found right on every host, and the most segments of a row."""

    compared: tuple[str, ...] = ()
    segments: int | None = None

    @classmethod
    def here(cls, config: Config) -> Packing:
        """Return what this machine knows without opening any text."""
        found = cls(compared=compared() if config.attention == "auto" and config.data.packing else ())
        if not found.wanted(config):
            return found
        return dataclasses.replace(found, segments=known(config.data, config.seed))

    def wanted(self, config: Config) -> tuple[str, ...]:
        """Return the kernels of packed rows that `config` may take, the first choice first."""
        packing = [name for name, facts in kernel_facts().items() if facts["packs"]]
        if not config.data.packing or config.plan not in ("declared", "auto"):
            return ()
        taken = self.compared if config.attention == "auto" else (config.attention,)
        return tuple(name for name in packing if name in taken)

    def declared(self, config: Config) -> dict[str, Any]:
        """Return what a plan is asked for of attention."""
        if config.attention != "auto":
            return {"attention": config.attention, "segments": self.segments}
        return {"attention": (*self.wanted(config), "auto"), "segments": self.segments}
