"""Which Flax loads with which JAX, said in one sentence where the installed ones do not fit."""

from __future__ import annotations

import importlib.metadata
import re

from ..sharding.errors import UserError, one_line

# The first Flax that loads with a JAX, newest first: 0.12.8 and 0.12.9 look for what JAX 0.11 renamed.
_LEAST_FLAX = (((0, 11), "0.12.10"), ((0, 10), "0.12.8"))


class FlaxDoesNotLoad(UserError, ImportError):
    """Flax and JAX that do not fit each other, or no Flax at all."""


def why_not(error: BaseException | str) -> str:
    """Say that Flax does not load, with the two versions and what to install; `error` is how it failed."""
    flax, jax = _version("flax"), _version("jax")
    numbers = tuple(int(part) for part in re.findall(r"\d+", jax or "")[:2])
    least = next((needed for of, needed in _LEAST_FLAX if numbers >= of), _LEAST_FLAX[-1][1])
    install = f'pip install "flax>={least}"'
    if flax is None:
        return f"flax is not installed, which models are made of: {install}"
    said = error if isinstance(error, str) else one_line(error)
    return f"flax {flax} does not load with jax {jax} ({said}): {install}"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
