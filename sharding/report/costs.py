"""Where a step's time and a device's memory go: by the Estimate, and beside it by the compiler."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..plans.estimate import Estimate
from ..plans.proof import Proof
from ..words import gib, seconds
from .document import (
    Bar,
    Bars,
    Chapter,
    Drawing,
    Figure,
    Segment,
    Sizes,
    Text,
    Track,
    change,
    size_text,
    time_text,
    worth_a_line,
)
from .drawings import memory_stack
from .proof import by_kind, compiler_of

# Items of an Estimate that are no work of the device's, which a compiled program says nothing of.
_NOT_COMPILED = {"host": "host, issuing", "stragglers": "stragglers", "bubble": "bubble"}
# What of an Estimate's memory is a compiled step's arguments: what it is given and gives back.
_ARGUMENTS = ("params", "optimizer", "state", "batch")
_ROUNDING = 1e-9
_COMPARED = ("estimated", "compiled", "")
_KINDS = {"compute": "computing", "talk": "collectives and transfers", "other": "else"}
_KINDS_COMPARED = {
    "before": "estimated",
    "compute": "computing, compiled",
    "talk": "collectives that computing waits for",
    "talk hidden": "collectives that run beside it",
}


def cost_figures(
    estimate: Estimate | None, proof: Proof | None, capacity_bytes: float | None
) -> list[Figure]:
    """Return what a step takes and a device holds; where both are known, what each of them says."""
    found = []
    made = "compiled" if proof is None else proof.made
    for by, one, before in (("estimated", estimate, None), (made, proof, estimate)):
        if one is None:
            continue
        of = "" if proof is None else f", {by}"
        rate = f"{one.mfu:.1%} of the peak" if isinstance(one, Estimate) else ""
        time = change(before.step_seconds if before else None, one.step_seconds)
        size = change(before.peak_bytes if before else None, one.peak_bytes)
        room = f"{one.peak_bytes / capacity_bytes:.0%} of {gib(capacity_bytes)}" if capacity_bytes else ""
        memory = ", ".join(filter(None, (size, room)))
        found += [
            Figure(name=f"step{of}", value=seconds(one.step_seconds), detail=rate or time),
            Figure(name=f"memory{of}", value=gib(one.peak_bytes), detail=memory),
        ]
    return found


def time_chapter(estimate: Estimate | None, proof: Proof | None) -> Chapter:
    """Return the items of a step's time; without blocks where neither is known."""
    title, blocks = "time of a step", ()
    if proof is not None:
        title += f", {_of_both(estimate)}{_compiled_by(proof)}"
        blocks = (Bars(bars=_compared_time(estimate, proof), head=_COMPARED, legend=_KINDS_COMPARED),)
    elif estimate is not None:
        rows = _rows(estimate.time, estimate.step_seconds)
        blocks = (Bars(bars=_shares(rows, {name: _kind(name) for name in rows}, time_text), legend=_KINDS),)
    return Chapter(title=title, blocks=blocks)


def memory_chapter(estimate: Estimate | None, proof: Proof | None, capacity_bytes: float | None) -> Chapter:
    """Return what fills a device's memory; without blocks where neither is known."""
    blocks: list[Drawing | Bars | Text] = []
    kinds: dict[str, str] = {}
    if estimate is not None:
        rows = _rows(estimate.memory, estimate.peak_bytes)
        kinds = {name: f"m{number % 8}" for number, name in enumerate(rows)}
        pieces = [(f"{name} {size_text(size)}", size, kinds[name]) for name, size in rows.items()]
        blocks.append(Drawing(svg=memory_stack(pieces, capacity_bytes)))
        if proof is None:
            blocks.append(Bars(bars=_shares(rows, kinds, size_text)))
    title = "memory of a device"
    if proof is not None:
        title += f", {_of_both(estimate)}compiled"
        blocks.append(Bars(bars=_compared_memory(estimate, proof, kinds), head=_COMPARED))
    if estimate is not None and estimate.heap_bytes is not None:
        words = f"With the gaps that an allocator leaves between arrays it takes {gib(estimate.heap_bytes)}."
        blocks.append(Text(words=words))
    return Chapter(title=title, blocks=tuple(blocks))


def _of_both(estimate: Estimate | None) -> str:
    return "" if estimate is None else "estimated and "


def _rows(items: Mapping[str, float], whole: float) -> dict[str, float]:
    """Return the items that are worth a line, the largest first, and the rest."""
    rows = worth_a_line({name: (size,) for name, size in items.items()}, whole)
    return {name: size or 0.0 for name, (size,) in rows}


def _shares(
    rows: Mapping[str, float], kinds: Mapping[str, str], write: Callable[[float], str]
) -> tuple[Bar, ...]:
    whole, most = sum(rows.values()), max(rows.values(), default=0.0)
    return tuple(
        Bar(
            name=name,
            figures=(write(size), f"{size / whole:.1%}"),
            tracks=((Segment(part=size / most, kind=kinds[name]),),),
        )
        for name, size in rows.items()
    )


def _kind(name: str) -> str:
    """Return the colour of an item of time: computing, talking, or else."""
    if name.startswith("compute") or name in ("optimizer", "passes"):
        return "compute"
    return "talk" if "/" in name else "other"


def _compiled_by(proof: Proof) -> str:
    """Say which compiler made a program, or scheduled it, and in how long."""
    time, known = proof.compile_seconds, ", known from before" if proof.cached else ""
    rounded = f"{time:.0f}" if time >= 10 else f"{time:.2g}"
    without = ", without machine code" if proof.quick else ""
    return f"{proof.made} by {compiler_of(proof.versions)} in {rounded} s{without}{known}"


def _as_compiled(estimate: Estimate | None) -> dict[str, dict[str, float]]:
    """Return the items of an Estimate's time below the names that a compiled step has for them."""
    found: dict[str, dict[str, float]] = {}
    for name, size in (estimate.time if estimate is not None else {}).items():
        if name.startswith("compute/") or name in ("optimizer", "passes"):
            within = "compute"
        else:
            within = "host" if name == "offload/host" else _NOT_COMPILED.get(name, name)
        found.setdefault(within, {})[name] = size
    return found


def _compared_time(estimate: Estimate | None, proof: Proof) -> tuple[Bar, ...]:
    before, sums = _as_compiled(estimate), by_kind(proof.collectives)
    items: dict[str, Sizes] = {}
    for name in dict.fromkeys([*before, *proof.time, *sums]):
        # What no compiler says is not nothing.
        compiled = None if name in _NOT_COMPILED.values() else proof.time.get(name, 0.0)
        hidden = max(sums[name]["seconds"] - sums[name]["exposed_seconds"], 0.0) if name in sums else 0.0
        estimated = None if estimate is None else sum(before.get(name, {}).values())
        items[name] = (estimated, compiled, (compiled or 0.0) + hidden)
    rows = worth_a_line(items, proof.step_seconds)
    most = max((size or 0.0 for _, sizes in rows for size in sizes), default=0.0)
    bars = []
    for name, (estimated, compiled, busy) in rows:
        exposed, beside = _track(compiled, most, _kind(name)), (busy or 0.0) - (compiled or 0.0)
        # What is left by rounding is not hidden.
        hidden = _track(beside, most, f"{_kind(name)} hidden") if beside > _ROUNDING * most else ()
        bars.append(_both(name, estimated, compiled, time_text, most, (*exposed, *hidden)))
        within = before.get(name, {})
        if estimate is not None and (len(within) > 1 or "offload/host" in within):
            bars += _within(_rows(within, estimate.step_seconds), most, {}, time_text)
    return tuple(bars)


def _compared_memory(estimate: Estimate | None, proof: Proof, kinds: Mapping[str, str]) -> tuple[Bar, ...]:
    """Return what is kept between steps and what comes to it within one; they add up to the peaks."""
    items = {} if estimate is None else estimate.memory
    whole = sum(items.values())
    arguments = min(proof.memory.get("arguments", 0.0), proof.peak_bytes)
    most = max(proof.peak_bytes, whole)
    bars = []
    for name, compiled, kept in (
        ("parameters, moments, batch", arguments, True),
        ("besides, at the peak", proof.peak_bytes - arguments, False),
    ):
        within = {item: size for item, size in items.items() if (item in _ARGUMENTS) == kept}
        estimated = None if estimate is None else sum(within.values())
        bars.append(_both(name, estimated, compiled, size_text, most, _track(compiled, most, "compute")))
        bars += _within(_rows(within, whole), most, kinds, size_text)
        scratch = 0.0 if kept else proof.memory.get("scratch", 0.0)
        if scratch:
            name = "of it cuDNN's, which was not there to say"
            figures = ("", size_text(scratch), "")
            tracks = ((), _track(scratch, most, "compute"))
            bars.append(Bar(name=name, figures=figures, tracks=tracks, depth=1, tone="soft"))
    return tuple(bars)


def _both(
    name: str,
    estimated: float | None,
    compiled: float | None,
    write: Callable[[float], str],
    most: float,
    track: Track,
) -> Bar:
    """Return an item as it is estimated and compiled, of which `track` is drawn."""
    figures = ("-" if one is None else write(one) for one in (estimated, compiled))
    return Bar(
        name=name,
        figures=(*figures, change(estimated, compiled)),
        tracks=(_track(estimated, most, "before"), track),
    )


def _within(
    rows: Mapping[str, float], most: float, kinds: Mapping[str, str], write: Callable[[float], str]
) -> list[Bar]:
    """Return what an item consists of by the Estimate; the compiler has but the sum."""
    return [
        Bar(
            name=name,
            figures=(write(size), "", ""),
            tracks=(_track(size, most, kinds.get(name, "before")), ()),
            depth=1,
            tone="soft",
        )
        for name, size in rows.items()
    ]


def _track(size: float | None, most: float, kind: str) -> Track:
    return (Segment(part=size / most, kind=kind),) if size else ()
