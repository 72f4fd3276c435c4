"""What a plan says of itself: mesh, costs, what it was preferred to, where every array lies."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ..hardware import memory
from ..hardware.links import describe
from ..plans.arrays import item_bytes
from ..plans.origin import Alternative, distinct, is_bound
from ..plans.record import ArrayPlan, Record
from ..plans.specs import axes_in, by_dimension, cut_into
from ..plans.trainable import is_trained
from ..plans.vocabulary import EXACT, stages_in_words
from ..words import gib, layout_in_words, seconds
from .costs import cost_figures, memory_chapter, time_chapter
from .document import Chapter, Column, Cut, Document, Drawing, Entry, Figure, List, Table, Text
from .drawings import Dot, layouts_plot, mesh_drawings
from .proof import proof_chapters
from .stages import stages_chapter

_OTHERS, _PARAMETERS = 6, 16
_DOTS = {
    "chosen": "chosen",
    "rival": "fits",
    "misfit": "does not fit",
    "bound": "bounds the time of its mesh",
}


def plan_document(plan: Record) -> Document:
    """Return all that `plan` shows in a terminal, in a notebook and as a page."""
    capacity = usable_bytes(plan)
    notes = (*plan.notes, *memory.notes_on(plan.topology.chip))
    devices = Figure(name="devices", value=f"{plan.topology.num_devices:,}")
    chapters = [
        _mesh(plan),
        time_chapter(plan.estimate, plan.proof),
        memory_chapter(plan.estimate, plan.proof, capacity),
        stages_chapter(plan),
        *([] if plan.proof is None else proof_chapters(plan.proof, capacity)),
        _others(plan, capacity),
        _dims(plan),
        _parameters(plan),
        _state(plan),
        Chapter(title="notes", blocks=(List(items=notes),) if notes else ()),
    ]
    return Document(
        name=f"Plan for {plan.topology}",
        title=layout_of(plan),
        figures=(devices, *cost_figures(plan.estimate, plan.proof, capacity)),
        chapters=tuple(chapter for chapter in chapters if chapter.blocks),
    )


# What a plan's ``kernels["arithmetic"]`` has otherwise than JAX, in words.
_ARITHMETIC = {
    "products": "gradients of bfloat16 products in bfloat16",
    "lookups": "those of look-ups summed in float32",
    "multiple": "odd widths padded",
}


def layout_of(plan: Record) -> str:
    """Write a plan's choices: topology, mesh, what layers keep, microbatches, pipeline, kernels."""
    words = f"{plan.topology}: {layout_in_words(plan.mesh, plan.remat, plan.microbatches, plan.saved)}"
    if plan.microbatches > 1 and plan.accumulation != EXACT:
        words += f" {plan.accumulation}"
    if plan.schedule is not None:
        words += f", {stages_in_words(*plan.way)}"
    for operation, kernel in plan.kernels.items():
        if "implementation" in kernel:
            words += f", {operation} by {kernel['implementation']}"
    for key in plan.kernels.get("arithmetic", {}):
        words += f", {_ARITHMETIC[key]}"
    return words


def alternative_in_words(row: Alternative) -> str:
    """Write the choices of a layout that lost."""
    words = layout_in_words(row.mesh, row.remat, row.microbatches, row.saved)
    if row.way is not None:
        words += f", {stages_in_words(*row.way)}"
    return f"{words}, {row.storage}"


def usable_bytes(plan: Record) -> float | None:
    """Return the bytes that a device of the plan's topology can use; None where they are of no real part."""
    chip = plan.topology.chip
    return None if chip.nominal else memory.usable_bytes(chip)


def cut_of(row: ArrayPlan) -> Cut:
    """Return an array's dimensions with the mesh axes that cut them."""
    return Cut(shape=row.shape, axes=by_dimension(row.spec, len(row.shape)))


def bytes_of(plan: Record, row: ArrayPlan) -> tuple[float, float]:
    """Return the bytes of an array on one device, and in all."""
    whole = math.prod(row.shape) * item_bytes(row.dtype)
    return whole / cut_into(axes_in(row.spec), plan.mesh), whole


def _mesh(plan: Record) -> Chapter:
    links = {line.partition("=")[0]: line for line in describe(plan.mesh, plan.topology).splitlines()}
    drawings = [
        Drawing(svg=svg, caption=links.get(axis, axis), note=f"not drawn: {left_out}" if left_out else "")
        for axis, svg, left_out in mesh_drawings(plan.mesh, plan.topology)
    ]
    words = "Each square is a device where it stands; its colour is its place along the axis."
    lead = Text(words=words if drawings else "One device.", page_only=True)
    return Chapter(title="mesh", blocks=(lead, *drawings), page_only=not drawings)


def _others(plan: Record, capacity_bytes: float | None) -> Chapter:
    rows, estimate = distinct(plan.alternatives), plan.estimate
    if not rows or estimate is None:
        return Chapter(title="", blocks=())
    chosen = Dot(
        seconds=estimate.step_seconds, bytes=estimate.peak_bytes, kind="chosen", words=layout_of(plan)
    )
    dots = [chosen, *map(_dot, rows)]
    kinds = {dot.kind for dot in dots}
    legend = {kind: words for kind, words in _DOTS.items() if kind in kinds}
    columns = (
        Column(name="layout"),
        Column(name="step", figures=True),
        Column(name="memory", figures=True, page_only=True),
        Column(name="why not"),
    )
    entries = tuple(
        Entry(
            cells=(
                alternative_in_words(row),
                f"{'≥ ' if is_bound(row) else ''}{seconds(row.estimate.step_seconds)}",
                gib(row.estimate.peak_bytes),
                row.lost,
            )
        )
        for row in rows
    )
    blocks: list[Drawing | Table | Text] = [
        Drawing(svg=layouts_plot(dots, capacity_bytes), legend=legend),
        Table(columns=columns, entries=entries, most=_OTHERS),
    ]
    if any(map(is_bound, rows)):
        words = (
            "≥: no layout on this mesh takes less time; this one keeps too much to fit, and those that fit "
            "were not worked out."
        )
        blocks.append(Text(words=words))
    return Chapter(title="preferred to", blocks=tuple(blocks))


def _dot(row: Alternative) -> Dot:
    return Dot(
        seconds=row.estimate.step_seconds,
        bytes=row.estimate.peak_bytes,
        kind="bound" if is_bound(row) else "rival" if row.fits else "misfit",
        words=alternative_in_words(row),
    )


def _dims(plan: Record) -> Chapter:
    whole = ", ".join(f"{name}={dim.size}" for name, dim in plan.dims.items() if not dim.axes)
    entries = tuple(
        Entry(cells=(name, f"{dim.size:,}", " x ".join(f"{axis}={plan.mesh[axis]}" for axis in dim.axes)))
        for name, dim in plan.dims.items()
        if dim.axes
    )
    blocks: list[Table | Text] = []
    if entries:
        blocks.append(Table(columns=(Column(), Column(figures=True), Column()), entries=entries))
    if whole:
        blocks.append(Text(words=f"Whole on every device: {whole}."))
    return Chapter(title="dimensions while computing", blocks=tuple(blocks), page_only=True)


def _parameters(plan: Record) -> Chapter:
    trained = trained_in_words(plan)
    blocks = (*((Text(words=trained),) if trained else ()), _arrays(plan, "parameter", plan.params))
    return Chapter(title="parameters as stored", blocks=blocks if plan.params else ())


def _state(plan: Record) -> Chapter:
    """Return where what changes beside the parameters lies; nothing where the loss has no state."""
    blocks = (_arrays(plan, "state", plan.state),) if plan.state else ()
    return Chapter(title="what changes beside them, as stored", blocks=blocks)


def _arrays(plan: Record, kind: str, rows: Mapping[str, ArrayPlan]) -> Table:
    sizes = {path: bytes_of(plan, row) for path, row in rows.items()}
    entries = tuple(
        Entry(cells=(path, cut_of(rows[path]), *map(gib, sizes[path])))
        for path in sorted(sizes, key=lambda path: -sizes[path][1])
    )
    columns = (
        Column(name=kind),
        Column(name="shape"),
        Column(name="on a device", figures=True),
        Column(name="in all", figures=True, page_only=True),
    )
    return Table(columns=columns, entries=entries, most=_PARAMETERS)


def trained_in_words(plan: Record) -> str:
    """Say how many of the parameters are trained; nothing where all are."""
    elements = {path: math.prod(row.shape) for path, row in plan.params.items()}
    trained = [path for path, row in plan.params.items() if is_trained(plan, path, row)]
    if len(trained) == len(elements):
        return ""
    share = sum(elements[path] for path in trained) / max(sum(elements.values()), 1)
    return (
        f"Trained: {len(trained)} of {len(elements)} parameters, {share:.2%} of their elements. "
        "The others have no gradient and no moments."
    )
