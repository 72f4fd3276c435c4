"""Which Flax loads with which JAX, said in one sentence where the installed ones do not fit."""

from __future__ import annotations

import importlib.metadata
import re

from ..sharding.errors import UserError, one_line

# The first Flax that loads with a JAX, newest first: 0.12.8 and 0.12.9 look for what JAX 0.11 renamed.
_LEAST_FLAX = (((0, 11), "0.12.10"), ((0, 10), "0.12.8"))


# What fails with Flax itself: it, or the JAX that it looks into.
_OWN = ("flax", "jax", "jaxlib", "")


class FlaxDoesNotLoad(UserError, ImportError):
    """Flax and JAX that do not fit each other, or no Flax at all."""


def why_not(error: BaseException | str, package: str = "") -> str:
    """Say that Flax does not load, with the two versions and what to install.

    Args:
        error: How it failed.
        package: Whose module failed; that of the error's innermost frame if none is given.
    """
    flax, jax = _version("flax"), _version("jax")
    parts = _numbers(jax or "")[:2]
    least = next((needed for of, needed in _LEAST_FLAX if parts >= of), _LEAST_FLAX[-1][1])
    if flax is None:
        return f'flax is not installed, which models are made of: pip install "flax>={least}"'
    said = error if isinstance(error, str) else one_line(error)
    package = package or ("" if isinstance(error, str) else failing_package(error))
    if package not in _OWN and (version := _version(package)) is not None:
        return (
            f"flax {flax} does not load, since {package} {version} does not with jax {jax} ({said}): "
            f"pip install --upgrade {package}"
        )
    # One that is new enough is broken, or newer than the JAX that is here.
    known = _numbers(flax) >= _numbers(least)
    install = f'pip install --force-reinstall "flax=={least}"' if known else f'pip install "flax>={least}"'
    return f"flax {flax} does not load with jax {jax} ({said}): {install}"


def failing_package(error: BaseException) -> str:
    """Return the top package of the module in which an error was raised, empty where that is not known."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    name = "" if trace is None else str(trace.tb_frame.f_globals.get("__name__", ""))
    return name.partition(".")[0]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
