"""A Plan as JSON: written so that two plans compare line by line, read with whatever is wrong named."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import UserError

if TYPE_CHECKING:
    from .record import ArrayPlan, DimPlan, Plan, Spec

# A version of the file format: a reader refuses one that it does not know.
FORMAT = 1

# What plans that were searched for have besides; left out of a file where there is none.
_SEARCHED = (
    "saved",
    "moments",
    "kernels",
    "origin",
    "estimate",
    "alternatives",
    "refused",
    "compiler_options",
    "proof",
)
# What plans of pipeline stages have besides.
_STAGED = ("schedule", "interleave")
# One line for each of their entries.
_TABLES = ("dims", "params", "batch", "moments", "refused")


def to_dict(plan: Plan) -> dict[str, Any]:
    """Return the plan as plain values."""
    record = dataclasses.asdict(dataclasses.replace(plan, optimizer=None, search=None))
    for passing in ("optimizer", "search"):
        del record[passing]
    spared = (*_SEARCHED, *(() if plan.schedule else _STAGED))
    kept = {key: value for key, value in record.items() if key not in spared or (key in _SEARCHED and value)}
    return {"format": FORMAT, **kept}


def write(plan: Plan, path: str | pathlib.Path) -> None:
    """Write the plan with one line an array, a dimension and an alternative."""
    lines = []
    for key, value in to_dict(plan).items():
        if key in _TABLES:
            rows = [f"    {json.dumps(name)}: {json.dumps(row)}" for name, row in value.items()]
            lines.append(f"{json.dumps(key)}: " + _block("{", rows, "}"))
        elif key == "alternatives":
            lines.append(
                f"{json.dumps(key)}: " + _block("[", [f"    {json.dumps(row)}" for row in value], "]")
            )
        else:
            lines.append(f"{json.dumps(key)}: {json.dumps(value)}")
    pathlib.Path(path).write_text("{\n  " + ",\n  ".join(lines) + "\n}\n", encoding="utf-8")


def _block(start: str, rows: list[str], end: str) -> str:
    return f"{start}\n" + ",\n".join(rows) + f"\n  {end}" if rows else start + end


def read(path: str | pathlib.Path) -> Plan:
    """Read a plan that `write` wrote. Raises UserError for a missing or malformed file."""
    try:
        return from_dict(json.loads(pathlib.Path(path).read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(f"no plan file {path}") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a plan: {type(error).__name__}: {error}") from None


def from_dict(record: Mapping[str, Any]) -> Plan:
    """Rebuild a plan from plain values."""
    from .record import Plan

    values = {**record, "notes": tuple(record.get("notes", ()))}
    if (found := values.pop("format", None)) != FORMAT:
        raise UserError(f"the plan has format {found}; this version reads format {FORMAT}")
    values["dims"] = {name: _dim_plan(row) for name, row in values["dims"].items()}
    for key in ("params", "batch"):
        values[key] = {name: _array_plan(row) for name, row in values[key].items()}
    if "moments" in values:
        values["moments"] = {name: _spec(row) for name, row in values["moments"].items()}
    if "origin" in values:
        from .origin import Origin

        values["origin"] = Origin(**values["origin"])
    if "estimate" in values:
        from ..cost.estimate import Estimate

        values["estimate"] = Estimate(**values["estimate"])
    if "proof" in values:
        from .proof import Proof

        values["proof"] = Proof.from_dict(values["proof"])
    if "alternatives" in values:
        from .origin import alternative_from

        values["alternatives"] = tuple(alternative_from(row) for row in values["alternatives"])
    return Plan(**values)


def _dim_plan(row: Mapping[str, Any]) -> DimPlan:
    from .record import DimPlan

    return DimPlan(**{**row, "axes": tuple(row["axes"])})


def _array_plan(row: Mapping[str, Any]) -> ArrayPlan:
    from .record import ArrayPlan

    return ArrayPlan(shape=tuple(row["shape"]), dtype=row["dtype"], spec=_spec(row["spec"]))


def _spec(entries: Any) -> Spec:
    return tuple(tuple(entry) if isinstance(entry, list) else entry for entry in entries)
