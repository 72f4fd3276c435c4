"""Programs that a trace holds by itself: every one that its process had compiled, as JAX's profiler adds.

They stand in the plane ``/host:metadata``, as statistics of events' metadata, which no binding shows:
``XSpace.planes`` (1) → ``XPlane.name`` (2), ``event_metadata`` (4) → its value (2) → ``name`` (2), such as
``jit_step(17)``, and ``stats`` (5) → ``bytes_value`` (6), an ``HloProto`` whose field 1 is the module.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property

from ...sharding.hlo.proto import module_of_proto
from ...sharding.hlo.text import HloModule
from .events import OpEvent
from .program import SavedProgram
from .wire import fields

_PLANE = b"/host:metadata"


def held_modules(content: bytes) -> dict[str, bytes]:
    """Return the serialised modules of a serialised XSpace by name and number, ``jit_step(17)``."""
    found: dict[str, bytes] = {}
    for number, plane in fields(content):
        if number != 1 or not isinstance(plane, bytes):
            continue
        parts = list(fields(plane))
        if (2, _PLANE) not in parts:
            continue
        for key, entry in parts:
            if key == 4 and isinstance(entry, bytes):
                found |= _module(entry)
    return found


def _module(entry: bytes) -> dict[str, bytes]:
    metadata = _bytes(entry, 2)
    name = _bytes(metadata, 2).decode(errors="replace")
    for number, stat in fields(metadata):
        if number == 5 and isinstance(stat, bytes) and (module := _bytes(_bytes(stat, 6), 1)):
            return {name: module}
    return {}


def _bytes(message: bytes, wanted: int) -> bytes:
    return next((v for number, v in fields(message) if number == wanted and isinstance(v, bytes)), b"")


class Programs:
    """The programs of operations: the step's, saved beside its trace with its mesh, and the traces' own."""

    def __init__(self, saved: SavedProgram | None, held: Iterable[Mapping[str, bytes]]) -> None:
        self.saved = saved
        self._held = {name: module for each in held for name, module in each.items()}
        self._read: dict[str, SavedProgram | None] = {}

    def of(self, event: OpEvent) -> SavedProgram | None:
        """Return the program that an operation is of, None where nobody kept it."""
        if self.saved is not None and event.module in ("", self.saved.program.name):
            return self.saved
        name = f"{event.module}({event.program})"
        if name not in self._held:
            named = self._by_name.get(event.module, ())
            name = named[0] if len(named) == 1 else ""
        if name not in self._read:
            module: HloModule | None = module_of_proto(self._held[name]) if name else None
            self._read[name] = None if module is None else SavedProgram(program=module, mesh={})
        return self._read[name]

    @cached_property
    def _by_name(self) -> dict[str, list[str]]:
        names: dict[str, list[str]] = {}
        for name in self._held:
            names.setdefault(name.rpartition("(")[0], []).append(name)
        return names
