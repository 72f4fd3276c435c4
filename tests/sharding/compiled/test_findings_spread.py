"""Findings about stages, context and experts, each in a program that has it and in one that has not."""

from __future__ import annotations

import pytest
from meshwright.sharding import Plan, Topology
from meshwright.sharding.compiled.read import read_proof
from meshwright.sharding.cost.calibration import calibration_for
from meshwright.sharding.plans.estimate import Estimate
from meshwright.sharding.plans.record import ArrayPlan, DimPlan

TOPOLOGY = Topology.parse("v5p:2x2x2")
PAIRS = ",".join(f"{{{n},{(n + 1) % 8}}}" for n in range(8))

# A loop of TURNS turns over an array that INSIDE is done to; MORE is done before it.
TEXT = """HloModule jit_step, is_scheduled=true, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%body (carry: (s32[], bf16[4096,1024])) -> (s32[], bf16[4096,1024]) {
  %carry = (s32[], bf16[4096,1024]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%carry), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%n, %one)
  %g = bf16[4096,1024]{1,0} get-tuple-element(%carry), index=1
  INSIDE
  ROOT %out = (s32[], bf16[4096,1024]{1,0}) tuple(%next, %done)
}

%more (carry: (s32[], bf16[4096,1024])) -> pred[] {
  %carry = (s32[], bf16[4096,1024]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%carry), index=0
  %all = s32[] constant(TURNS)
  ROOT %less = pred[] compare(%n, %all), direction=LT
}

ENTRY %main (x: bf16[4096,1024]) -> bf16[4096,1024] {
  %x = bf16[4096,1024]{1,0} parameter(0)
  %zero = s32[] constant(0)
  MORE
  %start = (s32[], bf16[4096,1024]{1,0}) tuple(%zero, %x)
  %loop = (s32[], bf16[4096,1024]{1,0}) while(%start), condition=%more, body=%body, \
backend_config={"known_trip_count":{"n":"TURNS"}}
  ROOT %y = bf16[4096,1024]{1,0} get-tuple-element(%loop), index=1
}
""".replace("\\\n", "")
SENT = f"%done = bf16[4096,1024]{{1,0}} collective-permute(%g), source_target_pairs={{{PAIRS}}}"
LIKE = "bf16[4096,1024]{1,0}"


def found(mesh, inside, *, turns=6, more="", seconds=None, **changes):
    plan = {
        "topology": str(TOPOLOGY),
        "mesh": mesh,
        "dims": {},
        "params": {"w": ArrayPlan(shape=(1024, 1024), dtype="float32", spec=())},
        "batch": {"x": ArrayPlan(shape=(32768, 128), dtype="int32", spec=())},
    }
    if seconds is not None:
        plan["estimate"] = Estimate(step_seconds=1.0, mfu=0.5, peak_bytes=1.0, time=seconds, memory={})
    text = TEXT.replace("INSIDE", inside).replace("TURNS", str(turns)).replace("MORE", more)
    proof = read_proof(
        text,
        topology=TOPOLOGY,
        mesh=mesh,
        peak_bytes=2.0**25,
        memory={},
        compile_seconds=0.0,
        versions={},
        planned=Plan(**{**plan, **changes}),
    )
    return {finding.kind: finding for finding in proof.findings}


def test_a_send_with_nothing_beside_it_is_found_as_a_send():
    kinds = found({"stage": 8}, SENT)
    assert "over stage 6 times a step" in kinds["send_not_overlapped"].what
    assert "overlaps_nothing" not in kinds
    # The same over another axis is none of stages.
    assert "send_not_overlapped" not in found({"context": 8}, SENT)


def test_a_send_beside_a_chunk_s_work_is_not_found():
    cycles = 'backend_config={"window_config":{"estimated_cycles":"900000000"}}'
    work = f"""%begun = ({LIKE}, {LIKE}) collective-permute-start(%g), source_target_pairs={{{PAIRS}}}
  %worked = {LIKE} add(%g, %g), {cycles}
  %done = {LIKE} collective-permute-done(%begun)"""
    assert "send_not_overlapped" not in found({"stage": 8}, work)


@pytest.mark.parametrize(
    ("microbatches", "stages", "is_told"), [(64, 8, True), (15, 8, False), (64, 1, False), (32, 8, False)]
)
def test_an_array_with_a_place_for_each_microbatch_is_found(microbatches, stages, is_told):
    # 15 are as many as the inputs that 8 stages keep; 33 are none of 32.
    places = 33 if microbatches == 32 else microbatches
    held = f"%held = f32[{places},128,1024]{{2,1,0}} broadcast(%zero), dimensions={{}}"
    read = "%use = f32[8,1024]{1,0} slice(%held), slice={[0:8], [0:1], [0:1024]}"
    mesh = {"stage": stages, "data": 8 // stages}
    kinds = found(mesh, SENT, more=f"{held}\n  {read}", microbatches=microbatches)
    assert ("grows_with_microbatches" in kinds) == is_told


def test_gathers_over_context_are_found_where_the_plan_says_ring():
    gather = (
        "%every = bf16[32768,1024]{1,0} all-gather(%g), replica_groups=[1,8]<=[8], dimensions={0}\n"
        f"  %done = {LIKE} slice(%every), slice={{[0:4096], [0:1024]}}"
    )
    assert "context=ring" in found({"context": 8}, gather, context="ring")["keys_gathered"].what
    assert "keys_gathered" not in found({"context": 8}, gather, context="gathered")
    assert "keys_gathered" not in found({"fsdp": 8}, gather, context="ring")
    assert "keys_gathered" not in found({"context": 8}, SENT, context="ring")


def test_another_axis_in_the_turns_of_a_ring_is_found():
    pairs = ",".join(f"{{{8 // 4 * n + k},{8 // 4 * ((n + 1) % 4) + k}}}" for n in range(4) for k in range(2))
    sent = f"%sent = {LIKE} collective-permute(%g), source_target_pairs={{{pairs}}}"
    more = f"%done = {LIKE} all-reduce(%sent), replica_groups=[4,2]<=[8], to_apply=%add"
    mesh = {"context": 4, "data": 2}
    finding = found(mesh, f"{sent}\n  {more}", turns=2, context="ring")["foreign_in_ring"]
    assert "all-reduce over data" in finding.what
    # In a loop of more turns than chunks go round, as one over layers, it is no matter of the ring.
    assert "foreign_in_ring" not in found(mesh, f"{sent}\n  {more}", turns=80, context="ring")
    assert "foreign_in_ring" not in found(
        mesh, f"{sent}\n  %done = {LIKE} copy(%sent)", turns=2, context="ring"
    )


def test_an_exchange_larger_than_its_formula_is_found():
    exchange = f"%done = {LIKE} all-to-all(%g), replica_groups=[1,8]<=[8], dimensions={{0}}"
    hidden = calibration_for("v5p").overlap_activations
    taken = found({"expert": 8}, exchange, seconds={"all_to_all/expert": 1e-9})["exchange_larger"].seconds
    assert taken > 0
    for times, is_told in ((1.0, False), (0.5, True)):
        priced = {"all_to_all/expert": times * taken * (1.0 - hidden)}
        kinds = found({"expert": 8}, exchange, seconds=priced)
        assert ("exchange_larger" in kinds) == is_told
    assert "2.00 times" in kinds["exchange_larger"].what
    # Two microbatches in three ticks: of what is exchanged a third is in the bubble, and priced there.
    exchange = f"%done = {LIKE} all-to-all(%g), replica_groups=[2,4]<=[8], dimensions={{0}}"
    staged = {"mesh": {"stage": 2, "expert": 4}, "inside": exchange, "microbatches": 2}
    taken = found(**staged, seconds={"all_to_all/expert": 1e-9})["exchange_larger"].seconds
    for times, is_told in ((2 / 3, False), (1 / 2, True)):
        priced = {"all_to_all/expert": times * taken * (1.0 - hidden)}
        assert ("exchange_larger" in found(**staged, seconds=priced)) == is_told


@pytest.mark.parametrize(
    ("rows", "name", "is_told"),
    [(4096, "dot", True), (64, "dot", False), (64, "ragged_dot_general", True)],
)
def test_products_of_all_rows_with_every_expert_are_found(rows, name, is_told):
    product = (
        f"%left = bf16[8,{rows},256]{{2,1,0}} broadcast(%n), dimensions={{}}\n"
        f"  %right = bf16[8,256,1024]{{2,1,0}} broadcast(%n), dimensions={{}}\n"
        f"  %dense = bf16[8,{rows},1024]{{2,1,0}} dot(%left, %right), lhs_batch_dims={{0}}, "
        "rhs_batch_dims={0}, "
        f'lhs_contracting_dims={{2}}, rhs_contracting_dims={{1}}, metadata={{op_name="jit(step)/{name}"}}\n'
        f"  %done = {LIKE} copy(%g)"
    )
    dims = {"experts": DimPlan(size=64, axes=("expert",), argument=0, path="w", dimension=0, part=0)}
    # 4,096 tokens of a device in each of 1,024 microbatches.
    kinds = found({"expert": 8}, product, dims=dims, microbatches=1024)
    assert ("dense_experts" in kinds) == is_told
    if is_told:
        assert "each of 8 experts" in kinds["dense_experts"].what
