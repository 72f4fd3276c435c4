"""Efficiencies measured on devices of one kind: a file that plans name, and hold by its digest."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import UserError, wrong
from ..files import write_asked
from .calibration import Calibration, calibration_for, checked

_FORMAT = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """What was measured of a chip, and the efficiencies that it comes to.

    Attributes:
      chip: as topologies name it, such as ``h100``.
      jax: version that ran.
      driver: of the devices; empty where they have none.
      cudnn: version, empty where there is none.
      efficiencies: field of `Calibration` → value, in place of the shipped record's.
      measured: what was timed, a row of plain values each.

    Raises:
      UserError: an efficiency is none of `Calibration`'s, or out of its range.
    """

    chip: str
    jax: str
    driver: str = ""
    cudnn: str = ""
    efficiencies: Mapping[str, float] = dataclasses.field(default_factory=dict)
    measured: Sequence[Mapping[str, Any]] = ()

    def __post_init__(self) -> None:
        for name, value in self.efficiencies.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise UserError(f"{name}={value!r} must be a number")
        checked(Calibration, self.efficiencies)

    @property
    def digest(self) -> str:
        """What tells this measurement's efficiencies from any other's."""
        decides = {"chip": self.chip, "efficiencies": dict(self.efficiencies)}
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]

    def record(self, chip: str, kernel: str | None = None) -> Calibration:
        """Return the efficiencies of `chip`, those that were measured in place of the shipped ones.

        Raises UserError for another chip than was measured.
        """
        if chip != self.chip:
            raise UserError(f"the calibration is of {self.chip}, and the plan for {chip}")
        return dataclasses.replace(calibration_for(chip, kernel), **self.efficiencies)


def save(measurement: Measurement, path: str | os.PathLike[str]) -> None:
    """Write `measurement` as JSON."""
    content = {"format": _FORMAT, **dataclasses.asdict(measurement)}
    write_asked(path, json.dumps(content, indent=1) + "\n")


def load(path: str | os.PathLike[str]) -> Measurement:
    """Return the measurement of a file that `save` wrote. Raises UserError, one sentence, for any other."""
    if not isinstance(path, str | os.PathLike):
        raise wrong("calibration", path, "is no file of `meshwright calibrate`, such as 'h100.json'")
    try:
        content = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except OSError:
        raise UserError(
            f"no calibration file {path}; `meshwright calibrate --out {path}` makes one"
        ) from None
    except ValueError as error:
        raise UserError(f"{path} is no calibration: {error}") from None
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise UserError(f"{path} is no calibration of format {_FORMAT}; `meshwright calibrate` makes one")
    known = {field.name for field in dataclasses.fields(Measurement)}
    given = {key: value for key, value in content.items() if key != "format"}
    if unknown := sorted(given.keys() - known):
        raise UserError(f"{path} is no calibration: it has {', '.join(unknown)}")
    for name, kind in (("chip", str), ("jax", str), ("efficiencies", dict)):
        if not isinstance(given.get(name), kind):
            raise UserError(f"{path} is no calibration: {name} is {given.get(name)!r}")
    try:
        return Measurement(**given)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
