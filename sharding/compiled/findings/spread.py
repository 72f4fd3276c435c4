"""Findings about what lies over ``stage``, ``context`` and ``expert``, and is not done as planned."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from ...cost.calibration import calibration_for
from ...cost.pipeline import Lockstep
from ...hlo.frames import nearest_line
from ...hlo.loops import branches, callees
from ...hlo.shapes import leaves, parse_shape
from ...hlo.text import Instruction
from ...plans.proof import Finding
from ...plans.record import Record
from ...plans.specs import axes_in, cut_into
from ..evidence import Evidence
from .lines import MATTERS, SMALL, by_line, is_send, waits

#: An exchange that takes so many times the seconds of its formula is larger; latency and padding are less.
LARGER = 1.1
_FLOATS = ("f32", "bf16", "f16")
# Products of rows grouped by experts that a compiler without a kernel for them works out for all experts.
_RAGGED = "ragged_dot"
_BATCHED = re.compile(r"\blhs_batch_dims=\{([\d,]*)\}")


def send_not_overlapped(evidence: Evidence) -> list[Finding]:
    """Return what stages hand on while nothing is computed, where a chunk could be worked through."""
    chosen = [seen for seen in evidence.collectives if is_send(seen) and waits(seen)]
    return by_line(
        evidence,
        "send_not_overlapped",
        chosen,
        what="sent over {axes} {runs} times a step, no computing beside it",
        remedy="give each chunk more work beside a send: more rows a microbatch, fewer chunks "
        "(`interleave`), fewer stages; or compile with asynchronous sends for this chip",
        least=MATTERS,
    )


def grows_with_microbatches(evidence: Evidence) -> list[Finding]:
    """Return arrays of a pipeline that have a place for every microbatch, and grow with their number.

    The inputs of chunks that a stage keeps are 2 p v - 1; where that is as many nothing can be told.
    """
    planned = evidence.planned
    if planned is None or planned.mesh.get("stage", 1) == 1:
        return []
    stages, chunks, count = planned.mesh["stage"], planned.interleave, planned.microbatches
    ticks = count * chunks + stages - 1
    places = {count, count * chunks, ticks} - {2 * stages * chunks - 1, *_layers(planned)}
    found = []
    for buffer in evidence.memory.buffers:
        made = evidence.module.instructions.get(buffer.name)
        array = next(iter(leaves(parse_shape(buffer.shape))), None)
        if made is None or made.opcode == "parameter" or array is None or count <= stages:
            continue
        if array.dtype not in _FLOATS or not array.dims or array.dims[0] not in places:
            continue
        if buffer.bytes < MATTERS * evidence.peak_bytes:
            continue
        found.append(
            Finding(
                kind="grows_with_microbatches",
                what=f"{buffer.shape} lies in memory with a place for each of microbatches={count}: a "
                "pipeline's memory is to be the same for any number",
                remedy="return no array of the layers or of each row from the loss, or sum it there",
                bytes=buffer.bytes,
                source=buffer.source,
            )
        )
    return found


def _layers(planned: Record) -> Iterator[int]:
    """Yield what parameters lead with, whole, of a stage and of a chunk: as many as layers may be layers."""
    stages = planned.mesh["stage"]
    for array in planned.params.values():
        if array.shape:
            yield from (array.shape[0] // cut for cut in (1, stages, stages * planned.interleave))


def keys_gathered(evidence: Evidence) -> list[Finding]:
    """Return gathers over ``context`` where attention goes over it without any."""
    planned = evidence.planned
    if planned is None or planned.context in (None, "gathered"):
        return []
    chosen = [
        seen
        for seen in evidence.collectives
        if seen.collective.kind == "all_gather" and "context" in seen.collective.axes
    ]
    return by_line(
        evidence,
        "keys_gathered",
        chosen,
        what=f"gathered over {{axes}} {{runs}} times a step, though context={planned.context} is planned",
        remedy="attention here is not the one that the plan spreads: call "
        "`meshwright.sharding.ops.attention`, or see the plan's notes on what was not recognised",
    )


def foreign_in_ring(evidence: Evidence) -> list[Finding]:
    """Return collectives of other axes inside the loop in which keys go round the ring.

    An axis that cuts the batch or heads and is left to the compiler has it gather in every turn.
    """
    planned = evidence.planned
    if planned is None or planned.context != "ring":
        return []
    inside = set(_in_rings(evidence, planned.mesh.get("context", 1)))
    instructions = evidence.module.instructions
    chosen = [
        seen
        for seen in evidence.collectives
        if instructions[seen.collective.start].computation in inside
        and not {"context"}.issuperset(seen.collective.axes)
    ]
    return by_line(
        evidence,
        "foreign_in_ring",
        chosen,
        what="{collective} over {axes} in the turns of the ring, {runs} times a step",
        remedy="what attention reads is cut otherwise there than where it is made: cut batch and heads "
        "of queries, keys and values over the same axes",
        least=-1.0,
    )


def _with_bubble(planned: Record) -> float:
    """Return how often layers are run, those of a bubble too, over how often they are needed.

    An Estimate has what they exchange there under ``bubble``.
    """
    stages, chunks, count = planned.mesh.get("stage", 1), planned.interleave, planned.microbatches
    ticks = Lockstep(stages=stages, chunks=chunks, microbatches=count)
    return ticks.layer_ticks / (chunks * count) if stages > 1 else 1.0


def exchange_larger(evidence: Evidence) -> list[Finding]:
    """Return an exchange over ``expert`` that takes more seconds than its bytes by the formula."""
    planned = evidence.planned
    if planned is None or planned.estimate is None:
        return []
    hidden = calibration_for(planned.topology.chip.name).overlap_activations
    kinds = ("all_to_all", "ragged_all_to_all")
    priced = sum(planned.estimate.time.get(f"{kind}/expert", 0.0) for kind in kinds) / (1.0 - hidden)
    priced *= _with_bubble(planned)
    chosen = [
        seen
        for seen in evidence.collectives
        if seen.collective.kind in kinds and seen.collective.axes == ("expert",)
    ]
    taken = sum(seen.seconds for seen in chosen)
    if not priced or taken <= LARGER * priced or taken - priced < MATTERS * evidence.step_seconds:
        return []
    largest = max(chosen, key=lambda seen: seen.seconds)
    return [
        Finding(
            kind="exchange_larger",
            what=f"rows are exchanged over expert for {taken / priced:.2f} times what their bytes take by "
            "the formula",
            remedy="rows are exchanged in a wider type, or padded, or once more: cast them before "
            "`ops.experts`, keep its output under `remat`",
            seconds=taken - priced,
            bytes=sum(seen.collective.bytes * seen.runs for seen in chosen),
            source=largest.source,
        )
    ]


def dense_experts(evidence: Evidence) -> list[Finding]:
    """Return products of all rows with every expert, where each row goes to few."""
    planned = evidence.planned
    if planned is None:
        return []
    experts, tokens = _experts(planned), _tokens(planned)
    found = []
    for name, cost, runs in evidence.instruction_costs():
        count = _experts_of(evidence, evidence.module.instructions[name], experts, tokens)
        seconds = cost.seconds * runs
        if count < 2 or seconds < SMALL * evidence.step_seconds:
            continue
        found.append(
            Finding(
                kind="dense_experts",
                what=f"every row is multiplied by each of {count} experts, {runs:.0f} times a step",
                remedy="group rows by their experts: `meshwright.sharding.ops.experts`",
                seconds=seconds * (1.0 - 1.0 / count),
                source=nearest_line(evidence.module, name),
            )
        )
    return found


def _in_rings(evidence: Evidence, parts: int) -> Iterator[str]:
    """Yield the computations of loops in which keys go round, which turn once for each chunk but two."""
    instructions = evidence.module.instructions
    sending = {
        instructions[seen.collective.start].computation
        for seen in evidence.collectives
        if seen.collective.kind == "collective_permute" and seen.collective.axes == ("context",)
    }
    for loop in evidence.loops.values():
        if loop.body in sending and loop.trip_count in (parts - 2, parts - 1, parts):
            yield from _reached(evidence, loop.body)


def _reached(evidence: Evidence, computation: str) -> Iterator[str]:
    """Yield a computation and all that it runs."""
    yield computation
    inside = evidence.module.computations.get(computation)
    for name in () if inside is None else inside.instructions:
        instruction = evidence.module.instructions[name]
        for inner in (*callees(instruction).values(), *branches(instruction)):
            yield from _reached(evidence, inner)


def _experts(planned: Record) -> frozenset[int]:
    """Return how many experts a device may have of those that lie over ``expert`` or are named so."""
    dims = [(name, dim) for name, dim in planned.dims.items() if "expert" in name or "expert" in dim.axes]
    return frozenset(dim.size // cut_into(dim.axes, planned.mesh) for _, dim in dims)


def _tokens(planned: Record) -> float:
    """Return the tokens of a microbatch on a device."""
    arrays = planned.batch.values()
    sizes = (math.prod(one.shape) / cut_into(axes_in(one.spec), planned.mesh) for one in arrays)
    return max(sizes, default=math.inf) / planned.microbatches


def _experts_of(evidence: Evidence, one: Instruction, experts: frozenset[int], tokens: float) -> int:
    """Return by how many experts an instruction multiplies every row; 0 for any other."""
    inside = evidence.module.inside(one)
    members = () if inside is None else inside.instructions
    return max(
        (
            _dense_over(product, experts, tokens)
            for product in (one, *(evidence.module.instructions[name] for name in members))
            if product.opcode == "dot"
        ),
        default=0,
    )


def _dense_over(product: Instruction, experts: frozenset[int], tokens: float) -> int:
    batched = _BATCHED.search(product.attributes)
    array = next(iter(leaves(parse_shape(product.shape))), None)
    if array is None or batched is None or not batched[1]:
        return 0
    # The result leads with its batch dimensions; the rows of one group follow, then columns.
    batch = len(batched[1].split(","))
    count, rows = math.prod(array.dims[:batch]), math.prod(array.dims[batch:-1])
    ragged = _RAGGED in product.op_name and rows > 1
    return count if count in experts and (ragged or rows >= tokens) else 0
