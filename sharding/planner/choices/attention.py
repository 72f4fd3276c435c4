"""Which kernel carries out attention: what the chip has, what it supports, and blocks that fit its memory."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Mapping, Sequence, Set
from typing import Any

from ...cost.compute import FusedAttention
from ...errors import UserError, nearest
from ...hardware.chip import Chip
from ...hardware.topology import Topology
from ...ops.attention import AttentionCall, attention_call
from ...ops.context.taken import Site, Taken, taken
from ...ops.cudnn import sliced
from ...ops.kernels import (
    block_that_divides,
    facts_on,
    gradient_scratch,
    has_capability,
    kernel_facts,
    refusal,
    takes_packed,
)
from ...program.lines import line_of
from ...program.program import Equation, Program
from ...xla.gpu_targets import compute_capability

# What may be declared: what the chip wants, plain XLA, or one of the kernels.
AUTO, PLAIN = "auto", "xla"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chosen:
    """The kernel of a program's attention on one topology, for the calls that it takes.

    kernels:       as a Plan has them; empty for plain XLA.
    notes:         why the chip's kernel is not used, or not for all calls.
    implementation: its name, None for plain XLA.
    facts:         what it can do on the chip, None without one.
    scratch:       bytes that its gradient works in, for each element of its result.
    """

    kernels: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    implementation: str | None = None
    calls: frozenset[int] = frozenset()
    facts: Mapping[str, Any] | None = None
    scratch: float = 0.0

    def taken(self, site: Site, word: str | None) -> Taken:
        """Return what carries a call out where it lies so, and a plan has this kernel and `word`."""
        settings = self.kernels.get("attention")
        return taken(site, settings, self.facts, word)

    def notes_on(self, sites: Mapping[int, Site], word: str | None) -> tuple[str, ...]:
        """Say why the chip's kernel does not carry attention out where calls lie as `sites`, by index."""
        left = [
            site
            for index, site in sites.items()
            if index in self.calls and self.implementation and self.taken(site, word).by is None
        ]
        if not left:
            return self.notes
        why = self._why_left(left[0])
        return (*self.notes, f"attention by {self.implementation} {why}; XLA computes it")

    def _why_left(self, site: Site) -> str:
        settings = self.kernels["attention"]
        rows, keys = site.query.shape[1] // site.parts(1), site.key.shape[1]
        if not site.query_axes[3] and "block_q" in settings:
            blocks = [
                block_that_divides(*one)
                for one in ((rows, settings["block_q"]), (keys, settings["block_kv"]))
            ]
            # Both divide, so it is their number.
            if None not in blocks:
                return (
                    f"keeps a table of all pairs of blocks of {rows:,} queries and {keys:,} keys, which are "
                    "more than a chip's scalar memory holds"
                )
        what = "heads" if site.query_axes[3] else "sequences"
        axes = ", ".join(site.query_axes[3] or site.query_axes[1])
        return f"needs {what} whole, which {axes} cuts"


def choose(
    program: Program,
    topology: Topology,
    declared: str | Sequence[str] | None = None,
    segments: int | None = None,
) -> Chosen:
    """Return the kernel for the calls of `ops.attention` in `program`.

    `declared` is ``auto`` (the chip's own), ``xla``, a kernel, or several of these, of which the first is
    taken that can do any of the calls. A call that the kernel does not support is left to XLA, and a note
    says so. `segments` is how many neighbours of one id a row has at most, None where that is not known.

    Raises UserError for a declared kernel that the chip does not have, or that can do none of the calls.
    """
    wanted = [AUTO] if declared is None else [declared] if isinstance(declared, str) else list(declared)
    facts = kernel_facts()
    for name in wanted:
        if name not in (AUTO, PLAIN, *facts):
            raise UserError(f"attention={name!r} is no kernel; {nearest(name, [AUTO, PLAIN, *facts])}")
    calls = [(equation, call) for equation in program.equations() if (call := attention_call(equation.eqn))]
    for name in wanted[:-1]:
        with contextlib.suppress(UserError):
            return _chosen(name, calls, topology.chip, segments)
    return _chosen(wanted[-1], calls, topology.chip, segments)


def _chosen(
    declared: str, calls: Sequence[tuple[Equation, AttentionCall]], chip: Chip, segments: int | None
) -> Chosen:
    """Return the choice of one declared word. Raises UserError as `choose` does."""
    wanted = chip.attention_kernel if declared == AUTO else declared
    if wanted in (None, PLAIN):
        return Chosen()
    capability = compute_capability(chip)
    facts = facts_on(wanted, capability)
    if declared != AUTO and chip.platform not in facts["platforms"]:
        own = f"{chip.attention_kernel}, {PLAIN}" if chip.attention_kernel else PLAIN
        raise UserError(f"attention={wanted!r} is no kernel of {chip.name}; known for it: {own}")
    if not calls:
        if declared != AUTO:
            raise UserError(
                f"attention={wanted!r}, but the program calls attention nowhere; it is told by "
                "meshwright.sharding.ops.attention"
            )
        return Chosen()
    taken, left = [], []
    for equation, call in calls:
        why = refusal(facts, call, *_arrays(equation))
        if why is None:
            taken.append((equation, call))
        else:
            left.append((equation, why))
    blocks = _blocks(facts, taken, chip)
    why = None
    if blocks is None:
        why = f"no block of it fits the {chip.kernel_vmem_bytes} bytes of vector memory that a kernel gets"
    elif taken and facts["packs"]:
        why = _why_unpacked(facts, taken, capability, segments)
    if why is not None:
        left, taken = [(equation, why) for equation, _ in calls], []
    if not taken and declared != AUTO:
        raise UserError(f"attention by {wanted} cannot be had: {left[0][1]}")
    notes = _notes(wanted, left, len(calls))
    if not taken:
        return Chosen(notes=notes)
    settings = {"implementation": wanted, **(blocks or {})}
    return Chosen(
        kernels={"attention": {**settings, "segments": segments} if facts["packs"] else settings},
        notes=notes,
        implementation=wanted,
        calls=frozenset(equation.index for equation, _ in taken),
        facts=facts,
        scratch=max((_scratch(facts, one, segments) for one, _ in taken), default=0.0),
    )


def _why_unpacked(
    facts: Mapping[str, Any],
    calls: Sequence[tuple[Equation, AttentionCall]],
    capability: str | None,
    segments: int | None,
) -> str | None:
    """Return why a kernel of packed rows has nothing to read them by, None if it has."""
    if not has_capability(capability, facts["capability"]):
        return f"it is for GPUs of compute capability {facts['capability']} and later"
    if not any(takes_packed(call) for _, call in calls):
        return "no call has segments that queries and keys share, without a window"
    if segments is None:
        return "how many segments a row has at most is not known; give segments"
    return None if segments > 1 else "it is for rows of at least two segments"


def _notes(kernel: str, left: Sequence[tuple[Equation, str]], calls: int) -> tuple[str, ...]:
    """Say which calls XLA computes, and why the kernel does not; all of one reason in one note."""
    if len({why for _, why in left}) == 1 and len(left) == calls:
        return (f"attention by {kernel} cannot be had: {left[0][1]}; XLA computes it",)
    notes = []
    for why in dict.fromkeys(why for _, why in left):
        lines = [line_of(equation.eqn) for equation, other in left if other == why]
        where = ", ".join(dict.fromkeys(lines))
        notes.append(
            f"attention by {kernel} cannot be had for {len(lines)} of {calls} calls ({where}): {why}; "
            "XLA computes these"
        )
    return tuple(notes)


def cost(chosen: Chosen, program: Program, calls: Set[int] | None = None) -> FusedAttention:
    """Return what decides how much the kernel computes of the calls that it takes, or of `calls` of these."""
    assert chosen.implementation is not None
    assert chosen.facts is not None
    facts, mine = chosen.facts, chosen.calls if calls is None else calls
    taken = [
        (equation, call)
        for equation in program.equations()
        if equation.index in mine and (call := attention_call(equation.eqn))
    ]
    told = {"gradient": kernel_facts()[chosen.implementation]["gradient"], "scratch": chosen.scratch}

    def of(some: Sequence[tuple[Equation, AttentionCall]]) -> FusedAttention:
        masked = _masked(some) if facts.get("dense_segments") else 0.0
        slices = max((_slices(facts, *one) for one in some), default=0.0)
        return FusedAttention(share=_share(some), masked=masked, slices=slices, **told)

    whole, single = of(taken), {one[0].index: of([one]) for one in taken}
    alike = len({(one.share, one.masked) for one in single.values()}) == 1
    return whole if alike else dataclasses.replace(whole, calls=single)


def priced_as(chosen: Chosen) -> str | None:
    """Return the kernel whose efficiencies are known for the chosen one."""
    if chosen.implementation is None:
        return None
    return chosen.implementation


def _scratch(facts: Mapping[str, Any], equation: Equation, segments: int | None) -> float:
    """Return the bytes that a call's gradient works in, for each element of its result."""
    query, key, _ = _arrays(equation)
    runs = (segments or 1) if facts["packs"] else 1
    return gradient_scratch(facts, query.shape[2], key.shape[2], runs)


def _slices(facts: Mapping[str, Any], equation: Equation, call: AttentionCall) -> float:
    """Return the bytes of keys and values that a call reads in parts, for each element of its result."""
    if not (facts.get("dense_segments") and call.segments):
        return 0.0
    query, key, value = _arrays(equation)
    times = sliced(query.shape[1], key.shape[1], causal=call.causal, window=call.window)
    elements = math.prod(query.shape[:3]) * value.shape[3]
    return times * key.dtype.itemsize * (key.size + value.size) / elements


def _arrays(equation: Equation) -> tuple[Any, Any, Any]:
    """Return shapes and types of queries, keys and values."""
    query, key, value = (atom.aval for atom in equation.eqn.invars[:3])
    return query, key, value


def _blocks(
    facts: Mapping[str, Any], calls: Sequence[tuple[Equation, AttentionCall]], chip: Chip
) -> dict[str, int] | None:
    """Return the largest blocks that fit for every call, none for a kernel without, None if none fits."""
    if "blocks" not in facts:
        return {}
    for block in facts["blocks"]:
        sizes = []
        for equation, call in calls:
            query, key, value = _arrays(equation)
            rows, columns = (block_that_divides(array.shape[1], block) or block for array in (query, key))
            sizes.append(
                vmem_bytes(
                    rows,
                    columns,
                    head_dim=query.shape[3],
                    value_dim=value.shape[3],
                    item=query.dtype.itemsize,
                    capped=call.cap is not None,
                )
            )
        if chip.kernel_vmem_bytes is None or max(sizes, default=0) <= chip.kernel_vmem_bytes:
            return {"block_q": block, "block_kv": block}
    return None


def vmem_bytes(
    block_q: int, block_kv: int, *, head_dim: int, value_dim: int, item: int, capped: bool = False
) -> int:
    """Return an upper bound of the vector memory of splash's kernels, forward and for the gradient.

    From the shapes of their blocks, which are held twice so that one is fetched while the other is worked on,
    of their accumulators, and of a block of scores in float32 and one of what becomes of them, which v4
    spills of its registers; with a soft cap one more, its gradient being of the scores before it. A number
    for each row, such as its segment, fills a vector register's 128 lanes.
    """
    scores = (3 if capped else 2) * 4 * block_q * block_kv
    heads, lanes = head_dim + value_dim, 128 * 4
    forward = 2 * item * heads * (block_q + block_kv) + 4 * value_dim * block_q + 8 * lanes * block_q
    backward = 2 * item * heads * (block_q + 2 * block_kv) + 4 * heads * block_kv + 2 * lanes * block_kv
    return scores + max(forward, backward)


def _share(calls: Sequence[tuple[Equation, AttentionCall]]) -> float:
    """Return the share of scores that causality and windows leave, over all calls by their work."""
    seen = total = 0.0
    for equation, call in calls:
        query, key, _ = _arrays(equation)
        queries, keys = query.shape[1], key.shape[1]
        seen += _work(equation, call)
        total += _work(equation, call) * queries * keys / call.visible(queries, keys)
    return seen / total


def _masked(calls: Sequence[tuple[Equation, AttentionCall]]) -> float:
    """Return the share of the calls' work that is with segments."""
    work = [(_work(equation, call), call.segments > 0) for equation, call in calls]
    return sum(size for size, masked in work if masked) / sum(size for size, _ in work)


def _work(equation: Equation, call: AttentionCall) -> float:
    query, key, _ = _arrays(equation)
    each = float(equation.multiplicity * query.shape[0] * query.shape[2] * query.shape[3])
    return each * call.visible(query.shape[1], key.shape[1])
