"""What the user has decided already, on one mesh: dims and arrays whose axes are kept."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from ..errors import UserError
from ..paths import by_path, matches
from ..program.program import Program
from ..rules.application import is_pattern
from ..rules.rules import Rules

# What the first two dimensions of an array of the data are called in rules.
DATA_NAMES = ("batch", "sequence")

# Axes that shard one thing only, so that giving one a size says what it is for.
_PURPOSE = {"context": "sequence", "expert": "experts"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Declared:
    """The parts of a plan that are not to be searched for; None where the search decides."""

    mesh: Mapping[str, int] = dataclasses.field(default_factory=dict)
    rules: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    remat: str | Mapping[str, str] | None = None
    microbatches: int | None = None
    schedule: str | None = None
    attention: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kept:
    """Declared rules on one mesh.

    `batch` are the axes that the batch is to be over, None if that is open; `dims` maps dim → axes while
    computing, `arrays` maps parameter argument index → array dimension → axes in storage.
    """

    batch: tuple[str, ...] | None = None
    dims: Mapping[int, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    arrays: Mapping[int, Mapping[int, tuple[str, ...]]] = dataclasses.field(default_factory=dict)


def names_of_data(batch: Any) -> Any:
    """Return a tree like `batch` of the names that rules may use for it."""
    import jax

    return jax.tree.map(lambda leaf: (DATA_NAMES + (None,) * leaf.ndim)[: leaf.ndim], batch)


def keep(program: Program, declared: Declared, mesh: Mapping[str, int], params: Any, names: Any) -> Kept:
    """Return what `declared` fixes on `mesh`.

    Raises UserError if a rule cannot hold on it.
    """
    rules = {**_purposes(declared, mesh), **declared.rules}
    if not rules:
        return Kept()
    checked = Rules(rules)
    axes_of = {key: axes for key, axes in checked.declared.items() if not is_pattern(key)}
    batch = axes_of.get("batch")
    return Kept(
        batch=None if batch is None else _long(batch, mesh),
        dims=_dims(program, axes_of, mesh, set(batch if batch is not None else ("data", "fsdp"))),
        arrays=_arrays(program, rules, mesh, params, names),
    )


def _purposes(declared: Declared, mesh: Mapping[str, int]) -> dict[str, str]:
    return {
        label: axis for axis, label in _PURPOSE.items() if mesh.get(axis, 1) > 1 and axis in declared.mesh
    }


def _long(axes: tuple[str, ...], mesh: Mapping[str, int]) -> tuple[str, ...]:
    return tuple(axis for axis in axes if mesh.get(axis, 1) > 1)


def _dims(
    program: Program, axes_of: Mapping[str, tuple[str, ...]], mesh: Mapping[str, int], of_batch: set[str]
) -> dict[int, tuple[str, ...]]:
    """Return how ruled dims are computed with: an axis that shards the batch shards nothing else by then."""
    found: dict[int, tuple[str, ...]] = {}
    said: dict[int, str] = {}
    for argument in program.arguments:
        for name, composition in zip(argument.names, argument.dims, strict=True):
            if name is None or name not in axes_of or name == "batch" or not composition:
                continue
            axes = tuple(axis for axis in _long(axes_of[name], mesh) if axis not in of_batch)
            dim = composition[0]
            if found.setdefault(dim, axes) != axes:
                raise UserError(
                    f"rules {said[dim]} and {name} differ, but both are dimension "
                    f"{program.dims[dim].name!r} of this program, which is sharded alike everywhere"
                )
            said.setdefault(dim, name)
    return found


def _arrays(
    program: Program, rules: Mapping[str, Any], mesh: Mapping[str, int], params: Any, names: Any
) -> dict[int, dict[int, tuple[str, ...]]]:
    of_params = {key: rule for key, rule in rules.items() if key not in DATA_NAMES}
    if not of_params:
        return {}
    specs = Rules(of_params).specs(params, mesh, names)
    patterns = [key for key in of_params if is_pattern(key)]
    found: dict[int, dict[int, tuple[str, ...]]] = {}
    flat = _flat_specs(specs)
    for argument, path, spec in zip(program.parameters, by_path(params), flat, strict=True):
        whole = any(matches(pattern, path) for pattern in patterns)
        entries = (*spec, *(None,) * (len(argument.shape) - len(spec)))
        kept = {
            n: _long((entry,) if isinstance(entry, str) else tuple(entry or ()), mesh)
            for n, entry in enumerate(entries)
            if whole or argument.names[n] in of_params
        }
        if kept:
            found[argument.index] = kept
    return found


def _flat_specs(specs: Any) -> list[Any]:
    import jax
    from jax.sharding import PartitionSpec

    return jax.tree.leaves(specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))


def parts(axes: tuple[str, ...], mesh: Mapping[str, int]) -> int:
    """Return into how many parts `axes` cut."""
    return math.prod(mesh[axis] for axis in axes)
