"""A fingerprint of a program that does not depend on the process that traced it."""

from __future__ import annotations

import dataclasses
import enum
import hashlib
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
from jax.extend import core

from ..ops.experts import experts_call
from .primitives import Trait, primitives

# Not part of what a program computes, or different from one tracing to the next.
_IGNORED = frozenset(
    {"name", "ctx_mesh", "debug", "debug_info", "compiler_options_kvs", "out_trees", "inline"}
)


def fingerprint(closed: core.ClosedJaxpr) -> str:
    """Return a hash of the equations, shapes and types of `closed`; values of constants do not count."""
    digest = hashlib.sha256()
    _jaxpr(digest, closed.jaxpr)
    return digest.hexdigest()[:32]


def primitive_counts(closed: core.ClosedJaxpr) -> dict[str, int]:
    """Return how often each primitive stands in `closed`, what calls and loops run included, by name."""
    counts: Counter[str] = Counter()
    inside = primitives(Trait.CALL) | primitives(Trait.CONTROL)

    def count(jaxpr: core.Jaxpr) -> None:
        for eqn in jaxpr.eqns:
            counts[eqn.primitive.name] += 1
            if experts_call(eqn) is not None:
                continue
            for inner in core.jaxprs_in_params(eqn.params) if eqn.primitive.name in inside else ():
                count(inner)

    count(closed.jaxpr)
    return dict(sorted(counts.items()))


def _jaxpr(digest: Any, jaxpr: core.Jaxpr) -> None:
    numbers: dict[Any, int] = {}

    def write(text: str) -> None:
        digest.update(text.encode())
        digest.update(b"\n")

    def variable(var: Any) -> str:
        if isinstance(var, core.Literal):
            return f"{np.asarray(var.val).tolist()!r}:{_aval(var.aval)}"
        return str(numbers.setdefault(var, len(numbers)))

    def declare(variables: Any) -> str:
        return " ".join(f"{variable(var)}:{_aval(var.aval)}" for var in variables)

    write(f"in {declare(jaxpr.constvars)} ; {declare(jaxpr.invars)}")
    for eqn in jaxpr.eqns:
        inputs = " ".join(variable(atom) for atom in eqn.invars)
        write(f"{declare(eqn.outvars)} = {eqn.primitive.name} {inputs}")
        if (mixture := experts_call(eqn)) is not None:
            # How it is carried out is no part of what it is.
            write(mixture.name)
            continue
        for key in sorted(eqn.params):
            if key not in _IGNORED:
                for inner in core.jaxprs_in_params({key: eqn.params[key]}):
                    write(f"{key}:")
                    _jaxpr(digest, inner)
                text = _plain(eqn.params[key])
                if text is not None:
                    write(f"{key}={text}")
    write(f"out {' '.join(variable(atom) for atom in jaxpr.outvars)}")


def _aval(aval: Any) -> str:
    shape = "x".join(str(size) for size in getattr(aval, "shape", ()))
    return f"{getattr(aval, 'dtype', type(aval).__name__)}[{shape}]"


def _plain(value: Any) -> str | None:
    """Write a parameter that is plain data; None for functions, meshes and whatever else has an address."""
    if value is None or isinstance(value, (bool, int, float, complex, str, np.dtype, np.generic)):
        return repr(value.item() if isinstance(value, np.generic) else value)
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, Mapping):
        value = sorted(value.items(), key=repr)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = [getattr(value, field.name) for field in dataclasses.fields(value)]
    if isinstance(value, (tuple, list, frozenset, set)):
        items = [
            _plain(item)
            for item in (sorted(value, key=repr) if isinstance(value, (set, frozenset)) else value)
        ]
        return f"({','.join(item for item in items if item is not None)})"
    return None
