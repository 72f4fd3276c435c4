"""The compilers for pods that are not here."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator

from ...sharding.xla.targets import INSTALL
from .check import Check
from .versions import version_of


def compilers() -> Iterator[Check]:
    """Look for the TPU and the GPU compiler, and hold them against the versions that JAX wants."""
    libtpu, wanted = version_of("libtpu"), _libtpu_of_jax()
    if libtpu is None:
        advice = f"{INSTALL} compiles for TPU pods from here, no TPU needed"
        yield Check(name="TPU compiler", value="not installed", advice=advice)
    elif wanted is not None and not f"{libtpu}.".startswith(wanted.removesuffix("*")):
        advice = f'JAX was released with {wanted}: pip install "libtpu=={wanted}"'
        yield Check(name="TPU compiler", value=f"libtpu {libtpu}", status="warn", advice=advice)
    else:
        yield Check(name="TPU compiler", value=f"libtpu {libtpu}")
    jaxlib = version_of("jaxlib")
    names = [f"jax-cuda{generation}-plugin" for generation in (13, 12)]
    cuda = [(name, version) for name in names if (version := version_of(name))]
    if not cuda:
        advice = f"{INSTALL} compiles for GPU clusters from here, no GPU needed"
        yield Check(name="GPU compiler", value="not installed", advice=advice)
    for name, version in cuda:
        match = version == jaxlib
        advice = "" if match else f'it must match jaxlib {jaxlib}: pip install "{name}=={jaxlib}"'
        yield Check(
            name="GPU compiler", value=f"{name} {version}", status="ok" if match else "bad", advice=advice
        )


def _libtpu_of_jax() -> str | None:
    """Return the versions of libtpu that the installed JAX's extra names, as ``0.0.42.*``."""
    try:
        lines = importlib.metadata.requires("jax") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = (line.partition(";")[0].strip() for line in lines if line.startswith("libtpu=="))
    return next((line.removeprefix("libtpu==") for line in found), None)
