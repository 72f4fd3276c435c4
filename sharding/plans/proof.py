"""What the compiler made of a planned step, as data: kept in plans, printed, compared."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from ..hlo.text import SourceLine
from ..words import file_or_cell

# A file of code by its whole path, before the number of a line, where a word of a sentence begins.
_LINE = re.compile(r"(?:(?<=[\s(])|^)/[^:()]*?\.py(?=:\d)")


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
    bytes by ``arguments``, ``temporaries``, ``outputs`` (beyond aliased arguments), ``code``, ``host``, and
    ``scratch``: of the peak, what kernels of a library work in that the compiler did not have, by formula.
    `timeline` are bytes alive at even places of the schedule, loops entered once; `buffers` are the largest
    at the peak. `flops` are those of all products that run, loops counted and recomputation included;
    `host_bytes` go between the device and its host. A `quick` one was read from what the compiler scheduled,
    before machine code: computing is timed by flops and bytes instead of the compiler's cycles, and which
    algorithms carry collectives is not known.
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
    quick: bool = False
    cached: bool = dataclasses.field(default=False, compare=False)

    @property
    def made(self) -> str:
        """How far the compiler went: ``scheduled`` or ``compiled``."""
        return "scheduled" if self.quick else "compiled"

    def portable(self) -> Proof:
        """Return the proof with files named as `nearby` does: plans are committed and read elsewhere."""

        def renamed(rows: Any) -> tuple[Any, ...]:
            return tuple(dataclasses.replace(row, source=_nearby_line(row.source)) for row in rows)

        return dataclasses.replace(
            self,
            collectives=renamed(self.collectives),
            findings=renamed(self.findings),
            buffers=renamed(self.buffers),
            lines=renamed(self.lines),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the proof as plain values, without `quick` where it is not."""
        values = dataclasses.asdict(self)
        return values if self.quick else {name: one for name, one in values.items() if name != "quick"}

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


def nearby(file: str) -> str:
    """Return a file's path without what only this machine has of it.

    It is relative to the working directory if it lies below, else its name with one folder.

    >>> nearby("/somewhere/else/models/mlp.py"), nearby("models/transformer/mlp.py")
    ('models/mlp.py', 'models/transformer/mlp.py')
    """
    path, here = pathlib.PurePath(file_or_cell(file)), pathlib.Path.cwd()
    if not path.is_absolute():
        return path.as_posix()
    return (
        path.relative_to(here) if path.is_relative_to(here) else pathlib.PurePath(*path.parts[-2:])
    ).as_posix()


def nearby_lines(sentence: str) -> str:
    """Return a sentence whose lines of code are named as `nearby` does.

    >>> nearby_lines("work is done again at /somewhere/else/models/mlp.py:12 (mlp), 2 s")
    'work is done again at models/mlp.py:12 (mlp), 2 s'
    """
    return _LINE.sub(lambda found: nearby(found[0]), sentence)


def _nearby_line(source: SourceLine | None) -> SourceLine | None:
    return None if source is None else dataclasses.replace(source, file=nearby(source.file))


def _source(row: Mapping[str, Any]) -> Any:
    found = row.get("source")
    return None if found is None else SourceLine(**found)
