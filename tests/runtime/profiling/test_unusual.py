"""Traces as other programs leave them: several threads, clocks, copy engines, TPU slices, lost launches."""

import pytest
from meshwright.runtime.profiling.analyse import analyse
from meshwright.runtime.profiling.xplane import trace_of_planes
from meshwright.sharding import UserError

from .planes import Gpu, event, plane

STEP = [("Stream #1", "dot", 0, 60), ("Stream #1", "norm", 60, 70), ("Stream #2", "all-reduce-start", 40, 90)]


def moved(by):
    return [(stream, op, start + by, end + by) for stream, op, start, end in STEP]


def profile(gpu):
    return analyse({0: trace_of_planes(gpu.planes())}, None)


def walls(found):
    return [(step.step, round(step.wall_seconds * 1e9)) for step in found.steps]


def said(found):
    return " ".join(found.notes)


@pytest.mark.parametrize("numbered", [True, False])
def test_what_the_hosts_cpu_computed_beside_the_devices_is_no_device(numbered):
    gpu = Gpu()
    for k in range(3):
        gpu.execution(1000 * k, moved(1000 * k + 100))
        stats = {"hlo_module": "jit_augment", "program_id": 9, "device_ordinal": 0, "run_id": 77 + k}
        made = event("add", 1000 * k - 300, 1000 * k - 100, hlo_op="add", **stats)
        gpu.host.setdefault("tf_XLAEigen", []).append(made)
        if numbered:
            gpu.step(k, 1000 * k - 1, 1000 * k + 30)
    found = profile(gpu)
    assert (found.platform, found.module, found.devices) == ("gpu", "jit_step", ("gpu:0",))
    assert "what the host's CPU computed beside the devices is left out: jit_augment" in found.notes
    assert not any("simulated" in note or "not every" in note for note in found.notes)


def test_numbers_that_come_again_are_steps_of_their_own():
    gpu = Gpu()
    for k in range(6):
        gpu.execution(1000 * k, moved(1000 * k + 100))
        gpu.step(k % 3, 1000 * k - 1, 1000 * k + 40)
    found = profile(gpu)
    assert [step.step for step in found.by_step()] == list(range(6))
    assert "numbers of steps, 0 to 2, come again: steps are counted from 0" in said(found)


def test_a_step_that_several_threads_number_is_one():
    mods = [event("jit_step(1)", 1000 * k, 1000 * k + 900, run_id=k) for k in range(3)]
    ops = [event("%fusion.1 = f32[] fusion()", 1000 * k, 1000 * k + 900) for k in range(3)]
    threads = [
        (
            f"thread {n}",
            [event("train", 1000 * k - 20 + n, 1000 * k + 40, step_num=7 + k) for k in range(3)],
        )
        for n in range(2)
    ]
    tpu = plane("/device:TPU:0", [("XLA Modules", mods), ("XLA Ops", ops)])
    found = analyse({0: trace_of_planes([tpu, plane("/host:CPU", threads)])}, None)
    assert walls(found) == [(7, 920), (8, 1000), (9, 1000)]


def test_programs_that_a_thread_launches_when_the_loop_is_further_on_are_of_their_own_steps():
    gpu = Gpu()
    for k, (start, end) in enumerate([(0, 10), (10, 20), (20, 900)]):
        gpu.step(k, start, end)
    for at in (5, 300, 600):
        gpu.execution(at, moved(at + 10), thread="pool")
    found = profile(gpu)
    assert walls(found) == [(0, 105), (1, 295), (2, 300)]
    assert {o.name: o.count for o in found.operations}["dot"] == 1


def test_a_line_of_steps_on_some_devices_alone_is_said():
    ran = [event("k", at, at + 10, correlation_id=at) for at in (0, 20, 100, 120)]
    steps = [event("4", 0, 30), event("5", 100, 130)]
    planes = [
        plane("/device:GPU:0", [("Stream #1", ran), ("Steps", steps)]),
        plane("/device:GPU:1", [("Stream #1", ran)]),
    ]
    found = analyse({0: trace_of_planes(planes)}, None)
    assert "not every device has all 2 steps: gpu:1 0" in found.notes


def test_a_collective_by_copy_engines_is_one():
    gpu = Gpu()
    for k in range(3):
        at = 1000 * k
        permute = ("Stream #2", "collective-permute-start.1", at + 50, at + 90)
        gpu.execution(at, [("Stream #1", "dot", at, at + 50), permute])
        gpu.streams[0]["Stream #2"][-1].name = "MemcpyP2P"
    found = profile(gpu)
    (permute,) = found.steps[0].collectives
    assert (permute.kind, permute.count, round(permute.exposed_seconds * 1e9)) == (
        "collective_permute",
        1,
        40,
    )
    assert found.placed == (6, 6)


def test_sends_between_tpu_slices_are_the_collective_that_they_carry_out():
    attributes = (
        'is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",'
        '_xla_megascale_transfer_type="ALL_REDUCE"}'
    )
    parts = [("send.5", 0, 2), ("recv.5", 2, 4), ("fusion.1", 4, 40), ("recv-done.5", 40, 70)]
    parts += [("send-done.5", 70, 75), ("copy-done.2", 75, 90), ("recv-done.9", 90, 100)]
    mods, ops = [], []
    for k in range(3):
        mods.append(event("jit_step(5)", 1000 * k, 1000 * k + 100, run_id=k))
        for op, start, end in parts:
            text = f"%{op} = f32[8] {op.partition('.')[0]}(%a), {attributes if op.endswith('5') else ''}"
            ops.append(event(text, 1000 * k + start, 1000 * k + end))
    tpu = plane("/device:TPU:0", [("XLA Modules", mods), ("XLA Ops", ops)])
    first = analyse({0: trace_of_planes([tpu])}, None).steps[0]
    (reduction,) = first.collectives
    assert (reduction.kind, reduction.axes, reduction.count) == ("all_reduce", "between slices", 1)
    assert round(reduction.exposed_seconds * 1e9) == 39
    # What the program receives from its host is a copy.
    assert (round(first.compute_seconds * 1e9), round(first.copy_seconds * 1e9)) == (36, 25)


@pytest.mark.parametrize(("skew", "first"), [(100_000_000, 90), (-50_000, 90)], ids=["ahead", "behind"])
def test_a_devices_clock_that_is_another_one_lengthens_no_step(skew, first):
    gpu = Gpu()
    for k in range(3):
        at = 1_000_000 + 1000 * k
        gpu.execution(at, moved(at + 100 + skew))
        gpu.step(k, at - 1, at + 40)
    found = profile(gpu)
    assert walls(found) == [(0, first), (1, 1000), (2, 1000)]
    late = "long after its launch (gpu:0 100 ms): clocks of host and device differ"
    assert (late in said(found)) == (skew > 0)


def test_operations_whose_launches_are_lost_are_counted():
    gpu = Gpu()
    for k in range(4):
        ops = [("Stream #1", f"dot.{n}", 1000 * k + 10 * n, 1000 * k + 10 * n + 8) for n in range(8)]
        gpu.execution(1000 * k, ops)
    launches = gpu.host["Host Threads/python"]
    gpu.host["Host Threads/python"] = launches[:8] + launches[12:]
    found = profile(gpu)
    assert found.placed == (28, 32)
    assert "4 operations of jit_step are of no known execution" in said(found)


def test_executions_that_the_host_does_not_name_are_those_of_the_kernels_launched_in_them():
    gpu = Gpu()
    for k in range(3):
        gpu.execution(1000 * k, moved(1000 * k + 100))
    for span in gpu.host["python"]:
        span.stats = []
    found = profile(gpu)
    assert walls(found) == [(0, 90), (1, 90), (2, 90)]
    assert not any("incomplete" in note or "launches" in note for note in found.notes)


def test_numbered_steps_of_another_program_are_said_beside_the_means():
    gpu = Gpu()
    for k in range(6):
        module, program = ("jit_eval", "2") if k in (2, 5) else ("jit_step", "1")
        gpu.execution(1000 * k, moved(1000 * k + 100), module=module, program=program)
        gpu.step(10 + k, 1000 * k - 1, 1000 * k + 40)
    assert "steps without jit_step, which count in the means: 12, 15" in profile(gpu).notes


def test_a_step_after_one_that_a_device_lacks_is_no_longer_for_it():
    gpu = Gpu(devices=2)
    for k in range(4):
        for device in range(2):
            if (device, k) != (1, 2):
                thread = f"thread {device}"
                gpu.execution(1000 * k, moved(1000 * k + 100), device=device, thread=thread, ordinal=device)
        gpu.step(k, 1000 * k - 1, 1000 * k + 30)
    found = profile(gpu)
    wall = {(step.step, step.device): round(step.wall_seconds * 1e9) for step in found.steps}
    assert (wall[3, "gpu:0"], wall[3, "gpu:1"]) == (1000, 191)
    assert "not every device has all 4 steps: gpu:1 3" in found.notes


def tpu(*, ops=(("%fusion.1 = f32[] fusion()", 0, 900),), at=0, steps=()):
    """Return a TPU's plane of three executions, a microsecond apart from `at` on."""
    begins = [at + 1000 * k for k in range(3)]
    mods = [event("jit_step(5)", begin, begin + 900, run_id=k) for k, begin in enumerate(begins)]
    ran = [event(op, begin + start, begin + end) for begin in begins for op, start, end in ops]
    return plane("/device:TPU:0", [("XLA Modules", mods), ("XLA Ops", ran), ("Steps", steps)])


def test_several_processes_in_one_file_are_refused():
    planes = [tpu(), tpu(at=50), plane("/host:CPU")]
    with pytest.raises(UserError, match=r"holds 2 planes of /device:TPU:0.*several processes"):
        trace_of_planes(planes)
    # A second plane of a device that ran nothing there says nothing.
    assert trace_of_planes([tpu(), plane("/device:TPU:0")]).devices == ("tpu:0", "tpu:0")


def test_steps_that_hold_numbered_microbatches_are_the_outer_ones():
    gpu = Gpu()
    for k in range(3):
        gpu.step(k, 1000 * k - 1, 1000 * k + 900)
        for part in range(2):
            at = 1000 * k + 300 * part
            gpu.step(part, at, at + 200)
            gpu.execution(at + 5, moved(at + 100))
    found = profile(gpu)
    assert walls(found) == [(0, 491), (1, 1000), (2, 1000)]
    assert {o.name: o.count for o in found.operations}["dot"] == 2
    assert "4 spans that the host numbered inside of others" in said(found)


@pytest.mark.parametrize("wrong", [(600, 550), (600, 10**9)], ids=["ends before it begins", "lasts a second"])
def test_operations_of_a_tpu_with_times_that_cannot_be_are_left_out_and_counted(wrong):
    ops = [("%fusion.1 = f32[] fusion()", 0, 500), ("%fusion.2 = f32[] fusion()", *wrong)]
    found = analyse({0: trace_of_planes([tpu(ops=[*ops, ("%fusion.3 = f32[] fusion()", 600, 900)])])}, None)
    assert walls(found) == [(0, 900), (1, 900), (2, 900)]
    assert "3 operations on tpu:0 have times that cannot be, and are left out" in found.notes


def test_a_tpus_clock_that_is_ahead_lengthens_no_step():
    spans = [event("train", 1000 * k - 50, 1000 * k + 100, step_num=k) for k in range(3)]
    host = plane("/host:CPU", [("loop", spans)])
    found = analyse({0: trace_of_planes([tpu(at=5_000_000_000), host])}, None)
    assert walls(found) == [(0, 900), (1, 1000), (2, 1000)]
    assert "long after its launch (tpu:0 5000 ms): clocks of host and device differ" in said(found)


def test_a_devices_numbers_of_steps_that_come_again_are_counted():
    steps = [event("1", 1000 * k, 1000 * k + 900) for k in range(3)]
    found = analyse({0: trace_of_planes([tpu(steps=steps)])}, None)
    assert walls(found) == [(0, 900), (1, 900), (2, 900)]
