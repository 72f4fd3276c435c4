"""What the compiler made of a plan beside its Estimate, as plain data for table, notebook and page."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from ..plans.proof import nearby
from ..words import gib, seconds

if TYPE_CHECKING:
    from ..hlo.text import SourceLine
    from ..plans.estimate import Estimate
    from ..plans.proof import CompiledCollective, Finding, Proof
    from ..plans.record import Record

# Items below this part of the whole, estimated and compiled, are one line together.
_WORTH_A_LINE = 0.004
# Items of an Estimate that are no work of the device's, which a compiled program says nothing of.
_NOT_COMPILED = {"host": "host, issuing", "stragglers": "stragglers", "bubble": "bubble"}
# What of an Estimate's memory is a compiled step's arguments: what it is given and gives back.
_ARGUMENTS = ("params", "optimizer", "batch")
# Distributions that all platforms have, so that they name no compiler unless there is no other.
_EVERYWHERE = ("jax", "jaxlib")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """One figure twice: `estimated` and `compiled`, each None where that side does not know it.

    `hidden` is what of a compiled collective runs beside computing, in seconds beyond `compiled`.
    """

    name: str
    estimated: float | None
    compiled: float | None
    write: Callable[[float], str] = dataclasses.field(repr=False, compare=False)
    hidden: float = 0.0

    def texts(self) -> tuple[str, str, str]:
        """Return both figures and their difference in words; ``-`` where there is none."""
        first, second = ("-" if one is None else self.write(one) for one in (self.estimated, self.compiled))
        return first, second, change(self.estimated, self.compiled)

    @property
    def largest(self) -> float:
        """The larger of the two, hidden parts counted."""
        return max(self.estimated or 0.0, (self.compiled or 0.0) + self.hidden)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """Everything that a proof shows.

    `totals` are seconds of a step and bytes of a device; `time` and `memory` their items, of collectives what
    is exposed. `collectives` and `findings` are the proof's, the costliest first; `lines` pairs places with
    seconds, `buffers` (what, place) with bytes. `timeline` are bytes alive through the step.
    """

    title: str
    totals: tuple[Pair, ...]
    time: tuple[Pair, ...]
    memory: tuple[Pair, ...]
    collectives: tuple[CompiledCollective, ...]
    findings: tuple[Finding, ...]
    buffers: tuple[tuple[str, str, float], ...]
    lines: tuple[tuple[str, float], ...]
    timeline: tuple[float, ...]
    step_seconds: float
    peak_bytes: float


def compiled_view(plan: Record) -> Compiled | None:
    """Return what the proof of `plan` shows; None without one."""
    proof, estimate = plan.proof, plan.estimate
    if proof is None:
        return None
    return Compiled(
        title=_title(proof),
        totals=(
            Pair(
                name="step",
                estimated=None if estimate is None else estimate.step_seconds,
                compiled=proof.step_seconds,
                write=time_text,
            ),
            Pair(
                name="memory",
                estimated=None if estimate is None else estimate.peak_bytes,
                compiled=proof.peak_bytes,
                write=size_text,
            ),
        ),
        time=_time(proof, estimate),
        memory=_memory(proof, estimate),
        collectives=tuple(sorted(proof.collectives, key=lambda row: (-row.seconds, -row.bytes))),
        findings=tuple(sorted(proof.findings, key=lambda row: (-row.seconds, -row.bytes))),
        buffers=tuple(
            (f"{row.name} {row.shape}".strip(), place(row.source), row.bytes)
            for row in sorted(proof.buffers, key=lambda row: -row.bytes)
        ),
        lines=tuple(
            (place(row.source, function=True), row.seconds)
            for row in sorted(proof.lines, key=lambda row: -row.seconds)
        ),
        timeline=proof.timeline,
        step_seconds=proof.step_seconds,
        peak_bytes=proof.peak_bytes,
    )


def compiler_of(versions: Mapping[str, str]) -> str:
    """Return the compiler's name and version: that of a platform's own distribution, else that of jaxlib.

    >>> compiler_of({"jax": "0.10.2", "jaxlib": "0.10.2", "libtpu": "0.0.42.1"})
    'libtpu 0.0.42.1'
    """
    own = [name for name in versions if name not in _EVERYWHERE] or [n for n in _EVERYWHERE if n in versions]
    return f"{own[-1]} {versions[own[-1]]}" if own else "XLA"


def place(source: SourceLine | None, *, function: bool = False) -> str:
    """Write a source line as ``models/block.py:88``: below the working directory, or with one folder.

    Nothing where it is not known; with `function`, whose line it is as well.
    """
    if source is None:
        return ""
    of = f" {source.function}" if function and source.function else ""
    return f"{nearby(source.file)}:{source.line}{of}"


def over(axes: Sequence[str]) -> str:
    """Write the mesh axes of a collective as an item of time does."""
    return "×".join(axes) or "none"


def how(row: CompiledCollective) -> str:
    """Say how a collective runs: by which algorithm, beside what."""
    if row.asynchronous:
        hidden = 1.0 - row.exposed_seconds / row.seconds if row.seconds else 1.0
        beside = f"asynchronous, {max(hidden, 0.0):.0%} beside computing"
    else:
        beside = "synchronous"
    return ", ".join(filter(None, (beside, row.algorithm)))


def time_text(time: float) -> str:
    """Write a time as `seconds` does, and none at all as ``0``."""
    return seconds(time) if time else "0"


def size_text(size: float) -> str:
    """Write bytes as `gib` does, and few of them as such."""
    return gib(size) if size >= 2**10 / 10 else f"{size:.0f} B" if size else "0"


def cost(row: Finding) -> str:
    """Write what a finding costs: seconds of a step, else bytes of a device, else nothing."""
    return seconds(row.seconds) if row.seconds else size_text(row.bytes) if row.bytes else ""


def kind_of(row: Finding) -> str:
    """Write a finding's kind in words."""
    return row.kind.replace("_", " ")


def change(before: float | None, after: float | None) -> str:
    """Write the difference of two figures as ``+6.2%``, or ``x 3.1`` where it is more than twofold."""
    if not before or after is None:
        return ""
    ratio = after / before
    return f"x {ratio:.3g}" if ratio >= 2 else f"{ratio - 1:+.1%}"


def estimated_time(estimate: Estimate | None) -> dict[str, float]:
    """Return an Estimate's items of time by the names that a compiled step has for them."""
    found: dict[str, float] = {}
    for name, size in (estimate.time if estimate is not None else {}).items():
        if name.startswith("compute/") or name == "optimizer":
            name = "compute"
        elif name == "offload/host":
            name = "host"
        else:
            name = _NOT_COMPILED.get(name, name)
        found[name] = found.get(name, 0.0) + size
    return found


def _title(proof: Proof) -> str:
    known = ", known from before" if proof.cached else ""
    return f"compiled by {compiler_of(proof.versions)} in {_rounded(proof.compile_seconds)} s{known}"


def _rounded(time: float) -> str:
    return f"{time:.0f}" if time >= 10 else f"{time:.2g}"


def _time(proof: Proof, estimate: Estimate | None) -> tuple[Pair, ...]:
    before = estimated_time(estimate)
    hidden: dict[str, float] = {}
    for row in proof.collectives:
        name = f"{row.kind}/{over(row.axes)}"
        hidden[name] = hidden.get(name, 0.0) + max(row.seconds - row.exposed_seconds, 0.0)
    names = dict.fromkeys([*before, *proof.time, *hidden])
    pairs = [
        Pair(
            name=name,
            estimated=None if estimate is None else before.get(name, 0.0),
            # What no compiler says is not nothing.
            compiled=None if name in _NOT_COMPILED.values() else proof.time.get(name, 0.0),
            write=time_text,
            hidden=hidden.get(name, 0.0),
        )
        for name in names
    ]
    return _ordered(pairs, proof.step_seconds, time_text)


def _memory(proof: Proof, estimate: Estimate | None) -> tuple[Pair, ...]:
    """Return what is kept between steps and what comes to it within one; they add up to the peaks."""
    items = {} if estimate is None else estimate.memory
    kept = sum(items.get(name, 0.0) for name in _ARGUMENTS)
    arguments = min(proof.memory.get("arguments", 0.0), proof.peak_bytes)
    rows = [
        ("parameters, moments, batch", kept, arguments),
        ("besides, at the peak", sum(items.values()) - kept, proof.peak_bytes - arguments),
    ]
    return tuple(
        Pair(name=name, estimated=None if estimate is None else before, compiled=after, write=size_text)
        for name, before, after in rows
    )


def _ordered(pairs: Iterable[Pair], whole: float, write: Callable[[float], str]) -> tuple[Pair, ...]:
    """Return the pairs by size, the small ones as one."""
    ordered = sorted(pairs, key=lambda pair: -pair.largest)
    large = [pair for pair in ordered if pair.largest >= _WORTH_A_LINE * whole]
    small = [pair for pair in ordered if 0.0 < pair.largest < _WORTH_A_LINE * whole]
    if len(small) == 1:
        return (*large, *small)
    if not small:
        return tuple(large)
    rest = Pair(
        name="the rest",
        estimated=None if small[0].estimated is None else sum(pair.estimated or 0.0 for pair in small),
        compiled=sum(pair.compiled or 0.0 for pair in small),
        write=write,
        hidden=sum(pair.hidden for pair in small),
    )
    return (*large, rest)
