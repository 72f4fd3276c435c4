"""The schedule of a plan's pipeline: the microbatch of each stage and tick, what waits, what is held."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from ..cost.pipeline import Lockstep, lockstep
from ..cost.stacks import held_layers
from ..plans.record import Record
from ..transform.pipeline import schedule
from ..transform.pipeline.beside import backward_later, forward_later, waits
from ..words import gib, seconds
from .document import Chapter, Drawing, Text

# Ticks and stages that are drawn; of more, the first and the last.
_TICKS, _STAGES = 16, 8
_CELL, _ROW, _NAME, _HEAD = 34, 18, 74, 18
_WIDE = 78
# Letters of a stack's name in a picture, and what they take of a page's.
_STACK, _STACK_WIDE = 12, 84

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
        _drawing(ticks, plan.stage_remat, _Stacks.of(plan)),
        Text(words=_held(plan, ticks)),
    )
    return Chapter(title="pipeline", blocks=blocks)


def _summary(plan: Record, ticks: Lockstep) -> str:
    chunks = f" of {ticks.chunks} chunks" if ticks.chunks > 1 else ""
    chunks += f", {len(plan.stacks)} stacks of layers" if plan.stacks else ""
    idle = ticks.layer_ticks - ticks.microbatches * ticks.chunks
    words = (
        f"{ticks.stages} stages{chunks}, {ticks.microbatches} microbatches: {ticks.layer_ticks} ticks "
        f"forward and as many backward, in {idle} of which a stage waits ({idle / ticks.layer_ticks:.1%})"
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
    cut = [dim.size for dim in plan.dims.values() if "stage" in dim.axes][:1]
    layers = dict(plan.stacks) or dict.fromkeys(("",), cut[0] if cut else None)
    what = "the inputs" if plan.stage_remat else "what layers keep"
    held = [
        f"{ticks.inputs + waits(k, len(layers), ticks.stages, ticks.chunks)} chunks{_of(name)}"
        for k, name in enumerate(layers)
    ]
    words = f"Each stage holds {what} of {' and '.join(held)}"
    if ticks.delayed:
        words += f" and what the gradients of {ticks.kept} chunks' weights are made of"
    words += ", however many microbatches there are"
    own = [_mine(name, count, ticks) for name, count in layers.items() if count is not None]
    words += f", and {' and '.join(own)}" if own else ""
    estimate = plan.estimate
    if estimate is None:
        return f"{words}."
    kept = estimate.memory.get("saved_activations", 0.0)
    parts = f", {gib(kept)} of it kept activations" if kept else ""
    return f"{words}: {gib(estimate.peak_bytes)} of memory on a device of each stage{parts}."


def _mine(name: str, layers: int, ticks: Lockstep) -> str:
    """Say how many of so many layers a stage has."""
    mine = held_layers(layers, ticks.stages, ticks.chunks)
    spare = mine * ticks.stages - layers
    filled = f", {spare} of all stages' filled with copies that are passed by" if spare else ""
    return f"{mine} of {layers} layers{_of(name)}{filled}"


def _of(name: str) -> str:
    return f" of {name}" if name else ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Stacks:
    """The stacks of layers that stages cut, by name: of one alone it is empty."""

    names: tuple[str, ...]

    @classmethod
    def of(cls, plan: Record) -> _Stacks:
        """Return those of a plan; names that are too long for a picture are numbers."""
        names = tuple(plan.stacks) or ("",)
        if any(len(name) > _STACK for name in names):
            names = tuple(f"stack {n}" for n in range(len(names)))
        return cls(names=names)

    def later(self, stack: int, work: str, ticks: Lockstep) -> int:
        """Return how many ticks later than alone a stack does some work."""
        if work == schedule.FORWARD:
            return forward_later(stack, ticks.stages, ticks.chunks)
        return backward_later(stack, len(self.names), ticks.stages, ticks.chunks)

    def last(self, ticks: Lockstep) -> int:
        """Return the last tick with layers in it: the first stage's backward of the last unit, or weights."""
        alone = ticks.layer_ticks - 1 + ticks.stages * ticks.chunks - 1 + ticks.delayed
        return alone + self.later(0, schedule.BACKWARD, ticks)


class _Row(NamedTuple):
    """What a stage does of one work in each column."""

    stack: str
    work: str
    cells: list[_Cell]


def _drawing(ticks: Lockstep, reruns: bool, stacks: _Stacks) -> Drawing:
    rows = _shown(list(range(ticks.stages)), _STAGES)
    width = max(len(_cell(ticks.slots - 1, ticks.chunks - 1, ticks)) + 1, 3)
    named = max(map(len, stacks.names))
    label = len(f"stage {ticks.stages - 1} backward ") + (named + 1 if named else 0)
    columns = _shown(list(range(stacks.last(ticks) + 1)), min(_TICKS, (_WIDE - label) // width))
    works = _WORKS if ticks.delayed else _WORKS[:2]
    table = {
        stage: tuple(
            _Row(name, work, _row(ticks, stage, columns, work, stacks.later(k, work, ticks)))
            for k, name in enumerate(stacks.names)
            for work in works
        )
        for stage in rows
        if stage is not None
    }
    heads = [(_number(tick), "") for tick in columns]
    art = [f"{'tick':<{label}}" + _joined(heads, width)]
    for stage in rows:
        if stage is None:
            art.append("…")
            continue
        for n, row in enumerate(table[stage]):
            whose = f"{row.stack if row.work == schedule.FORWARD else '':<{named}} " if named else ""
            begin = f"stage {stage} " if not n else " " * len(f"stage {stage} ")
            art.append(
                f"{begin}{whose}{row.work:<{len('backward')}} "[:label].ljust(label)
                + _joined(row.cells, width)
            )
    letters = ", a letter its chunk" if ticks.chunks > 1 else ""
    none = "has none of that stack" if named else "waits"
    return Drawing(
        svg=_svg(table, columns),
        art=tuple(line.rstrip() for line in art),
        caption=f"A number is the microbatch of a tick{letters}; · {none}.",
        legend={
            _KINDS[schedule.FORWARD]: "forward",
            _KINDS[schedule.BACKWARD]: "backward, the chunk run again before it" if reruns else "backward",
            **({_KINDS[schedule.WEIGHTS]: "gradients of weights"} if ticks.delayed else {}),
            _WAITS: none,
        },
    )


def _shown(numbers: list[int], most: int) -> list[int | None]:
    """Return the first and the last few of many, None between them."""
    if len(numbers) <= most:
        return list(numbers)
    last = most // 3
    return [*numbers[: most - last - 1], None, *numbers[-last:]]


def _row(ticks: Lockstep, stage: int, columns: Sequence[int | None], work: str, later: int) -> list[_Cell]:
    """Return the words and the kind of a stage's cells, of a stack that is so many ticks later than alone."""
    found: list[_Cell] = []
    for tick in columns:
        if tick is None:
            found.append(("…", ""))
            continue
        unit = schedule.unit_at(work, tick - later, stage, ticks.stages, ticks.chunks)
        works = bool(schedule.is_one(unit.microbatch, ticks.microbatches))
        found.append((_cell(unit.microbatch, unit.chunk, ticks), _KINDS[work]) if works else ("·", _WAITS))
    return found


def _cell(microbatch: int, chunk: int, ticks: Lockstep) -> str:
    return f"{microbatch}{chr(ord('a') + chunk % 26) if ticks.chunks > 1 else ''}"


def _joined(cells: Sequence[_Cell], width: int) -> str:
    return "".join(f"{words:>{width}}" for words, _ in cells)


def _svg(table: dict[int, tuple[_Row, ...]], columns: Sequence[int | None]) -> str:
    """Return the same as a picture: a row of each work for each stage, and in it for each stack."""
    names = any(row.stack for rows in table.values() for row in rows)
    left = _NAME + (_STACK_WIDE if names else 0)
    parts = [_text(left + (n + 0.5) * _CELL, 12, _number(tick)) for n, tick in enumerate(columns)]
    top = _HEAD
    for stage, rows in table.items():
        parts.append(f'<text x="0" y="{top + _ROW + 4}">stage {stage}</text>')
        for row in rows:
            if row.stack and row.work == schedule.FORWARD:
                parts.append(f'<text x="{_NAME - 8}" y="{top + _ROW + 4}">{escape(row.stack)}</text>')
            for n, (words, kind) in enumerate(row.cells):
                x = left + n * _CELL
                if kind:
                    size = f'width="{_CELL - 2}" height="{_ROW - 2}"'
                    parts.append(f'<rect class="{kind}" x="{x}" y="{top}" {size} rx="2"/>')
                parts.append(_text(x + _CELL / 2 - 1, top + 12, words))
            top += _ROW
        top += 4
    width = left + len(columns) * _CELL
    return (
        f'<svg class="ticks" viewBox="0 0 {width} {top}" width="{width}" height="{top}" role="img">'
        f"<title>Microbatches by stage and tick</title>{''.join(parts)}</svg>"
    )


def _number(tick: int | None) -> str:
    return "…" if tick is None else str(tick)


def _text(x: float, y: float, words: str) -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="middle">{escape(words)}</text>'
