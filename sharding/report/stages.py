"""The schedule of a plan's pipeline: the microbatch of each stage and tick, what waits, what is held."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from ..cost.pipeline import Lockstep, lockstep
from ..cost.stacks import held_layers
from ..plans.record import Record
from ..transform.pipeline import schedule
from ..words import gib, seconds
from .document import Chapter, Drawing, Text

# Ticks and stages that are drawn; of more, the first and the last.
_TICKS, _STAGES = 16, 8
_CELL, _ROW, _NAME, _HEAD = 34, 18, 74, 18
_WIDE = 78

_Cell = tuple[str, str]
_WORKS: tuple[str, ...] = (schedule.FORWARD, schedule.BACKWARD, schedule.WEIGHTS)
_KINDS: dict[str, str] = dict(zip(_WORKS, ("before", "compute", "other"), strict=True))
_WAITS = "free"


def stages_chapter(plan: Record) -> Chapter:
    """Return the picture of a plan's pipeline; nothing for a plan without stages."""
    ticks = lockstep(plan)
    if ticks.stages == 1:
        return Chapter(title="", blocks=())
    blocks = (
        Text(words=_summary(plan, ticks)),
        _drawing(ticks, plan.stage_remat),
        Text(words=_held(plan, ticks)),
    )
    return Chapter(title="pipeline", blocks=blocks)


def _summary(plan: Record, ticks: Lockstep) -> str:
    chunks = f" of {ticks.chunks} chunks" if ticks.chunks > 1 else ""
    waits = ticks.layer_ticks - ticks.microbatches * ticks.chunks
    words = (
        f"{ticks.stages} stages{chunks}, {ticks.microbatches} microbatches: {ticks.layer_ticks} ticks "
        f"forward and as many backward, in {waits} of which a stage waits ({waits / ticks.layer_ticks:.1%})"
    )
    if ticks.delayed:
        words += f"; gradients of weights take {ticks.weight_ticks} ticks, in which none waits"
    estimate = plan.estimate
    if estimate is None or "bubble" not in estimate.time:
        return f"{words}."
    bubble = estimate.time["bubble"]
    return f"{words}: {seconds(bubble)}, {bubble / estimate.step_seconds:.1%} of the step."


def _held(plan: Record, ticks: Lockstep) -> str:
    """Say what each stage holds; all hold alike, since they do alike."""
    layers = next((dim.size for dim in plan.dims.values() if "stage" in dim.axes), None)
    what = "the inputs" if plan.stage_remat else "what layers keep"
    words = f"Each stage holds {what} of {ticks.inputs} chunks"
    if ticks.delayed:
        words += f" and what the gradients of {ticks.kept} chunks' weights are made of"
    words += ", however many microbatches there are"
    if layers is not None:
        mine = held_layers(layers, ticks.stages, ticks.chunks)
        spare = mine * ticks.stages - layers
        filled = f", {spare} of all stages' filled with copies that are passed by" if spare else ""
        words = f"{words}, and {mine} of {layers} layers{filled}"
    estimate = plan.estimate
    if estimate is None:
        return f"{words}."
    kept = estimate.memory.get("saved_activations", 0.0)
    parts = f", {gib(kept)} of it kept activations" if kept else ""
    return f"{words}: {gib(estimate.peak_bytes)} of memory on a device of each stage{parts}."


def _drawing(ticks: Lockstep, reruns: bool) -> Drawing:
    rows = _shown(list(range(ticks.stages)), _STAGES)
    width = max(len(_cell(ticks.slots - 1, ticks.chunks - 1, ticks)) + 1, 3)
    label = len(f"stage {ticks.stages - 1} backward ")
    columns = _shown(list(range(_last(ticks) + 1)), min(_TICKS, (_WIDE - label) // width))
    works = _WORKS if ticks.delayed else _WORKS[:2]
    table = {
        stage: tuple(_row(ticks, stage, columns, work) for work in works)
        for stage in rows
        if stage is not None
    }
    heads = [(_number(tick), "") for tick in columns]
    art = [f"{'tick':<{label}}" + _joined(heads, width)]
    for stage in rows:
        if stage is None:
            art.append("…")
            continue
        for work, cells in zip(works, table[stage], strict=True):
            name = f"stage {stage} {work}" if work == schedule.FORWARD else f"{work:>{label - 1}} "
            art.append(f"{name:<{label}}" + _joined(cells, width))
    letters = ", a letter its chunk" if ticks.chunks > 1 else ""
    return Drawing(
        svg=_svg(table, columns),
        art=tuple(line.rstrip() for line in art),
        caption=f"A number is the microbatch of a tick{letters}; · waits.",
        legend={
            _KINDS[schedule.FORWARD]: "forward",
            _KINDS[schedule.BACKWARD]: "backward, the chunk run again before it" if reruns else "backward",
            **({_KINDS[schedule.WEIGHTS]: "gradients of weights"} if ticks.delayed else {}),
            _WAITS: "waits",
        },
    )


def _last(ticks: Lockstep) -> int:
    """Return the last tick with layers in it: the first stage's backward of the last unit, or its weights."""
    return ticks.layer_ticks - 1 + ticks.stages * ticks.chunks - 1 + ticks.delayed


def _shown(numbers: list[int], most: int) -> list[int | None]:
    """Return the first and the last few of many, None between them."""
    if len(numbers) <= most:
        return list(numbers)
    last = most // 3
    return [*numbers[: most - last - 1], None, *numbers[-last:]]


def _row(ticks: Lockstep, stage: int, columns: Sequence[int | None], work: str) -> list[_Cell]:
    """Return the words and the kind of a stage's cells."""
    found: list[_Cell] = []
    for tick in columns:
        if tick is None:
            found.append(("…", ""))
            continue
        unit = schedule.unit_at(work, tick, stage, ticks.stages, ticks.chunks)
        works = bool(schedule.is_one(unit.microbatch, ticks.microbatches))
        found.append((_cell(unit.microbatch, unit.chunk, ticks), _KINDS[work]) if works else ("·", _WAITS))
    return found


def _cell(microbatch: int, chunk: int, ticks: Lockstep) -> str:
    return f"{microbatch}{chr(ord('a') + chunk % 26) if ticks.chunks > 1 else ''}"


def _joined(cells: Sequence[_Cell], width: int) -> str:
    return "".join(f"{words:>{width}}" for words, _ in cells)


def _svg(table: dict[int, tuple[list[_Cell], ...]], columns: Sequence[int | None]) -> str:
    """Return the same as a picture: a row of each work for each stage."""
    parts = [_text(_NAME + (n + 0.5) * _CELL, 12, _number(tick)) for n, tick in enumerate(columns)]
    top = _HEAD
    for stage, rows in table.items():
        parts.append(f'<text x="0" y="{top + _ROW + 4}">stage {stage}</text>')
        for cells in rows:
            for n, (words, kind) in enumerate(cells):
                x = _NAME + n * _CELL
                if kind:
                    size = f'width="{_CELL - 2}" height="{_ROW - 2}"'
                    parts.append(f'<rect class="{kind}" x="{x}" y="{top}" {size} rx="2"/>')
                parts.append(_text(x + _CELL / 2 - 1, top + 12, words))
            top += _ROW
        top += 4
    width = _NAME + len(columns) * _CELL
    return (
        f'<svg class="ticks" viewBox="0 0 {width} {top}" width="{width}" height="{top}" role="img">'
        f"<title>Microbatches by stage and tick</title>{''.join(parts)}</svg>"
    )


def _number(tick: int | None) -> str:
    return "…" if tick is None else str(tick)


def _text(x: float, y: float, words: str) -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="middle">{escape(words)}</text>'
