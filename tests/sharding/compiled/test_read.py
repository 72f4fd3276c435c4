"""What is read of small programs, compiled for real for every family of chips, against counts by hand."""

from __future__ import annotations

import dataclasses
import re

import pytest
from compiled_programs import (
    BATCH,
    COLUMNS,
    EMBED,
    HIDDEN,
    LARGE,
    LAYERS,
    ROWS,
    SEQUENCE,
    STEPS,
    WIDTH,
    Compiled,
    texts,
)
from meshwright.sharding import Topology
from meshwright.sharding.compiled.memory import memory
from meshwright.sharding.cost.calibration import calibration_for
from meshwright.sharding.hlo.loops import loops
from meshwright.sharding.hlo.text import parse_hlo
from meshwright.sharding.plans.proof import Proof
from meshwright.sharding.xla.targets import missing

TPUS = (
    "v5p:4x4x4/fsdp=16,tensor=4/all_gather,all_reduce,reduce_scatter,all_to_all,collective_permute,perceptron,"
    "nested,endless,product,scaled,scaled_float32,overlapped,zeros,sliced,replicated,padded",
    "v4:2x2x2/fsdp=8/all_gather,reduce_scatter,product,scaled,scaled_float32",
    "v5e:4x4/data=2,fsdp=8/all_gather,all_reduce,collective_permute,product,scaled,scaled_float32",
    "v6e:4x4/data=2,fsdp=8/all_gather,all_to_all,product,scaled,scaled_float32",
    "tpu7x:2x2x1/fsdp=8/all_gather,all_reduce,reduce_scatter,product,scaled,scaled_float32",
    "2*v5e:2x2/fsdp=4,data=2/all_reduce",
    "v5e:8x16/fsdp=16,tensor=8/carried",
)
GPUS = (
    "h100:2x8/data=2,fsdp=8/all_gather,all_reduce,reduce_scatter,all_to_all,collective_permute,perceptron,"
    "nested,product",
)
SLOW = ("v5p:2x2x2/fsdp=8/offloaded",)
# Compilers whose programs differ from another chip's by numbers alone.
ALIKE = ("v4:2x2x2", "v6e:4x4", "tpu7x:2x2x1")
SHARD = ROWS * COLUMNS * 2  # bytes of bfloat16
# What a compiler makes of a reduce-scatter that is not a ring over one torus axis.
REDUCED = {"v4:2x2x2": "all_reduce"}


def _cases(specs):
    return [
        f"{topology}/{program}"
        for topology, _, programs in (spec.split("/") for spec in specs)
        for program in programs.split(",")
    ]


def _marked(cases):
    return [pytest.param(one, marks=pytest.mark.slow if one.startswith(ALIKE) else ()) for one in cases]


def _compiled(case: str) -> Compiled:
    topology = case.split("/")[0]
    reason = missing(Topology.parse(topology))
    if reason is not None:
        pytest.skip(reason)
    (spec,) = [spec for spec in (*TPUS, *GPUS, *SLOW) if spec.split("/")[0] == topology]
    return texts(spec)[case]


def _proof(case: str) -> Proof:
    return _compiled(case).proof()


ALONE = [
    case
    for case in _cases(TPUS + GPUS)
    if case.split("/")[1]
    in ("all_gather", "all_reduce", "reduce_scatter", "all_to_all", "collective_permute")
]


@pytest.mark.parametrize("case", _marked(ALONE))
def test_a_collective_alone_is_read_as_written(case):
    topology, asked = case.split("/")
    proof, mesh = _proof(case), _compiled(case).mesh
    axis = list(mesh)[-1]
    n = mesh[axis]
    kind = REDUCED.get(topology, asked) if asked == "reduce_scatter" else asked
    (row,) = proof.collectives
    assert (row.kind, row.axes, row.count) == (kind, (axis,), 1)
    bytes_ = {"all_gather": n * SHARD, "reduce_scatter": SHARD / n}.get(kind, SHARD)
    sent = {
        "all_gather": (n - 1) * SHARD,
        "all_reduce": 2 * (n - 1) / n * SHARD,
        "collective_permute": SHARD,
    }.get(kind, (n - 1) / n * SHARD)
    assert (row.bytes, row.wire_bytes) == pytest.approx((bytes_, sent))
    assert row.seconds > 0
    assert row.algorithm
    # Nothing else is there to run beside it.
    assert row.exposed_seconds == pytest.approx(row.seconds, rel=0.1)
    # Between slices, and for a reduction put in another's place, nobody says which line asked.
    if topology[0] != "2" and kind == asked:
        assert row.source is not None
        assert row.source.file.endswith("compiled_programs.py")


@pytest.mark.parametrize("case", _marked(_cases(TPUS + GPUS)))
def test_the_items_of_time_add_up_and_a_proof_survives_its_record(case):
    proof = _proof(case)
    assert sum(proof.time.values()) == pytest.approx(proof.step_seconds)
    exposed = sum(row.exposed_seconds for row in proof.collectives)
    assert exposed == pytest.approx(
        sum(seconds for item, seconds in proof.time.items() if "/" in item), abs=1e-12
    )
    assert all(row.exposed_seconds <= row.seconds * (1 + 1e-9) for row in proof.collectives)
    assert sum(line.seconds for line in proof.lines) <= proof.time.get("compute", 0.0) * (1 + 1e-9)
    assert Proof.from_dict(proof.to_dict()) == proof


@pytest.mark.parametrize("case", ["v5p:4x4x4/perceptron", "h100:2x8/perceptron"])
def test_a_perceptron_gathers_scatters_and_multiplies_what_can_be_counted(case):
    proof, mesh = _proof(case), _compiled(case).mesh
    axis = list(mesh)[-1]
    n = mesh[axis]
    weight = WIDTH * HIDDEN * 2
    gathered = [row for row in proof.collectives if row.kind == "all_gather"]
    assert {row.axes for row in gathered} == {(axis,)}
    assert sum(row.bytes for row in gathered) == 2 * weight
    assert sum(row.wire_bytes for row in gathered) == pytest.approx(2 * weight * (n - 1) / n)
    scattered = [row for row in proof.collectives if row.kind == "reduce_scatter"]
    assert sum(row.bytes for row in scattered) == pytest.approx(2 * weight / n)
    # Two products forwards; backwards two more for the second layer and one for the first.
    assert proof.flops == 5 * 2 * BATCH * WIDTH * HIDDEN


@pytest.mark.parametrize("case", ["v5p:4x4x4/nested", "h100:2x8/nested"])
def test_what_loops_hold_counts_as_often_as_they_turn(case):
    proof = _proof(case)
    reduced = [row for row in proof.collectives if row.kind == "all_reduce"]
    assert sum(row.count for row in reduced) == STEPS * (LAYERS + 1)
    assert sum(row.bytes for row in reduced) == STEPS * (LAYERS + 1) * BATCH * WIDTH * 2
    assert proof.flops == STEPS * LAYERS * 2 * BATCH * WIDTH * WIDTH


@pytest.mark.parametrize("case", _marked(case for case in _cases(TPUS) if case.endswith("/product")))
def test_cycles_over_the_clock_come_near_the_peak_and_never_above(case):
    proof = _proof(case)
    peak = Topology.parse(case.split("/")[0]).chip.peak_flops("bfloat16")
    assert peak is not None
    assert proof.flops == 2 * LARGE**3
    assert 0.6 < proof.flops / peak / proof.time["compute"] <= 1.0


@pytest.mark.parametrize("case", _marked(case for case in _cases(TPUS) if "/scaled" in case))
def test_elementwise_work_takes_as_long_as_its_bytes(case):
    topology, _, dtype = case.partition("/scaled")
    chip = Topology.parse(topology).chip
    moved = 2 * LARGE**2 * (4 if dtype else 2)
    assert chip.hbm_bytes_per_second is not None
    seconds = moved / chip.hbm_bytes_per_second / calibration_for(chip.name).fusion_efficiency
    assert _proof(case).time["compute"] == pytest.approx(seconds, rel=0.04)
    # What the compiler says of them, which is as much for elements of half the width.
    cycles = [_cycles(_compiled(f"{topology}/{name}").text) for name in ("scaled", "scaled_float32")]
    assert cycles[0] == pytest.approx(cycles[1], rel=0.03)


def _cycles(text):
    return max(int(found) for found in re.findall(r'"estimated_cycles":"(\d+)"', text))


def test_a_transfer_runs_beside_products_that_do_not_need_it():
    proof = _proof("v5p:4x4x4/overlapped")
    (row,) = proof.collectives
    assert row.asynchronous
    assert row.exposed_seconds < 0.75 * row.seconds
    assert proof.step_seconds < proof.time["compute"] + row.seconds


def test_a_gather_that_goes_on_through_the_turns_of_a_loop_is_one():
    found = _compiled("v5e:8x16/carried")
    (name,) = {
        name for name in parse_hlo(found.text).computations if "windowed_dot_general_body" in name
    } & set(re.findall(r"body=%([\w.\-]+)", found.text))
    body = found.text.split(f"%{name} ")[1].split("\n}")[0]
    assert "async_collective_fusion" in body
    proof = _proof("v5e:8x16/carried")
    gather = next(c for c in proof.collectives if c.kind == "all_gather" and c.axes == ("tensor",))
    assert gather.asynchronous
    assert (gather.count, gather.bytes) == (1, 4 * SEQUENCE * EMBED * 2)
    # The loop's permutes, half of them each way, and the gather, which goes both ways, use the same links.
    permutes = next(c for c in proof.collectives if c.kind == "collective_permute")
    last = proof.flops / 2 / Topology.parse("v5e:8x16").chip.peak_flops("bfloat16")
    assert proof.step_seconds > gather.seconds + permutes.seconds / 2 + last
    # What these hold is not hidden, though the products beside it would take longer than the gather alone.
    assert 0.0 < gather.exposed_seconds < gather.seconds < proof.time["compute"]


@pytest.mark.slow
def test_host_transfers_are_counted_both_ways():
    proof = _proof("v5p:2x2x2/offloaded")
    carried = 4096 * 1024 * 2
    assert proof.host_bytes == 2 * LAYERS * carried
    assert proof.time["host"] > 0


NAMED = {
    "endless": "unknown_trip_count",
    "zeros": "all_gather_became_all_reduce",
    "sliced": "reduce_scatter_became_all_reduce",
    "replicated": "involuntary_full_rematerialisation",
    "padded": "padding_waste",
}


@pytest.mark.parametrize("program", NAMED)
def test_a_program_made_to_go_wrong_is_found_and_only_so(program):
    proof = _proof(f"v5p:4x4x4/{program}")
    found = {finding.kind: finding for finding in proof.findings if finding.kind != "overlaps_nothing"}
    assert set(found) == {NAMED[program]}
    finding = found[NAMED[program]]
    assert finding.remedy
    if program != "padded":  # an argument, which no line made
        assert finding.source is not None
        assert finding.source.file.endswith("compiled_programs.py")


def test_collectives_that_computing_waits_for_are_found():
    (finding,) = _proof("v5p:4x4x4/all_gather").findings
    assert finding.kind == "overlaps_nothing"
    assert finding.seconds == pytest.approx(_proof("v5p:4x4x4/all_gather").time["all_gather/tensor"])


# Where the compiler keeps arrays in vector memory (other chips' small programs) its peak counts those too.
IN_HBM = [
    "v5p:4x4x4/all_gather",
    "v5p:4x4x4/perceptron",
    "v5p:4x4x4/sliced",
    "v5p:4x4x4/endless",
    "v5p:4x4x4/padded",
    pytest.param("v5p:2x2x2/offloaded", marks=pytest.mark.slow),
    *_cases(GPUS),
]


@pytest.mark.parametrize("case", IN_HBM)
def test_the_replayed_schedule_holds_what_the_compiler_says(case):
    found = _compiled(case)
    program = parse_hlo(found.text)
    replayed = memory(program, loops(program), Topology.parse(found.topology).chip.platform)
    assert replayed.peak_bytes == pytest.approx(found.peak_bytes, rel=0.1)
    assert max(replayed.timeline) == replayed.peak_bytes
    assert len(replayed.timeline) <= 200
    assert sum(buffer.bytes for buffer in replayed.buffers) <= replayed.peak_bytes
    if case.endswith("offloaded"):
        assert replayed.host_bytes == LAYERS * 4096 * 1024 * 2


@pytest.mark.parametrize(("case", "counts"), [("h100:2x8/perceptron", True), ("v5p:4x4x4/perceptron", False)])
def test_a_peak_of_products_that_nobody_tuned_is_no_less_than_the_replays(case, counts):
    found = _compiled(case)
    program = parse_hlo(found.text)
    replayed = memory(program, loops(program), Topology.parse(found.topology).chip.platform)
    proof = _stating(found, 1.0)
    assert proof.peak_bytes == (replayed.peak_bytes if counts else 1.0)
    assert _stating(found, 1e15).peak_bytes == 1e15


def _stating(found: Compiled, peak: float) -> Proof:
    return dataclasses.replace(found, memory={**found.memory, "peak_memory_in_bytes": peak}).proof()
