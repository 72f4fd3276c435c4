"""Proof of a compiled step, read from the text of its optimised and scheduled program."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from ..cost.calibration import Calibration, calibration_for
from ..hardware.topology import Topology
from ..hlo.frames import nearest_line
from ..hlo.loops import loops, run_counts
from ..hlo.text import SourceLine, parse_hlo
from ..ops.kernels import kernel_facts
from ..plans.proof import CompiledCollective, LineCost, Proof
from ..plans.record import Record
from ..xla.compiler import compiler_of
from ..xla.options import product_cycles
from .collectives import CollectiveFinder
from .evidence import Evidence, StepCollective
from .findings import findings
from .flops import flops
from .memory import Memory
from .memory import memory as memory_of
from .schedule import for_all_alike
from .timeline import Timeline
from .wires import Fabric


def read_proof(
    text: str,
    *,
    topology: Topology,
    mesh: Mapping[str, int],
    peak_bytes: float | None,
    memory: Mapping[str, float] | None,
    compile_seconds: float,
    versions: Mapping[str, str],
    planned: Record | None = None,
    calibration: Calibration | None = None,
    bundles: Mapping[str, int] | None = None,
    quick: bool = False,
) -> Proof:
    """Return the proof of a step: what one device does in it, by the compiler's word.

    Args:
      text: of the optimised and scheduled program, as ``compiled.as_text()`` gives it.
      topology: what it was compiled for.
      mesh: axis → size; the program's devices are those of ``mesh.devices.flat``.
      peak_bytes: the compiler's own figure of a device's memory; None where it states none, and the replay of
        buffers gives it. Of untuned products (`Compiler.untuned_peak`) the larger of both counts.
      memory: bytes by what they are for, as in `Proof.memory`; None where the compiler states none, and they
        are those of the replay.
      compile_seconds: how long the compiler took.
      versions: distribution → version of what compiled it.
      planned: the plan that it was compiled from, with which findings compare it.
      calibration: efficiencies of links and kernels; those of the topology's chip if not given.
      bundles: instruction → length of its schedule, as `schedule.read_bundles` returns them.
      quick: whether the program was read before machine code was made of it.

    Raises:
      ValueError: `text` is not the text of an HLO module, or its groups do not fit a mesh of these axes.
    """
    efficiencies, kernels = calibration, {}
    if efficiencies is None:
        efficiencies = calibration_for(topology.chip.name)
        kernels = {name: calibration_for(topology.chip.name, name) for name in kernel_facts()}
        options = {} if planned is None else planned.compiler_options
        share = product_cycles(options, topology, efficiencies.product_cycles)
        efficiencies = dataclasses.replace(efficiencies, product_cycles=share)
    module = parse_hlo(text)
    found = loops(module)
    fabric = Fabric(topology, mesh, efficiencies)
    line = Timeline(
        module=module,
        loops=found,
        finder=CollectiveFinder(module, mesh, fabric),
        chip=topology.chip,
        calibration=efficiencies,
        bundles=for_all_alike(module, bundles or {}),
        kernels=kernels,
    )
    step = line.cost(module.entry)
    held = memory_of(module, found, topology.chip.platform)
    peak = held.peak_bytes if peak_bytes is None else peak_bytes + held.scratch_bytes
    sizes = _replayed(held) if memory is None else dict(memory)
    if compiler_of(topology).untuned_peak and not sizes.get("host"):
        peak = max(peak, held.peak_bytes)
    evidence = Evidence(
        module=module,
        loops=found,
        run_counts=run_counts(module, found, line.slowest_branch),
        costs=line.costs,
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
        memory=sizes | ({"scratch": held.scratch_bytes} if held.scratch_bytes else {}),
        collectives=_collectives(evidence),
        findings=findings(evidence),
        buffers=evidence.memory.buffers,
        lines=_lines(evidence),
        timeline=evidence.memory.timeline,
        flops=sum(
            flops(module, module.instructions[name]) * runs for name, _, runs in evidence.instruction_costs()
        ),
        host_bytes=sum((moved for _, moved in evidence.host_transfers()), 0.0),
        quick=quick,
    )


def _replayed(held: Memory) -> dict[str, float]:
    """Return bytes by what they are for, as far as the replay of buffers tells them apart."""
    return {
        "arguments": held.argument_bytes,
        "temporaries": held.peak_bytes - held.argument_bytes - held.output_bytes,
        "outputs": held.output_bytes,
        "host": held.host_bytes,
    }


def _collectives(evidence: Evidence) -> tuple[CompiledCollective, ...]:
    """Return the collectives by kind, axes, algorithm and whether asynchronous, the costliest first."""
    alike: dict[tuple[object, ...], list[StepCollective]] = {}
    for seen in evidence.collectives:
        one = seen.collective
        alike.setdefault((one.kind, one.axes, one.algorithm.name, one.asynchronous), []).append(seen)
    rows = [
        CompiledCollective(
            kind=group[0].collective.kind,
            axes=group[0].collective.axes,
            count=sum(seen.runs for seen in group),
            bytes=sum(seen.collective.bytes * seen.runs for seen in group),
            wire_bytes=sum(seen.collective.wire_bytes * seen.runs for seen in group),
            seconds=sum(seen.seconds for seen in group),
            exposed_seconds=sum(seen.exposed_seconds for seen in group),
            algorithm=group[0].collective.algorithm.name,
            asynchronous=group[0].collective.asynchronous,
            source=max(group, key=lambda seen: seen.seconds).source,
        )
        for group in alike.values()
    ]
    return tuple(sorted(rows, key=lambda row: -row.seconds))


def _lines(evidence: Evidence) -> tuple[LineCost, ...]:
    """Return the seconds of computing of each line of the user's code, the costliest first."""
    found: dict[SourceLine, float] = {}
    for name, cost, runs in evidence.instruction_costs():
        line = nearest_line(evidence.module, name) if cost.seconds else None
        if line is not None:
            found[line] = found.get(line, 0.0) + cost.seconds * runs
    rows = [LineCost(source=line, seconds=seconds) for line, seconds in found.items()]
    return tuple(sorted(rows, key=lambda row: -row.seconds))
