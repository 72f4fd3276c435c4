"""What a step was predicted to cost beside what it costs: seconds, memory, MFU, and items of a trace."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...sharding.files import write_whole
from ...sharding.plans.estimate import Estimate
from ...sharding.words import gib, seconds
from ..profiling import Profile

# By how much truth may differ from the estimate before a note says in what.
_APART = 0.15
# Steps that are timed, and those before them in which caches fill and clocks settle.
_TIMED, _BEFORE = 10, 2
# Fewer timed steps than these say nothing.
_LEAST = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepCost:
    """Seconds of a step, bytes of a device at its fullest moment, and MFU; None where nobody says."""

    seconds: float | None = None
    bytes: float | None = None
    mfu: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """What the estimate and the compiler said of a plan's step, and the items of the estimate."""

    estimate: Estimate
    compiled: StepCost
    where: str

    def beside(self, device: StepCost, first: int, last: int) -> list[str]:
        """Return lines that put the prediction beside what steps `first` to `last` cost on the devices."""
        foreseen = StepCost(
            seconds=self.estimate.step_seconds, bytes=self.estimate.peak_bytes, mfu=self.estimate.mfu
        )
        rows = {"estimate": foreseen, "compiler": self.compiled, "device": device}
        lines = [f"a step on {self.where}, steps {first} to {last}:"]
        lines += [f"  {name:9} {_words(cost)}" for name, cost in rows.items()]
        return lines + self._notes(device)

    def _notes(self, device: StepCost) -> list[str]:
        notes = []
        for what, found, said, items, words in (
            ("a step takes", device.seconds, self.estimate.step_seconds, self.estimate.time, seconds),
            ("a device holds", device.bytes, self.estimate.peak_bytes, self.estimate.memory, gib),
        ):
            if found is None or abs(found / said - 1) <= _APART:
                continue
            item, size = max(items.items(), key=lambda pair: pair[1], default=("", 0.0))
            notes.append(
                f"note: {what} {words(found)}, {_apart(found, said)} than the estimate's {words(said)}, "
                f"whose largest item is {item} with {words(size)}"
            )
        return notes

    def by_item(self, profile: Profile) -> list[str]:
        """Return the lines that put the estimate's items beside those of a traced window."""
        said, found = _predicted(self.estimate), _measured(profile)
        rows = {name: (said.get(name, 0.0), found.get(name, 0.0)) for name in (*said, *found)}
        lines = ["a step by item, as estimated and as traced:"]
        for name, (one, other) in sorted(rows.items(), key=lambda row: -max(row[1])):
            lines.append(f"  {name:24} {seconds(one):>9} {seconds(other):>9}")
        total, wall = self.estimate.step_seconds, profile.mean().wall_seconds
        if abs(wall / total - 1) > _APART:
            name, (one, other) = max(rows.items(), key=lambda row: abs(row[1][0] - row[1][1]))
            lines.append(
                f"note: a traced step takes {seconds(wall)}, {_apart(wall, total)} than estimated, most "
                f"of it in {name}: {seconds(other)} for {seconds(one)}"
            )
        return lines


class FirstSteps:
    """A sink that times a run's first steps and then says once what was predicted of them.

    Steps within the window of a profile, which are traced, are not timed.
    """

    def __init__(
        self,
        prediction: Prediction,
        *,
        start: int,
        traced: Sequence[int],
        cost: Callable[[float], StepCost],
        say: Callable[[str], object],
        file: pathlib.Path | None = None,
    ) -> None:
        """Time steps after `start`, without those `traced`; `cost` makes a device's cost of seconds."""
        self._prediction, self._cost, self._say, self._file = prediction, cost, say, file
        self._first, self._traced = start + 1 + _BEFORE, frozenset(traced)
        self._seconds: dict[int, float] = {}
        self._said = False

    def write(self, record: Mapping[str, Any]) -> None:
        """Time one step."""
        step = int(record["step"])
        if self._said or step < self._first or step in self._traced:
            return
        self._seconds[step] = record["step_seconds"]
        if len(self._seconds) == _TIMED:
            self._tell()

    def close(self) -> None:
        """Say what there is to say of a run that ended before."""
        if not self._said and len(self._seconds) >= _LEAST:
            self._tell()

    def _tell(self) -> None:
        self._said = True
        first, last = min(self._seconds), max(self._seconds)
        device = self._cost(statistics.median(self._seconds.values()))
        for line in self._prediction.beside(device, first, last):
            self._say(line)
        if self._file is not None:
            record = {
                "where": self._prediction.where,
                "steps": [first, last],
                "estimate": self._prediction.estimate.to_dict(),
                "compiled": dataclasses.asdict(self._prediction.compiled),
                "device": dataclasses.asdict(device),
            }
            write_whole(self._file, json.dumps(record, indent=1) + "\n")


def _predicted(estimate: Estimate) -> dict[str, float]:
    """Return an estimate's seconds by what a trace can tell apart."""
    found: dict[str, float] = {}
    for item, spent in estimate.time.items():
        kind, _, over = item.partition("/")
        if kind in ("compute", "optimizer"):
            name = "compute"
        elif over:
            name = "copies" if over == "host" else item
        else:
            name = "idle"
        found[name] = found.get(name, 0.0) + spent
    return found


def _measured(profile: Profile) -> dict[str, float]:
    mean = profile.mean()
    found = {
        "compute": mean.compute_seconds,
        "copies": mean.copy_seconds,
        "data wait": mean.data_wait_seconds,
    }
    found |= {f"{c.kind}/{c.axes}": c.exposed_seconds for c in mean.collectives}
    found["idle"] = mean.idle_seconds
    return {name: spent for name, spent in found.items() if spent}


def _apart(found: float, said: float) -> str:
    return f"{abs(found / said - 1):.0%} {'more' if found > said else 'less'}"


def _words(cost: StepCost) -> str:
    return "  ".join(
        (
            f"{'-' if cost.seconds is None else seconds(cost.seconds):>8}",
            f"{'-' if cost.bytes is None else gib(cost.bytes):>10}",
            "MFU " + ("-" if cost.mfu is None else f"{cost.mfu:.1%}"),
        )
    )
