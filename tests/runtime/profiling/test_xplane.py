"""The three platforms' traces, written by hand in each one's own convention, read into one kind of record."""

from types import SimpleNamespace

import pytest
from meshwright.runtime.profiling.executions import busiest_module, step_windows
from meshwright.runtime.profiling.xplane import read_xplane, trace_of_planes
from meshwright.sharding.errors import UserError


def event(name, start, end, **stats):
    return SimpleNamespace(name=name, start_ns=start, duration_ns=end - start, stats=list(stats.items()))


def plane(name, **lines):
    made = [SimpleNamespace(name=line.replace("_", " "), events=events) for line, events in lines.items()]
    return SimpleNamespace(name=name, lines=made)


HOST = plane(
    "/host:CPU",
    python=[
        event("train_step", 0, 20, step_num=7),
        event("data_wait", 1, 5),
        event("train_step", 20, 30, step_num=8),
        event("ThreadpoolListener::Record", 0, 0),
    ],
)


def test_a_tpu_names_operations_by_their_text_and_executions_on_their_own_line():
    device = plane(
        "/device:TPU:0",
        XLA_Modules=[event("jit_step(123)", 10, 50, run_id=4), event("jit_step(123)", 55, 90, run_id=5)],
        XLA_Ops=[
            event("%fusion.1 = bf16[8]{0} fusion(%p), kind=kLoop", 10, 40),
            event("%all-gather-done = f32[8] all-gather-done(%s)", 40, 50),
            event("%fusion.1 = bf16[8]{0} fusion(%p), kind=kLoop", 55, 90),
        ],
        Async_XLA_Ops=[event("%all-gather-start = f32[8] all-gather-start(%p)", 12, 50)],
        Steps=[event("7", 0, 100)],
    )
    trace = trace_of_planes([HOST, device, plane("/device:TPU:0 SparseCore 0", XLA_Ops=[event("x", 0, 9)])])
    assert [(e.op, e.module, e.run, e.role) for e in trace.events] == [
        ("fusion.1", "jit_step", 4, "run"),
        ("all-gather-start", "jit_step", 4, "flight"),
        ("all-gather-done", "jit_step", 4, "run"),
        ("fusion.1", "jit_step", 5, "run"),
    ]
    assert {e.device for e in trace.events} == {"tpu:0"}
    assert trace.notes == ("what SparseCores did beside the devices is left out (1 of them)",)
    windows = step_windows(trace.events, "jit_step", trace.steps)
    assert [(w.step, w.start_ns, w.end_ns) for w in windows] == [(7, 0, 50), (8, 50, 90)]


def test_a_gpu_runs_kernels_on_streams_and_its_steps_are_told_by_what_runs_once_in_each():
    def kernel(op, start, end, module="jit_step"):
        return event(f"kernel_{op}", start, end, hlo_op=op, hlo_module=module, correlation_id=start)

    device = plane(
        "/device:GPU:1",
        **{
            "Stream #13(Compute)": [
                kernel("loop_fusion", 12, 20),
                kernel("loop_fusion", 20, 30),
                kernel("norm", 10, 12),
                kernel("norm", 50, 55),
                kernel("loop_fusion", 55, 60),
                kernel("loop_fusion", 60, 70),
                event("MemcpyH2D", 30, 45),
            ],
            "Stream #20(Collective)": [
                kernel("all-reduce-start", 31, 40),
                kernel("all-reduce-start", 71, 80),
            ],
            "XLA Ops": [event("derived", 0, 100)],
        },
    )
    trace = trace_of_planes([HOST, device])
    assert all(e.run is None and e.device == "gpu:1" for e in trace.events)
    assert [e.op for e in trace.events if e.copy] == ["MemcpyH2D"]
    assert busiest_module(trace.events) == "jit_step"
    windows = step_windows(trace.events, "jit_step", trace.steps)
    assert [(w.step, w.start_ns, w.end_ns) for w in windows] == [(7, 0, 40), (8, 40, 80)]


def test_a_cpu_operation_that_finishes_elsewhere_lasts_until_the_next_one_begins():
    def thunk(op, start, end, flow):
        return event(op, start, end, hlo_op=op, hlo_module="jit_step", device_ordinal=3, run_id=-9, _p=flow)

    host = plane(
        "/host:CPU",
        **{
            "tf_XLAExecute/1": [
                thunk("dot.1", 10, 12, 70),
                event("end: dot.1", 90, 91, _c=70),
                thunk("copy.1", 5, 6, 71),
                event("end: copy.1", 5, 5, _c=71),
            ],
            "tf_XLAEigen/2": [thunk("add.1", 40, 50, 72)],
        },
    )
    trace = trace_of_planes([host])
    assert [(e.op, e.start_ns, e.end_ns, e.role) for e in trace.events] == [
        ("copy.1", 5, 6, "run"),
        ("dot.1", 10, 12, "run"),
        ("dot.1", 12, 40, "rest"),
        ("add.1", 40, 50, "run"),
    ]
    assert {(e.device, e.run) for e in trace.events} == {("cpu:3", -9)}


def test_steps_and_waits_come_from_the_host():
    trace = trace_of_planes([HOST])
    assert [(s.step, s.start_ns, s.end_ns) for s in trace.steps] == [(7, 0, 20), (8, 20, 30)]
    assert [(w.start_ns, w.end_ns) for w in trace.waits] == [(1, 5)]


def test_executions_that_do_not_divide_among_the_steps_are_an_error():
    device = plane(
        "/device:TPU:0",
        XLA_Modules=[event("jit_step", k, k + 1, run_id=k) for k in (1, 3, 5)],
        XLA_Ops=[event("%a = f32[] add()", k, k + 1) for k in (1, 3, 5)],
    )
    trace = trace_of_planes([HOST, device])
    with pytest.raises(ValueError, match="3 executions of 'jit_step' do not divide among 2 steps"):
        step_windows(trace.events, "jit_step", trace.steps)


@pytest.mark.parametrize(("content", "wanted"), [(b"", "is empty"), (b"nonsense" * 9, "is damaged")])
def test_a_damaged_trace_is_named(tmp_path, content, wanted):
    (tmp_path / "host_0.xplane.pb").write_bytes(content)
    with pytest.raises(UserError, match=wanted):
        read_xplane(tmp_path / "host_0.xplane.pb")
