"""Hand-made traces of accelerators, with their program, to a profile."""

import pytest
from meshwright.runtime.profiling.analyse import analyse
from meshwright.runtime.profiling.events import HostSpan, OpEvent, Trace
from meshwright.runtime.profiling.program import SavedProgram
from meshwright.sharding.errors import UserError
from meshwright.sharding.hlo.text import parse_hlo

PROGRAM = """HloModule jit_step, num_partitions=4

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %start = (f32[8]{0}, f32[8]{0}) all-reduce-start(%a), replica_groups=[2,2]<=[2,2]T(1,0)
  %matmul = f32[8]{0} fusion(%a), kind=kCustom, metadata={op_name="mlp" source_file="model.py" source_line=7}
  ROOT %done = f32[8]{0} all-reduce-done(%start)
}
"""
SAVED = SavedProgram(program=parse_hlo(PROGRAM), mesh={"data": 2, "fsdp": 2})


def gpu_trace(*steps, module="jit_step"):
    """Return a trace whose step n runs a matmul for 60 ns from 100 n on, and a reduction from 40 to 90."""
    events = []
    for n in steps:
        for line, op, start, end in (("Stream #1", "matmul", 0, 60), ("Stream #2", "start", 40, 90)):
            events.append(
                OpEvent(
                    device="gpu:0",
                    line=line,
                    op=op,
                    module=module,
                    run=None,
                    start_ns=100 * n + start,
                    end_ns=100 * n + end,
                )
            )
    spans = tuple(HostSpan(step=n, start_ns=100 * n, end_ns=100 * n + 10) for n in steps)
    return Trace(events=tuple(events), steps=spans, waits=(HostSpan(start_ns=190, end_ns=195),))


def test_a_gpu_profile_separates_what_the_matmul_hid_from_what_it_did_not():
    profile = analyse({0: gpu_trace(1, 2)}, SAVED)
    first, second = profile.steps
    assert (first.step, first.device) == (1, "gpu:0")
    assert first.wall_seconds == pytest.approx(90e-9)
    assert first.compute_seconds == pytest.approx(60e-9)
    (reduction,) = first.collectives
    assert (reduction.kind, reduction.axes, reduction.count) == ("all_reduce", "data", 1)
    assert reduction.exposed_seconds == pytest.approx(30e-9)
    assert reduction.overlapped_seconds == pytest.approx(20e-9)
    assert second.wall_seconds == pytest.approx(100e-9)
    assert (second.data_wait_seconds, second.idle_seconds) == pytest.approx((5e-9, 5e-9))
    matmul = next(o for o in profile.operations if o.name == "matmul")
    assert (matmul.source, matmul.op_name, matmul.kind) == ("model.py:7", "mlp", "compute")
    assert matmul.share == pytest.approx(120 / 190)


def test_devices_of_two_processes_are_told_apart():
    profile = analyse({0: gpu_trace(1), 1: gpu_trace(1)}, SAVED)
    assert profile.devices == ("process 0 gpu:0", "process 1 gpu:0")
    assert profile.mean().compute_seconds == pytest.approx(60e-9)


def test_another_programs_trace_is_refused():
    with pytest.raises(UserError, match="the saved program is 'jit_step', but the trace holds 'jit_other'"):
        analyse({0: gpu_trace(1, module="jit_other")}, SAVED)


def test_a_mesh_that_does_not_fit_the_program_is_refused():
    small = SavedProgram(program=SAVED.program, mesh={"data": 2})
    with pytest.raises(UserError, match="does not fit the saved program: device 2 lies outside a mesh of 2"):
        analyse({0: gpu_trace(1)}, small)


def test_a_trace_without_operations_is_refused():
    with pytest.raises(UserError, match="holds no operation of any device"):
        analyse({0: Trace(events=(), steps=(), waits=())}, SAVED)


def test_executions_that_the_hosts_steps_do_not_fit_are_steps_of_their_own_and_that_is_said():
    trace = gpu_trace(1, 2, 3)
    profile = analyse({0: Trace(events=trace.events, steps=trace.steps[:2], waits=())}, SAVED)
    assert [(step.step, step.wall_seconds) for step in profile.steps] == [
        (k, pytest.approx(90e-9)) for k in range(3)
    ]
    said = "numbered 2 steps, and which of them 3 executions of jit_step are of is not known"
    assert any(said in note for note in profile.notes)


def test_executions_that_began_before_the_hosts_steps_do_not_bear_their_numbers():
    trace = gpu_trace(1, 2, 3)
    later = tuple(HostSpan(step=k, start_ns=250 + 20 * k, end_ns=260 + 20 * k) for k in range(3))
    profile = analyse({0: Trace(events=trace.events, steps=later, waits=())}, SAVED)
    assert [step.gap_seconds for step in profile.steps] == pytest.approx([0, 10e-9, 10e-9])
    assert any("nobody numbered the steps" in note for note in profile.notes)


def test_a_tpus_fused_collectives_are_told_without_a_program():
    events = []
    for n, (op, start, end) in enumerate(
        [("fusion.1", 0, 40), ("async-collective-done.3", 40, 70), ("all-reduce-scatter.4", 70, 90)] * 2
    ):
        at = 100 * (n // 3)
        events.append(
            OpEvent(
                device="tpu:0",
                line="XLA Ops",
                op=op,
                module="f",
                run=at,
                start_ns=at + start,
                end_ns=at + end,
            )
        )
    first = analyse({0: Trace(events=tuple(events), steps=(), waits=())}, None).steps[0]
    assert {c.kind: c.exposed_seconds for c in first.collectives} == pytest.approx(
        {"collective": 30e-9, "reduce_scatter": 20e-9}
    )
    assert first.compute_seconds == pytest.approx(40e-9)


def test_a_program_that_ran_once_without_a_number_is_no_step():
    trace = gpu_trace(1)
    profile = analyse({0: Trace(events=trace.events, steps=(), waits=())}, None)
    assert profile.steps == ()
    assert profile.mean().wall_seconds == pytest.approx(90e-9)
    assert [(p.module, p.executions, p.operations) for p in profile.programs] == [("jit_step", 0, 2)]
    assert any(note.startswith("no steps: ") for note in profile.notes)
    assert profile.placed == (0, 2)
