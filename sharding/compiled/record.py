"""What the compiler made of a planned step, as data: kept in plans, printed, compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from .hlo import SourceLine


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledCollective:
    """All collectives of a step that are alike, per device.

    Attributes:
      kind: as compiled: ``all_gather``, ``all_reduce``, ``reduce_scatter``, ``all_to_all``, …
      axes: the mesh axes that its groups run over, in mesh order.
      count: how often it runs in a step, loops counted.
      bytes: of the results, of all `count` together.
      wire_bytes: what one device sends, of all together.
      seconds: that the links are busy under the link model of `algorithm`, of all together.
      exposed_seconds: of those, what no computing runs beside.
      algorithm: as the compiler names it, or the ring assumed where it names none.
      asynchronous: whether it is split into a start and a done.
      source: the line of the user's program that asked for it, the costliest of all alike.
    """

    kind: str
    axes: tuple[str, ...]
    count: float
    bytes: float
    wire_bytes: float
    seconds: float
    exposed_seconds: float
    algorithm: str
    asynchronous: bool
    source: SourceLine | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """Something that the compiler did and nobody planned: `what` happened, what it costs, what to do."""

    kind: str
    what: str
    remedy: str
    seconds: float = 0.0
    bytes: float = 0.0
    source: SourceLine | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Buffer:
    """An array that is alive at the fullest moment of a step."""

    name: str
    shape: str
    bytes: float
    source: SourceLine | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class LineCost:
    """What a line of the user's program costs in a step: seconds of computing by the compiler's cycles."""

    source: SourceLine
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Proof:
    """What the real compiler says of a plan: one device, one step.

    `time` (seconds by ``compute`` and kind/axes, exposed only) adds up to `step_seconds`. `memory` holds
    bytes by ``arguments``, ``temporaries``, ``outputs`` (beyond aliased arguments), ``code``, ``host``.
    `timeline` are bytes alive at even places of the schedule, loops entered once; `buffers` are the largest
    at the peak. `flops` are those of all products that run, loops counted and recomputation included;
    `host_bytes` go between the device and its host.
    """

    topology: str
    versions: Mapping[str, str]
    peak_bytes: float
    step_seconds: float
    compile_seconds: float
    time: Mapping[str, float]
    memory: Mapping[str, float]
    collectives: tuple[CompiledCollective, ...] = ()
    findings: tuple[Finding, ...] = ()
    buffers: tuple[Buffer, ...] = ()
    lines: tuple[LineCost, ...] = ()
    timeline: tuple[float, ...] = ()
    flops: float = 0.0
    host_bytes: float = 0.0
    cached: bool = dataclasses.field(default=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Return the proof as plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Proof:
        """Rebuild a proof from plain values."""
        return cls(
            **{
                **record,
                "collectives": tuple(
                    CompiledCollective(**{**row, "axes": tuple(row["axes"]), "source": _source(row)})
                    for row in record["collectives"]
                ),
                "findings": tuple(Finding(**{**row, "source": _source(row)}) for row in record["findings"]),
                "buffers": tuple(Buffer(**{**row, "source": _source(row)}) for row in record["buffers"]),
                "lines": tuple(LineCost(**{**row, "source": _source(row)}) for row in record["lines"]),
                "timeline": tuple(record["timeline"]),
            }
        )


def _source(row: Mapping[str, Any]) -> Any:
    found = row.get("source")
    return None if found is None else SourceLine(**found)
