"""Findings that need a plan to compare with, or a compiler's log; test_reading has those of real programs."""

from __future__ import annotations

import dataclasses

import pytest
from meshwright.sharding import Plan, Topology
from meshwright.sharding.compiled.read import read_proof
from meshwright.sharding.plans.record import ArrayPlan, DimPlan

TOPOLOGY = Topology.parse("v5p:2x2x2")

# A step over 8 devices: parameters come in eighths or whole, activations are exchanged, a value is sent away.
TEXT = """HloModule jit_step, is_scheduled=true, num_partitions=8

FileNames
1 "/home/me/model.py"
2 "/home/me/.venv/lib/python3.12/site-packages/flax/nnx/module.py"

FunctionNames
1 "loss"
2 "call"

FileLocations
1 {{file_name_id=1 function_name_id=1 line=7}}
2 {{file_name_id=2 function_name_id=2 line=90}}

StackFrames
1 {{file_location_id=1 parent_frame_id=1}}
2 {{file_location_id=2 parent_frame_id=2}}

ENTRY %main (w: f32[{rows},1024], x: bf16[4096,1024]) -> bf16[4096,1024] {{
  %w = f32[{rows},1024]{{1,0:T(8,128)}} parameter(0), sharding={{{sharding}}}, NAMED
  %x = ARRAY parameter(1), sharding={{devices=[8,1]<=[8]}}
  %turned = ARRAY all-to-all(%x), replica_groups=[1,8]<=[8], dimensions={{0}}, FRAME
  %away = (HOSTED, ARRAY, u32[]{{:S(2)}}) copy-start(%turned), FRAME
  %gone = HOSTED copy-done(%away)
  ROOT %y.remat = ARRAY add(%turned, %turned), FRAME, CYCLES
}}
"""
for short, written in {
    "ARRAY": "bf16[4096,1024]{{1,0:T(8,128)(2,1)}}",
    "HOSTED": "bf16[4096,1024]{{1,0:T(8,128)(2,1)S(5)}}",
    "NAMED": """metadata={{op_name="params[\\'w\\']"}}""",
    "FRAME": "metadata={{stack_frame_id=2}}",
    "CYCLES": """backend_config={{"window_config":{{"estimated_cycles":"175000"}}}}""",
}.items():
    TEXT = TEXT.replace(short, written)


def _plan(**changes) -> Plan:
    dim = DimPlan(size=32768, axes=("fsdp",), argument=1, path="x", dimension=0, part=0)
    plan = Plan(
        topology=str(TOPOLOGY),
        mesh={"data": 1, "fsdp": 8, "tensor": 1},
        dims={"batch": dim},
        params={"w": ArrayPlan(shape=(1024, 1024), dtype="float32", spec=("fsdp",))},
        batch={"x": ArrayPlan(shape=(32768, 1024), dtype="bfloat16", spec=("fsdp",))},
    )
    return dataclasses.replace(plan, **changes)


def _kinds(plan: Plan | None, *, rows=128, sharding="devices=[8,1]<=[8]"):
    proof = read_proof(
        TEXT.format(rows=rows, sharding=sharding),
        topology=TOPOLOGY,
        mesh={"data": 1, "fsdp": 8, "tensor": 1},
        peak_bytes=2.0**25,
        memory={},
        compile_seconds=0.0,
        versions={},
        planned=plan,
    )
    return {finding.kind: finding for finding in proof.findings}


def test_an_exchange_that_the_plan_does_not_have_is_found_at_the_users_own_line():
    finding = _kinds(_plan())["unplanned_resharding"]
    assert finding.source is not None
    # The innermost frame is flax's; the user's is around it.
    assert (finding.source.file, finding.source.line) == ("/home/me/model.py", 7)
    assert "all-to-all over fsdp" in finding.what
    assert finding.seconds > 0
    assert "unplanned_resharding" not in _kinds(None)


def test_an_exchange_over_an_axis_of_activations_is_planned():
    mesh = {"data": 1, "fsdp": 1, "tensor": 8}
    proof = read_proof(
        TEXT.format(rows=128, sharding="devices=[8,1]<=[8]"),
        topology=TOPOLOGY,
        mesh=mesh,
        peak_bytes=2.0**25,
        memory={},
        compile_seconds=0.0,
        versions={},
        planned=_plan(
            mesh=mesh,
            dims={},
            params={"w": ArrayPlan(shape=(1024, 1024), dtype="float32", spec=("tensor",))},
            batch={},
        ),
    )
    assert "unplanned_resharding" not in {finding.kind for finding in proof.findings}


def test_a_parameter_held_whole_is_found_and_a_sharded_one_is_not():
    assert "parameter_kept_whole" not in _kinds(_plan())
    for sharding in ("replicated", "devices=[1,1,8]<=[8] last_tile_dim_replicate"):
        finding = _kinds(_plan(), rows=1024, sharding=sharding)["parameter_kept_whole"]
        assert "params['w']" in finding.what
        assert "cut into 1" in finding.what
        assert finding.bytes == 1024 * 1024 * 4 * 7 / 8
    small = _plan(params={"w": ArrayPlan(shape=(1024, 1024), dtype="float32", spec=())})
    assert "parameter_kept_whole" not in _kinds(small, rows=1024, sharding="replicated")


def test_values_sent_to_the_host_unasked_are_found():
    finding = _kinds(_plan())["spilled_to_host"]
    assert finding.bytes == 4096 * 1024 * 2
    asked = _kinds(_plan(remat="names", saved={"block": "host"}))
    assert "spilled_to_host" not in asked
    assert "host_transfers_exposed" in asked


def test_what_the_compiler_computes_again_is_found():
    finding = _kinds(_plan())["compiler_rematerialised"]
    assert finding.seconds == pytest.approx(175000 / 1.75e9)


LOOP = """HloModule jit_step, is_scheduled=true, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%body (carry: (s32[], f32[4096,1024])) -> (s32[], f32[4096,1024]) {
  %carry = (s32[], f32[4096,1024]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%carry), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%n, %one)
  %g = f32[4096,1024]{1,0} get-tuple-element(%carry), index=1
  %reduced = f32[4096,1024]{1,0} all-reduce(%g), replica_groups=[1,8]<=[8], to_apply=%add
  ROOT %out = (s32[], f32[4096,1024]{1,0}) tuple(%next, %reduced)
}

%more (carry: (s32[], f32[4096,1024])) -> pred[] {
  %carry = (s32[], f32[4096,1024]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%carry), index=0
  %all = s32[] constant(4)
  ROOT %less = pred[] compare(%n, %all), direction=LT
}

ENTRY %main (x: f32[4096,1024]) -> f32[4096,1024] {
  %x = f32[4096,1024]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], f32[4096,1024]{1,0}) tuple(%zero, %x)
  %loop = (s32[], f32[4096,1024]{1,0}) while(%start), condition=%more, body=%body, \
backend_config={"known_trip_count":{"n":"4"}}
  ROOT %y = f32[4096,1024]{1,0} get-tuple-element(%loop), index=1
}
"""


@pytest.mark.parametrize(
    ("microbatches", "spec", "found"), [(4, (), True), (1, (), False), (4, ("data",), False)]
)
def test_gradients_reduced_in_each_microbatch_are_found(microbatches, spec, found):
    mesh = {"data": 8, "fsdp": 1, "tensor": 1}
    proof = read_proof(
        LOOP.replace("\\\n", ""),
        topology=TOPOLOGY,
        mesh=mesh,
        peak_bytes=2.0**25,
        memory={},
        compile_seconds=0.0,
        versions={},
        planned=_plan(
            mesh=mesh,
            dims={},
            params={"w": ArrayPlan(shape=(1024, 1024), dtype="float32", spec=spec)},
            batch={},
            microbatches=microbatches,
        ),
    )
    told = [finding for finding in proof.findings if finding.kind == "reduced_in_loop"]
    assert bool(told) == found
    if found:
        assert "over data 4 times a step" in told[0].what
