"""A Plan as JSON: written so that two plans compare line by line, read with whatever is wrong named."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from ..errors import UserError, nearest, one_line, wrong
from ..files import write_asked
from .arrays import item_bytes
from .estimate import Estimate
from .origin import Alternative, Origin, alternative_from
from .proof import Proof
from .record import ArrayPlan, Decision, DimPlan, Record
from .specs import Spec, axes_in

# A version of the file format: a reader refuses one that it does not know.
FORMAT = 1

_NONE = dataclasses.MISSING

# Written even where they are as usual, so that a reader of a file need not know what is usual.
_ALWAYS = ("remat", "microbatches", "notes")

# One line for each of their entries.
_TABLES = ("dims", "params", "batch", "moments", "state", "refused")

_Made = TypeVar("_Made", bound=Record)


def to_dict(plan: Decision) -> dict[str, Any]:
    """Return a decision or a record as plain values, without what is as it is by default."""
    fields = dataclasses.fields(Record if isinstance(plan, Record) else Decision)
    values = {
        field.name: _plain(value)
        for field in fields
        if (value := getattr(plan, field.name)) != _default(field) or field.name in _ALWAYS
    }
    return {"format": FORMAT, **values, "topology": str(plan.topology)}


def _default(field: dataclasses.Field[Any]) -> Any:
    made = field.default_factory
    return field.default if made is _NONE else made()


def _plain(value: Any) -> Any:
    if isinstance(value, Alternative):
        return value.to_dict()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return tuple(_plain(item) for item in value) if isinstance(value, tuple) else value


def write(plan: Record, path: str | pathlib.Path) -> None:
    """Write the plan with one line an array, a dimension and an alternative."""
    if not isinstance(path, str | os.PathLike):
        raise wrong("path", path, "is no file to write a plan to, such as 'plan.json'")
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
    write_asked(path, "{\n  " + ",\n  ".join(lines) + "\n}\n")


def _block(start: str, rows: list[str], end: str) -> str:
    return f"{start}\n" + ",\n".join(rows) + f"\n  {end}" if rows else start + end


def read(path: str | pathlib.Path, kind: type[_Made]) -> _Made:
    """Read a plan that `write` wrote, as a `kind` of record. Raises UserError for a bad or missing file."""
    try:
        return from_dict(json.loads(pathlib.Path(path).read_text(encoding="utf-8")), kind)
    except FileNotFoundError:
        raise UserError(f"no plan file {path}") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a plan: {type(error).__name__}: {error}") from None


def from_dict(values: Mapping[str, Any], kind: type[_Made]) -> _Made:
    """Rebuild a plan from plain values, as a `kind` of record."""
    if not isinstance(values, Mapping):
        raise UserError(f"this is not a plan, which is a mapping of fields, but a {type(values).__name__}")
    if (found := values.get("format")) != FORMAT:
        raise UserError(f"the plan has format {found}; this version reads format {FORMAT}")
    known = {field.name: field for field in dataclasses.fields(Record)}
    read = {}
    for name, value in values.items():
        if name == "format":
            continue
        if name not in known:
            raise UserError(f"a plan has no {name!r}; {nearest(name, known)}")
        try:
            read[name] = _READERS.get(name, _same)(value)
        except UserError:
            raise
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise wrong(name, value, f"is not what a plan has there: {one_line(error)}") from None
    missing = [name for name, field in known.items() if _default(field) is _NONE and name not in read]
    if missing:
        raise UserError(f"this is not a plan, for it lacks {missing[0]!r}")
    return kind(**read)


def _same(value: Any) -> Any:
    return value


def _spec(entries: Any) -> Spec:
    spec = tuple(tuple(entry) if isinstance(entry, list) else entry for entry in entries)
    for axis in axes_in(spec):
        if not isinstance(axis, str):
            raise TypeError(f"{axis!r} is no axis")
    return spec


def _mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"{type(value).__name__} is no mapping")
    return value


def _texts(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(one, str) for one in value):
        raise TypeError("it is no list of texts")
    return tuple(value)


def _optional(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else read(value)


def _arrays(rows: Mapping[str, Any]) -> dict[str, ArrayPlan]:
    return {
        path: ArrayPlan(shape=_shape(row["shape"]), dtype=_dtype(row["dtype"]), spec=_spec(row["spec"]))
        for path, row in rows.items()
    }


def _shape(sizes: Any) -> tuple[int, ...]:
    if not all(isinstance(size, int) and size >= 0 for size in sizes):
        raise TypeError(f"{sizes!r} is no shape")
    return tuple(sizes)


def _dtype(name: Any) -> str:
    item_bytes(name)
    return str(name)


# Field → what makes it of plain values, where they are not the field itself.
_READERS: Mapping[str, Any] = {
    "mesh": _mapping,
    "saved": _mapping,
    "kernels": _mapping,
    "compiler_options": _mapping,
    "refused": _mapping,
    "dims": lambda rows: {name: DimPlan(**{**row, "axes": tuple(row["axes"])}) for name, row in rows.items()},
    "params": _arrays,
    "batch": _arrays,
    "moments": lambda rows: {path: _spec(row) for path, row in rows.items()},
    "trainable": _optional(_texts),
    "state": _optional(_arrays),
    "notes": _texts,
    "stacks": _mapping,
    "recognise": _texts,
    "origin": _optional(lambda row: Origin(**row)),
    "estimate": _optional(lambda row: Estimate(**row)),
    "alternatives": lambda rows: tuple(alternative_from(row) for row in rows),
    "proof": _optional(Proof.from_dict),
}
