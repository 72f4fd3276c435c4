"""When everything runs: programs written by hand, whose seconds follow from their collectives'."""

from __future__ import annotations

import pytest
from meshwright.sharding import Topology
from meshwright.sharding.compiled.read import read_proof
from meshwright.sharding.cost.calibration import calibration_for
from meshwright.sharding.plans.proof import Proof

ALL, ROWS, COLUMNS = (
    f"replica_groups={groups}, dimensions={{0}}, use_global_device_ids=true"
    for groups in ("{{0,1,2,3}}", "{{0,1},{2,3}}", "{{0,2},{1,3}}")
)
LOOP = """
%condition.{n} (c: (s32[], bf16[1024,1024])) -> pred[] {{
  %c.{n} = (s32[], bf16[1024,1024]) parameter(0)
  %i.{n} = s32[] get-tuple-element(%c.{n}), index=0
  %bound.{n} = s32[] constant({turns})
  ROOT %less.{n} = pred[] compare(%i.{n}, %bound.{n}), direction=LT
}}

%body.{n} (b: (s32[], bf16[1024,1024])) -> (s32[], bf16[1024,1024]) {{
  %b.{n} = (s32[], bf16[1024,1024]) parameter(0)
  %j.{n} = s32[] get-tuple-element(%b.{n}), index=0
  %one.{n} = s32[] constant(1)
  %next.{n} = s32[] add(%j.{n}, %one.{n})
  %x.{n} = bf16[1024,1024] get-tuple-element(%b.{n}), index=1
  {work}
  ROOT %again.{n} = (s32[], bf16[1024,1024]) tuple(%next.{n}, %x.{n})
}}
"""
WHILE = (
    "%while.{n} = (s32[], bf16[1024,1024]) while({start}), condition=%condition.{n}, body=%body.{n}, "
    'backend_config={{"known_trip_count":{{"n":"{turns}"}}}}'
)
GATHERED = f"%inner = bf16[4096,1024] all-gather(%x.1), channel_id=9, {ALL}"


def _gather(name: str, channel: int, groups: str = ALL, rows: int = 4096) -> tuple[str, str]:
    """Return the start and the done of an all-gather of the entry's parameter."""
    shape = f"bf16[{rows},1024]"
    return (
        f"%{name}-start = (bf16[1024,1024], {shape}) all-gather-start(%p), channel_id={channel}, {groups}",
        f"%{name}-done = {shape} all-gather-done(%{name}-start)",
    )


def _read(computations: str, *lines: str, topology: str = "v5e:2x2") -> Proof:
    body = "\n  ".join(lines)
    text = f"""HloModule timed, is_scheduled=true, num_partitions=4
{computations}
ENTRY %main (p: bf16[1024,1024]) -> bf16[1024,1024] {{
  %p = bf16[1024,1024] parameter(0)
  %zero = s32[] constant(0)
  %first = (s32[], bf16[1024,1024]) tuple(%zero, %p)
  {body}
  ROOT %out = bf16[1024,1024] copy(%p)
}}
"""
    return read_proof(
        text,
        topology=Topology.parse(topology),
        mesh={"data": 2, "fsdp": 2},
        peak_bytes=1.0,
        memory={},
        compile_seconds=0.0,
        versions={},
    )


def _seconds(proof: Proof) -> float:
    """What the links were waited for."""
    return sum(seconds for item, seconds in proof.time.items() if item.startswith("all_gather"))


@pytest.fixture
def one() -> float:
    """Seconds of one gather that nothing runs beside."""
    return _seconds(_read("", f"%alone = bf16[4096,1024] all-gather(%p), channel_id=1, {ALL}"))


@pytest.mark.parametrize("queued", [1, 2])
def test_what_is_open_around_a_loop_waits_for_the_links_that_the_loop_holds(one: float, queued: int) -> None:
    gathers = [_gather(f"open{n}", n + 1) for n in range(queued)]
    loop = LOOP.format(n=1, turns=3, work=GATHERED)
    proof = _read(
        loop,
        *(start for start, _ in gathers),
        WHILE.format(n=1, turns=3, start="%first"),
        *(done for _, done in gathers),
    )
    assert _seconds(proof) == pytest.approx((3 + queued) * one)


def test_what_waits_for_links_of_what_is_put_off_is_put_off_too() -> None:
    """The first holds the links of both axes, the second those of one; the loop those of the other."""
    half = f"%inner = bf16[2048,1024] all-gather(%x.1), channel_id=9, {ROWS}"
    whole, part = _gather("whole", 1), _gather("part", 2, COLUMNS, 2048)
    loop, run = LOOP.format(n=1, turns=5, work=half), WHILE.format(n=1, turns=5, start="%first")
    apart = [_seconds(_read("", start, done)) for start, done in (whole, part)]
    apart.append(_seconds(_read(loop, run)))
    proof = _read(loop, whole[0], part[0], run, whole[1], part[1])
    assert _seconds(proof) == pytest.approx(sum(apart))


def test_loops_hold_links_for_all_the_turns_of_those_around_them(one: float) -> None:
    start, done = _gather("open", 1)
    inner = LOOP.format(n=1, turns=3, work=GATHERED)
    outer = LOOP.format(n=2, turns=2, work=WHILE.format(n=1, turns=3, start="%b.2"))
    proof = _read(inner + outer, start, WHILE.format(n=2, turns=2, start="%first"), done)
    assert _seconds(proof) == pytest.approx((2 * 3 + 1) * one)


def test_what_ended_before_a_loop_is_not_put_off(one: float) -> None:
    start, done = _gather("open", 1)
    loop = LOOP.format(n=1, turns=3, work=GATHERED)
    proof = _read(loop, start, done, WHILE.format(n=1, turns=3, start="%first"))
    assert _seconds(proof) == pytest.approx(4 * one)


@pytest.mark.parametrize(("topology", "waits"), [("h100:4", True), ("v5e:2x2", False)])
def test_a_loop_whose_turns_only_a_run_knows_waits_for_its_host_on_gpus(topology: str, waits: bool) -> None:
    """Its program says how many to count; a TPU knows by itself whether a loop goes on."""
    known = LOOP.format(n=1, turns=7, work=""), WHILE.format(n=1, start="%first", turns=7)
    told = (
        "%while.1 = (s32[], bf16[1024,1024]) while(%first), condition=%condition.1, body=%body.1, "
        'metadata={op_name="jit(f)/meshwright_turns[7]/while"}'
    )
    of_compiler = _read(*known, topology=topology)
    of_program = _read(known[0], told, topology=topology)
    wanted = 7 * calibration_for("h100").turn_seconds if waits else 0.0
    assert of_program.step_seconds - of_compiler.step_seconds == pytest.approx(wanted)
    assert (wanted > 0) == waits


def test_slices_that_a_gpu_copies_beside_kernels_take_their_time() -> None:
    """Copies and kernels run on the same processors; 2 MiB are read and written whatever runs beside."""
    inside = """
%copied (s: bf16[8,1024,1024], x: bf16[1024,1024], i: s32[]) -> bf16[8,1024,1024] {
  %s = bf16[8,1024,1024] parameter(0)
  %x = bf16[1024,1024] parameter(1)
  %one = bf16[1,1024,1024] bitcast(%x)
  %i = s32[] parameter(2)
  %z = s32[] constant(0)
  ROOT %d = bf16[8,1024,1024] dynamic-update-slice(%s, %one, %i, %z, %z)
}
"""
    lines = (
        '%stack = bf16[8,1024,1024] custom-call(), custom_call_target="AllocateBuffer"',
        "%put = ((bf16[8,1024,1024], bf16[1024,1024], s32[]), bf16[8,1024,1024], u32[]) "
        "fusion-start(%stack, %p, %zero), kind=kLoop, calls=%copied",
        "%twice = bf16[1024,1024] add(%p, %p)",
        "%done = bf16[8,1024,1024] fusion-done(%put)",
    )
    proof = _read(inside, *lines, topology="h100:4")
    chip = Topology.parse("h100:4").chip
    rate = (chip.hbm_bytes_per_second or 0.0) * calibration_for("h100").memory_efficiency
    assert proof.time["copies"] == pytest.approx(2 * 2 * 1024 * 1024 / rate)
