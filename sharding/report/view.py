"""What a Plan says of itself, as plain data: the table, the notebook view and the page show the same."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..hardware.topology import Topology
from ..plans.origin import distinct
from ..plans.specs import axes_of
from ..words import gib, layout_in_words, seconds

if TYPE_CHECKING:
    from ..plans.estimate import Estimate
    from ..plans.record import ArrayPlan, Record

# Items below this part of the whole are one line together.
_WORTH_A_LINE = 0.004


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bar:
    """One item of a whole: its name, its size in seconds or bytes, the same in words, its share."""

    name: str
    size: float
    text: str
    share: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parameter:
    """A parameter: shape, the mesh axes that cut each of its dimensions, bytes whole and on one device."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    cuts: tuple[tuple[str, ...], ...]
    parts: int
    bytes_whole: int
    bytes_device: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rival:
    """A layout that was considered, the chosen one included (`lost` is empty)."""

    layout: str
    storage: str
    step_seconds: float
    peak_bytes: float
    fits: bool
    lost: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class View:
    """Everything that a plan shows. Without an estimate `step`, `peak`, `time` and `memory` are empty."""

    topology: Topology
    mesh: Mapping[str, int]
    layout: str
    step: str
    mfu: str
    peak: str
    peak_bytes: float
    capacity_bytes: float | None
    time: tuple[Bar, ...]
    memory: tuple[Bar, ...]
    dims: tuple[tuple[str, int, tuple[str, ...]], ...]
    parameters: tuple[Parameter, ...]
    rivals: tuple[Rival, ...]
    links: tuple[str, ...]
    notes: tuple[str, ...]


def view(plan: Record) -> View:
    """Return what `plan` shows."""
    from ..hardware.links import describe

    topology = plan.topology
    estimate = plan.estimate
    layout = layout_in_words(plan.mesh, plan.remat, plan.microbatches, plan.saved)
    if plan.schedule is not None:
        layout += f", {plan.schedule}"
        layout += f" of {plan.interleave} chunks a stage" if plan.interleave > 1 else ""
    for operation, kernel in plan.kernels.items():
        layout += f", {operation} by {kernel['implementation']}"
    return View(
        topology=topology,
        mesh=plan.mesh,
        layout=layout,
        step="" if estimate is None else seconds(estimate.step_seconds),
        mfu="" if estimate is None else f"{estimate.mfu:.1%}",
        peak="" if estimate is None else gib(estimate.peak_bytes),
        peak_bytes=0.0 if estimate is None else estimate.peak_bytes,
        capacity_bytes=None if topology.chip.nominal else topology.chip.usable_bytes,
        time=() if estimate is None else _bars(estimate.time, seconds),
        memory=() if estimate is None else _bars(estimate.memory, gib),
        dims=tuple((name, dim.size, dim.axes) for name, dim in plan.dims.items()),
        parameters=tuple(_parameter(plan, path, row) for path, row in plan.params.items()),
        rivals=_rivals(plan, layout, estimate),
        links=tuple(describe(plan.mesh, topology).splitlines()),
        notes=plan.notes,
    )


def _bars(items: Mapping[str, float], write) -> tuple[Bar, ...]:
    total = sum(items.values()) or 1.0
    ordered = sorted(items.items(), key=lambda item: -item[1])
    shown = [(name, size) for name, size in ordered if size >= _WORTH_A_LINE * total]
    rest = total - sum(size for _, size in shown)
    if len(shown) < len(ordered) and rest > 0:
        shown.append(("the rest", rest))
    return tuple(Bar(name=name, size=size, text=write(size), share=size / total) for name, size in shown)


def _parameter(plan: Record, path: str, row: ArrayPlan) -> Parameter:
    import jax.numpy as jnp

    cuts = tuple(axes_of(entry) for entry in row.spec) + ((),) * (len(row.shape) - len(row.spec))
    parts = math.prod(plan.mesh[axis] for axes in cuts for axis in axes)
    whole = math.prod(row.shape) * jnp.dtype(row.dtype).itemsize
    return Parameter(
        path=path,
        shape=row.shape,
        dtype=row.dtype,
        cuts=cuts,
        parts=parts,
        bytes_whole=whole,
        bytes_device=whole // parts,
    )


def _rivals(plan: Record, layout: str, estimate: Estimate | None) -> tuple[Rival, ...]:
    if estimate is None:
        return ()
    chosen = Rival(
        layout=layout,
        storage="",
        step_seconds=estimate.step_seconds,
        peak_bytes=estimate.peak_bytes,
        fits=True,
        lost="",
    )
    others = (
        Rival(
            layout=layout_in_words(row.mesh, row.remat, row.microbatches, row.saved),
            storage=row.storage,
            step_seconds=row.estimate.step_seconds,
            peak_bytes=row.estimate.peak_bytes,
            fits=row.fits,
            lost=row.lost,
        )
        for row in distinct(plan.alternatives)
    )
    return (chosen, *others)


def written(parameter: Parameter) -> str:
    """Write a parameter's sharding as ``[fsdp, tensor, -]``."""
    return "[" + ", ".join("x".join(axes) or "-" for axes in parameter.cuts) + "]"
