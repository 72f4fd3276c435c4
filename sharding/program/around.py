"""The mesh that is set where a function is traced, and the types that it gives to what is traced there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import jax
from jax.sharding import AbstractMesh, AxisType

# No mesh: what is traced under it says nothing in its types of how it lies.
NO_MESH = AbstractMesh((), ())


_OF_CALLER: ContextVar[AbstractMesh | None] = ContextVar("_OF_CALLER", default=None)

_AT_ONCE: ContextVar[bool] = ContextVar("_AT_ONCE", default=False)


def explicit_mesh() -> AbstractMesh | None:
    """Return the mesh that is set if some of its axes are explicit, so that arrays say how they lie."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if AxisType.Explicit in mesh.axis_types else None


def mesh_of_caller() -> AbstractMesh | None:
    """Return the mesh with explicit axes that a loss is to be traced under, None if there is none."""
    return explicit_mesh() or _OF_CALLER.get()


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Within it no mesh is set if the caller's has explicit axes, which a loss is traced under."""
    mesh = explicit_mesh()
    if mesh is None:
        yield
        return
    token = _OF_CALLER.set(mesh)
    try:
        with under(NO_MESH):
            yield
    finally:
        _OF_CALLER.reset(token)


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """Within it what is run is computed at once, not traced, and outside of all meshes and manual regions."""
    token = _AT_ONCE.set(True)
    try:
        with under(NO_MESH), jax.ensure_compile_time_eval():
            yield
    finally:
        _AT_ONCE.reset(token)


def is_at_once() -> bool:
    """Whether it is within `at_once`."""
    return _AT_ONCE.get()


@contextlib.contextmanager
def under(mesh: AbstractMesh | None) -> Iterator[None]:
    """Within it `mesh` is set, or, of None, what was set before."""
    if mesh is None:
        yield
        return
    with jax.sharding.use_abstract_mesh(mesh):
        yield
