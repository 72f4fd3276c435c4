"""The packages that a run needs, held against the versions that it needs."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from ...models.flax_versions import why_not
from .check import Check


def versions() -> Iterator[Check]:
    """Look at Python and at the packages that a run needs."""
    yield Check(name="python", value=f"{sys.version.split()[0]} at {sys.executable}")
    wanted = _requirements()
    for name in ("meshwright", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy"):
        version, spec = version_of(name), wanted.get(name, "")
        if version is None:
            yield Check(name=name, value="missing", status="bad", advice=f'pip install "{name}{spec}"')
        elif not _satisfies(version, spec):
            advice = f'meshwright needs {spec}: pip install "{name}{spec}"'
            yield Check(name=name, value=version, status="bad", advice=advice)
        else:
            yield Check(name=name, value=version)
    jax, jaxlib = version_of("jax"), version_of("jaxlib")
    if jax and jaxlib and numbers(jax)[:3] != numbers(jaxlib)[:3]:
        yield Check(
            name="jax and jaxlib",
            value=f"jax {jax} beside jaxlib {jaxlib}",
            status="warn" if numbers(jaxlib)[:2] == numbers(jax)[:2] else "bad",
            advice=f'pip install "jaxlib=={jax}"',
        )


def flax(answer: Mapping[str, Any]) -> Iterator[Check]:
    """Say why Flax does not load, where it is installed and a child process found that it does not."""
    if answer.get("flax_error") and (version := version_of("flax")) is not None:
        both = f"flax {version}, jax {version_of('jax')}"
        advice = why_not(answer["flax_error"], answer.get("flax_package") or "")
        yield Check(name="flax and jax", value=both, status="bad", advice=advice)


def _requirements() -> dict[str, str]:
    """Version bounds that this installation of meshwright asks for, by distribution."""
    try:
        lines = importlib.metadata.requires("meshwright") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    found = (re.fullmatch(r"([\w.-]+)([<>=!~\d.,]*)(?:; *(.*))?", line) for line in lines)
    return {match[1]: match[2] for match in found if match and _is_meant(match[3] or "")}


def _is_meant(marker: str) -> bool:
    """Hold a requirement's marker against this Python; other markers are of extras, which no run needs."""
    match = re.fullmatch(r"python_version ([<>=]+) [\"']([\d.]+)[\"']", marker)
    if match is None:
        return not marker
    here, there = sys.version_info[:2], numbers(match[2])
    return {"<": here < there, ">=": here >= there}.get(match[1], False)


def _satisfies(version: str, spec: str) -> bool:
    """Hold `version` against bounds of the form ``>=1.2,<2``."""
    for bound in filter(None, spec.split(",")):
        limit = numbers(bound.lstrip("<>="))
        if bound.startswith(">=") and numbers(version) < limit:
            return False
        if bound.startswith("<") and not bound.startswith("<=") and numbers(version) >= limit:
            return False
    return True


def numbers(version: str) -> tuple[int, ...]:
    """Return a version's numbers, without what stands after a plus.

    >>> numbers("0.12.0.1+local")
    (0, 12, 0, 1)
    """
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0]))


def version_of(distribution: str) -> str | None:
    """Return the installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
