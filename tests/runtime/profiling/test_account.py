"""The arithmetic of overlap on hand-made events: every moment counted once."""

import pytest
from meshwright.runtime.profiling.account import account
from meshwright.runtime.profiling.events import HostSpan, OpEvent
from meshwright.runtime.profiling.steps import StepWindow


def op(name, start, end, line="core", role="run"):
    return OpEvent(
        device="tpu:0", line=line, op=name, module="jit_step", run=1, start_ns=start, end_ns=end, role=role
    )


def ledger_of(*events, window=(0, 100), waits=()):
    return account(
        sorted(events, key=lambda event: event.start_ns),
        StepWindow(step=0, start_ns=window[0], end_ns=window[1]),
        [HostSpan(start_ns=start, end_ns=end) for start, end in waits],
        lambda event: ("all_gather", "fsdp") if event.op.startswith("all-gather") else None,
        lambda event: event.op.startswith("while"),
    )


def total(ledger):
    return ledger.compute_ns + sum(ledger.exposed_ns.values()) + ledger.data_wait_ns + ledger.idle_ns


def test_a_loop_that_holds_operations_is_counted_for_its_own_time_alone():
    ledger = ledger_of(
        op("while.1", 10, 90), op("fusion.1", 10, 40), op("all-gather.1", 40, 60), op("fusion.2", 65, 90)
    )
    assert ledger.op_ns == {"fusion.1": 30, "all-gather.1": 20, "fusion.2": 25, "while.1": 5}
    assert (ledger.compute_ns, ledger.idle_ns, total(ledger)) == (60, 20, 100)


def test_an_operation_that_holds_others_without_being_a_loop_is_counted_for_its_own_time_alone():
    ledger = ledger_of(op("custom", 0, 100), op("inner", 20, 50))
    assert ledger.op_ns == {"custom": 70, "inner": 30}


def test_the_end_of_a_loop_and_its_last_operation_at_one_moment_is_still_nesting():
    ledger = ledger_of(op("outer", 0, 100), op("middle", 0, 100), op("inner", 0, 100))
    assert ledger.op_ns == {"inner": 100}


def test_communication_beside_computation_is_overlapped_and_the_rest_exposed():
    ledger = ledger_of(
        op("all-gather-start", 0, 2),
        op("all-gather-start", 0, 70, line="async", role="flight"),
        op("fusion.1", 2, 50),
        op("all-gather-done", 50, 70),
        op("fusion.2", 70, 100),
    )
    assert ledger.overlapped_ns == {("all_gather", "fsdp"): 48}
    assert ledger.exposed_ns == {("all_gather", "fsdp"): 22}
    assert ledger.collective_counts == {("all_gather", "fsdp"): 1}
    assert (ledger.compute_ns, ledger.idle_ns) == (78, 0)


def test_a_gpu_collective_on_its_own_stream_overlaps_the_kernels_of_the_other():
    ledger = ledger_of(
        op("gemm", 0, 60, line="Stream #1"),
        op("all-gather-start.1", 40, 90, line="Stream #2"),
    )
    assert ledger.exposed_ns == {("all_gather", "fsdp"): 30}
    assert ledger.overlapped_ns == {("all_gather", "fsdp"): 20}
    assert (ledger.compute_ns, ledger.idle_ns) == (60, 10)


def test_an_asynchronous_copy_is_neither_work_nor_communication():
    ledger = ledger_of(op("copy-start.1", 0, 100, line="async", role="flight"), op("fusion", 0, 30))
    assert (ledger.compute_ns, ledger.idle_ns) == (30, 70)


def test_operations_at_once_share_the_moment():
    ledger = ledger_of(op("a", 0, 60, line="1"), op("b", 20, 60, line="2"))
    assert ledger.op_ns == {"a": 40, "b": 20}
    assert ledger.compute_ns == 60


def test_a_wait_for_data_counts_only_where_the_device_waits_too():
    ledger = ledger_of(op("fusion", 0, 40), op("fusion", 70, 90), waits=[(20, 60), (95, 200)])
    assert (ledger.data_wait_ns, ledger.idle_ns, ledger.compute_ns) == (25, 15, 60)


def test_what_lies_outside_of_the_step_does_not_count():
    ledger = ledger_of(op("before", -50, 10), op("after", 95, 130), op("later", 200, 300))
    assert ledger.op_ns == {"before": 10, "after": 5}
    assert ledger.op_counts == {"after": 1}
    assert total(ledger) == pytest.approx(100)


def test_an_empty_step_is_idle():
    assert ledger_of().idle_ns == 100
