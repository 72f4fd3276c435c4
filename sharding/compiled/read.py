"""From the text of an optimised, scheduled program to the `Proof`: what one device does in one step."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from ..cost.calibration import Calibration, calibration_for
from ..hardware.topology import Topology
from ..hlo.frames import nearest_line
from ..hlo.loops import loops, weights
from ..hlo.text import Program, SourceLine, parse_program
from ..plans.proof import CompiledCollective, LineCost, Proof
from ..plans.record import Record
from ..xla.options import product_cycles
from .collectives import Sites
from .evidence import Evidence, Seen
from .findings import findings
from .flops import flops
from .memory import memory as memory_of
from .schedule import for_all_alike
from .timeline import Timeline, Turn
from .wires import Fabric


def read_proof(
    text: str,
    *,
    topology: Topology,
    mesh: Mapping[str, int],
    peak_bytes: float | None,
    memory: Mapping[str, float],
    compile_seconds: float,
    versions: Mapping[str, str],
    planned: Record | None = None,
    calibration: Calibration | None = None,
    bundles: Mapping[str, int] | None = None,
) -> Proof:
    """Return what the compiler says of a step.

    Args:
      text: of the optimised program, `compiled.as_text()`; scheduled, as accelerators' programs are.
      topology: what it was compiled for.
      mesh: axis → size; the program's devices are those of ``mesh.devices.flat``.
      peak_bytes: the compiler's own figure, kept as it is; None where it states none of the device's, and the
        schedule's is taken.
      memory: bytes by what they are for, as `Proof.memory` has them.
      compile_seconds: how long the compiler took.
      versions: of what compiled it.
      planned: the plan that it was compiled from; findings compare with it.
      calibration: of links and of kernels without cycles; the chip's shipped one if not given.
      bundles: instruction → length of its schedule, as `schedule.read_bundles` has them.

    Raises:
      ValueError: `text` is not the text of an HLO module, or is one that no mesh of these axes can run.
    """
    efficiencies = calibration
    if efficiencies is None:
        efficiencies = calibration_for(topology.chip.name)
        options = {} if planned is None else planned.compiler_options
        share = product_cycles(options, topology, efficiencies.product_cycles)
        efficiencies = dataclasses.replace(efficiencies, product_cycles=share)
    program = parse_program(text)
    found = loops(program)
    fabric = Fabric(topology, mesh, efficiencies)
    sites = Sites(program, topology, mesh, fabric)
    schedules = for_all_alike(program, bundles or {})
    line = Timeline(program, found, sites, topology.chip, efficiencies, schedules)
    step = line.turn(program.entry)
    runs = weights(program, found, line.worst_branch)
    held = memory_of(program, found, topology.chip.platform)
    peak = held.peak_bytes if peak_bytes is None else peak_bytes
    evidence = Evidence(
        program=program,
        topology=topology,
        mesh=mesh,
        loops=found,
        weights=runs,
        turns=line.turns,
        memory=held,
        peak_bytes=peak,
        step_seconds=step.seconds,
        planned=planned,
    )
    return Proof(
        topology=str(topology),
        versions=dict(versions),
        peak_bytes=peak,
        step_seconds=step.seconds,
        compile_seconds=compile_seconds,
        time=dict(step.items),
        memory=dict(memory),
        collectives=_collectives(evidence),
        findings=findings(evidence),
        buffers=evidence.memory.buffers,
        lines=_lines(program, runs, line.turns),
        timeline=evidence.memory.timeline,
        flops=_flops(program, runs, line.turns),
        host_bytes=sum(sum(turn.hosts.values()) * runs.get(name, 0.0) for name, turn in line.turns.items()),
    )


def _collectives(evidence: Evidence) -> tuple[CompiledCollective, ...]:
    """Put those alike together: kind, axes, algorithm and whether asynchronous; the costliest first."""
    alike: dict[tuple[object, ...], list[Seen]] = {}
    for seen in evidence.collectives:
        site = seen.site
        alike.setdefault((site.kind, site.axes, site.algorithm.name, site.asynchronous), []).append(seen)
    rows = [
        CompiledCollective(
            kind=group[0].site.kind,
            axes=group[0].site.axes,
            count=sum(seen.runs for seen in group),
            bytes=sum(seen.site.bytes * seen.runs for seen in group),
            wire_bytes=sum(seen.site.wire_bytes * seen.runs for seen in group),
            seconds=sum(seen.seconds for seen in group),
            exposed_seconds=sum(seen.exposed_seconds for seen in group),
            algorithm=group[0].site.algorithm.name,
            asynchronous=group[0].site.asynchronous,
            source=max(group, key=lambda seen: seen.seconds).source,
        )
        for group in alike.values()
    ]
    return tuple(sorted(rows, key=lambda row: -row.seconds))


def _lines(program: Program, runs: Mapping[str, float], turns: Mapping[str, Turn]) -> tuple[LineCost, ...]:
    """Return what each of the user's lines costs in computing, the costliest first."""
    found: dict[SourceLine, float] = {}
    for computation, turn in turns.items():
        for name, done in turn.works.items():
            seconds = done.seconds * runs.get(computation, 0.0)
            line = nearest_line(program, name) if seconds else None
            if line is not None:
                found[line] = found.get(line, 0.0) + seconds
    rows = [LineCost(source=line, seconds=seconds) for line, seconds in found.items()]
    return tuple(sorted(rows, key=lambda row: -row.seconds))


def _flops(program: Program, runs: Mapping[str, float], turns: Mapping[str, Turn]) -> float:
    return sum(
        flops(program, program.instructions[name]) * runs.get(computation, 0.0)
        for computation, turn in turns.items()
        for name in turn.works
    )
