"""GPU traces made by hand from how planes look: what kernels belong to, and what is said where none knows."""

import pytest
from meshwright.runtime.profiling.analyse import analyse
from meshwright.runtime.profiling.program import SavedProgram
from meshwright.runtime.profiling.xplane import trace_of_planes
from meshwright.sharding.hlo.text import parse_hlo

from .planes import Gpu, event, plane

STEP = [("Stream #1", "dot", 0, 60), ("Stream #1", "norm", 60, 70), ("Stream #2", "all-reduce-start", 40, 90)]


def moved(ops, by):
    return [(stream, op, start + by, end + by) for stream, op, start, end in ops]


def profile(gpu, program=None):
    return analyse({0: trace_of_planes(gpu.planes())}, program)


def walls(found):
    return [(s.step, round(s.wall_seconds * 1e9), round(s.gap_seconds * 1e9)) for s in found.steps]


def test_each_execution_of_the_one_program_is_a_step_from_its_own_first_to_its_own_last_kernel():
    gpu = Gpu()
    for k in range(3):
        gpu.execution(10 * k, moved(STEP, 100 + 200 * k))
    found = profile(gpu)
    assert walls(found) == [(0, 90, 0), (1, 90, 110), (2, 90, 110)]
    assert found.placed == (9, 9)
    (reduction,) = found.steps[0].collectives
    assert (reduction.kind, round(reduction.exposed_seconds * 1e9)) == ("all_reduce", 20)
    assert {o.name: o.count for o in found.operations} == {"dot": 1, "norm": 1, "all-reduce-start": 1}


def test_numbered_steps_hold_the_executions_that_were_launched_in_them_however_many():
    gpu = Gpu()
    launches = [(5, "jit_grad"), (12, "jit_grad"), (20, "jit_update"), (35, "jit_grad"), (50, "jit_update")]
    for k, (at, module) in enumerate(launches):
        gpu.execution(at, moved(STEP[:2], 100 * (k + 1)), module=module)
    gpu.step(7, 0, 30)
    gpu.step(8, 30, 60)
    found = profile(gpu)
    # The first step begins where the host began it, and both end with their own last kernel.
    assert walls(found) == [(7, 370, 0), (8, 200, 0)]
    assert {p.module: p.executions for p in found.programs} == {"jit_grad": 3, "jit_update": 2}


@pytest.mark.parametrize("ordinals", [True, False], ids=["said", "paired by launches"])
def test_each_device_has_its_own_executions_though_several_are_launched_at_once(ordinals):
    gpu = Gpu(devices=3)
    for k in range(2):
        for device in range(2):
            ops = moved(STEP, 100 + 300 * k + 50 * device)
            # Of one program, at nearly one time, from threads whose names say nothing of the device.
            thread = f"py_xla_execute/{7 - device}"
            gpu.execution(
                10 * k + device, ops, device=device, thread=thread, ordinal=device if ordinals else None
            )
    found = profile(gpu)
    assert [(s.step, s.device, round(s.wall_seconds * 1e9)) for s in found.steps] == [
        (step, f"gpu:{device}", 90) for step in range(2) for device in range(2)
    ]
    assert "no operations on gpu:2" in found.notes
    assert found.placed == (12, 12)


def test_kernels_that_lost_launch_and_name_belong_to_the_execution_around_them():
    gpu = Gpu()
    ops = [("Stream #1", "dot", 0, 60), ("Stream #1", "norm.1", 60, 70), ("Stream #1", "dot.2", 80, 90)]
    for k in range(3):
        gpu.execution(10 * k, moved(ops, 200 * k))
    gpu.execution(40, moved([ops[0], ops[2]], 600))
    # Its number is a copy's, which was launched when nothing ran.
    gpu.launch(999, 35, name="hipMemcpyDtoDAsync")
    gpu.kernel(0, "Stream #1", "", 660, 670, kernel="norm_1", correlation=999)
    found = profile(gpu)
    assert found.placed == (12, 12)
    assert {o.name: o.count for o in found.operations} == {"dot": 1, "norm.1": 1, "dot.2": 1}


def test_what_a_program_moves_within_the_device_is_its_own_work():
    gpu = Gpu()
    for k in range(2):
        at = 200 * k
        ops = [("copy.1", at, at + 10), ("set", at + 10, at + 30), ("copy-start.1", at + 40, at + 60)]
        gpu.execution(10 * k, [("Stream #1", *op) for op in ops])
        kernels = gpu.streams[0]["Stream #1"][-3:]
        for kernel, name in zip(kernels, ("MemcpyD2D", "Memset", "MemcpyH2D"), strict=True):
            kernel.name = name
    first = profile(gpu).steps[0]
    times = first.compute_seconds, first.copy_seconds, first.idle_seconds
    assert [round(spent * 1e9) for spent in times] == [30, 20, 10]


def test_transfers_are_no_kernels_unless_the_program_asked_for_them():
    gpu = Gpu()
    for k in range(2):
        gpu.execution(
            10 * k,
            [
                ("Stream #1", "dot", 200 * k, 200 * k + 60),
                ("Stream #1", "fill.1", 200 * k + 60, 200 * k + 70),
            ],
        )
    gpu.streams[0]["Stream #1"][1].name = "__amd_rocclr_fillBufferAligned.kd"
    gpu.streams[0]["Stream #1"][3].name = "__amd_rocclr_fillBufferAligned.kd"
    for at in (20, 210, 350):
        gpu.kernel(0, "Stream #3", "", at, at + 30, kernel="__amd_rocclr_copyBuffer.kd")
    gpu.kernel(0, "Stream #1", "", 262, 266, kernel="MemcpyH2D")
    found = profile(gpu)
    assert walls(found) == [(0, 70, 0), (1, 70, 130)]
    assert [round(s.compute_seconds * 1e9) for s in found.steps] == [70, 70]
    assert found.placed == (4, 4)
    assert {o.name: o.kind for o in found.operations}["fill.1"] == "compute"
    assert {o.kind for o in found.operations if "copyBuffer" in o.name} <= {"copy"}


def test_a_copy_beside_nothing_is_told_apart_from_idling():
    gpu = Gpu()
    gpu.execution(0, [("Stream #1", "dot", 100, 150), ("Stream #1", "dot.1", 190, 200)])
    gpu.execution(10, [("Stream #1", "dot", 300, 350), ("Stream #1", "dot.1", 390, 400)])
    gpu.kernel(0, "Stream #2", "", 140, 170, kernel="MemcpyH2D")
    first = profile(gpu).steps[0]
    assert [round(t * 1e9) for t in (first.compute_seconds, first.copy_seconds, first.idle_seconds)] == [
        60,
        20,
        20,
    ]


def test_kernels_of_a_command_buffer_are_told_by_their_own_names_and_by_the_programs_lines():
    gpu = Gpu()
    for k in range(2):
        at = 100 * k
        gpu.execution(10 * k, [("Stream #1", "command_buffer_3", at, at + 20)])
        (correlation,) = (dict(e.stats)["correlation_id"] for e in gpu.streams[0]["Stream #1"][-1:])
        named = {"module": "jit_step", "correlation": correlation}
        gpu.streams[0]["Stream #1"][-1].name = "loop_add_fusion_1"
        gpu.kernel(0, "Stream #1", "command_buffer_3", at + 20, at + 50, kernel="nvjet_tst_256x128", **named)
        gpu.kernel(
            0,
            "Stream #2",
            "command_buffer_3",
            at + 50,
            at + 70,
            kernel="ncclDevKernel_AllGather_RING_LL",
            **named,
        )
    text = """HloModule jit_step

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  ROOT %loop_add_fusion.1 = f32[8]{0} fusion(%a), kind=kLoop, metadata={source_file="model.py" source_line=7}
}
"""
    found = profile(gpu, SavedProgram(program=parse_hlo(text), mesh={"data": 1}))
    assert [(o.name, o.kind, o.source) for o in found.operations] == [
        ("command_buffer_3: nvjet_tst_256x128", "compute", None),
        ("command_buffer_3: loop_add_fusion_1", "compute", "model.py:7"),
        ("command_buffer_3: ncclDevKernel_AllGather_RING_LL", "all_gather(unknown)", None),
    ]
    assert any("command buffers" in note for note in found.notes)
    assert found.placed == (6, 6)


def test_without_launches_executions_are_told_by_repetition_and_what_the_host_launched_besides_is_missed():
    gpu = Gpu(devices=2)
    gpu.execution(0, [])
    for k in range(2):
        gpu.execution(10 * k, [], thread="py_xla_execute/1")
        gpu.execution(10 * k, [], thread="py_xla_execute/2")
    for k in range(2):
        for stream, op, start, end in moved([*STEP, ("Stream #1", "norm", 70, 75)], 200 * k):
            gpu.kernel(1, stream, op, start, end, module="jit_step")
    found = profile(gpu)
    assert walls(found) == [(0, 90, 0), (1, 90, 110)]
    notes = " ".join(found.notes)
    assert "no launches of the kernels on gpu:1" in notes
    assert "launched 5 executions of jit_step, and it holds operations of 2" in notes
    assert "no operations on gpu:0" in notes


def test_a_loop_within_one_execution_is_not_taken_for_executions():
    gpu = Gpu()
    gpu.execution(0, [])
    for k in range(6):
        gpu.kernel(0, "Stream #1", "dot", 100 * k, 100 * k + 50, module="jit_step")
    gpu.step(3, 0, 5)
    found = profile(gpu)
    assert walls(found) == [(3, 550, 0)]


def several(gpu, times, busy=10):
    """Run two programs in turn; the second one takes `busy` times as long from the third turn on."""
    at = 0
    for k in range(times):
        length = 50 * (busy if k > 1 else 1)
        gpu.execution(20 * k, [("Stream #1", "dot", at, at + 40)], module="jit_a")
        gpu.execution(20 * k + 10, [("Stream #1", "dot", at + 50, at + 50 + length)], module="jit_b")
        at += 200 + length
    return profile(gpu)


def test_programs_that_follow_each_other_again_and_again_are_one_step_together():
    found = several(Gpu(), 4, busy=1)
    assert walls(found) == [(0, 100, 0), (1, 100, 150), (2, 100, 150), (3, 100, 150)]
    assert any("2 executions in their order are one" in note for note in found.notes)


def test_programs_that_take_unlike_long_each_time_are_no_steps_and_are_reported_by_program():
    found = several(Gpu(), 4)
    assert found.steps == ()
    assert found.by_step() == ()
    assert any("no steps: 2 executions follow each other 4 times" in note for note in found.notes)
    assert {p.module: p.executions for p in found.programs} == {"jit_a": 4, "jit_b": 4}
    assert {o.name: o.count for o in found.operations} == {"jit_a/dot": 4, "jit_b/dot": 4}
    assert found.to_dict()["programs"][0]["module"] == "jit_b"


def test_programs_of_one_name_are_not_one_program():
    gpu = Gpu()
    for k in range(4):
        ops = [("Stream #1", "dot", 1000 * k, 1000 * k + 10 ** (k % 3))]
        gpu.execution(10 * k, ops, module="jit_dot", program=str(k % 3))
    assert profile(gpu).steps == ()


def test_a_devices_own_line_of_steps_is_taken_where_the_host_numbered_none():
    lines = [
        ("Stream #1", [event("void f<int>(int*)", k, k + 10, correlation_id=k) for k in (0, 20, 100, 120)]),
        ("Steps", [event("4", 0, 30, group_id=0), event("5", 100, 130, group_id=1)]),
    ]
    found = analyse({0: trace_of_planes([plane("/device:GPU:0", lines)])}, None)
    assert walls(found) == [(4, 30, 0), (5, 30, 70)]
    assert found.placed == (4, 4)


def test_a_device_that_lacks_a_step_is_named():
    gpu = Gpu(devices=2)
    for k in range(3):
        for device in range(2 if k < 2 else 1):
            gpu.execution(10 * k, moved(STEP, 200 * k), device=device, thread=f"t/{device}", ordinal=device)
    assert "not every device has all 3 steps: gpu:1 2" in profile(gpu).notes


def test_transfers_alone_are_refused():
    from meshwright.sharding.errors import UserError

    gpu = Gpu()
    gpu.kernel(0, "Stream #1", "", 0, 10, kernel="MemcpyH2D")
    with pytest.raises(UserError, match="holds transfers alone"):
        profile(gpu)


def in_turn(gpu, times, first=0):
    """Launch jit_grad and jit_update in turn; return when the next one may begin."""
    for k in range(first, first + times):
        gpu.execution(20 * k, [("Stream #1", "dot", 200 * k, 200 * k + 90)], module="jit_grad")
        ops = [("Stream #1", "add", 200 * k + 100, 200 * k + 150)]
        gpu.execution(20 * k + 10, ops, module="jit_update", program="2")
    return first + times


def test_programs_before_and_a_step_that_is_cut_do_not_hide_the_order_of_the_others():
    gpu = Gpu()
    gpu.execution(0, [("Stream #1", "fill", 0, 10)], module="jit_zeros", program="3")
    k = in_turn(gpu, 4, first=1)
    gpu.execution(20 * k, [("Stream #1", "dot", 200 * k, 200 * k + 90)], module="jit_grad")
    found = profile(gpu)
    assert walls(found) == [(0, 150, 0), (1, 150, 50), (2, 150, 50), (3, 150, 50)]
    notes = " ".join(found.notes)
    assert "2 executions in their order are one (1 of jit_grad, 1 of jit_update)" in notes
    assert "executions outside of these steps: 2" in notes


def test_an_execution_that_the_trace_cuts_is_no_step():
    gpu = Gpu()
    for k in range(4):
        gpu.execution(10 * k, moved(STEP[: 3 if k < 3 else 1], 200 * k))
    found = profile(gpu)
    assert walls(found) == [(0, 90, 0), (1, 90, 110), (2, 90, 110)]
    assert "executions that the trace cuts are no steps: gpu:0 1" in found.notes


def test_kernels_that_name_no_program_are_placed_by_their_calls_alone():
    gpu = Gpu()
    for k in range(3):
        gpu.execution(50 * k, [])
        graph = gpu.kernel(0, "Stream #1", "", 200 * k, 200 * k + 40, kernel="nvjet_tst")
        gpu.kernel(0, "Stream #1", "", 200 * k + 40, 200 * k + 60, kernel="add_kernel", correlation=graph)
        gpu.launch(graph, 50 * k, name="cuGraphLaunch (CudaGraph:7)")
    found = profile(gpu)
    assert walls(found) == [(0, 60, 0), (1, 60, 140), (2, 60, 140)]
    assert found.placed == (6, 6)
    assert [p.module for p in found.programs] == ["jit_step"]


def test_calls_may_stand_in_a_plane_of_their_own():
    gpu = Gpu()
    for k in range(2):
        gpu.execution(10 * k, moved(STEP, 200 * k))
    host, *devices = gpu.planes()
    calls = [line for line in host.lines if line.name.startswith("Host Threads")]
    spans = [line for line in host.lines if line not in calls]
    planes = [
        plane("/host:CPU", [(line.name, line.events) for line in spans]),
        plane("/host:CUPTI", [(line.name, line.events) for line in calls]),
        *devices,
    ]
    found = analyse({0: trace_of_planes(planes)}, None)
    assert walls(found) == [(0, 90, 0), (1, 90, 110)]
    assert not any("launches" in note for note in found.notes)


def test_kernels_with_times_that_cannot_be_are_left_out_and_counted():
    gpu = Gpu()
    for k in range(2):
        gpu.execution(10 * k, moved(STEP, 200 * k))
    gpu.kernel(0, "Stream #1", "lost", -9, 2**60, module="jit_step")
    found = profile(gpu)
    assert walls(found) == [(0, 90, 0), (1, 90, 110)]
    assert "1 kernels on gpu:0 have times that cannot be, and are left out" in found.notes


def test_a_first_numbered_step_begins_when_the_device_has_done_what_came_before():
    gpu = Gpu()
    for k in range(4):
        gpu.execution(20 * k, moved(STEP, 1000 + 200 * k))
    gpu.step(7, 39, 59)
    gpu.step(8, 59, 79)
    found = profile(gpu)
    assert walls(found) == [(7, 200, 0), (8, 200, 0)]
    assert {o.name: o.count for o in found.operations} == {"dot": 1, "norm": 1, "all-reduce-start": 1}


@pytest.mark.parametrize("around", [True, False], ids=["epochs around", "evaluations beside"])
def test_steps_are_the_numbered_spans_in_which_the_program_was_launched(around):
    gpu = Gpu()
    for k in range(4):
        gpu.execution(40 * k, moved(STEP, 200 * k))
        gpu.execution(40 * k + 20, moved(STEP[1:2], 200 * k + 100), module="jit_eval", program="2")
        gpu.step(10 + k, 40 * k - 1, 40 * k + 19)
        if not around:
            gpu.host["loop"].append(event("eval", 40 * k + 19, 40 * k + 30, step_num=k))
    if around:
        gpu.host["loop"].append(event("epoch", -5, 200, step_num=3))
    found = profile(gpu)
    assert [step.step for step in found.steps] == [10, 11, 12, 13]
    assert any("numbered as train_step" in note for note in found.notes)


def test_time_in_which_two_executions_ran_is_of_one_step_alone():
    gpu = Gpu()
    for k in range(4):
        at = 100 * k
        gpu.execution(10 * k, [("Stream #1", "dot", at, at + 80), ("Stream #2", "tail", at + 80, at + 130)])
    found = profile(gpu)
    assert walls(found) == [(0, 130, 0), (1, 100, 0), (2, 100, 0), (3, 100, 0)]
    assert {o.name: o.count for o in found.operations} == {"dot": 1, "tail": 1}


def test_a_numbered_step_that_the_trace_cuts_is_left_out():
    gpu = Gpu()
    for k in range(4):
        gpu.execution(100 * k, moved(STEP[: 3 if k < 3 else 1], 1000 + 100 * k))
        gpu.step(k, 100 * k - 1, 100 * k + 50)
    found = profile(gpu)
    assert [step.step for step in found.steps] == [0, 1, 2]
    assert "steps that the trace cuts are left out: gpu:0 3" in found.notes


def test_what_holds_for_some_processes_alone_is_said_of_them():
    def traced(steps, ran=True):
        gpu = Gpu()
        for k in range(steps):
            gpu.step(k, 10 * k - 1, 10 * k + 9)
            if ran:
                gpu.execution(10 * k, moved(STEP, 200 * k))
        return trace_of_planes(gpu.planes())

    notes = analyse({0: traced(3), 1: traced(2), 2: traced(3, ran=False)}, None).notes
    assert "not every process has all 3 steps: process 1 2" in notes
    assert "process 2: no operations on gpu:0" in notes
    assert not any("no steps" in note for note in notes)


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "reduce_scatter"),
        ("ncclSymkDevKernel_AllReduce_AGxLL_R_bf16", "all_reduce"),
        ("ncclSymDevKernel_AllGather_LL", "all_gather"),
        ("ncclDevKernel_Generic_4(ncclDevKernelArgsStorage<4096ul>)", "collective"),
        ("void stream_executor::gpu::AllReduceKernelImpl<float>", "all_reduce"),
        ("void rcclGenericKernel<1, false>(ncclDevKernelArgsStorage<4096ul>)", "collective"),
        ("mscclKernel_Sum_float_Simple(ncclDevComm*)", "collective"),
        ("ncclDevKernel_Generic_2(ncclDevKernelArgsStorage<4096ul>)", "collective"),
        ("ncclKernel_SendRecv_RING_SIMPLE_Sum_int8_t(ncclDevComm*)", "send_recv"),
    ],
)
def test_collectives_in_command_buffers_are_told_by_their_kernels(kernel, kind):
    gpu = Gpu()
    for k in range(2):
        (graph,) = gpu.execution(10 * k, [("Stream #1", "command_buffer", 100 * k, 100 * k + 20)])
        named = {"kernel": kernel, "correlation": graph, "module": "jit_step"}
        gpu.kernel(0, "Stream #1", "command_buffer", 100 * k + 20, 100 * k + 50, **named)
    (collective,) = profile(gpu).steps[0].collectives
    assert (collective.kind, round(collective.exposed_seconds * 1e9)) == (kind, 30)
