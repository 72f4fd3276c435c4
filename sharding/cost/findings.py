"""What a Pricer has found so far of its program on its topology."""

from __future__ import annotations

import dataclasses
from typing import TypeVar

from .compute import Busy, Passes
from .exchange import Exchange, StoredOver
from .living import Worked
from .memory import Standing
from .pipeline import Least
from .placement import Placement

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")

# Findings of a kind that are kept: a search prices several storages and policies of each placement.
_MOST = 8192


@dataclasses.dataclass(kw_only=True)
class Findings:
    """Placements, where parameters are stored, and what follows from them.

    Keys are made of the identities of what is given, which is kept beside what was found, so that nothing
    else gets them.
    """

    placements: dict[object, Placement] = dataclasses.field(default_factory=dict)
    of_maps: dict[object, tuple[Placement, object]] = dataclasses.field(default_factory=dict)
    stored: dict[object, tuple[StoredOver, object]] = dataclasses.field(default_factory=dict)
    tables: dict[object, tuple[dict[int, tuple[str, ...]], object]] = dataclasses.field(default_factory=dict)
    slots: dict[object, tuple[float, object]] = dataclasses.field(default_factory=dict)
    exchanges: dict[object, tuple[Exchange, object]] = dataclasses.field(default_factory=dict)
    standing: dict[object, tuple[Standing, object]] = dataclasses.field(default_factory=dict)
    passes: dict[int, tuple[Passes, Placement]] = dataclasses.field(default_factory=dict)
    busy: dict[object, tuple[Busy, object]] = dataclasses.field(default_factory=dict)
    least: dict[object, tuple[float, Placement]] = dataclasses.field(default_factory=dict)
    exchanged: dict[object, tuple[Least, Placement]] = dataclasses.field(default_factory=dict)
    whole: dict[object, tuple[Least, Placement]] = dataclasses.field(default_factory=dict)
    worked: dict[object, tuple[Worked, object]] = dataclasses.field(default_factory=dict)
    # The sum of all items at the fullest moment, and that of those that an allocator leaves places between.
    held: dict[object, tuple[tuple[float, float], object]] = dataclasses.field(default_factory=dict)


def remembered(known: dict[_Key, _Value], key: _Key, value: _Value) -> _Value:
    """Keep `value` in `known`, which is emptied where it has become too long."""
    if len(known) >= _MOST:
        known.clear()
    known[key] = value
    return value
